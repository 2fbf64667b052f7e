"""Batches of the reward-maximising baselines: trajectories of the policy as it is, with advantages of their log R."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import ml_collections
import numpy as np

from gfn_jax import distributed, policy
from gfn_jax.advantages import adapt_kl_coefficient, explained_variance, gae, group_advantages, whiten
from gfn_jax.collect import Collector
from gfn_jax.config import num_micro_batches
from gfn_jax.losses import act_log_probs
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.parallel import micro_batches, over_data, split
from gfn_jax.types import Acts, Batch, Queries

ON_POLICY = ml_collections.FrozenConfigDict(dict(buffer=0.0, tempered=0.0, temperature_low=1.0, temperature_high=1.0))


def measure(
  model: ModelConfig,
  stop_token_id: int,
  min_length: int,
  max_length: int,
  num_micro_batches: int,
  bin_by_bin: bool,
  params: dict,
  allowed_tokens: jax.Array,
  trained: dict,
  batch: Batch,
) -> tuple[Float[jax.Array, "B S"], Float[jax.Array, "B S"], Float[jax.Array, "B S"]]:
  """`losses.act_log_probs` of the policy and of the base, nats, and the critic's values (0 without a critic)."""

  def of(micro: Batch):
    def score(lora):
      states = policy.tree_states(model, params, lora, micro.trees)
      log_pf, log_pterm = policy.score_trees(
        model, params, states, micro.trees, micro.length, micro.action_mask, allowed_tokens=allowed_tokens,
        stop_token_id=stop_token_id, max_length=max_length,
      )  # fmt: skip
      return act_log_probs(log_pf, log_pterm, micro.length, min_length), states

    (log_prob, states), (log_reference, _) = score(trained["lora"]), score(None)
    if "value" not in trained:
      return log_prob, log_reference, jnp.zeros_like(log_prob)
    return log_prob, log_reference, policy.of_prefixes(policy.state_values(trained["value"], states), micro.trees)

  def of_bins(micro: Batch):
    def fill(number, rows):
      trees, here = policy.trees_of_bin(micro.trees, number)
      return jax.tree.map(lambda a, b: jnp.where(here[:, None], a, b), of(micro.replace(trees=trees)), rows)

    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of, micro))
    return jax.lax.fori_loop(0, micro.trees.num_bins[0], fill, empty)

  rows = jax.lax.map(of_bins if bin_by_bin else of, micro_batches(batch, num_micro_batches))
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)


class OnPolicyCollector(Collector):
  """Samples every query from the policy, and scores whole samples alone: prefixes bring no reward of their own."""

  def __init__(self, parts: Any, table: Queries):
    super().__init__(parts, table)
    self._behavior, self._params, config = ON_POLICY, parts.params, parts.config
    self._devices, self._allowed = parts.devices, jnp.asarray(parts.task.allowed_tokens)
    measure_share = functools.partial(
      measure, parts.pretrained.config, parts.task.stop_token_id, config.sampler.min_length,
      config.sampler.max_length,
      num_micro_batches(config, len(parts.devices) * jax.process_count()),
      self.padding.bin_by_bin,
    )  # fmt: skip
    self._measure = over_data(measure_share, (None, None, None, 0), parts.devices)

  def seed_replay(self, on_round: Callable[[], None] | None = None) -> str:
    """Nothing: there is no buffer."""
    del on_round
    return ""

  def __call__(
    self, trained: Mapping[str, Any], step: int, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> tuple[Batch, dict[str, float]]:
    """The step's batch with its `Acts`, and metrics of its samples."""
    config = self._config
    draft = self.begin(trained["lora"], step, key)  # all queries are fresh: nothing is replayed
    plan, (z, log_reward) = draft.plan, self._scored(draft, on_round)
    batch = self._batch(plan.query_ids, z.tokens, z.length, z.action_mask, log_reward)
    measured = self._measure(self._params, self._allowed, trained, split(batch, self._devices))
    own = [np.asarray(x).reshape(-1, log_reward.shape[1]) for x in measured]
    log_prob, log_reference, value = distributed.gather(own, len(log_reward))
    prefixes, length = np.arange(log_reward.shape[1]), z.length[:, None]
    stops = (prefixes == length) & (length < config.sampler.max_length)
    mask = (np.pad(z.action_mask, ((0, 0), (0, 1))) & (prefixes < length)) | stops
    acts = Acts(mask, log_prob, log_reference, np.zeros_like(value), value, np.zeros_like(value))
    final = np.take_along_axis(log_reward, length, axis=1)[:, 0]
    kl = float(np.where(mask, log_prob - log_reference, 0.0).sum(axis=1).mean())
    acts, metrics = self._advantages(acts, final, kl)
    acts = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.float32), acts)
    metrics = self._sample_metrics(plan, draft.fresh, z, log_reward) | metrics
    return batch.replace(acts=acts), metrics | {"kl_reference": kl}

  def _advantages(self, acts: Acts, log_reward: Float[np.ndarray, "B"], kl: float) -> tuple[Acts, dict[str, float]]:
    """Fills in advantages and the critic's targets; `log_reward` of the whole samples, `kl` nats a trajectory."""
    raise NotImplementedError


class PPOCollector(OnPolicyCollector):
  """Advantages by a critic; each act pays for its log-ratio to the base, the last one earns log R.

  The coefficient of that payment adapts, and is the collector's state.
  """

  def __init__(self, parts: Any, table: Queries):
    super().__init__(parts, table)
    self._kl_coefficient = float(parts.config.ppo.kl_coefficient)

  def to_arrays(self) -> dict[str, np.ndarray]:
    return {"kl_coefficient": np.float64(self._kl_coefficient)}

  def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
    self._kl_coefficient = float(arrays["kl_coefficient"])

  def _advantages(self, acts, log_reward, kl):
    c, used = self._config.ppo, self._kl_coefficient
    rewards = np.where(acts.mask, -used * (acts.log_prob - acts.log_reference), 0.0)
    last = acts.mask.shape[1] - 1 - np.argmax(acts.mask[:, ::-1], axis=1)
    rewards[np.arange(len(last)), last] += log_reward
    advantages, targets = gae(rewards, acts.value, acts.mask, c.discount, c.gae_lambda)
    self._kl_coefficient = adapt_kl_coefficient(used, kl, c.kl_target, c.kl_horizon, len(log_reward))
    metrics = {"kl_coefficient": used, "explained_variance": explained_variance(acts.value, targets, acts.mask)}
    return acts.replace(advantage=whiten(advantages, acts.mask), value_target=targets), metrics


class GRPOCollector(OnPolicyCollector):
  """Advantages by comparison with a query's other samples."""

  def _advantages(self, acts, log_reward, kl):
    del kl
    config = self._config
    advantage = group_advantages(log_reward, config.sampler.num_samples, config.grpo.scale)
    return acts.replace(advantage=np.where(acts.mask, advantage[:, None], 0.0)), {}
