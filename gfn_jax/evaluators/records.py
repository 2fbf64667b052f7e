"""What samples.jsonl and `generate` tell of a sample."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gfn_jax.data import QueryTable
from gfn_jax.rewards import RewardModel
from gfn_jax.types import Example, Trajectory


def sample_records(
  task: Any, reward_model: RewardModel | None, examples: Sequence[Example], queries: QueryTable, z: Trajectory
) -> list[dict]:
  """A record of each trajectory: X, Z and Y as text, log q(Z stop) and log R(Z) in nats, and whether Z is right.

  Args:
    task: decodes, and judges: a verdict of None is left out.
    reward_model: gives log R, untempered; None leaves log R and Y out.
    examples, queries: Q of them; `z` has Q * N rows, grouped by query.
  """
  whole = np.arange(z.tokens.shape[1] + 1) == z.length[:, None]
  log_q, log_reward = z.log_q, None
  if reward_model is not None:
    parts = reward_model(
      queries.prompt_tokens, queries.prompt_mask, z.tokens, z.length, whole, queries.target_tokens, queries.target_mask
    )
    log_reward = np.where(whole, parts[0] + parts[1], 0.0).sum(-1)
  records, num_samples = [], len(z.length) // len(examples)
  for row, (tokens, length) in enumerate(zip(z.tokens, z.length)):
    example, tokens = examples[row // num_samples], tokens[:length].tolist()
    record = {"X": example.prompt, "Z": task.decode(tokens), "log_q": round(float(log_q[row]), 4)}
    if log_reward is not None:
      record |= {"Y": example.target, "log_R": round(float(log_reward[row]), 4)}
    verdict = task.is_right(example, tokens)
    records.append(record if verdict is None else record | {"right": verdict})
  return records
