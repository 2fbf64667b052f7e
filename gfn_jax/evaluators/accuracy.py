"""Accuracy by majority vote over sampled rationales (paper section 4.4), for each kind of problem."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.models import Lora, Pretrained
from gfn_jax.rewards import RewardModel
from gfn_jax.sampler import Sampler
from gfn_jax.types import Example

ROWS_PER_CALL = 1280
SHOWN = 4  # problems of a kind whose first sample is recorded


class Accuracy:
  """Samples `num_votes` rationales a problem, takes the majority answer, and compares.

  Args:
    task: the task. pretrained: the base. params: its parameters as placed on `devices`.
    settings: config.eval. min_length: of Z.
    reward_model: scores the recorded samples.
    context: tokens before every question (k-shot baselines).
  """

  def __init__(
    self,
    task: Any,
    pretrained: Pretrained,
    params: dict,
    settings: Any,
    *,
    min_length: int,
    reward_model: RewardModel,
    context: Sequence[int] = (),
    devices: Sequence[jax.Device],
  ):
    self._task, self._settings, self._reward_model = task, settings, reward_model
    self._max_positions = pretrained.config.max_positions
    self._context_length = len(context)
    self._sampler = Sampler(
      pretrained.config, params, allowed_tokens=task.allowed_tokens, stop_token_id=task.stop_token_id,
      max_length=settings.max_length, min_length=min_length, tool=task.tool, context=context, devices=devices,
    )  # fmt: skip
    self.samples: list[dict] = []

  def __call__(
    self,
    lora: Lora | None,
    problems: Mapping[str, Sequence[Example]],
    key: jax.Array,
    on_round: Callable[[], None] | None = None,
  ) -> Iterator[tuple[str, float]]:
    """Yields ("accuracy/3", 0.95), ...; `samples` then holds what samples.jsonl records.

    Args:
      problems: kind -> examples.
      key: row r of the concatenated problems draws from fold_in(key, r).
    """
    examples = [e for kind in problems.values() for e in kind]
    votes, task = self._settings.num_votes, self._task
    table = query_table(examples, task.encode, self._max_positions, self._settings.max_length + self._context_length)
    devices = len(self._sampler.devices)
    chunk = min(-(-len(examples) // devices), max(1, ROWS_PER_CALL // votes // devices)) * devices
    right, self.samples, kinds = [], [], [kind for kind, es in problems.items() for _ in es]
    shown = {i for kind in problems for i in [j for j, k in enumerate(kinds) if k == kind][:SHOWN]}
    for begin in range(0, len(examples), chunk):
      ids = np.minimum(np.arange(begin, begin + chunk), len(examples) - 1)  # the last call is padded
      batch = table[ids]
      trajectories = self._sampler(
        lora, batch.prompt_tokens, batch.prompt_mask, num_samples=votes,
        temperature=np.full(chunk, self._settings.temperature), key=key,
        row_ids=np.arange(begin, begin + chunk)[:, None] * votes + np.arange(votes), on_round=on_round,
      )  # fmt: skip
      for i in range(begin, min(begin + chunk, len(examples))):
        rows = range((i - begin) * votes, (i - begin + 1) * votes)
        answers = [trajectories.tokens[r][: trajectories.length[r]].tolist() for r in rows]
        right.append(task.predict(answers) == examples[i].answer)
      here = [i for i in range(begin, min(begin + chunk, len(examples))) if i in shown]
      if here:
        self._record(examples, kinds, here, [(i - begin) * votes for i in here], table, trajectories)
    for kind in problems:
      yield f"accuracy/{kind}", float(np.mean([r for r, k in zip(right, kinds) if k == kind]))

  def _record(self, examples, kinds, ids, rows, table, trajectories) -> None:
    queries, firsts = table[np.array(ids)], trajectories.rows(np.array(rows))
    whole = np.arange(firsts.tokens.shape[1] + 1) == firsts.length[:, None]
    parts = self._reward_model(
      queries.prompt_tokens, queries.prompt_mask, firsts.tokens, firsts.length, whole,
      queries.target_tokens, queries.target_mask,
    )  # fmt: skip
    log_reward, log_q = np.where(whole, parts[0] + parts[1], 0.0).sum(-1), firsts.log_q
    for j, i in enumerate(ids):
      z = firsts.tokens[j][: firsts.length[j]].tolist()
      self.samples.append({
        "kind": kinds[i], "X": examples[i].prompt, "Z": self._task.decode(z), "Y": examples[i].target,
        "log_q": round(float(log_q[j]), 4), "log_R": round(float(log_reward[j]), 4),
        "right": self._task.is_right(examples[i], z),
      })  # fmt: skip
