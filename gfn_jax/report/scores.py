"""A filled table as a section: ours beside the paper's."""

from gfn_jax.report.cells import Filled
from gfn_jax.report.section import Section


def scores(name: str, title: str, table: Filled) -> Section:
  """Cells read "mean ± sample standard deviation (number of seeds)"; a column "paper" stands beside those of ours that
  the paper has."""
  has_paper = [any(paper[i] for _, paper, _ in table.rows) for i in range(len(table.columns))]
  header, rows, records = [""], [], []
  for column, beside in zip(table.columns, has_paper):
    header += [column.title, "paper"] if beside else [column.title]
  for label, paper, cells in table.rows:
    row = [label]
    for column, cell, theirs, beside in zip(table.columns, cells, paper, has_paper):
      row += [cell.text(column.digits), theirs or "-"] if beside else [cell.text(column.digits)]
      records.append([label, column.title, cell.mean, cell.deviation, len(cell.values), theirs])
    rows.append(row)
  return Section(name, title, header, rows, ("row", "column", "mean", "standard_deviation", "n", "paper"), records)
