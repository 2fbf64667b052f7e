"""Texts in, texts out: sampling from a policy behind any prompt, without a config."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
from jaxtyping import Bool
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.models import Lora, Pretrained
from gfn_jax.models.text import TextCodec
from gfn_jax.sampler import Sampler
from gfn_jax.types import Example


class FreeText(TextCodec):
  """What a task is to sampler and rewards, for any prompt and at most one target. It cannot tell right from wrong.

  Args:
    pretrained: whose tokenizer reads and writes.
    stop: a text of one token, or a token id; None for the tokenizer's end of text.
    allowed_tokens: the vocabulary of Z, stop token included; None for the whole.
    tool: as in `Sampler`.
    target: Y of every prompt; "" for none.

  Raises:
    ValueError: no tokenizer, or a stop token or a vocabulary that does not fit it.
  """

  def __init__(
    self,
    pretrained: Pretrained,
    *,
    stop: str | SupportsIndex | None = None,
    allowed_tokens: Bool[np.ndarray, "V"] | None = None,
    tool: Any = None,
    target: str = "",
  ):
    if pretrained.tokenizer is None:
      raise ValueError(f"model {pretrained.source!r} has no tokenizer: text needs one")
    super().__init__(pretrained.tokenizer)
    self._target, self.tool = target, tool
    vocab_size = pretrained.config.vocab_size
    self.allowed_tokens = np.ones(vocab_size, bool) if allowed_tokens is None else np.asarray(allowed_tokens, bool)
    if self.allowed_tokens.shape != (vocab_size,):
      raise ValueError(f"allowed_tokens has shape {self.allowed_tokens.shape}: must be ({vocab_size},), the vocabulary")
    self.stop_token_id = self._find_stop(stop)
    if not 0 <= self.stop_token_id < vocab_size:
      raise ValueError(f"stop token {self.stop_token_id}: must be a token id from 0 to {vocab_size - 1}")

  def _find_stop(self, stop: str | SupportsIndex | None) -> int:
    if stop is None:
      stop = self._tokenizer.eos_token_id
      if stop is None:
        raise ValueError("the tokenizer has no end-of-text token: name a stop token")
    if not isinstance(stop, str):
      return stop.__index__()
    ids = self.encode_after(stop)
    if len(ids) != 1 or self.decode(ids).strip() != stop.strip():  # some tokenizers drop what they do not know
      pieces = [self.decode([i]) for i in ids]
      raise ValueError(f"stop {stop!r} must be one token: to this tokenizer it is {pieces}")
    return ids[0]

  def example_of(self, prompt: str) -> Example:
    return Example(prompt, rationale=None, target=self._target, answer="")

  def context_tokens(self, num_demonstrations: int) -> list[int]:
    del num_demonstrations  # it has none
    return []

  def is_right(self, example: Example, tokens: Sequence[int]) -> None:
    del example, tokens


def sample(
  pretrained: Pretrained,
  lora: Lora | None,
  prompts: Sequence[str],
  num_samples: int,
  *,
  temperature: float = 1.0,
  max_length: int,
  min_length: int = 0,
  stop: str | SupportsIndex | None = None,
  allowed_tokens: Bool[np.ndarray, "V"] | None = None,
  tool: Any = None,
  seed: int,
  top_k: int | None = None,
  top_p: float | None = None,
) -> list[list[str]]:
  """Samples `num_samples` completions of each prompt.

  Args:
    pretrained: the base. lora: its adapter, or None for the base alone.
    prompts: as the tokenizer reads them, its beginning-of-sequence token included where it has one.
    temperature: 0 is greedy. Then `top_k` and `top_p` drop tokens, in this order; None for no such filter.
    max_length, min_length: of a completion, in tokens; results of the tool are counted.
    stop: ends a completion and is no part of it: a text of one token, or a token id; None for the end of text.
    allowed_tokens: bool [V], the vocabulary of completions, stop token included; None for the whole.
    tool: `tools.Calculator` or another object with `is_call` and `respond`; None for none.
    seed: with the same seed the same call gives the same texts.

  Returns:
    For each prompt its completions, in the order in which they were drawn.

  Raises:
    ValueError: one line that names the value and the rule, before anything compiles.
  """
  if isinstance(prompts, str):
    raise ValueError(f"prompts is the text {prompts[:60]!r}: must be a list of texts")
  if num_samples < 1:
    raise ValueError(f"num_samples {num_samples}: must be at least 1")
  task = FreeText(pretrained, stop=stop, allowed_tokens=allowed_tokens, tool=tool)
  sampler = Sampler(
    pretrained.config, pretrained.params, allowed_tokens=task.allowed_tokens, stop_token_id=task.stop_token_id,
    tool=task.tool, max_length=max_length, min_length=min_length, top_k=top_k, top_p=top_p,
  )  # fmt: skip
  if not prompts:
    return []
  table = query_table([task.example_of(p) for p in prompts], task, pretrained.config.max_positions, max_length)
  z = sampler.draw(
    lora, table.prompt_tokens, table.prompt_mask, num_samples=num_samples, temperature=temperature,
    key=jax.random.key(seed),
  )  # fmt: skip
  texts = [task.decode(row[:n]) for row, n in zip(z.tokens.tolist(), z.length)]
  return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
