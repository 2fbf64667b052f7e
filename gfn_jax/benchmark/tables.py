"""Results of the benchmark as a person reads them."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from gfn_jax.benchmark.measure import NOTABLE_SECONDS, PHASES

COLUMNS = (
  "phase", "seconds", "share", "GFLOP by hand", "GFLOP run", "run / by hand", "GFLOP/s", "of matmul peak", "GB/s",
  "of copy peak",
)  # fmt: skip


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """A table of cells, its first row the head; columns but the first are numbers."""
  head, *rest = (f"| {' | '.join(row)} |" for row in rows)
  return "\n".join([head, f"|---|{'---:|' * (len(rows[0]) - 1)}", *rest])


def _number(value: float | None, scale: float = 1.0) -> str:
  return "" if not value else f"{value / scale:.3g}"


def _share(value: float | None) -> str:
  return "" if value is None else f"{100 * value:.1f}%"


def phase_table(result: Mapping[str, Any]) -> str:
  """A row a phase; then their sum."""
  phases = result["phases"]
  total = {k: sum(p[k] for p in phases.values()) for k in ("seconds", "flops_by_hand", "flops_run")}

  def row(name: str, phase: Mapping[str, float]) -> list[str]:
    by_hand, run = phase["flops_by_hand"], phase["flops_run"]
    return [
      name,
      f"{phase['seconds']:.4f}",
      _share(phase["seconds"] / total["seconds"]),
      _number(by_hand, 1e9),
      _number(run, 1e9),
      f"{run / by_hand:.2f}" if by_hand and run else "",
      _number(phase.get("flops_per_second"), 1e9),
      _share(phase.get("share_of_matmul_peak")),
      _number(phase.get("bytes_per_second"), 1e9),
      _share(phase.get("share_of_copy_peak")),
    ]

  return markdown([COLUMNS, *(row(name, phases[name]) for name in PHASES), row("sum", total)])


def notes(result: Mapping[str, Any]) -> str:
  """What the table says nothing of."""
  r, reward = result, result["phases"]["reward"]
  lines = [
    f"{r['config']}: {r['model']}, {r['parameters'] / 1e6:.1f}M parameters, {r['dtype']}; {r['num_queries']} queries x "
    f"{r['num_samples']} samples of at most {r['max_length']} tokens; medians of {r['repeats']} steps after "
    f"{r['warm_up_steps']} to warm up; {len(r['devices'])} x {r['device_kind']}; commit {r['commit']}, {r['date']}.",
    f"A whole step, its phases not waited for: {r['step_seconds']:.4f} s; {r['trajectories_per_second']:.4g} "
    f"trajectories/s, {r['tokens_per_second']:.4g} generated tokens/s.",
  ]
  if reward.get("flops_by_hand"):
    parts = (
      f"{name} {reward[f'flops_{name}'] / 1e9:.3g} GFLOP ({reward[f'tokens_{name}']:.0f} tokens)"
      for name in ("trunk", "branches")
    )
    lines.append(f"Reward by hand: {', '.join(parts)}; one program runs both.")
  lines += [
    f"Peaks here: matmul {_number(r['matmul_peak_flops_per_second'], 1e9)} GFLOP/s, copy "
    f"{_number(r['copy_peak_bytes_per_second'], 1e9)} GB/s, read and written.",
    f"Compiled: {r['compiled_programs']} programs in {r['compile_seconds']:.1f} s, of which "
    f"{r['compiled_notable_programs']} took more than {NOTABLE_SECONDS} s. Peak memory of the {r['peak_memory_of']}: "
    f"{r['peak_memory_bytes'] / 1e9:.2f} GB.",
  ]
  return "\n".join(lines)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
  """b of seconds = a size^b, by least squares of the logarithms; NaN where there is nothing to fit."""
  kept = [(math.log(n), math.log(s)) for n, s in zip(sizes, seconds) if s > 0]
  if len({n for n, _ in kept}) < 2:
    return math.nan
  return float(np.polyfit(*zip(*kept), 1)[0])


def sweep_exponents(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Of the whole step, and of every phase that takes time: how its seconds grow with `size`."""
  sizes = [r["size"] for r in results]
  columns = {"step": [r["step_seconds"] for r in results]}
  columns |= {name: [r["phases"][name]["seconds"] for r in results] for name in PHASES}
  fitted = {name: exponent(sizes, seconds) for name, seconds in columns.items()}
  return {name: b for name, b in fitted.items() if not math.isnan(b)}


def sweep_table(kind: str, results: Sequence[Mapping[str, Any]]) -> str:
  """A row a size: seconds of a step and of its phases; under it the exponents."""
  head = [kind, "step, s", *(f"{name}, s" for name in PHASES), "trajectories/s", "peak memory, GB"]
  rows = [
    [
      f"{r['size']:g}",
      f"{r['step_seconds']:.4f}",
      *(f"{r['phases'][name]['seconds']:.4f}" for name in PHASES),
      f"{r['trajectories_per_second']:.4g}",
      f"{r['peak_memory_bytes'] / 1e9:.2f}",
    ]
    for r in results
  ]
  fitted = ", ".join(f"{name} {b:.2f}" for name, b in sweep_exponents(results).items())
  return f"{markdown([head, *rows])}\n\nExponent of seconds over {kind}: {fitted}."
