"""Examples -> arrays, and what a step draws: queries, behaviours, temperatures are functions of (seed, step) alone."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jaxtyping import Bool, Int
import numpy as np

from gfn_jax.types import Example, Queries

# Streams of host randomness; each step's generator is seeded by (seed, stream, step).
PLAN_STREAM, REPLAY_STREAM, PREFIX_STREAM, SEED_PREFIX_STREAM = range(4)

# Purposes of device randomness.
INIT, SAMPLE, DROPOUT, EVALUATE, SEED = range(5)


def step_rng(seed: int, stream: int, step: int) -> np.random.Generator:
  """The generator of one purpose at one step."""
  return np.random.default_rng((seed, stream, step))


def step_key(seed: int, purpose: int, step: int) -> jax.Array:
  """The key of one purpose at one step."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """What one step does.

  Attributes:
    query_ids: int [Q].
    from_buffer: bool [Q], queries to replay (those with an empty buffer are sampled instead).
    temperature: float [Q], of the behaviour policy; 1 is the policy itself.
  """

  query_ids: np.ndarray
  from_buffer: np.ndarray
  temperature: np.ndarray


def num_by_behavior(behavior, num_queries: int) -> tuple[int, int]:
  """How many of a step's queries are (replayed, sampled from the tempered policy)."""
  replayed = round(behavior.buffer * num_queries)
  return replayed, min(round(behavior.tempered * num_queries), num_queries - replayed)


def num_sampled(behavior, num_queries: int) -> int:
  """How many queries a step samples where all it wants to replay has something to."""
  return num_queries - num_by_behavior(behavior, num_queries)[0]


def plan_step(seed: int, step: int, weights: np.ndarray, num_queries: int, behavior) -> StepPlan:
  """Draws a step (paper section 3.3): queries by weight, and fixed counts of buffer, tempered and policy queries.

  Without replacement, where enough queries have a weight above 0.

  Args:
    weights: float [examples].
    behavior: the config's shares `buffer` and `tempered`, and the range `temperature_low` to `temperature_high`.
  """
  rng = step_rng(seed, PLAN_STREAM, step)
  too_few = np.count_nonzero(weights) < num_queries
  query_ids = rng.choice(len(weights), num_queries, replace=too_few, p=weights / weights.sum())
  num_buffer, num_tempered = num_by_behavior(behavior, num_queries)
  order = np.arange(num_queries)
  temperature = np.ones(num_queries, np.float32)
  tempered = (order >= num_buffer) & (order < num_buffer + num_tempered)
  temperature[tempered] = rng.uniform(behavior.temperature_low, behavior.temperature_high, tempered.sum())
  return StepPlan(query_ids, order < num_buffer, temperature)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "Q P"], Bool[np.ndarray, "Q P"]]:
  """Token ids and their mask, as prompts are laid out; P is a multiple of 8, so that like prompts share programs."""
  width = -(-max(map(len, rows)) // 8) * 8
  tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
  return tokens, mask


def pad_right(rows: Sequence[Sequence[int]], width: int = 1) -> tuple[Int[np.ndarray, "Q Y"], Bool[np.ndarray, "Q Y"]]:
  """Token ids and their mask, as targets and samples are laid out; Y is at least `width`."""
  width = max([width, *map(len, rows)])
  tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def query_table(examples: Sequence[Example], task: Any, max_positions: int, reserved: int) -> Queries:
  """Tokenises examples.

  Args:
    task: `encode_prompt` and `encode_after` of it read prompts and targets.
    max_positions: the model's; `reserved`: tokens that context, Z and whatever else will take beside prompt and target.

  Raises:
    ValueError: a prompt that is empty or does not fit, by name.
  """
  prompts = [task.encode_prompt(e.prompt) for e in examples]
  reward_prompts = [
    prompt if e.reward_prompt is None else task.encode_prompt(e.reward_prompt) or task.beginning()
    for e, prompt in zip(examples, prompts)
  ]
  targets = [[task.encode_after(text) for text in (e.target, *e.rivals)] for e in examples]
  num_targets = max(map(len, targets), default=1)
  for example, *both, of_query in zip(examples, prompts, reward_prompts, targets):
    needed = max(map(len, of_query)) + reserved
    of_query += [[]] * (num_targets - len(of_query))
    for text, prompt in zip((example.prompt, example.rewarded_prompt), both):
      if not prompt:
        raise ValueError(f"prompt {text!r} has no tokens: one must stand before Z, which {example.target!r} follows")
      if len(prompt) + needed > max_positions:
        raise ValueError(
          f"prompt {text[:200]!r} has {len(prompt)} tokens: with {needed} more it exceeds the model's "
          f"{max_positions} positions"
        )
  rows = np.empty(len(examples), object)
  rows[:] = examples
  padded = pad_right([target for of_query in targets for target in of_query])
  target_tokens, target_mask = (x.reshape(len(examples), num_targets, x.shape[-1]) for x in padded)
  return Queries(*pad_left(prompts), *pad_left(reward_prompts), target_tokens, target_mask, rows)
