"""What is wrong with a wrong rationale of the arithmetic task: the paper's three kinds (appendix E, Table E.5)."""

from collections import Counter
import itertools
import re

from gfn_jax.datasets.expressions import expression_of
from gfn_jax.tools import calculate

MISSING_OPERAND, WRONG_OPERAND, WRONG_OPERATOR, OTHER = KINDS = (
  "missing operand", "wrong operand", "wrong operator", "other",
)  # fmt: skip

_STEP = re.compile(r" *(-?[0-9]+) *([+-]) *(-?[0-9]+) *= *(-?[0-9]+) *")


def steps_of(rationale: str) -> list[tuple[str, str, str, str]] | None:
  """ "6 - 0 = 6, 6 - 4 = 2" -> [("6", "-", "0", "6"), ...]; None for text that is no list of right steps."""
  found = []
  for part in rationale.split(","):
    match = _STEP.fullmatch(part)
    if match is None or calculate(" ".join(match.groups()[:3])) != match[4]:
      return None
    found.append(match.groups())
  return found


def kind_of_mistake(prompt: str, rationale: str) -> str:
  """One of KINDS, for a rationale whose answer is wrong.

  A rationale with fewer steps than the question has operators misses an operand, whatever else it does. One with as
  many copies an operand wrongly where a step does not start from the result before it, or where the operands are not
  the question's, in any order; an operator, where the operands are the question's and their signs are not. Text that is
  no list of steps with their results, such as the question repeated, and a rationale with more steps are "other".
  """
  operators, operands = _terms(expression_of(prompt))
  steps = steps_of(rationale)
  if steps is None or len(steps) >= len(operands):
    return OTHER
  if len(steps) < len(operands) - 1:
    return MISSING_OPERAND
  chained = all(step[0] == before[3] for before, step in itertools.pairwise(steps))
  written = [steps[0][0], *(step[2] for step in steps)]
  if not chained or Counter(written) != Counter(operands):
    return WRONG_OPERAND
  signs = ["+", *(step[1] for step in steps)]
  if Counter(zip(signs, written)) != Counter(zip(operators, operands)):
    return WRONG_OPERATOR
  return OTHER


def _terms(expression: str) -> tuple[list[str], list[str]]:
  """ "6 - 0 + 4" -> (["+", "-", "+"], ["6", "0", "4"])."""
  parts = expression.split()
  return ["+", *parts[1::2]], parts[::2]
