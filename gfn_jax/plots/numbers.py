"""The distribution of random numbers, as the paper's Fig. 2."""

import pathlib

import numpy as np

from gfn_jax.metrics import read_jsonl
from gfn_jax.plots.figure import figure
from gfn_jax.report import label


def plot_numbers(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes plots/numbers.png: the exact q(n) of each method of the final evaluation beside the target, log y."""
  records = [r for r in read_jsonl(workdir / "samples.jsonl") if "method" in r and "log_q" in r]
  if not records:
    return []
  path, last = workdir / "plots" / "numbers.png", max(r["step"] for r in records)
  records = [r for r in records if r["step"] == last]
  with figure(path, "random numbers: probability of each", "number", "probability") as ax:
    for method in sorted({r["method"] for r in records}):
      numbers, log_q = zip(*((int(r["Z"]), r["log_q"]) for r in records if r["method"] == method))
      ax.plot(numbers, np.exp(log_q), ".-", linewidth=0.8, markersize=4, label=label(method))
    target = {int(r["Z"]): np.exp(r["log_R"]) for r in records}
    ax.plot(*zip(*sorted(target.items())), "k--", linewidth=1, label="target")
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
  return [path]
