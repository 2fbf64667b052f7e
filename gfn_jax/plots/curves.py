"""What a run tells while it trains, over its steps."""

from collections.abc import Mapping, Sequence

import numpy as np

from gfn_jax.files import Path
from gfn_jax.metrics import read_jsonl
from gfn_jax.plots.figure import figure

Points = Sequence[tuple[int, float]]
SLICES = {"arith": "operands", "subj": "labels"}  # what the numbers behind an accuracy count


def _draw(path: Path, title: str, ylabel: str, curves: Mapping[str, Points], limits=None) -> list[Path]:
  curves = {label: points for label, points in curves.items() if points}
  if not curves:
    return []
  with figure(path, title, "training step", ylabel) as ax:
    for label, points in curves.items():
      steps, values = zip(*points)
      smooth = len(points) > 60  # a step's batch is small: show the trend over its scatter
      (line,) = ax.plot(
        steps, values, label=None if smooth else label, alpha=0.25 if smooth else 1,
        marker=None if len(points) > 12 else "o",
      )  # fmt: skip
      if smooth:
        window = max(5, len(points) // 25)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], mean, color=line.get_color(), label=f"{label} (mean of {window} steps)")
    if limits:
      ax.set_ylim(*limits)
  return [path]


def plot_curves(workdir: Path, task: str) -> list[Path]:
  """Writes accuracy, log_reward, loss and log_ratio_variance.png into plots/, as far as metrics.jsonl has them."""
  records, folder = read_jsonl(workdir / "metrics.jsonl"), workdir / "plots"

  def series(field, scale=1.0):
    return [(r["step"], scale * r[field]) for r in records if field in r]

  kinds = sorted({k.split("/")[-1] for r in records for k in r if k.startswith(f"{task}/validation/accuracy/")})
  counted = SLICES.get(task, "")
  accuracy = {f"validation, {k} {counted}".strip(): series(f"{task}/validation/accuracy/{k}", 100) for k in kinds}
  accuracy |= {"validation": series(f"{task}/validation/accuracy", 100)}
  accuracy["training samples of the policy"] = series("accuracy", 100)
  rewards = {
    "log R of the policy's samples": series("log_reward_policy_mean"),
    "log R of the batch": series("log_reward_mean"),
  }
  spread = {"validation": series(f"{task}/validation/log_ratio_variance")}
  return [
    *_draw(folder / "accuracy.png", f"{task}: accuracy while training", "accuracy (%)", accuracy, (-3, 103)),
    *_draw(folder / "log_reward.png", f"{task}: log R (untempered) while training", "nats", rewards),
    *_draw(folder / "loss.png", f"{task}: loss while training", "loss (nats²)", {"loss": series("loss")}),
    *_draw(folder / "log_ratio_variance.png", f"{task}: Var(log R / T - log q) on held-out queries", "nats²", spread),
  ]
