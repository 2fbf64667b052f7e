"""A run's results as a person reads them: the paper's table, and plots."""

from collections.abc import Mapping
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from gfn_jax.files import replacing
from gfn_jax.metrics import read_jsonl

LABELS = {"base": "base, zero-shot", "gfn": "GFlowNet fine-tuning"}


def _label(method: str) -> str:
  if method.startswith("base_"):
    return f"base, {method.removeprefix('base_').replace('shot', '')} demonstrations"
  return LABELS.get(method, method)


def accuracy_table(results: Mapping[str, float], task: str) -> str:
  """Markdown like the paper's Table 4: a line a method, a column a number of operands, per cent."""
  cells: dict[str, dict[str, float]] = {}
  for key, value in results.items():
    parts = key.split("/")
    if len(parts) == 4 and parts[0] == task and parts[2] == "accuracy":
      cells.setdefault(parts[1], {})[parts[3]] = value
  kinds = sorted({k for row in cells.values() for k in row}, key=lambda k: (len(k), k))
  order = sorted(cells, key=lambda m: (not m.startswith("base"), m))
  width = max(len(_label(m)) for m in order)
  lines = [f"| {'test accuracy (%), operands':<{width}} | " + " | ".join(f"{k:>5}" for k in kinds) + " |"]
  lines.append("|" + "-" * (width + 2) + "|" + "|".join(["------:"] * len(kinds)) + "|")
  for method in order:
    values = (f"{100 * cells[method][k]:5.1f}" if k in cells[method] else "    -" for k in kinds)
    lines.append(f"| {_label(method):<{width}} | " + " | ".join(values) + " |")
  return "\n".join(lines)


def plot_run(workdir: str | pathlib.Path, task: str) -> list[pathlib.Path]:
  """Writes plots/accuracy.png and plots/log_reward.png from metrics.jsonl; returns what was written."""
  workdir = pathlib.Path(workdir)
  records = read_jsonl(workdir / "metrics.jsonl")
  folder = workdir / "plots"
  folder.mkdir(exist_ok=True)
  written = []

  def figure(name, title, ylabel, curves, note=None):
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
      return
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, points in curves.items():
      steps, values = zip(*points)
      smooth = len(points) > 60  # a step's batch is small: show the trend over its scatter
      (line,) = ax.plot(
        steps,
        values,
        label=None if smooth else label,
        alpha=0.25 if smooth else 1,
        marker=None if len(points) > 12 else "o",
      )
      if smooth:
        window = max(5, len(points) // 25)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], mean, color=line.get_color(), label=f"{label} (mean of {window} steps)")
    ax.set(title=title, xlabel="training step", ylabel=ylabel)
    if note:
      ax.set_ylim(*note)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2)
    path = folder / f"{name}.png"
    with replacing(path) as temporary:
      fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)
    written.append(path)

  def series(field, scale=1.0):
    return [(r["step"], scale * r[field]) for r in records if field in r]

  kinds = sorted({k.split("/")[-1] for r in records for k in r if k.startswith(f"{task}/validation/accuracy/")})
  accuracy = {f"validation, {k} operands": series(f"{task}/validation/accuracy/{k}", 100) for k in kinds}
  accuracy["training samples of the policy"] = series("accuracy", 100)
  figure("accuracy", f"{task}: accuracy while training", "accuracy (%)", accuracy, (-3, 103))
  rewards = {
    "log R of the policy's samples": series("log_reward_policy_mean"),
    "log R of the batch": series("log_reward_mean"),
  }
  figure("log_reward", f"{task}: log R (untempered) while training", "nats", rewards)
  figure("loss", f"{task}: loss while training", "loss (nats²)", {"loss": series("loss")})
  return written
