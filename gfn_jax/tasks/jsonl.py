"""A user's own records: X, Y and Z are templates over the fields of JSON lines (paper, section 3.1).

Policy and reward may read different prompts: in infilling the policy sees what comes after Z, and the reward does not.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from gfn_jax.datasets import json_lines, sources
from gfn_jax.named import load_named
from gfn_jax.task import Task
from gfn_jax.types import Example


@dataclasses.dataclass(frozen=True)
class Words:
  """log c(z): `penalty` nats off for each required word or phrase that z lacks, and each forbidden one that it has."""

  required: Sequence[str]
  forbidden: Sequence[str]
  penalty: float

  def __call__(self, example: Example, text: str) -> float:
    """log c in nats; words are compared in lower case."""
    del example
    has = lambda words: re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None  # noqa: E731
    return -self.penalty * (sum(not has(w) for w in self.required) + sum(map(has, self.forbidden)))


class JsonlTask(Task):
  """Templates over a user's records."""

  name = "jsonl"
  reads_test_path = True

  def __init__(self, config: Any, tokenizer: Any, vocab_size: int):
    """`config` is the run's. Raises ValueError for records, templates or a tokenizer that cannot serve."""
    super().__init__(tokenizer, vocab_size, config.model.name)
    self._settings, self._data = config.jsonl, config.data
    c = self._settings
    path, test_path = config.data.path, config.data.test_path
    if path is None:
      raise ValueError("config.data.path is missing: name a file of JSON lines")
    if (c.required_words or c.forbidden_words) and c.constraint is not None:
      raise ValueError("config.jsonl.constraint is a function of its own: it takes the place of the lists of words")
    made = self._read(path)
    order = np.random.default_rng(config.data.seed).permutation(len(made))
    num_held_out = max(1 if test_path else 2, round(c.held_out_share * len(made)))
    if len(made) <= num_held_out:
      raise ValueError(f"{path} has {len(made)} records and {num_held_out} are held out: add records")
    held_out, kept = ([made[i] for i in ids] for ids in np.split(order, [num_held_out]))
    self._validation, self._test = held_out[0::2], held_out[1::2]
    if test_path:
      self._validation, self._test = held_out, self._read(test_path)
    self.demonstrations = [e for e in kept if e.rationale is not None]
    if c.rationale is not None and not any(e.rationale is not None for e in made):
      print(f"config.jsonl.rationale {c.rationale!r}: no record of {path} has its fields, so none is a demonstration")
    self.num_seeded = len(self.demonstrations)
    self.examples = self.demonstrations + [e for e in kept if e.rationale is None]
    self.stop_token_id = self.stop_of_targets(config.sampler.stop_at_eos) if made[0].target else self.find_stop(c.stop)
    if c.allowed_characters is not None:
      allowed, texts = set(c.allowed_characters), (self.decode([i]) for i in range(vocab_size))
      self.allowed_tokens = np.array([bool(text) and set(text) <= allowed for text in texts])
      self.allowed_tokens[self.stop_token_id] = True
    self._log_c = None
    if c.constraint is not None:
      self._log_c = load_named(c.constraint)
    elif c.required_words or c.forbidden_words:
      self._log_c = Words(tuple(c.required_words), tuple(c.forbidden_words), c.penalty)
    self.log_constraint = None if self._log_c is None else self._constrain

  def _read(self, path: str) -> list[Example]:
    examples = []
    file = sources.embedded("records.jsonl") if path == "embedded" else path
    for i, record in enumerate(json_lines.read(file, ()), 1):
      try:
        examples.append(self._example(record))
      except ValueError as e:
        raise ValueError(f"{path}, record {i}: {e}") from None
    return examples

  def _example(self, record: dict) -> Example:
    c = self._settings
    fill = lambda template: json_lines.render(template, record)  # noqa: E731
    shown = c.rationale is not None and all(record.get(f) is not None for f in json_lines.template_fields(c.rationale))
    return Example(
      prompt=fill(c.prompt),
      rationale=fill(c.rationale) if shown else None,
      target=fill(c.target),
      answer="" if c.answer is None else fill(c.answer),
      reward_prompt=None if c.reward_prompt is None else fill(c.reward_prompt),
    )

  def _written(self, rationale: str) -> str:
    return rationale  # a template says itself where its spaces are

  def _constrain(self, example: Example, tokens: list[int]) -> float:
    found = self._log_c(example, self.decode(tokens))
    try:
      log_c = float(found)
    except (TypeError, ValueError):
      log_c = math.nan
    if not math.isfinite(log_c):
      raise ValueError(f"config.jsonl.constraint {self._settings.constraint!r} gave {found!r}: must be finite nats")
    return log_c

  def context_tokens(self, num_demonstrations: int, seed: int | None = None) -> list[int]:
    """Records that have a Z, whole, a line each."""
    shown = self.shown(num_demonstrations, seed)
    lines = self.encode("".join(f"{e.rewarded_prompt}{e.rationale}{e.target}\n" for e in shown))
    return [*self.start_tokens, *lines] if shown else []

  def example_of(self, prompt: str) -> Example:
    """The example that a user's prompt makes; where the config names an answer, this one's is not known."""
    return Example(prompt, rationale=None, target="", answer=None if self._settings.answer is not None else "")

  def is_right(self, example: Example, tokens: Sequence[int]) -> bool | None:
    """Whether Z reads as the answer, or keeps the constraint; None where the config names neither."""
    if self._settings.answer is not None:
      return None if example.answer is None else self.decode(tokens).strip() == example.answer.strip()
    return None if self._log_c is None else self._constrain(example, tokens) >= 0

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    return {"": self._validation[:number]}

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    """`number` of the records held out, or all of config.data.test_path."""
    return {"": self._test[:number] if self._data.test_path is None else self._test}
