"""A run's pictures, from its metrics.jsonl and samples.jsonl."""

import os

from gfn_jax.files import Path, to_path
from gfn_jax.plots.curves import plot_curves
from gfn_jax.plots.frontier import plot_frontier
from gfn_jax.plots.numbers import plot_numbers

TASK_PLOTS = {  # beside the curves, which every task has
  "next_sentence": lambda workdir: plot_frontier([workdir], workdir / "plots" / "frontier.png"),
  "rng": lambda workdir: plot_numbers([workdir], workdir / "plots" / "numbers.png"),
}


def plot_run(workdir: str | os.PathLike, task: str) -> list[Path]:
  """Writes plots/*.png; returns what was written."""
  workdir = to_path(workdir)
  extra = TASK_PLOTS.get(task)
  return plot_curves(workdir, task) + (extra(workdir) if extra else [])
