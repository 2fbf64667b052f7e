"""Which adapter a run leaves, and when it stops early: by the held-out spread of log R / T - log q.

Never by the mean log-likelihood, which a policy that has collapsed onto one mode maximises.
"""

import math
from typing import Any

from gfn_jax import distributed
from gfn_jax.files import Path
from gfn_jax.metrics import read_jsonl
from gfn_jax.models import Lora, Pretrained, load_adapter, save_adapter


class Selection:
  """The evaluations so far. Its memory is metrics.jsonl, so a run that goes on remembers what it had found.

  Args:
    settings: config.train. metric: what evaluations call the spread; lower is better.
    first_step: evaluations before it are of another reward temperature than the last, and do not count: their spreads
      do not compare (that of a base at T = 1 may well be 0).

  Attributes:
    best_step: of the best evaluation; None before the first.
  """

  def __init__(self, settings: Any, workdir: Path, metric: str, first_step: int):
    self._keeps_best, self._patience, self._metric = settings.keep == "best", settings.patience, metric
    self._folder, self._first_step = workdir / "best", first_step
    records = read_jsonl(workdir / "metrics.jsonl")
    self._history = [(r["step"], r[metric]) for r in records if metric in r and r["step"] >= first_step]

  @property
  def best_step(self) -> int | None:
    return min(self._history, key=lambda found: found[1])[0] if self._history else None

  def consider(self, step: int, values: dict[str, float], lora: Lora, pretrained: Pretrained) -> None:
    """Takes an evaluation; keeps its adapter if it is the best so far.

    Raises:
      ValueError: the evaluation lacks the metric, or it is not finite.
    """
    value = values.get(self._metric, math.nan)
    if not math.isfinite(value) and (self._keeps_best or self._patience):
      raise ValueError(
        f"config.train.keep and patience go by {self._metric}, which is {value} at step {step}: "
        "they need held-out queries, and a step that samples some"
      )
    if not math.isfinite(value) or step < self._first_step:
      return
    self._history.append((step, value))
    # A folder each: a run that is killed and goes on from before this step may not come to the same best.
    if self._keeps_best and self.best_step == step and distributed.is_first():
      save_adapter(self._folder / str(step), lora, pretrained)

  def is_over(self) -> bool:
    """Whether the last `patience` evaluations were no better than one before them."""
    if not self._patience or not self._history:
      return False
    steps = [step for step, _ in self._history]
    return len(steps) - 1 - steps.index(self.best_step) >= self._patience

  def load(self, pretrained: Pretrained) -> Lora:
    """The best evaluation's adapter."""
    distributed.wait_for_all("the best adapter")
    return load_adapter(self._folder / str(self.best_step), pretrained)
