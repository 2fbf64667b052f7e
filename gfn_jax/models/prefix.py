"""What comes before Z, computed once and shared: the context of all queries and the prompt of each."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import KeyValues, Segment, causal_mask, hidden_states, prompt_positions
from gfn_jax.models.lora import Lora


@flax.struct.dataclass
class Prefix:
  """Keys and values of context and prompts.

  Attributes:
    context: KeyValues [L, H, C, Dh] without a query axis, or None.
    prompt: KeyValues [L, Q, H, P, Dh].
    prompt_mask: bool [Q, P]; prompt_positions: int [Q, P].
    length: int [Q], tokens before Z.
    last_hidden: [Q, D], the hidden state that predicts Z's first token.
  """

  context: Any
  prompt: Any
  prompt_mask: Any
  prompt_positions: Any
  length: Any
  last_hidden: Any

  def take(self, query_ids: Int[Array, "R"]) -> "Prefix":
    """The prefix of each of these queries."""
    prompt = jax.tree.map(lambda x: x[:, query_ids], self.prompt)
    others = self.prompt_mask, self.prompt_positions, self.length, self.last_hidden
    return Prefix(self.context, prompt, *(x[query_ids] for x in others))

  def segments(self, num_lead: int) -> list[Segment]:
    """The segments as tokens with `num_lead` leading axes (Q first) read them."""
    segments = []
    if self.context is not None:
      segments.append(context_segment(self.context))
    queries, tokens = self.prompt_mask.shape
    one_row = lambda x: x.reshape(queries, *(1,) * num_lead, tokens)  # noqa: E731
    return [*segments, Segment(self.prompt, one_row(self.prompt_mask), one_row(self.prompt_positions))]


def encode_context(config: ModelConfig, params: dict, lora: Lora | None, tokens: Int[Array, "C"]) -> KeyValues:
  """Keys and values [L, H, C, Dh] of the tokens that stand before every prompt."""
  n = tokens.shape[0]
  return hidden_states(config, params, lora, tokens, jnp.arange(n), causal_mask(n))[1]


def context_segment(context: KeyValues) -> Segment:
  """The context as every later token reads it."""
  n = context.keys.shape[-2]
  return Segment(context, jnp.ones((1, n), bool), jnp.arange(n)[None])


def encode_prompts(
  config: ModelConfig,
  params: dict,
  lora: Lora | None,
  tokens: Int[Array, "Q P"],
  mask: Bool[Array, "Q P"],
  context: KeyValues | None = None,
  dropout_key: jax.Array | None = None,
  remat: str = "none",
) -> Prefix:
  """Runs the left-padded prompts once each, after `context` (none: None)."""
  before = 0 if context is None else context.keys.shape[-2]
  positions = before + prompt_positions(mask)
  hidden, kv = hidden_states(
    config, params, lora, tokens, positions, causal_mask(tokens.shape[1]) & mask[:, None, :],
    [] if context is None else [context_segment(context)], dropout_key, remat=remat,
  )  # fmt: skip
  return Prefix(context, kv, mask, positions, before + mask.sum(-1), hidden[:, -1])


def without_start(mask: Bool[np.ndarray, "*lead P"], number: int) -> Bool[np.ndarray, "*lead P"]:
  """Prompts without their first `number` tokens: more of what is left-padded."""
  return mask & (mask.cumsum(-1) > number) if number else mask


def prompt_width(mask: Bool[np.ndarray, "*lead P"]) -> int:
  """How many columns of left-padded prompts hold all of them: 32, 64, 128, ... or P, each a program to compile."""
  longest = max(1, int(mask.sum(-1).max()))
  return min(mask.shape[-1], max(32, 1 << (longest - 1).bit_length()))


def masked_logits(
  logits: Float[Array, "*lead V"], allowed: Bool[Array, "V"] | None
) -> tuple[Float[Array, "*lead V"], Float[Array, "*lead 1"]]:
  """Float32 logits of the allowed tokens, less the largest, about -1e30 of the others, and their log-normaliser.

  The first minus the second are log-probabilities, in nats. Who needs those of a few tokens takes the difference of
  these alone: a log_softmax writes as many numbers as there are logits.
  """
  logits = logits.astype(jnp.float32)
  if allowed is not None:  # a sum, through which a gradient goes as it is
    logits += jnp.where(allowed, 0.0, -1e30)
  logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))  # log-probabilities near 0 keep their digits
  return logits, jnp.log(jnp.exp(logits).sum(axis=-1, keepdims=True))
