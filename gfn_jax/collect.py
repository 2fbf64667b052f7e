"""From a step's plan to its batch: sampling, prefix rewards, replay."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

from gfn_jax import data
from gfn_jax.config import num_micro_batches
from gfn_jax.losses import PREFIX_LOSSES
from gfn_jax.models import Lora
from gfn_jax.parallel import platform_of
from gfn_jax.prefix_tree import bin_size, build_trees, padding_of
from gfn_jax.replay import ReplayBuffer
from gfn_jax.sampler import Rollout
from gfn_jax.types import Batch, Queries, Trajectory, terminable_prefixes

MIN_PROMPTS = 8  # of a supervised step, where as many rows allow it


def scored_prefixes(
  objective: str,
  num_prefixes: int | None,
  length: Int[np.ndarray, "B"],
  terminable: Bool[np.ndarray, "B S"],
  rng: np.random.Generator,
) -> Bool[np.ndarray, "B S"]:
  """The prefixes whose rewards an objective reads: whole samples alone, or those of some or all pairs.

  The whole sample is always among them, so that its pairs weigh more than others in the mean of `subtb_loss`: another
  weighting, with the same optimum. `db` compares neighbours among them.

  Args:
    objective: config.loss.name, or a baseline's config.method.
    num_prefixes: of a sample: itself, and others that `rng` draws where stopping is possible. None: all.
  """
  whole = np.arange(terminable.shape[1]) == np.asarray(length)[:, None]
  if objective not in PREFIX_LOSSES:
    return whole
  if num_prefixes is None:
    return terminable
  order = np.where(whole, -1.0, np.where(terminable, rng.random(terminable.shape), 2.0))
  return terminable & (order.argsort(axis=1).argsort(axis=1) < num_prefixes)


def better_prefixes(
  log_reward: Float[np.ndarray, "B S"], length: Int[np.ndarray, "B"], min_length: int
) -> Bool[np.ndarray, "B S"]:
  """Of each row the whole, and its prefixes of `min_length` tokens or more with a higher log R. NaN is none."""
  prefixes = np.arange(log_reward.shape[1])
  better = log_reward > np.take_along_axis(log_reward, length[:, None], axis=1)
  return (prefixes == length[:, None]) | (better & (prefixes >= min_length))


@dataclasses.dataclass(frozen=True)
class Draft:
  """A step whose samples are on their way.

  Attributes:
    step: its number; plan: of its queries.
    fresh: int [F], the queries of the plan that are sampled; the others are replayed.
    rollout: of the fresh ones; None where there are none.
  """

  step: int
  plan: data.StepPlan
  fresh: np.ndarray
  rollout: Rollout | None


class Collector:
  """Draws the behaviours of a step, samples and scores what is fresh, replays the rest (paper section 3.3).

  Attributes:
    replay: the buffer.
    table: the training queries. num_seeded: how many of them, the first ones, have demonstrations that seed the buffer.
    padding: of the batches' trees.
  """

  def __init__(self, parts: Any, table: Queries):
    """`parts`: of the run, as `experiment.build` makes them. `table`: the training queries, as `task.examples`.

    Raises:
      ValueError: fewer queries can be drawn than a step has.
    """
    config, task = parts.config, parts.task
    self._config, self._task, self.table = config, task, table
    self._sampler, self._reward = parts.sampler, parts.reward
    shares = len(parts.sampler.devices) * jax.process_count()
    self._num_shares = shares * num_micro_batches(config, shares)
    self._model, self.padding = parts.pretrained.config, padding_of(platform_of(parts.sampler.devices))
    self._behavior = config.behavior
    self._objective = config.loss.name if config.method == "gfn" else config.method
    self._better_prefixes = config.replay.better_prefixes and config.method == "gfn"
    self._replay_settings = {
      "capacity": config.replay.capacity,
      "similarity": config.replay.similarity,
      "max_length": config.sampler.max_length,
    }
    self.replay = ReplayBuffer(**self._replay_settings)
    by_demonstrations = config.method == "sft" or config.replay.seed_from == "demonstrations"
    self.num_seeded = task.num_seeded if by_demonstrations else 0
    self.weights = np.full(len(task.examples), config.data.unseeded_weight, np.float64)
    self.weights[: self.num_seeded] = config.data.seeded_weight
    drawable, wanted = int((self.weights > 0).sum()), config.train.num_queries
    if config.method != "sft" and (not drawable or drawable < wanted <= len(self.weights)):
      raise ValueError(
        f"config.train.num_queries {wanted}: only {drawable} queries have a weight above 0 (config.data.seeded_weight "
        f"{config.data.seeded_weight}, config.data.unseeded_weight {config.data.unseeded_weight})"
      )

  def score(self, ids: np.ndarray, z: Trajectory, wanted: Bool[np.ndarray, "B S"]) -> Float[np.ndarray, "B S"]:
    """log R of the `wanted` prefixes of N trajectories of each query, nats, untempered; NaN elsewhere."""
    return np.where(wanted, self._reward(self.table[ids], z.tokens, z.length, wanted), np.float32(np.nan))

  def to_arrays(self) -> dict[str, np.ndarray]:
    """What a checkpoint keeps of the collector."""
    return self.replay.to_arrays()

  def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Goes on with what `to_arrays` gave; {} is the empty buffer."""
    if arrays:
      self.replay = ReplayBuffer.from_arrays(arrays, **self._replay_settings)

  def seed_replay(self, on_round: Callable[[], None] | None = None) -> str:
    """Fills the buffer before the first step, as config.replay.seed_from says; what with, in words, "" for nothing.

    `on_round` is called between device rounds, where there are any.
    """
    if self._config.replay.seed_from in ("inverse_prompt", "samples"):
      return self._seed_by_sampling(on_round)
    return self._seed_by_demonstrations()

  def _seed_by_demonstrations(self) -> str:
    max_length, seeded = self._config.sampler.max_length, self._task.examples[: self.num_seeded]
    found = [(i, self._task.rationale_tokens(e, max_length)) for i, e in enumerate(seeded)]
    found = [(i, *z) for i, z in found if z is not None]
    if found:
      ids, tokens, chosen = zip(*found)
      length = np.array([len(row) for row in tokens], np.int32)
      (tokens, _), (chosen, _) = data.pad_right(tokens, max_length), data.pad_right(chosen, max_length)
      blank = np.zeros(tokens.shape, np.float32)
      z = Trajectory(tokens, length, chosen.astype(bool), blank, np.pad(blank, ((0, 0), (0, 1))))
      log_reward = self.score(np.array(ids), z, self._wanted(z, data.SEED_PREFIX_STREAM, 0))
      for row, q in enumerate(ids):
        at = slice(row, row + 1)
        self.replay.add(q, tokens[at], length[at], z.action_mask[at], log_reward[at])
    fit = f"{len(found)} of {self.num_seeded} demonstrations fit {max_length} tokens"
    return fit if self.num_seeded else ""

  def _seed_by_sampling(self, on_round: Callable[[], None] | None) -> str:
    """What the base writes: behind the prompts, or the reasons it gives when it is told the answer (appendix D).

    Those are scored behind the plain prompt.
    """
    task, config, queries = self._task, self._config, self.table
    told = config.replay.seed_from == "inverse_prompt"
    if told:
      prompts = [dataclasses.replace(e, prompt=task.inverse_prompt(e), reward_prompt=None) for e in task.examples]
      queries = data.query_table(prompts, task, self._model.max_positions, config.sampler.max_length)
    z = self._sampler.draw(
      None, queries.prompt_tokens, queries.prompt_mask, num_samples=config.replay.num_seed_samples, temperature=1.0,
      key=data.step_key(config.seed, data.SEED, 0), on_round=on_round,
    )  # fmt: skip
    rows = np.arange(len(z.length))
    if told:
      length = [len(task.first_words(row[:n].tolist())) for row, n in zip(z.tokens, z.length)]
      z = z.beginnings(np.array(length, np.int32))
      rows = np.flatnonzero(z.length)
    ids = np.arange(len(task.examples))
    self._keep(ids, z, self.score(ids, z, self._wanted(z, data.SEED_PREFIX_STREAM, 0)), rows)
    return f"{len(self.replay)} rationales of {len(rows)} by the base" if len(rows) else ""

  def _keep(self, ids: np.ndarray, z: Trajectory, log_reward: np.ndarray, rows: np.ndarray) -> None:
    """Adds the `rows` of N samples of each query to the buffer, perhaps with what they begin with and is worth more."""
    ends, query_of = z.length[rows], rows // (len(z.length) // len(ids))
    if self._better_prefixes:
      found, ends = np.nonzero(better_prefixes(log_reward[rows], ends, self._config.sampler.min_length))
      rows, query_of = rows[found], query_of[found]
    for j, q in enumerate(ids):
      at = query_of == j
      of = rows[at]
      self.replay.add(int(q), z.tokens[of], ends[at], z.action_mask[of], log_reward[of])

  def __call__(
    self, trained: Mapping[str, Any], step: int, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> tuple[Batch, dict[str, float]]:
    """The step's batch, sampled by the adapter in `trained`, and metrics of its fresh samples. Fills the buffer."""
    draft = self.begin(trained["lora"], step, key)
    return self.batch(draft, self.finish(draft, on_round))

  def begin(self, lora: Lora, step: int, key: jax.Array) -> Draft:
    """Sends for the step's samples, as `Sampler.begin` does. The buffer must hold what the steps before it found."""
    config = self._config
    plan = data.plan_step(config.seed, step, self.weights, config.train.num_queries, self._behavior)
    replayed = np.array(
      [from_buffer and int(q) in self.replay for q, from_buffer in zip(plan.query_ids, plan.from_buffer)]
    )
    fresh = np.flatnonzero(~replayed)
    if not len(fresh):
      return Draft(step, plan, fresh, None)
    # Padded to one of two counts, so that shapes do not change.
    total, usual = len(plan.query_ids), data.num_sampled(self._behavior, len(plan.query_ids))
    padded = np.resize(fresh, usual if len(fresh) <= usual else total)
    n, q = config.sampler.num_samples, self.table[plan.query_ids[padded]]
    rollout = self._sampler.begin(
      lora, q.prompt_tokens, q.prompt_mask, num_samples=n, temperature=plan.temperature[padded], key=key,
      row_ids=padded[:, None] * n + np.arange(n),
    )  # fmt: skip
    return Draft(step, plan, fresh, rollout)

  def finish(self, draft: Draft, on_round: Callable[[], None] | None = None) -> tuple[Trajectory, np.ndarray] | None:
    """The fresh samples with their log R [B, S], which go into the buffer too; None where all is replayed."""
    if draft.rollout is None:
      return None
    z, log_reward = self._scored(draft, on_round)
    self._keep(draft.plan.query_ids[draft.fresh], z, log_reward, np.arange(len(z.length)))
    return z, log_reward

  def batch(self, draft: Draft, samples: tuple[Trajectory, np.ndarray] | None) -> tuple[Batch, dict[str, float]]:
    """The step's batch of what `finish` gave and of the buffer as that left it, and metrics of the samples."""
    config, plan, fresh = self._config, draft.plan, draft.fresh
    n, t = config.sampler.num_samples, config.sampler.max_length
    shapes = (((t,), np.int32), ((), np.int32), ((t,), bool), ((t + 1,), np.float32))
    fields = [np.zeros((len(plan.query_ids), n, *shape), dtype) for shape, dtype in shapes]
    metrics = {}
    if samples is not None:
      z, log_reward = samples
      for field, values in zip(fields, (z.tokens, z.length, z.action_mask, log_reward)):
        field[fresh] = values.reshape(len(fresh), n, *values.shape[1:])
      metrics = self._sample_metrics(plan, fresh, z, log_reward)
    rng = data.step_rng(config.seed, data.REPLAY_STREAM, draft.step)
    replayed = np.setdiff1d(np.arange(len(plan.query_ids)), fresh)
    for j in replayed:
      sampled = self.replay.sample(int(plan.query_ids[j]), n, rng, config.replay.prioritized)
      for field, values in zip(fields, sampled):
        field[j] = values
    tokens, length, action_mask, log_reward = (f.reshape(-1, *f.shape[2:]) for f in fields)
    batch = self._batch(plan.query_ids, tokens, length, action_mask, log_reward)
    return batch, metrics | {"replayed_queries": float(len(replayed)), "replay_size": float(len(self.replay))}

  def _batch(self, query_ids, tokens, length, action_mask, log_reward) -> Batch:
    q = self.table[query_ids]
    prompts = [row[mask] for row, mask in zip(q.prompt_tokens, q.prompt_mask)]
    of_query = q.prompt_tokens.shape[1], len(tokens) // len(q), tokens.shape[1]
    size = bin_size(*of_query, self._model.hidden_size, self.padding)
    whole = self._objective == "vargrad" and self.padding.bin_by_bin  # it compares the samples of a query
    trees = build_trees(prompts, tokens, length, size, self._num_shares, self.padding, whole)
    return Batch(
      query_ids.astype(np.int32), tokens, length, action_mask,
      terminable_prefixes(length, action_mask) & ~np.isnan(log_reward), log_reward, trees,
    )  # fmt: skip

  def _scored(self, draft: Draft, on_round: Callable[[], None] | None) -> tuple[Trajectory, np.ndarray]:
    """The fresh queries' samples, without what padded them, and their log R."""
    n = self._config.sampler.num_samples
    z = self._sampler.finish(draft.rollout, on_round).rows(slice(0, len(draft.fresh) * n))
    return z, self.score(draft.plan.query_ids[draft.fresh], z, self._wanted(z, data.PREFIX_STREAM, draft.step))

  def _wanted(self, z: Trajectory, stream: int, step: int) -> np.ndarray:
    """`scored_prefixes` of fresh samples, or of what seeds the buffer: as many of each, whose pairs weigh alike.

    All, where the buffer is to have those that an objective of whole samples would not ask for.
    """
    if self._better_prefixes and self._objective not in PREFIX_LOSSES:
      return z.terminable
    rng = data.step_rng(self._config.seed, stream, step)
    return scored_prefixes(self._objective, self._config.loss.num_prefixes, z.length, z.terminable, rng)

  def _sample_metrics(self, plan, fresh, z, log_reward) -> dict[str, float]:
    n = self._config.sampler.num_samples
    on_policy = np.repeat(plan.temperature[fresh] == 1, n)
    examples = [self._task.examples[q] for q in np.repeat(plan.query_ids[fresh], n)]
    final = np.take_along_axis(log_reward, z.length[:, None], axis=1)[:, 0]
    rows = np.flatnonzero(on_policy)
    if not len(rows):
      return {}
    metrics = {"log_reward_policy_mean": float(final[rows].mean())}
    right = [self._task.is_right(examples[i], z.tokens[i][: z.length[i]].tolist()) for i in rows]
    return metrics if right[0] is None else metrics | {"accuracy": float(np.mean(right))}


class DemonstrationCollector(Collector):
  """Demonstrations alone, for supervised fine-tuning: as many rows a step as `Collector` has.

  Demonstrations of one prompt (the rationales of an M-step) are drawn together and share its keys and values: as many
  as every prompt has, but of at least `MIN_PROMPTS` prompts a step. Where prompts have one each, a row is a query, and
  so it is where devices or micro-batches could not share the prompts evenly.
  """

  def score(self, ids, z, wanted):
    return np.zeros(z.log_pterm.shape, np.float32)  # no reward enters the loss

  def seed_replay(self, on_round: Callable[[], None] | None = None) -> str:
    """The demonstrations that fit. Raises ValueError where no demonstration is left to learn from."""
    del on_round
    said = self._seed_by_demonstrations()
    if not len(self.replay):
      raise ValueError(
        f"config.method 'sft' learns from demonstrations, and of the data's {self.num_seeded} none has at most "
        f"config.sampler.max_length {self._config.sampler.max_length} tokens"
      )
    return said

  def _by_prompt(self) -> list[np.ndarray]:
    """The queries that hold a demonstration, [prompts][demonstrations]."""
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(self._task.examples):
      if i in self.replay:
        groups.setdefault(example.prompt, []).append(i)
    return [np.array(group) for group in groups.values()]

  def __call__(
    self, trained: Mapping[str, Any], step: int, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> tuple[Batch, dict[str, float]]:
    """The step's batch of demonstrations, drawn by (seed, step); no metrics, since nothing is sampled."""
    del trained, key, on_round
    config, groups = self._config, self._by_prompt()
    rows = config.train.num_queries * config.sampler.num_samples
    most = min(map(len, groups))
    together = max(n for n in range(1, most + 1) if n == 1 or (rows % n == 0 and rows // n >= MIN_PROMPTS))
    if rows // together % self._num_shares:
      together = 1
    if together == 1:  # rows are then as likely as one another, however many share a prompt
      groups = [group[i : i + 1] for group in groups for i in range(len(group))]
    plan = data.plan_step(config.seed, step, np.ones(len(groups)), rows // together, self._behavior)
    rng = data.step_rng(config.seed, data.REPLAY_STREAM, step)
    drawn = [g if len(g) == 1 else rng.choice(g, together, replace=False) for g in (groups[i] for i in plan.query_ids)]
    queries = np.array([ids[0] for ids in drawn])
    rationales = [self.replay.sample(int(i), 1, rng, config.replay.prioritized) for ids in drawn for i in ids]
    return self._batch(queries, *(np.concatenate(field) for field in zip(*rationales))), {}
