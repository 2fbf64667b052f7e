"""Runs averaged over their seeds, and the refusal to average any others."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

import numpy as np

from gfn_jax.config import RESUMABLE, first_difference
from gfn_jax.report.runs import Run
from gfn_jax.report.tables import Column, Row, Table
from gfn_jax.results import label

# More than a resumed run may not differ in: of its length and of what it is chosen by.
_MATTER = ("train.num_steps", "eval.every_steps")
IGNORED = ("seed", *(f for f in RESUMABLE if f not in _MATTER))


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in their seed alone, in its order.

  Attributes:
    values: of the method and of the fields that tell groups apart.
    settings: those fields in which the groups of its method differ; all of them where it is the only one.
  """

  values: Mapping[str, Any]
  settings: Mapping[str, Any]
  runs: tuple[Run, ...]

  @property
  def method(self) -> str:
    return self.values["method"]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A value of each seed, as shown."""

  values: tuple[float, ...] = ()

  @property
  def mean(self) -> float | None:
    return float(np.mean(self.values)) if self.values else None

  @property
  def deviation(self) -> float | None:
    """The sample standard deviation; None for fewer than two."""
    return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

  def text(self, digits: str) -> str:
    """ "95.2 ± 1.3 (3)"; "-" where there is nothing."""
    if not self.values:
      return "-"
    spread = f" ± {self.deviation:{digits}}" if len(self.values) > 1 else ""
    return f"{self.mean:{digits}}{spread} ({len(self.values)})"


@dataclasses.dataclass(frozen=True)
class Filled:
  """A table with our numbers: rows of a label, the paper's cells, and ours in the order of `columns`."""

  columns: tuple[Column, ...]
  rows: tuple[tuple[str, tuple[str, ...], tuple[Cell, ...]], ...]


def group_runs(varied: Sequence[str], runs: Sequence[Run]) -> list[Group]:
  """Runs by their method and the `varied` fields, in the order in which they first appear.

  Raises:
    ValueError: runs of a group differ in another field than the seed, or have the same; names field, values, folders.
  """
  fields = ("method", *varied)
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(json.dumps([run.config.get(f) for f in fields]), []).append(run)
  for first, *others in groups.values():
    seeds = {first.config["seed"]: first}
    for run in others:
      difference = first_difference(dict(first.config), dict(run.config), IGNORED)
      if difference:
        raise ValueError(f"{first.folder} and {run.folder} cannot be averaged: {difference}")
      twin = seeds.setdefault(run.config["seed"], run)
      if twin is not run:
        raise ValueError(
          f"{twin.folder} and {run.folder} cannot be averaged: config.seed is {run.config['seed']} in both"
        )
  every = [{f: g[0].config.get(f) for f in fields} for g in groups.values()]

  def settings_of(values):
    rivals = [v for v in every if v["method"] == values["method"]]
    return {f: values[f] for f in varied if len(rivals) == 1 or any(v[f] != values[f] for v in rivals)}

  return [
    Group(values, settings_of(values), tuple(sorted(g, key=lambda r: r.config["seed"])))
    for values, g in zip(every, groups.values())
  ]


def fill(table: Table, groups: Sequence[Group]) -> Filled:
  """The table's declared rows, then those of the methods and settings that it does not declare."""
  results = table.measure or (lambda run: run.results)
  known = {run.folder: results(run) for group in groups for run in group.runs}

  def values_of(group, key):
    found = (known[run.folder].get(key) for run in group.runs)
    return [v for v in found if v is not None]

  columns = table.columns + _further_columns(table, list(known.values()))
  filled = []
  for row in _all_rows(table, groups, known, columns):
    matching = [g for g in groups if all(g.values.get(f) == v for f, v in row.where.items())]
    cells = []
    for column in columns:
      method = row.method.format(slice=column.key.rpartition("/")[2])
      key = f"{table.task}/{method}/{column.key}"
      # What no run trains is in the results of several groups, the same for each seed: the fullest one speaks for it.
      values = max((values_of(g, key) for g in matching), key=len, default=[])
      cells.append(Cell(tuple(column.scale * v for v in values)))
    filled.append((row.label, row.paper + ("",) * (len(columns) - len(row.paper)), tuple(cells)))
  return Filled(columns, tuple(filled))


def is_trained(method: str, group: Group) -> bool:
  """Whether a group's runs have trained what the results call `method`: "gfn", or "gfn_sft" made from it."""
  return method == group.method or method.startswith(f"{group.method}_")


def _further_columns(table: Table, results: Sequence[Mapping[str, float]]) -> tuple[Column, ...]:
  if table.sliced is None:
    return ()
  declared = {c.key for c in table.columns}
  slices = {k.rpartition("/")[2] for found in results for k in found if k.split("/")[2:-1] == [table.sliced]}
  slices = sorted(slices, key=lambda s: (float(s) if s.isdecimal() else math.inf, s))
  further = (Column(s, f"{table.sliced}/{s}", table.columns[0].scale) for s in slices)
  return tuple(c for c in further if c.key not in declared)


def _agree(method, groups, known) -> bool:
  """Whether the runs of a seed have the same results of what they have not trained."""
  seen: dict[tuple[int, str], float] = {}
  results = ((run.config["seed"], k, v) for g in groups for run in g.runs for k, v in known[run.folder].items())
  return all(seen.setdefault((seed, k), v) == v for seed, k, v in results if k.split("/")[1] == method)


def _all_rows(table, groups, known, columns) -> list[Row]:
  keys = {c.key for c in columns}
  shown = [f for f in table.varied if f not in table.in_columns]
  rows, taken = list(table.rows), {}
  for row in table.rows:
    for c in columns:
      taken.setdefault(row.method.format(slice=c.key.rpartition("/")[2]), []).append(row.where)
  further: dict[str, Row] = {}
  for group in groups:
    methods = dict.fromkeys(
      k.split("/")[1] for run in group.runs for k in known[run.folder] if k.split("/", 2)[2] in keys
    )
    for method in methods:
      trained = is_trained(method, group)
      if table.policies_only and not trained:
        continue
      apart = trained or (table.baselines_vary and not _agree(method, groups, known))
      where = {f: group.values[f] for f in shown} if apart else {}
      where |= {"method": group.method} if trained else {}
      if any(all(where.get(f) == v for f, v in w.items()) for w in taken.get(method, [])):
        continue
      setting = "".join(f", {f} = {v}" for f, v in group.settings.items() if apart and f in shown)
      further.setdefault(json.dumps([method, where]), Row(label(method) + setting, method, where=where))
  base_first = sorted(further.values(), key=lambda r: (not r.method.startswith("base"), bool(r.where)))
  return rows + base_first
