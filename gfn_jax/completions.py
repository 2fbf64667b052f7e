"""Texts in, texts out: sampling from a policy behind any prompt, without a config."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
from jaxtyping import Bool
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.models import Lora, Pretrained
from gfn_jax.task import Task
from gfn_jax.types import Example


class FreeText(Task):
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
    super().__init__(pretrained.tokenizer, pretrained.config.vocab_size, pretrained.source)
    self._target, self.tool = target, tool
    if allowed_tokens is not None:
      if np.shape(allowed_tokens) != self.allowed_tokens.shape:
        raise ValueError(
          f"allowed_tokens has shape {np.shape(allowed_tokens)}: must be {self.allowed_tokens.shape}, the vocabulary"
        )
      self.allowed_tokens = np.asarray(allowed_tokens, bool)
    self.stop_token_id = self.find_stop(stop)

  def example_of(self, prompt: str) -> Example:
    return Example(prompt, rationale=None, target=self._target, answer="")


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
  sampler = task.make_sampler(pretrained, max_length=max_length, min_length=min_length, top_k=top_k, top_p=top_p)
  if not prompts:
    return []
  table = query_table([task.example_of(p) for p in prompts], task, pretrained.config.max_positions, max_length)
  z = sampler.draw(
    lora, table.prompt_tokens, table.prompt_mask, num_samples=num_samples, temperature=temperature,
    key=jax.random.key(seed),
  )  # fmt: skip
  texts = [task.decode(row[:n]) for row, n in zip(z.tokens.tolist(), z.length)]
  return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
