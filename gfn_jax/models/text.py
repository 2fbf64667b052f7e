"""Text to tokens and back, as a prompt's beginning or as what stands behind other text."""

from collections.abc import Sequence
from typing import Any


class TextCodec:
  """A tokenizer without its special tokens, which knows where a text stands.

  SentencePiece tokenizers (Llama 2) put a space before a text that stands alone: "." is then another token than the one
  that ends a sentence. What continues a text is therefore tokenised behind other text, and cut.

  Attributes:
    start_tokens: what the tokenizer puts before every text: a beginning of sequence (Llama, Gemma) or nothing (GPT-2).
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    bare, whole = self.encode("a"), list(tokenizer("a").input_ids)
    self.start_tokens = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
    line = self.encode("\n")
    alone_is_other = self._decode([*line, *self.encode(".")]) != self._decode(line) + "."
    self._before = line if alone_is_other else []

  def encode(self, text: str) -> list[int]:
    """The tokens of a text that begins a sequence."""
    return self._tokenizer.encode(text, add_special_tokens=False)

  def encode_after(self, text: str) -> list[int]:
    """The tokens of a text that continues another."""
    if not self._before:
      return self.encode(text)
    whole = self.encode("\n" + text)
    return whole[len(self._before) :] if whole[: len(self._before)] == self._before else self.encode(text)

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of tokens that continue others."""
    return self._decode([*self._before, *tokens])[len(self._decode(self._before)) :]

  def _decode(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
