"""Likelihood against diversity of next sentences, as the paper's Fig. 3."""

from collections.abc import Mapping, Sequence
import os
import pathlib

from gfn_jax.files import read_json
from gfn_jax.metrics import read_jsonl
from gfn_jax.plots.figure import figure
from gfn_jax.report import label

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


def plot_frontier(workdirs: Sequence[str | os.PathLike], path: str | os.PathLike) -> list[pathlib.Path]:
  """The decoders of the first run, tempered sampling joined by a line, and the policy of every run with its T.

  Args:
    workdirs: runs that differ in their reward temperature. path: the PNG to write.
  """
  runs = [pathlib.Path(w) for w in workdirs]
  finals = [_final(run) for run in runs]
  others = points(finals[0])
  if not others:
    return []
  with figure(path, "next sentences", "sentence diversity", "max. log-likelihood (nats)") as ax:
    tempered = sorted(p for m, p in others.items() if m == "base" or m.startswith("sampling_"))
    ax.plot(*zip(*tempered), "o--", label="sampling at several temperatures")
    for method, point in sorted(others.items()):
      if point not in tempered and method != "gfn":
        ax.plot(*point, "s", label=label(method))
    for run, final in zip(runs, finals):
      if "gfn" in (found := points(final)):
        temperature = read_json(run / "config.json")["config"]["reward.temperature_end"]
        ax.plot(*found["gfn"], "*", markersize=12, label=f"{label('gfn')}, T = {temperature:g}")
  return [pathlib.Path(path)]


def _final(workdir: pathlib.Path) -> dict[str, float]:
  records = [r for r in read_jsonl(workdir / "metrics.jsonl") if f"{_TASK}/gfn/max_log_likelihood" in r]
  return records[-1] if records else {}
