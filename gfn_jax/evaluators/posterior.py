"""How close the policy is to the posterior, on held-out queries."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.models import Lora
from gfn_jax.rewards import RewardModel
from gfn_jax.sampler import Sampler
from gfn_jax.types import Example


def posterior_quality(
  lora: Lora | None,
  sampler: Sampler,
  reward_model: RewardModel,
  task: Any,
  examples: Sequence[Example],
  max_positions: int,
  *,
  num_calls: int,
  num_samples: int,
  reward_temperature: float,
  key: jax.Array,
  on_round: Callable[[], None] | None = None,
) -> Iterator[tuple[str, float]]:
  """At an exact policy log R / T - log q is log Z for every sample of a query: its variance is 0.

  Samples N rationales a query from q at temperature 1. Yields `log_ratio_variance` (nats^2: the variance within a
  query, meaned over queries) and `log_reward_correlation` (Pearson, of log R / T and log q about their queries' means).

  Args:
    examples: sampled in `num_calls` equal parts, each a multiple of the number of devices.
  """
  log_rewards, log_qs = [], []
  table = query_table(examples, task, max_positions, 0)
  for call, ids in enumerate(np.split(np.arange(len(examples)), num_calls)):
    queries = table[ids]
    z = sampler(
      lora, queries.prompt_tokens, queries.prompt_mask, num_samples=num_samples, temperature=np.ones(len(ids)),
      key=jax.random.fold_in(key, call), on_round=on_round,
    )  # fmt: skip
    whole = np.arange(z.tokens.shape[1] + 1) == z.length[:, None]
    parts = reward_model(
      queries.prompt_tokens, queries.prompt_mask, z.tokens, z.length, whole, queries.target_tokens, queries.target_mask
    )
    log_rewards.append(np.where(whole, parts[0] + parts[1], 0.0).sum(-1) / reward_temperature)
    log_qs.append(z.log_q)
  log_reward, log_q = (np.concatenate(x).reshape(len(examples), num_samples) for x in (log_rewards, log_qs))
  yield "log_ratio_variance", float(np.var(log_reward - log_q, axis=1).mean())
  a, b = (x - x.mean(axis=1, keepdims=True) for x in (log_reward, log_q))
  norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
  yield "log_reward_correlation", float((a * b).sum()) / norm if norm > 0 else 0.0
