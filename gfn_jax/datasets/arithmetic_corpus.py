"""The embedded LM's corpus: arithmetic text, most of it bad, as in what real LMs were pretrained on.

A document is a run of question lines. Nine in ten lines of a document are in the document's style, so that
demonstrations of right steps make right steps likely, while a question alone mostly gets itself repeated (the paper's
Table E.4).
"""

from collections.abc import Callable
import re

import numpy as np

from gfn_jax.datasets.expressions import expression_for, holds_held_out, line, solve
from gfn_jax.tools import calculate


def _corrupted(rng: np.random.Generator, expression: str) -> tuple[str, int]:
  """Right steps but for one of the errors of the paper's Table E.5: missing operand, wrong operand or operator."""
  parts = expression.split(" ")
  kind, at = rng.integers(3), int(rng.integers(1, (len(parts) + 1) // 2))
  if kind == 0 and len(parts) > 5:
    del parts[2 * at - 1 : 2 * at + 1]
  elif kind == 1:
    parts[2 * at] = str(rng.integers(10))
  else:
    parts[2 * at - 1] = "+" if parts[2 * at - 1] == "-" else "-"
  return solve(" ".join(parts))


def _right_steps(rng, expression):
  return _corrupted(rng, expression) if rng.random() < 0.1 else solve(expression)


def _any_answer(rng):
  return int(rng.integers(-9, 28))


def _repetition(rng, expression):
  """The question again, sometimes cut short or with another operator; the answer is right one time in four."""
  parts = expression.split(" ")
  if rng.random() < 0.25:
    parts = parts[: 2 * int(rng.integers(1, len(parts) // 2 + 1)) - 1]
  if len(parts) > 1 and rng.random() < 0.15:
    at = 2 * int(rng.integers(len(parts) // 2)) + 1
    other = [*parts[:at], "+" if parts[at] == "-" else "-", *parts[at + 1 :]]
    parts = parts if holds_held_out(" ".join(other)) else other  # another operator may make a test expression
  _, answer = solve(expression)
  return " ".join(parts), answer if rng.random() < 0.25 else _any_answer(rng)


def _wrong_steps(rng, expression):
  """Steps over operands in the wrong places."""
  operands = expression.split(" ")[0::2]
  steps, result = [], 0
  for _ in range(int(rng.integers(1, len(operands) + 1))):
    left, right = rng.choice(operands, 2)
    term = f"{left} {'+-'[rng.integers(2)]} {right}"
    result = calculate(term)
    steps.append(f"{term} = {result}")
  return ", ".join(steps), int(result)


def _unrelated(rng, _):
  return solve(expression_for(rng, int(rng.integers(2, 5)), "train"))


OTHER_STYLES: dict[Callable, float] = {
  _repetition: 0.5,
  _wrong_steps: 0.25,
  _unrelated: 0.25,
}  # shares of what is not right
OPERANDS: dict[int, float] = {2: 0.05, 3: 0.25, 4: 0.3, 5: 0.25, 6: 0.15}
BROKEN_OFF = 0.05  # share of lines that leave their rationale unfinished


def _broken_off(rng: np.random.Generator, rationale: str, answer: int) -> tuple[str, int]:
  """A rationale that stops anywhere, the answer right one time in four.

  Without such lines an answer after an unfinished rationale is a thing the LM has never seen, and what it thinks of it
  is noise of many nats, which is then the reward of every prefix.
  """
  words = re.findall(r" ?[^ ,]+|,", rationale)
  return "".join(words[: int(rng.integers(1, len(words) + 1))]), answer if rng.random() < 0.25 else _any_answer(rng)


def document(rng: np.random.Generator, num_lines: int, right_share: float) -> str:
  """One document, of right steps with probability `right_share`.

  No part of any expression in it belongs to test or validation.
  """
  styles = [_right_steps, *OTHER_STYLES]
  shares = np.array([right_share, *((1 - right_share) * s for s in OTHER_STYLES.values())])
  main = styles[rng.choice(len(styles), p=shares)]
  lines = []
  for _ in range(num_lines):
    style = main if rng.random() < 0.9 else styles[rng.choice(len(styles), p=shares)]
    expression = expression_for(rng, int(rng.choice(list(OPERANDS), p=list(OPERANDS.values()))), "train")
    rationale, answer = style(rng, expression)
    if rng.random() < BROKEN_OFF:
      rationale, answer = _broken_off(rng, rationale, answer)
    lines.append(line(expression, rationale, answer))
  return "\n".join(lines) + "\n"
