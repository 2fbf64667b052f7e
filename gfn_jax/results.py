"""What a run has measured, and as a person reads it at its end."""

from collections.abc import Mapping
from typing import Any

from gfn_jax.evaluators.posterior import METRICS as POSTERIOR_METRICS

LABELS = {
  "gfn": "GFlowNet fine-tuning", "sft": "supervised fine-tuning", "ppo": "PPO", "grpo": "GRPO",
  "base_zero_shot": "base, told how to begin",
}  # fmt: skip


def label(method: str) -> str:
  """A method as a table's row or a plot's curve is called."""
  if method.startswith("base_") and method not in LABELS:
    return f"base, {method.removeprefix('base_').replace('shot', '')} demonstrations"
  return LABELS.get(method, method)


def measured(results: Mapping[str, Any]) -> dict[str, float]:
  """`<task>/...` of results.json, without meta/ and time/."""
  return {k: v for k, v in results.items() if not k.startswith(("meta/", "time/"))}


PER_CENT = ("accuracy", "valid_mass", "histogram/valid_share")  # shares that a table shows in per cent


def results_table(results: Mapping[str, float]) -> str:
  """Markdown like the paper's tables: a line a method, a column a metric (and kind of problem)."""
  cells: dict[str, dict[str, float]] = {}
  task = ""
  for key, value in results.items():
    task, method, metric = key.split("/", 2)
    cells.setdefault(method, {})[metric] = value
  order = sorted(cells, key=lambda m: (not m.startswith("base"), m))
  every = dict.fromkeys(k for m in order for k in cells[m])
  metrics = [k for k in every if k not in POSTERIOR_METRICS]

  def text(metric, value):
    return f"{100 * value:.1f}" if metric.startswith(PER_CENT) else f"{value:.4g}"

  head = [task, *(f"{k} (%)" if k.startswith(PER_CENT) else k for k in metrics)]
  rows = [[label(m), *(text(k, cells[m][k]) if k in cells[m] else "-" for k in metrics)] for m in order]
  widths = [max(map(len, column)) for column in zip(head, *rows)]

  def line(row):
    first, *others = (f"{c:<{w}}" if c is row[0] else f"{c:>{w}}" for c, w in zip(row, widths))
    return f"| {' | '.join([first, *others])} |"

  rule = f"|{'|'.join('-' * (w + 1) + (':' if i else '-') for i, w in enumerate(widths))}|"
  lines = [line(head), rule, *map(line, rows)]
  for m in order:
    posterior = [f"{k} {cells[m][k]:.4g}" for k in POSTERIOR_METRICS if k in cells[m]]
    lines += [f"{label(m)}, at its last reward temperature: {', '.join(posterior)}"] if posterior else []
  return "\n".join(lines)
