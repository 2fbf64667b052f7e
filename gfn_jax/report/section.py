"""A part of the report: a title over a table of texts, its CSV, and perhaps a figure."""

from collections.abc import Sequence
import csv
import dataclasses
import io
import pathlib

from gfn_jax.files import write_text


@dataclasses.dataclass(frozen=True)
class Section:
  """One table or figure.

  Attributes:
    name: of its files: NAME.csv, NAME.png.
    title: its heading.
    header, rows: the table as read; texts.
    csv_header, csv_rows: the same as data, unrounded.
    note: a sentence under the heading.
    figure: NAME.png, where there is one.
    of_paper: whether nothing in it is ours.
  """

  name: str
  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  csv_header: Sequence[str]
  csv_rows: Sequence[Sequence[object]]
  note: str = ""
  figure: pathlib.Path | None = None
  of_paper: bool = False


def cell_text(text: str) -> str:
  """Text that stays inside its cell of a Markdown table."""
  return " ".join(text.replace("|", "\\|").split())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table, its columns padded so that it reads as plain text too."""
  cells = [[cell_text(c) for c in row] for row in (header, *rows)]
  widths = [max(3, *map(len, column)) for column in zip(*cells)]
  lines = [f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths))} |" for row in cells]
  return "\n".join([lines[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *lines[1:]])


def write_csv(section: Section, folder: pathlib.Path) -> pathlib.Path:
  """NAME.csv; a dash of the table is an empty field."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerows([section.csv_header, *section.csv_rows])
  write_text(folder / f"{section.name}.csv", text.getvalue())
  return folder / f"{section.name}.csv"


def to_markdown(section: Section) -> str:
  """The heading, the note, the figure and the table."""
  parts = [f"## {section.title}", section.note]
  parts += [f"![{section.title}]({section.figure.name})"] if section.figure else []
  return "\n\n".join(p for p in [*parts, markdown_table(section.header, section.rows)] if p)
