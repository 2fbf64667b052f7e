"""What can be said of any sampled texts: their reward, their variety, whether they are right."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.evaluators.evaluator import Evaluator, Problems
from gfn_jax.evaluators.records import sample_records
from gfn_jax.models import Lora

SHOWN = 8  # prompts whose first sample is recorded


class Texts(Evaluator):
  """Samples config.eval.num_votes texts a prompt."""

  def __init__(self, parts, context=()):
    super().__init__(parts, context)
    self._draw = self._sampler().draw

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields, meaned over prompts: `log_reward` (nats) of a sample and `log_reward_best` of a prompt's best,
    `distinct_share` of a prompt's samples, and `right` (a share) where the task can tell."""
    parts, task, settings = self._parts, self._parts.task, self._parts.config.eval
    examples, n = [e for kind in problems.values() for e in kind], settings.num_votes
    reserved = settings.max_length + len(self._context)
    queries = query_table(examples, task, parts.pretrained.config.max_positions, reserved)
    z = self._draw(
      lora, queries.prompt_tokens, queries.prompt_mask, num_samples=n, temperature=settings.temperature, key=key,
      on_round=on_round,
    )  # fmt: skip
    records = sample_records(task, parts.reward, queries, z)
    self.samples = records[: SHOWN * n : n]
    log_reward = np.array([r["log_R"] for r in records]).reshape(-1, n)
    yield "log_reward", float(log_reward.mean())
    yield "log_reward_best", float(log_reward.max(-1).mean())
    texts = [r["Z"] for r in records]
    yield "distinct_share", float(np.mean([len(set(texts[i : i + n])) / n for i in range(0, len(texts), n)]))
    if "right" in records[0]:
      yield "right", float(np.mean([r["right"] for r in records]))
