"""Integer arithmetic with a calculator (paper section 4.4, appendix E).

X "Question: 6 - 0 - 4 = ? Answer:", Z " 6 - 0 = 6, 6 - 4 = 2" where the calculator writes the results, Y ". The answer
is 2.", whose first token ends Z. The reward sees three demonstrations before the question; the policy does not.
"""

from collections import Counter
from collections.abc import Sequence
import re
from typing import Any

import numpy as np

from gfn_jax import tools
from gfn_jax.datasets import arithmetic, expressions
from gfn_jax.task import Task
from gfn_jax.types import Example

ALLOWED_CHARACTERS = frozenset("0123456789+-=,. ")  # "we limit the model to generate only numbers and operators"
_RESULT = re.compile(r" *(-?[0-9]+)")


def to_example(record: dict) -> Example:
  """A data set's record as text."""
  return Example(
    prompt=record["prompt"],
    rationale=record["rationale"] or None,
    target=expressions.answer_text(record["answer"]),
    answer=str(record["answer"]),
  )


def parse_answer(rationale: str) -> str | None:
  """The number after the last "=" of Z; None where there is none, which is never right."""
  if "=" not in rationale:
    return None
  match = _RESULT.match(rationale.rpartition("=")[2])
  return None if match is None else str(int(match.group(1)))


def majority(answers: Sequence[str | None]) -> str | None:
  """The most frequent answer among those that parse, the first reached among equals; None if none parses."""
  counts = Counter(a for a in answers if a is not None)
  return counts.most_common(1)[0][0] if counts else None


class ArithTask(Task):
  """Integer arithmetic; its tool is the calculator."""

  name = "arith"
  reads_test_path = True

  def __init__(self, config: Any, tokenizer: Any, vocab_size: int):
    """`config` is the run's. Raises ValueError for data or a tokenizer that cannot serve."""
    super().__init__(tokenizer, vocab_size, config.model.name)
    self._data = config.data
    self._builder_config = arithmetic.make_config(config.data.seed, config.data.path)
    self.tool = tools.Calculator(self.encode, self.decode, vocab_size)
    demonstrations = [to_example(r) for r in self._load("demonstrations")]
    for e in demonstrations:
      if e.rationale is None:
        raise ValueError(f"the demonstration {e.prompt!r} has no rationale")
    self.demonstrations = demonstrations
    seeded = config.data.num_seed_rationales
    if seeded > len(demonstrations):
      raise ValueError(f"config.data.num_seed_rationales {seeded}: the data has {len(demonstrations)}")
    # A query whose demonstration does not seed the buffer is still a query.
    unseeded = [Example(e.prompt, None, e.target, e.answer) for e in demonstrations[seeded:]]
    unseeded += [Example(e.prompt, None, e.target, e.answer) for e in map(to_example, self._load("train"))]
    self.examples, self.num_seeded = demonstrations[:seeded] + unseeded, seeded
    self.stop_token_id = self.stop_of_targets(config.sampler.stop_at_eos)
    self.allowed_tokens = np.array(
      [bool(s) and set(s) <= ALLOWED_CHARACTERS for s in (self.decode([i]) for i in range(vocab_size))]
    )
    self.allowed_tokens[[*self.tool.result_tokens, self.stop_token_id]] = True

  def _load(self, split: str) -> list[dict]:
    return arithmetic.load(self._builder_config, split, self._data.dir)

  def _written(self, rationale: str) -> str:
    return f" {expressions.without_results(rationale)}"

  def context_tokens(self, num_demonstrations: int, seed: int | None = None) -> list[int]:
    """Demonstrations with their results written out, a line each, as they stand before a question."""
    shown = self.shown(num_demonstrations, seed)
    lines = self.encode("".join(f"{e.prompt} {e.rationale}{e.target}\n" for e in shown))
    return [*self.start_tokens, *lines] if shown else []

  def example_of(self, prompt: str) -> Example:
    """A question that a user asks, solved. Raises ValueError for a prompt that is no question."""
    if not expressions.is_question(prompt):
      form = expressions.question("6 - 0 - 4")
      raise ValueError(f"prompt {prompt!r} is no question of the arith task: it must read as {form!r}")
    _, answer = expressions.solve(expressions.expression_of(prompt))
    return to_example({"prompt": prompt, "rationale": "", "answer": answer})

  def is_right(self, example: Example, tokens: Sequence[int]) -> bool:
    """Whether one Z gives the example's answer."""
    return parse_answer(self.decode(tokens)) == example.answer

  def predict(self, samples: Sequence[Sequence[int]]) -> str | None:
    """The answer that most of a question's samples give."""
    return majority([parse_answer(self.decode(s)) for s in samples])

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    """`number` held-out problems for each number of operands."""
    return {
      str(k): [to_example(r) for r in self._load(f"validation_{k}")[:number]] for k in arithmetic.EVALUATED_OPERANDS
    }

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    """`number` test problems for each number of operands, or all of config.data.test_path."""
    if self._data.test_path is None:
      return {str(k): [to_example(r) for r in self._load(f"test_{k}")[:number]] for k in arithmetic.EVALUATED_OPERANDS}
    kinds: dict[str, list[Example]] = {}
    for record in arithmetic.read_records(self._data.test_path):
      kinds.setdefault(str(expressions.num_operands(record["prompt"])), []).append(to_example(record))
    return dict(sorted(kinds.items()))
