"""Next sentences (paper section 4.1, appendix B): Z in proportion to p_LM(Z | X)^(1/T), one sentence behind a prompt.

The full stop ends Z and is part of the text, so it is scored with it. What would break a sentence in two or quote
another is left out of the vocabulary, of policy and reward alike.
"""

import re
from typing import Any

import numpy as np

from gfn_jax.datasets import openwebtext_prompts
from gfn_jax.task import Task
from gfn_jax.types import Example

_ILLEGAL = re.compile(
  r"""[\n\r\t"“”!?;<>|\\\[\]{}]   # line ends, quotes, other ends of sentences, mark-up
  | https?|www|://                # addresses
  | [^\w\s]{2,}                   # runs of punctuation
  | ^[A-Z]$                       # an initial, without a space before it
  | \ufffd""",  # half a character
  re.VERBOSE,
)
# Behind these a full stop ends no sentence.
_ABBREVIATIONS = frozenset(
  "Mr Mrs Ms Dr Prof St Sr Jr Rev Gen Col Capt Lt Sgt Sen Gov Rep Hon vs etc Inc Corp Co Ltd No US UK UN eg ie al"
  .split()
)


def is_legal(text: str) -> bool:
  """Whether a token of this text may stand in a sentence (the full stop itself apart)."""
  return bool(text) and "." not in text and not _ILLEGAL.search(text) and text.strip() not in _ABBREVIATIONS


class NextSentenceTask(Task):
  """Sentences behind prompts."""

  name = "next_sentence"

  def __init__(self, config: Any, tokenizer: Any, vocab_size: int):
    """`config` is the run's. Raises ValueError for data or a tokenizer that cannot serve."""
    super().__init__(tokenizer, vocab_size, config.model.name)
    self._config = config
    self.stop_token_id = self.find_stop(".")
    special = set(tokenizer.all_special_ids)
    texts = [self.decode([i]) for i in range(vocab_size)]
    self.allowed_tokens = np.array([is_legal(text) and i not in special for i, text in enumerate(texts)])
    self.allowed_tokens[self.stop_token_id] = True
    c = config.next_sentence
    self._source = openwebtext_prompts.make_config(
      config.data.path or "embedded", c.kind, config.data.seed, num_train=c.num_train,
      num_validation=c.num_validation, num_test=c.num_test, count_tokens=lambda text: len(self.encode(text)),
      tokenizer_name=config.model.name,
    )  # fmt: skip
    self.examples = self._load("train")

  def _load(self, split: str) -> list[Example]:
    # A space behind a prompt belongs to the sentence that follows.
    records = openwebtext_prompts.load(self._source, split, self._config.data.dir)
    return [self.example_of(r["prompt"].rstrip()) for r in records]

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    return {"": self._load("validation")[:number]}

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    return {"": self._load("test")[:number]}
