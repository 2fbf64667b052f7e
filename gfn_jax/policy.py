"""log q of trajectories: the only place where log_pf and log_pterm are defined.

The policy is the base with its adapter, at temperature 1, over the allowed vocabulary (the stop token is part of it).
Minimum length and temperature belong to the behaviour policy in `sampler` and never enter here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import causal_mask, hidden_states, output_logits
from gfn_jax.models.lora import Lora
from gfn_jax.models.prefix import encode_prompts, masked_log_softmax


def action_log_probs(logits: Float[Array, "*lead V"], allowed_tokens: Bool[Array, "V"]) -> Float[Array, "*lead V"]:
  """log q(. | z_<t) in nats: float32, renormalised over the allowed tokens and the stop token among them."""
  return masked_log_softmax(logits, allowed_tokens)


def prefix_states(
  config: ModelConfig,
  params: dict,
  lora: Lora | None,
  prompt_tokens: Int[Array, "Q P"],
  prompt_mask: Bool[Array, "Q P"],
  tokens: Int[Array, "B T"],
  *,
  dropout_key: jax.Array | None = None,
  remat: str = "none",
) -> Float[Array, "B S D"]:
  """Hidden states of every prefix of B = Q * N trajectories, grouped by query; differentiable in `lora`.

  The N samples of a query share its prompt's keys and values. Arguments as of `score`.
  """
  queries, num_tokens = prompt_tokens.shape[0], tokens.shape[1]
  keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
  prefix = encode_prompts(config, params, lora, prompt_tokens, prompt_mask, dropout_key=keys[0], remat=remat)
  grouped = tokens.reshape(queries, -1, num_tokens)
  positions = jnp.broadcast_to(prefix.length[:, None, None] + jnp.arange(num_tokens), grouped.shape)
  hidden, _ = hidden_states(
    config, params, lora, grouped, positions, causal_mask(num_tokens), prefix.segments(2), keys[1], unroll=True,
    remat=remat,
  )  # fmt: skip
  first = jnp.broadcast_to(prefix.last_hidden[:, None, None], (*grouped.shape[:2], 1, hidden.shape[-1]))
  return jnp.concatenate([first, hidden], axis=2).reshape(len(tokens), num_tokens + 1, -1)


def score_states(
  config: ModelConfig,
  params: dict,
  states: Float[Array, "B S D"],
  tokens: Int[Array, "B T"],
  length: Int[Array, "B"],
  action_mask: Bool[Array, "B T"],
  *,
  allowed_tokens: Bool[Array, "V"],
  stop_token_id: int,
  max_length: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B S"]]:
  """`score`, from the states of `prefix_states`."""
  log_probs = action_log_probs(output_logits(config, params, states), allowed_tokens)
  log_pf = jnp.take_along_axis(log_probs[:, :-1], tokens[..., None], axis=-1)[..., 0]
  log_pf = jnp.where(action_mask, log_pf, 0.0)
  prefixes = jnp.arange(states.shape[1])
  free = (prefixes <= length[:, None]) & (prefixes < max_length)
  return log_pf, jnp.where(free, log_probs[..., stop_token_id], 0.0)


def score(
  config: ModelConfig,
  params: dict,
  lora: Lora | None,
  prompt_tokens: Int[Array, "Q P"],
  prompt_mask: Bool[Array, "Q P"],
  tokens: Int[Array, "B T"],
  length: Int[Array, "B"],
  action_mask: Bool[Array, "B T"],
  *,
  allowed_tokens: Bool[Array, "V"],
  stop_token_id: int,
  max_length: int,
  dropout_key: jax.Array | None = None,
  remat: str = "none",
) -> tuple[Float[Array, "B T"], Float[Array, "B S"]]:
  """log_pf and log_pterm of B = Q * N trajectories, grouped by query; differentiable in `lora`.

  Tokens that the tool wrote are conditioned on, and score 0.

  Args:
    tokens, length, action_mask: as in `types.Trajectory`.
    allowed_tokens: the vocabulary of Z, stop token included.
    max_length: where stopping is forced, in tokens; T may be shorter.
    dropout_key: turns the adapter's dropout on.
    remat: as in `decoder.REMATS`.

  Returns:
    log_pf [B, T] = log q(z_t | z_<t), 0 where action_mask is False; log_pterm [B, S] = log q(stop | z_1:t), 0 at
    max_length and past `length`.
  """
  states = prefix_states(
    config, params, lora, prompt_tokens, prompt_mask, tokens, dropout_key=dropout_key, remat=remat
  )  # fmt: skip
  return score_states(
    config, params, states, tokens, length, action_mask, allowed_tokens=allowed_tokens, stop_token_id=stop_token_id,
    max_length=max_length,
  )  # fmt: skip


def init_value_head(config: ModelConfig) -> dict[str, Float[Array, "..."]]:
  """A critic that predicts 0: one linear output on the policy's states."""
  return {"kernel": jnp.zeros(config.hidden_size), "bias": jnp.zeros(())}


def state_values(head: dict[str, Array], states: Float[Array, "B S D"]) -> Float[Array, "B S"]:
  """The critic's prediction of the return at every prefix, nats."""
  return states.astype(jnp.float32) @ head["kernel"] + head["bias"]
