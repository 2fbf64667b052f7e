"""How close the policy is to the posterior, on held-out queries."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from gfn_jax.data import pad_right, query_table
from gfn_jax.evaluators import scoring
from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.models import Lora
from gfn_jax.rewards import whole_log_rewards
from gfn_jax.types import Example, Queries

METRICS = (
  "log_ratio_variance", "log_reward_correlation", "effective_sample_share", "log_partition_lower",
  "log_partition_upper", "distinct_samples", "length_mean",
)  # fmt: skip


def posterior_quality(
  lora: Lora | None,
  parts: Parts,
  examples: Sequence[Example],
  *,
  num_calls: int,
  num_samples: int,
  reward_temperature: float,
  key: jax.Array,
  on_round: Callable[[], None] | None = None,
) -> Iterator[tuple[str, float]]:
  """Samples N rationales a query from q at temperature 1 and weighs them: w = log R / T - log q.

  At an exact policy every w of a query is its log Z. Where the sampler's min_length keeps short Z from being drawn,
  importance sampling and the lower bound go by what Z is drawn with (`Trajectory.log_drawn`). Yields, meaned over
  queries:
    log_ratio_variance: the variance of w within a query, nats^2; 0 for an exact sampler.
    log_reward_correlation: Pearson, of log R / T and log q about their queries' means.
    effective_sample_share: (sum e^w)^2 / (N sum e^2w), of importance sampling; 1 for an exact sampler, and nearly so
      under a min_length, before which an exact q seldom stops.
    log_partition_lower: the mean of w, a lower bound of log Z (the ELBO), nats; of the Z that can be drawn.
    log_partition_upper: the mean of w over exact samples of the target, an upper bound, where the task has any.
    distinct_samples: different Z among the N. length_mean: tokens.

  Args:
    examples: sampled in `num_calls` equal parts.
  """
  log_rewards, log_qs, log_drawn, distinct, lengths = [], [], [], [], []
  task, max_positions = parts.task, parts.pretrained.config.max_positions
  table = query_table(examples, task, max_positions, 0)
  for call, ids in enumerate(np.split(np.arange(len(examples)), num_calls)):
    queries = table[ids]
    z = parts.sampler(
      lora, queries.prompt_tokens, queries.prompt_mask, num_samples=num_samples, temperature=np.ones(len(ids)),
      key=jax.random.fold_in(key, call), on_round=on_round,
    )  # fmt: skip
    log_rewards.append(whole_log_rewards(parts.reward, queries, z.tokens, z.length) / reward_temperature)
    log_qs.append(z.log_q)
    log_drawn.append(z.log_drawn(parts.sampler.min_length))
    texts = np.array([str(row[:n].tolist()) for row, n in zip(z.tokens, z.length)]).reshape(len(ids), num_samples)
    distinct += [len(set(row)) for row in texts]
    lengths.append(z.length)
  log_reward, log_q, log_drawn = (
    np.concatenate(x).reshape(len(examples), num_samples) for x in (log_rewards, log_qs, log_drawn)
  )
  yield "log_ratio_variance", float(np.var(np.asarray(log_reward, np.float64) - log_q, axis=1).mean())
  a, b = (x - x.mean(axis=1, keepdims=True) for x in (log_reward, log_q))
  norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
  yield "log_reward_correlation", float((a * b).sum()) / norm if norm > 0 else 0.0
  log_weight = log_reward - log_drawn
  weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
  yield "effective_sample_share", float((weight.sum(1) ** 2 / (weight**2).sum(1)).mean()) / num_samples
  yield "log_partition_lower", float(log_weight.mean())
  seed = np.asarray(jax.random.key_data(key)).tolist()
  at = {example: i for i, example in enumerate(examples)}  # equal queries have equal bounds
  upper = {e: _target_log_weight(lora, parts, table[[i]], num_samples, reward_temperature, seed) for e, i in at.items()}
  if None not in upper.values():
    yield "log_partition_upper", float(np.mean([upper[e] for e in examples]))
  yield "distinct_samples", float(np.mean(distinct))
  yield "length_mean", float(np.mean(np.concatenate(lengths)))


def _target_log_weight(
  lora: Lora | None, parts: Parts, query: Queries, num_samples: int, reward_temperature: float, seed: list[int]
) -> float | None:
  """The mean of log R / T - log q over samples of the target, nats; None where the task has none."""
  drawn = parts.task.target_samples(query.examples[0], num_samples, reward_temperature, np.random.default_rng(seed))
  if drawn is None:
    return None
  tokens, mask = pad_right([*drawn, [0] * parts.config.sampler.max_length])
  log_reward = whole_log_rewards(parts.reward, query, tokens[:-1], mask[:-1].sum(-1))
  return float((log_reward / reward_temperature - scoring.log_q(lora, parts, query, drawn)).mean())
