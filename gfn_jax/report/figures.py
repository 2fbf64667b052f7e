"""The report's figures: Fig. 2, Fig. 3, and what the reward thinks beside what is right."""

from collections.abc import Sequence
import pathlib

from gfn_jax.plots.figure import figure
from gfn_jax.plots.frontier import plot_frontier
from gfn_jax.plots.numbers import plot_numbers
from gfn_jax.report.cells import Filled, Group


def plot_rewards(table: Filled, path: pathlib.Path) -> list[pathlib.Path]:
  """Mean log R of each method's samples against the share that is right (Table E.4's point), means over seeds."""
  keys = [c.key for c in table.columns]
  x, y = keys.index("right"), keys.index("log_reward")
  found = [(label, cells[x].mean, cells[y].mean) for label, _, cells in table.rows if cells[x].values]
  if not found:
    return []
  with figure(path, "what the reward prefers, beside what is right", "right (%)", "mean log R (nats)") as ax:
    for name, right, log_reward in found:
      ax.plot(right, log_reward, "o", label=name)
    ax.set_xlim(-3, 103)
  return [path]


def draw(table_name: str, groups: Sequence[Group], table: Filled, path: pathlib.Path) -> pathlib.Path | None:
  """The figure of one of TABLES that has one, if the runs have what it shows."""
  folders = [run.folder for group in groups for run in group.runs]
  draws = {
    "fig2": lambda: plot_numbers(folders, path),
    "fig3": lambda: plot_frontier(folders, path),
    "table_e4": lambda: plot_rewards(table, path),
  }
  written = draws[table_name]() if table_name in draws else []
  return written[0] if written else None
