"""python -m gfn_jax.report RUNS... [--table=table4] [--output=report]

RUNS are workdirs of finished runs, folders of sweeps, or a mixture. Writes report.md, a CSV a table, a PNG a figure.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import shlex

from absl import flags

from gfn_jax import cli
from gfn_jax.files import local_path, write_text
from gfn_jax.report import texts
from gfn_jax.report.cells import Group, fill, group_runs
from gfn_jax.report.commands import commands_of
from gfn_jax.report.figures import draw
from gfn_jax.report.runs import Run, read_runs
from gfn_jax.report.scores import scores
from gfn_jax.report.section import Section, to_markdown, write_csv
from gfn_jax.report.tables import MAIN, TABLES, Table, table_of

TEXTS = {  # task -> the sections of texts that the runs of a table make
  "arith": lambda name, groups: [
    texts.side_by_side(f"{name}_samples", "Table E.4: rationales", groups), texts.paper_rewards(f"{name}_paper"),
    texts.mistakes(f"{name}_errors", groups),
  ],
  "infill": lambda name, groups: [texts.side_by_side(f"{name}_samples", "Tables C.3-C.8: infills", groups)],
  "next_sentence": lambda name, groups: [
    texts.side_by_side(f"{name}_samples", "Table B.1: next sentences", groups, ("base", "diverse_beam"))
  ],
  "subj": lambda name, groups: [texts.top_reasons(f"{name}_reasons", groups)],
}  # fmt: skip
ABLATIONS = ("table_d4", "table_e3")  # without texts


def by_table(runs: Sequence[Run], name: str | None) -> dict[str, list[Run]]:
  """Runs under the name of their table: their sweep's, or `name`, by default that of the task's main table."""
  found: dict[str, list[Run]] = {}
  for run in runs:
    found.setdefault(run.sweep or name or MAIN.get(run.task, run.task), []).append(run)
  for table_name, its_runs in found.items():
    lender = TABLES[table_name].borrows if table_name in TABLES else None
    its_runs += [run for run in found.get(lender, ()) if run.method == "gfn"]
  return found


def sections_of(name: str, table: Table, groups: Sequence[Group], folder: pathlib.Path) -> list[Section]:
  """The table of that name with its figure, and what else its runs show."""
  found = []

  def add(file_name, kind, shown):
    filled = fill(shown, groups)
    figure = draw(kind, groups, filled, folder / f"{file_name}.png")
    found.append(dataclasses.replace(scores(file_name, shown.title, filled), figure=figure))

  add(name, name, table)
  if name in ABLATIONS:
    return found
  if table.task == "arith" and name != "table_e4":
    rewards = dataclasses.replace(TABLES["table_e4"], varied=table.varied, baselines_vary=table.baselines_vary)
    add(f"{name}_rewards", "table_e4", rewards)
  return found + [s for s in TEXTS.get(table.task, lambda *_: [])(name, groups) if s]


def source(runs: Sequence[Run]) -> str:
  """Where a table comes from: the commands, the commits, the devices."""
  commands = "\n".join(f"    {c}" for c in commands_of(runs))
  commits, devices = (", ".join(sorted(set(values))) for values in zip(*((r.commit, r.devices) for r in runs)))
  return f"From\n\n{commands}\n\n{len(runs)} run{'s' if len(runs) > 1 else ''}; commit {commits}; devices {devices}."


def write_report(
  folders: Sequence[str | os.PathLike], output: str | os.PathLike, table: str | None = None
) -> list[pathlib.Path]:
  """Writes report.md, a CSV a table and a PNG a figure into `output`; returns what was written.

  Args:
    folders: runs and sweeps.
    table: the table of runs that belong to no sweep, one of TABLES.

  Raises:
    ValueError: a slip of the user's, in one line; nothing is written then.
  """
  if table is not None and table not in TABLES:
    raise ValueError(f"--table={table} is unknown: choose from {', '.join(TABLES)}")
  if not folders:
    raise ValueError("name the runs to report, as in python -m gfn_jax.report runs/arith-table4")
  runs, unfinished = read_runs(folders)
  if not runs:
    raise ValueError(f"no run has ended: {unfinished[0]} is unfinished")
  tables = {name: (table_of(name, its_runs), its_runs) for name, its_runs in by_table(runs, table).items()}
  groups = {name: group_runs(declared.varied, its_runs) for name, (declared, its_runs) in tables.items()}
  output = local_path(output)
  output.mkdir(parents=True, exist_ok=True)
  arguments = [*(["--table=" + table] if table else []), f"--output={output}"]
  command = shlex.join(["python", "-m", "gfn_jax.report", *map(str, folders), *arguments])
  parts = [
    "# Results beside the paper's",
    "Paper: Hu et al., *Amortizing intractable inference in large language models* (ICLR 2024). A cell of ours is the "
    "mean ± the sample standard deviation over seeds, with their number in brackets.",
    f"    {command}",
  ]
  if unfinished:
    parts.append(f"Left out, since they have not ended: {', '.join(map(str, unfinished))}.")
  written = []
  for name, (declared, its_runs) in tables.items():
    for section in sections_of(name, declared, groups[name], output):
      parts += [to_markdown(section), *([] if section.of_paper else [source(its_runs)])]
      written += [write_csv(section, output), *([section.figure] if section.figure else [])]
  write_text(output / "report.md", "\n\n".join(parts) + "\n")
  return [output / "report.md", *written]


def main(folders: Sequence[str]) -> int:
  for path in write_report(folders, _OUTPUT.value, _TABLE.value):
    print(path)
  return 0


if __name__ == "__main__":
  _OUTPUT = flags.DEFINE_string("output", "report", "The folder to write.")
  _TABLE = flags.DEFINE_string("table", None, f"Of runs that belong to no sweep: {', '.join(TABLES)}.")
  cli.launch(main, needs_config=False, takes_arguments=True)
