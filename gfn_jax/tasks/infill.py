"""Story infilling (paper section 4.2, appendix C): the fourth of five sentences, between what is before and after it.

The policy reads X and Y, "Beginning: ... End: ... Middle:"; the reward is log p(X Z Y) of an LM of stories, which reads
them in their order. Y's first token, the full stop of the fourth sentence, ends Z.
"""

import dataclasses
from typing import Any

from gfn_jax.datasets import roc_stories
from gfn_jax.task import Task
from gfn_jax.types import Example

ENDS = ".!?"


@dataclasses.dataclass(frozen=True)
class Story(Example):
  """A story as an example.

  Attributes:
    before, after: the sentences around the one that is to be written, as far as they are known.
  """

  before: tuple[str, ...] = ()
  after: tuple[str, ...] = ()


def to_example(sentences: list[str], reverse: bool) -> Story:
  """A story of five sentences. `reverse`: nothing is known of its beginning (paper section 3.1)."""
  beginning, middle, ending = " ".join(sentences[:3]), sentences[3].rstrip(ENDS), sentences[4]
  # The prompts of the paper (PAPER: "Middle: "), whose last space belongs to Z.
  prompt = f"End: {ending}\n Middle:" if reverse else f"Beginning: {beginning}\n End: {ending}\n Middle:"
  return Story(
    prompt, middle, f". {ending}", middle, reward_prompt="" if reverse else beginning,
    before=() if reverse else tuple(sentences[:3]), after=(ending,),
  )  # fmt: skip


class InfillTask(Task):
  """Fourth sentences."""

  name = "infill"

  def __init__(self, config: Any, tokenizer: Any, vocab_size: int):
    """`config` is the run's. Raises ValueError for data or a tokenizer that cannot serve."""
    super().__init__(tokenizer, vocab_size, config.model.name)
    self._config = config
    c = config.infill
    self._source = roc_stories.make_config(config.data.path or "embedded", config.data.seed, c.num_train, c.num_test)
    examples = self._load("train")
    self._validation = examples[: c.num_validation]
    self.examples = examples[c.num_validation :]
    if not self.examples:
      raise ValueError(f"config.infill.num_validation {c.num_validation}: there are {len(examples)} training stories")
    self.num_seeded = len(self.examples)
    self.stop_token_id = self.stop_of_targets(config.sampler.stop_at_eos)
    # A sentence has one full stop: a token that holds one with something else would end it unseen.
    texts = [self.decode([i]) for i in range(vocab_size)]
    for i, text in enumerate(texts):
      if any(end in text for end in (*ENDS, "\n")) and i != self.stop_token_id:
        self.allowed_tokens[i] = False

  def _load(self, split: str) -> list[Story]:
    records = roc_stories.load(self._source, split, self._config.data.dir)
    return [to_example(r["sentences"], self._config.infill.reverse) for r in records]

  def rationale_tokens(self, example: Example, max_length: int) -> tuple[list[int], list[bool]] | None:
    """As `Task`; a sentence with a full stop inside, or another forbidden token, is left out."""
    try:
      return super().rationale_tokens(example, max_length)
    except ValueError:
      return None

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    """Training stories that are not trained on."""
    return {"": self._validation[:number]}

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    """Test stories."""
    return {"": self._load("test")[:number]}
