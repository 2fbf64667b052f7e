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
from gfn_jax.models.prefix import encode_prompts, masked_logits
from gfn_jax.types import Trees


def tree_states(
  config: ModelConfig,
  params: dict,
  lora: Lora | None,
  trees: Trees,
  *,
  dropout_key: jax.Array | None = None,
  remat: str = "none",
) -> Float[Array, "G U D"]:
  """Hidden states of the nodes of prefix trees; differentiable in `lora`.

  A query's prompt is computed once in a bin, and so is what its trajectories begin with. Arguments as of `score`.
  """
  hidden, _ = hidden_states(
    config, params, lora, trees.tokens, trees.positions, trees.ancestors, (), dropout_key, unroll=True, remat=remat
  )
  return hidden


def trees_of_bin(trees: Trees, number: Int[Array, ""]) -> tuple[Trees, Bool[Array, "B"]]:
  """A bin by itself, and the trajectories that stand in it; others are given its first node."""
  here = trees.node_of[:, 0] // trees.tokens.shape[1] == number
  node_of = jnp.where(here[:, None], trees.node_of - number * trees.tokens.shape[1], 0)
  alone = (x[number][None] for x in (trees.tokens, trees.parents, trees.positions, trees.ancestors))
  return Trees(*alone, node_of, jnp.ones_like(trees.num_bins)), here


def of_prefixes(values: Float[Array, "G U"], trees: Trees) -> Float[Array, "B S"]:
  """What stands at the nodes, for the prefixes of each trajectory."""
  return values.reshape(-1)[trees.node_of]


def _free(
  log_pf: Float[Array, "B T"], log_pterm: Float[Array, "B S"], length: Int[Array, "B"], action_mask: Bool[Array, "B T"],
  max_length: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B S"]]:  # fmt: skip
  """0 where the policy does not choose: what the tool wrote, the forced stop, and padding."""
  prefixes = jnp.arange(log_pterm.shape[1])
  free = (prefixes <= length[:, None]) & (prefixes < max_length)
  return jnp.where(action_mask, log_pf, 0.0), jnp.where(free, log_pterm, 0.0)


def score_trees(
  config: ModelConfig,
  params: dict,
  states: Float[Array, "G U D"],
  trees: Trees,
  length: Int[Array, "B"],
  action_mask: Bool[Array, "B T"],
  *,
  allowed_tokens: Bool[Array, "V"],
  stop_token_id: int,
  max_length: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B S"]]:
  """`score`, from the states of `tree_states`."""
  logits, log_z = masked_logits(output_logits(config, params, states), allowed_tokens)
  bins = jnp.arange(len(trees.tokens))[:, None]
  log_step = logits[bins, trees.parents, trees.tokens] - log_z[bins, trees.parents, 0]  # from its parent to each node
  log_stop = logits[..., stop_token_id] - log_z[..., 0]
  log_pf, log_pterm = of_prefixes(log_step, trees)[:, 1:], of_prefixes(log_stop, trees)
  return _free(log_pf, log_pterm, length, action_mask, max_length)


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
  keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
  prefix = encode_prompts(config, params, lora, prompt_tokens, prompt_mask, dropout_key=keys[0], remat=remat)
  rows, t = tokens.shape
  by_query = tokens.reshape(len(prompt_tokens), -1, t)
  positions = jnp.broadcast_to(prefix.length[:, None, None] + jnp.arange(t), by_query.shape)
  hidden, _ = hidden_states(
    config, params, lora, by_query, positions, causal_mask(t), prefix.segments(2), keys[1], unroll=True, remat=remat
  )
  root = jnp.broadcast_to(prefix.last_hidden[:, None, None], (*hidden.shape[:2], 1, hidden.shape[-1]))
  states = jnp.concatenate([root, hidden], axis=2).reshape(rows, t + 1, -1)
  logits, log_z = masked_logits(output_logits(config, params, states), allowed_tokens)
  log_pf = (jnp.take_along_axis(logits[:, :-1], tokens[..., None], axis=2) - log_z[:, :-1])[..., 0]
  return _free(log_pf, logits[..., stop_token_id] - log_z[..., 0], length, action_mask, max_length)


def init_value_head(config: ModelConfig) -> dict[str, Float[Array, "..."]]:
  """A critic that predicts 0: one linear output on the policy's states."""
  return {"kernel": jnp.zeros(config.hidden_size), "bias": jnp.zeros(())}


def state_values(head: dict[str, Array], states: Float[Array, "G U D"]) -> Float[Array, "G U"]:
  """The critic's prediction of the return at every node, nats.

  Its gradient stops at the states: returns of tens of nats, squared, would shape the adapter far more than the policy's
  own objective does, and PPO would fall apart.
  """
  return jax.lax.stop_gradient(states).astype(jnp.float32) @ head["kernel"] + head["bias"]
