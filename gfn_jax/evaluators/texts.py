"""What can be said of any sampled texts: their reward, their variety, whether they are right."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from gfn_jax.evaluators.evaluator import Evaluator, Problems
from gfn_jax.models import Lora

SHOWN = 8  # prompts whose first sample is recorded


class Texts(Evaluator):
  """Samples config.eval.num_votes texts a prompt."""

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields, meaned over prompts: `log_reward` (nats) of a sample and `log_reward_best` of a prompt's best,
    `distinct_share` of a prompt's samples, and `right` (a share) where the task can tell."""
    n = self._parts.config.eval.num_votes
    _, records = self._sample(lora, problems, key, on_round)
    self.samples = records[: SHOWN * n : n]
    log_reward = np.array([r["log_R"] for r in records]).reshape(-1, n)
    yield "log_reward", float(log_reward.mean())
    yield "log_reward_best", float(log_reward.max(-1).mean())
    texts = [r["Z"] for r in records]
    yield "distinct_share", float(np.mean([len(set(texts[i : i + n])) / n for i in range(0, len(texts), n)]))
    if "right" in records[0]:
      yield "right", float(np.mean([r["right"] for r in records]))
