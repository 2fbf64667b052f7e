"""Subjectivity with latent reasons (paper section 4.3, appendix D): is a movie review objective or subjective?

X 'Classify this movie review as objective or subjective: "..." This review is', Z " full of feeling", Y ", so it is
subjective.". The policy does not see Y. With config.method "sft" there is no Z between: the label itself is learned.
"""

import pathlib
from typing import Any

from gfn_jax.datasets import json_lines, subj
from gfn_jax.task import Task
from gfn_jax.types import Example

LABELS = ("objective", "subjective")
CONCLUSION = ", so it is"


def prompt_of(text: str) -> str:
  """X."""
  return f'Classify this movie review as objective or subjective: "{text}" This review is'


def target_of(label: str) -> str:
  """Y behind a reason."""
  return f"{CONCLUSION} {label}."


def direct_target(label: str) -> str:
  """Y behind X itself: what prompting and supervised fine-tuning read and write."""
  return f" {label}."


def to_example(record: dict) -> Example:
  """A data set's record as text."""
  rivals = tuple(target_of(label) for label in LABELS if label != record["label"])
  return Example(prompt_of(record["text"]), None, target_of(record["label"]), record["label"], rivals=rivals)


class SubjTask(Task):
  """Reasons for a label."""

  name = "subj"
  reads_test_path = has_m_step = True
  labels = LABELS
  target_of = staticmethod(target_of)
  direct_target = staticmethod(direct_target)

  def __init__(self, config: Any, tokenizer: Any, vocab_size: int):
    """`config` is the run's. Raises ValueError for data or a tokenizer that cannot serve."""
    super().__init__(tokenizer, vocab_size, config.model.name)
    self._data = config.data
    self._source = subj.make_config(config.data.path or "embedded")
    train = subj.load(self._source, "train", config.data.dir)
    self._labelled = subj.labelled_subset(train, config.subj.num_labels, config.subj.label_seed)
    self.demonstrations = [to_example(r) for r in self._labelled]
    self.examples = list(self.demonstrations)
    if config.method == "sft":
      self.stop_token_id = self.find_stop(None)
      self.examples = self._to_learn(config.em)
      self.num_seeded = len(self.examples)
      if config.em.rationales_path is not None and config.em.objective == "label":
        self.allowed_tokens[:] = False
        labels = [token for label in LABELS for token in self.encode_after(f" {label}")]
        self.allowed_tokens[[*labels, self.stop_token_id]] = True
    else:
      self.stop_token_id = self.stop_of_targets(config.sampler.stop_at_eos)

  def _to_learn(self, em: Any) -> list[Example]:
    """What supervised fine-tuning reads: the labels, or what an M-step has sampled."""
    if em.rationales_path is None:
      return [Example(e.prompt, direct_target(e.answer), "", e.answer) for e in self.demonstrations]
    records = json_lines.read(em.rationales_path, ("X", "Z", "Y"))
    if em.objective == "joint":
      return [Example(r["X"], r["Z"] + r["Y"], "", "") for r in records]
    # Over the labels' tokens: the cross-entropy between them, as in the authors' code, but for the end of the text,
    # which is a third class that no record has.
    return [
      Example(r["X"] + r["Z"] + CONCLUSION, r["Y"].removeprefix(CONCLUSION).removesuffix("."), "", "") for r in records
    ]

  def rationale_tokens(self, example: Example, max_length: int) -> tuple[list[int], list[bool]] | None:
    """As `Task`, in the tokens that the tokenizer writes for X and Z together; one that joins the two is left out."""
    whole = self.encode(example.prompt + example.rationale)
    prompt = self.encode(example.prompt)
    z = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or len(z) > max_length or self.stop_token_id in z:
      return None
    return z, [True] * len(z)

  def context_tokens(self, num_demonstrations: int, seed: int | None = None) -> list[int]:
    """Labelled reviews, a line each."""
    shown = self.shown(num_demonstrations, seed)
    lines = self.encode("".join(f"{e.prompt}{direct_target(e.answer)}\n" for e in shown))
    return [*self.start_tokens, *lines] if shown else []

  def inverse_prompt(self, example: Example) -> str:
    """A prompt behind which the base writes reasons for the example's label (appendix D)."""
    return f"{example.prompt} {example.answer} because it is"

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    """Reviews of the training side whose labels are not trained on."""
    return {"": self._held_out("train", number)}

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    """Test reviews, or all of config.data.test_path."""
    if self._data.test_path is None:
      return {"": self._held_out("test", number)}
    return {"": [to_example(r) for r in subj.read_records(pathlib.Path(self._data.test_path))]}

  def _held_out(self, split: str, number: int) -> list[Example]:
    records = subj.load(self._source, split, self._data.dir)
    return [to_example(r) for r in subj.held_out(records, number, self._labelled)] if number else []
