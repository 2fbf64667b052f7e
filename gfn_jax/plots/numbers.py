"""The distribution of random numbers, as the paper's Fig. 2."""

from collections.abc import Sequence
import os

import numpy as np

from gfn_jax.files import Path, to_path
from gfn_jax.metrics import read_jsonl
from gfn_jax.plots.figure import figure
from gfn_jax.results import label


def plot_numbers(workdirs: Sequence[str | os.PathLike], path: str | os.PathLike) -> list[Path]:
  """The exact q(n) of each method, the mean over the runs' final evaluations, beside the target, log y.

  Args:
    workdirs: runs of one target, of any seeds and methods. path: the PNG to write.
  """
  probabilities: dict[str, dict[int, list[float]]] = {}
  target = {}
  for workdir in workdirs:
    records = [r for r in read_jsonl(to_path(workdir) / "samples.jsonl") if "method" in r and "log_q" in r]
    last = max((r["step"] for r in records), default=0)
    for r in (r for r in records if r["step"] == last):
      number = int(r["Z"])
      probabilities.setdefault(r["method"], {}).setdefault(number, []).append(np.exp(r["log_q"]))
      target[number] = np.exp(r["log_R"])
  if not target:
    return []
  with figure(path, "random numbers: probability of each", "number", "probability") as ax:
    for method, found in sorted(probabilities.items()):
      numbers = sorted(found)
      means = [np.mean(found[n]) for n in numbers]
      ax.plot(numbers, means, ".-", linewidth=0.8, markersize=4, label=label(method))
    ax.plot(*zip(*sorted(target.items())), "k--", linewidth=1, label="target")
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
  return [to_path(path)]
