"""What samples.jsonl and `generate` tell of a sample."""

from typing import Any

from gfn_jax.rewards import whole_log_rewards
from gfn_jax.task import Task
from gfn_jax.types import Queries, Trajectory


def sample_records(task: Task, reward: Any, queries: Queries, z: Trajectory) -> list[dict]:
  """A record of each trajectory: X, Z and Y as text, log q(Z stop) and log R(Z) in nats, and whether Z is right.

  Args:
    task: decodes, and judges: a verdict of None is left out.
    reward: gives log R, untempered; None leaves log R and Y out.
    queries: Q of them; `z` has Q * N rows, grouped by query.
  """
  log_q, log_reward = z.log_q, None
  if reward is not None:
    log_reward = whole_log_rewards(reward, queries, z.tokens, z.length)
  records, num_samples = [], len(z.length) // len(queries)
  for row, (tokens, length) in enumerate(zip(z.tokens, z.length)):
    example, tokens = queries.examples[row // num_samples], tokens[:length].tolist()
    record = {"X": example.prompt, "Z": task.decode(tokens), "log_q": round(float(log_q[row]), 4)}
    if log_reward is not None:
      record |= {"Y": example.target, "log_R": round(float(log_reward[row]), 4)}
    verdict = task.is_right(example, tokens)
    records.append(record if verdict is None else record | {"right": verdict})
  return records
