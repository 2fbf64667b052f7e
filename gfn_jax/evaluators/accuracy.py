"""Accuracy by majority vote over sampled rationales (paper section 4.4), for each kind of problem."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.evaluators.evaluator import Evaluator, Problems
from gfn_jax.evaluators.records import sample_records
from gfn_jax.models import Lora

SHOWN = 20  # problems of a kind whose samples are recorded


class Accuracy(Evaluator):
  """Samples config.eval.num_votes rationales a problem, takes the majority answer (`task.predict`), and compares."""

  needs = ("predict",)

  def __init__(self, parts, context=(), draws=None):
    super().__init__(parts, context, draws)
    self._draw = self._sampler().draw

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields ("accuracy/3", 0.95), ...; row r of the concatenated problems draws from fold_in(key, r)."""
    examples = [e for kind in problems.values() for e in kind]
    parts, task, settings = self._parts, self._parts.task, self._parts.config.eval
    votes, reserved = settings.num_votes, settings.max_length + len(self._context)
    queries = query_table(examples, task, parts.pretrained.config.max_positions, reserved)
    z = self._draw(
      lora, queries.prompt_tokens, queries.prompt_mask, num_samples=votes, temperature=settings.temperature, key=key,
      on_round=on_round,
    )  # fmt: skip
    answers = [row[:n] for row, n in zip(z.tokens.tolist(), z.length)]
    right = [task.predict(answers[i * votes : (i + 1) * votes]) == e.answer for i, e in enumerate(examples)]
    kinds = [kind for kind, es in problems.items() for _ in es]
    shown = np.array([i for kind in problems for i in [j for j, k in enumerate(kinds) if k == kind][:SHOWN]])
    rows = (shown[:, None] * votes + np.arange(votes)).reshape(-1)
    records = sample_records(task, parts.reward, queries[shown], z.rows(rows))
    self.samples = [{"kind": kinds[row // votes], **record} for row, record in zip(rows, records)]
    for kind in problems:
      name = f"accuracy/{kind}" if kind else "accuracy"
      yield name, float(np.mean([r for r, k in zip(right, kinds) if k == kind]))
