"""The kinds of error of wrong rationales: the paper's examples of Table E.5, and cases made by hand."""

import pytest

from gfn_jax.datasets.expressions import question, solve
from gfn_jax.report.mistakes import (
  MISSING_OPERAND,
  OTHER,
  WRONG_OPERAND,
  WRONG_OPERATOR,
  kind_of_mistake,
  steps_of,
)

CASES = {
  "paper: 9 is left out": ("7 + 3 + 4 - 9 + 9", "7 + 3 = 10, 10 - 9 = 1, 1 + 4 = 5", MISSING_OPERAND),
  "paper: 4 in place of 5": (
    "8 + 5 - 1 - 4 + 5", "8 + 5 = 13, 13 - 1 = 12, 12 + 4 = 16, 16 - 4 = 12", WRONG_OPERAND,
  ),
  "paper: + in place of -": ("0 + 5 - 6 - 1 - 6", "0 + 5 = 5, 5 - 6 = -1, -1 - 6 = -7, -7 + 1 = -6", WRONG_OPERATOR),
  "one step of two": ("6 - 0 - 4", "6 - 0 = 6", MISSING_OPERAND),
  "one step, and its operand is wrong too": ("6 - 0 - 4", "6 - 3 = 3", MISSING_OPERAND),
  "the last operand": ("6 - 0 - 4", " 6 - 0 = 6, 6 - 5 = 1", WRONG_OPERAND),
  "the first operand": ("6 - 0 - 4", "7 - 0 = 7, 7 - 4 = 3", WRONG_OPERAND),
  "an operand twice, another not at all": ("6 - 1 - 4", "6 - 4 = 2, 2 - 4 = -2", WRONG_OPERAND),
  "the result before is copied wrongly": ("6 - 4 + 1 + 7", "6 - 4 = 2, 2 + 1 = 3, 4 + 7 = 11", WRONG_OPERAND),
  "the last operator": ("6 - 0 - 4", "6 - 0 = 6, 6 + 4 = 10", WRONG_OPERATOR),
  "operands swapped about a minus": ("1 - 9 + 8", "9 - 1 = 8, 8 + 8 = 16", WRONG_OPERATOR),
  "operators swapped": ("5 - 2 + 3", "5 + 2 = 7, 7 - 3 = 4", WRONG_OPERATOR),
  "the question repeated": ("8 + 7 + 2 + 7", "8 + 7 + 2 + 7", OTHER),
  "nothing": ("8 + 7 + 2", "", OTHER),
  "cut short": ("8 + 7 + 2", "8 + 7 = 15, 15 +", OTHER),
  "no result": ("8 + 7 + 2", "8 + 7 = 15, 15 + 2 =", OTHER),
  "a wrong sum": ("8 + 7 + 2", "8 + 7 = 14, 14 + 2 = 16", OTHER),
  "a step too many": ("8 + 7 + 2", "8 + 7 = 15, 15 + 2 = 17, 17 + 2 = 19", OTHER),
  "another text for the question": ("what", "8 + 7 = 15", OTHER),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kinds(case):
  expression, rationale, kind = CASES[case]
  assert kind_of_mistake(question(expression), rationale) == kind


def test_a_right_rationale_has_no_kind_of_its_own():
  steps, _ = solve("6 - 0 - 4 + 9")
  assert len(steps_of(" " + steps)) == 3
  assert kind_of_mistake(question("6 - 0 - 4 + 9"), steps) == OTHER
  assert kind_of_mistake(question("6 - 0 - 4 + 9"), steps.replace("2 + 9 = 11", "2 - 9 = -7")) == WRONG_OPERATOR


def test_negative_numbers():
  assert steps_of("-8 + 8 = 0, 0 - -3 = 3") == [("-8", "+", "8", "0"), ("0", "-", "-3", "3")]
  assert kind_of_mistake(question("-8 + 8 - -3"), "-8 + 8 = 0, 0 - -4 = 4") == WRONG_OPERAND
