"""Likelihood against diversity of next sentences, as the paper's Fig. 3."""

from collections.abc import Mapping, Sequence
import os

import numpy as np

from gfn_jax.files import Path, read_json, to_path
from gfn_jax.metrics import read_jsonl
from gfn_jax.plots.figure import figure
from gfn_jax.results import label

_TASK = "next_sentence"


def points(results: Mapping[str, float]) -> dict[str, tuple[float, float]]:
  """method -> (diversity, max log-likelihood) of the methods that have both."""
  found = {}
  for key, value in results.items():
    task, _, rest = key.partition("/")
    method, _, metric = rest.partition("/")
    if task == _TASK and metric == "diversity" and f"{_TASK}/{method}/max_log_likelihood" in results:
      found[method] = value, results[f"{_TASK}/{method}/max_log_likelihood"]
  found.pop("validation", None)
  return found


def mean_points(workdirs: Sequence[Path]) -> dict[tuple[str, float | None], tuple[float, float]]:
  """(method, reward temperature) -> its mean point; the temperature is None for what no run has trained."""
  found: dict[tuple[str, float | None], list[tuple[float, float]]] = {}
  for run in workdirs:
    config = read_json(run / "config.json")["config"]
    for method, point in points(_final(run)).items():
      temperature = config["reward.temperature_end"] if method == config["method"] else None
      found.setdefault((method, temperature), []).append(point)
  return {key: tuple(np.mean(values, axis=0).tolist()) for key, values in found.items()}


def plot_frontier(workdirs: Sequence[str | os.PathLike], path: str | os.PathLike) -> list[Path]:
  """The base's decoders, tempered sampling joined by a line, and the policies at each T; means over the runs.

  Args:
    workdirs: runs that differ in their reward temperature, their method and their seed. path: the PNG to write.
  """
  found = mean_points([to_path(w) for w in workdirs])
  if not found:
    return []
  others = {method: point for (method, temperature), point in found.items() if temperature is None}
  with figure(path, "next sentences", "sentence diversity", "max. log-likelihood (nats)") as ax:
    tempered = sorted(p for m, p in others.items() if m == "base" or m.startswith("sampling_"))
    if tempered:
      ax.plot(*zip(*tempered), "o--", label="sampling at several temperatures")
    for method, point in sorted(others.items()):
      if point not in tempered:
        ax.plot(*point, "s", label=label(method))
    for (method, temperature), point in sorted((k, p) for k, p in found.items() if k[1] is not None):
      ax.plot(*point, "*", markersize=12, label=f"{label(method)}, T = {temperature:g}")
  return [to_path(path)]


def _final(workdir: Path) -> dict[str, float]:
  """The record of the final evaluation, the only one that tests a method by its name."""
  return next((r for r in reversed(read_jsonl(workdir / "metrics.jsonl")) if points(r)), {})
