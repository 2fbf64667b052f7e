"""Accuracy by majority vote over sampled rationales (paper section 4.4), for each kind of problem."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.evaluators.records import sample_records
from gfn_jax.models import Lora, Pretrained
from gfn_jax.rewards import RewardModel
from gfn_jax.sampler import Sampler
from gfn_jax.types import Example

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
      max_length=settings.max_length, min_length=min_length, tool=task.tool, context=context,
      num_replaced=len(task.start_tokens), devices=devices,
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
    table = query_table(examples, task, self._max_positions, self._settings.max_length + self._context_length)
    z = self._sampler.draw(
      lora, table.prompt_tokens, table.prompt_mask, num_samples=votes, temperature=self._settings.temperature, key=key,
      on_round=on_round,
    )  # fmt: skip
    answers = [row[:n] for row, n in zip(z.tokens.tolist(), z.length)]
    right = [task.predict(answers[i * votes : (i + 1) * votes]) == e.answer for i, e in enumerate(examples)]
    kinds = [kind for kind, es in problems.items() for _ in es]
    shown = np.array([i for kind in problems for i in [j for j, k in enumerate(kinds) if k == kind][:SHOWN]])
    firsts = z.rows(shown * votes)
    records = sample_records(task, self._reward_model, [examples[i] for i in shown], table[shown], firsts)
    self.samples = [{"kind": kinds[i], **record} for i, record in zip(shown, records)]
    for kind in problems:
      yield f"accuracy/{kind}", float(np.mean([r for r, k in zip(right, kinds) if k == kind]))
