"""Integer expressions, their step-by-step solutions, and the hash that keeps test expressions out of all else.

The paper's arithmetic problems: operands 0-9, + and - (section 4.4, Table E.1). Nothing here needs a data set library.
"""

import hashlib
import re

import numpy as np

from gfn_jax.tools import calculate

TEST_PERCENT, VALIDATION_PERCENT = 15, 5


def split_of(expression: str) -> str:
  """ "test", "validation" or "train", decided by a hash of "6 - 0 - 4" alone."""
  bucket = int.from_bytes(hashlib.blake2b(expression.encode(), digest_size=8).digest(), "big") % 100
  if bucket < TEST_PERCENT:
    return "test"
  return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"


def holds_held_out(expression: str) -> bool:
  """Whether some part of `expression` with three operands or more belongs to test or validation."""
  parts = expression.split(" ")
  starts = range(0, len(parts), 2)
  return any(split_of(" ".join(parts[i : j + 1])) != "train" for i in starts for j in range(i + 4, len(parts), 2))


def random_expression(rng: np.random.Generator, num_operands: int) -> str:
  """Uniform operands 0-9 and operators."""
  operands = rng.integers(0, 10, num_operands)
  operators = rng.integers(0, 2, num_operands - 1)
  return str(operands[0]) + "".join(f" {'+-'[o]} {n}" for o, n in zip(operators, operands[1:]))


def expression_for(rng: np.random.Generator, num_operands: int, split: str) -> str:
  """A random expression of a split. Those of "train" hold no test or validation expression as a part."""
  while True:
    expression = random_expression(rng, num_operands)
    if split == "train" and not holds_held_out(expression):
      return expression
    if split != "train" and split_of(expression) == split:
      return expression


def solve(expression: str) -> tuple[str, int]:
  """The steps "6 - 0 = 6, 6 - 4 = 2" and the answer 2."""
  parts = expression.split(" ")
  steps, value = [], parts[0]
  for operator, operand in zip(parts[1::2], parts[2::2]):
    result = calculate(f"{value} {operator} {operand}")
    steps.append(f"{value} {operator} {operand} = {result}")
    value = result
  return ", ".join(steps), int(value)


def question(expression: str) -> str:
  """X as the policy sees it (paper, Table E.1)."""
  return f"Question: {expression} = ? Answer:"


def answer_text(answer: int) -> str:
  """Y."""
  return f". The answer is {answer}."


def line(expression: str, rationale: str, answer: int) -> str:
  """X, Z and Y as one line of text."""
  return f"{question(expression)} {rationale}{answer_text(answer)}"


_QUESTION = re.compile(r"Question: (.*?) = \? Answer:")


def expression_of(prompt: str) -> str:
  """The expression that a question asks about; the whole text where it is no such question."""
  match = _QUESTION.search(prompt)
  return match.group(1) if match else prompt


_EXPRESSION = re.compile(r"-?[0-9]{1,9}( [+-] -?[0-9]{1,9})+")


def is_question(prompt: str) -> bool:
  """Whether a text is a question, and nothing but one, that `solve` can answer."""
  match = _QUESTION.fullmatch(prompt)
  return match is not None and _EXPRESSION.fullmatch(match.group(1)) is not None


def num_operands(prompt: str) -> int:
  """Operands of a question's expression."""
  return len(re.findall(r"\d+", expression_of(prompt)))


def without_results(rationale: str) -> str:
  """ "6 - 0 = 6, 6 - 4 = 2" -> "6 - 0 =, 6 - 4 =": what a policy with a calculator writes itself."""
  return re.sub(r"= -?\d+", "=", rationale)
