"""A user's own JSON-lines files, and templates that make text of their records."""

from collections.abc import Iterator, Mapping, Sequence
import json
import os
import string

from gfn_jax.files import reason, to_path


def read_objects(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
  """The objects of a JSON-lines file, each with its line number (from 1), as they are read; blank lines are left out.

  Raises:
    ValueError: the file cannot be read, or a line is no JSON object; one line that names file and line.
  """
  try:
    with to_path(path).open("rb") as file:
      for number, line in enumerate(file, start=1):
        try:
          line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
          if not line:
            continue
          value = json.loads(line)
        except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
          raise ValueError(f"{path}, line {number}: no JSON: {e}") from None
        if not isinstance(value, dict):
          raise ValueError(f"{path}, line {number}: an object is needed, not {type(value).__name__}")
        yield number, value
  except OSError as e:
    raise ValueError(f"{path} cannot be read: {reason(e)}") from None


def text_field(path: str | os.PathLike, number: int, record: Mapping, field: str) -> str:
  """A field of a record that must be there and be text.

  Raises:
    ValueError: one line that names file, line and field.
  """
  if field not in record:
    raise ValueError(f"{path}, line {number}: no field {field!r}: the record has {', '.join(record) or 'none'}")
  value = record[field]
  if not isinstance(value, str):
    raise ValueError(f"{path}, line {number}: field {field!r} must be text, not {type(value).__name__}")
  if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):  # JSON can spell halves of a character
    raise ValueError(f"{path}, line {number}: field {field!r} holds half of a surrogate pair: no tokenizer can read it")
  return value


def read(path: str | os.PathLike, fields: Sequence[str]) -> list[dict]:
  """The records of a JSON-lines file, whole and in order.

  Args:
    fields: names that every record must have, with text as value; others are kept unseen.

  Raises:
    ValueError: the file cannot be read, is empty, or holds a bad record; one line naming file, line and field.
  """
  records = []
  for number, record in read_objects(path):
    for field in fields:
      text_field(path, number, record, field)
    records.append(record)
  if not records:
    raise ValueError(f"{path} has no records")
  return records


def template_fields(template: str) -> list[str]:
  """The fields that a template names, in order: "Question: {question}\\nAnswer:" -> ["question"].

  Raises:
    ValueError: it is no template; one line that names it.
  """
  return [field for _, field in _parse(template) if field is not None]


def render(template: str, record: Mapping) -> str:
  """A template with a record's values in place of its fields: "Question: {question}\\nAnswer:".

  Fields are plain names; "{{" and "}}" are literal braces. Braces in a value stay as they are.

  Raises:
    ValueError: it is no template, or the record lacks a field; one line that names both.
  """
  parts = []
  for literal, field in _parse(template):
    parts.append(literal)
    if field is not None:
      if field not in record:
        raise ValueError(f"template {template!r} names {field!r}: the record has {', '.join(record) or 'no fields'}")
      if record[field] is None:
        raise ValueError(f"template {template!r} names {field!r}, which is null")
      parts.append(str(record[field]))
  return "".join(parts)


def _parse(template: str) -> list[tuple[str, str | None]]:
  """(literal text, the field after it) of `str.format`'s syntax, of which only names are allowed."""
  try:
    parsed = list(string.Formatter().parse(template))
  except ValueError as e:
    raise ValueError(f"template {template!r}: {e}; write {{{{ and }}}} for literal braces") from None
  for _, field, form, conversion in parsed:
    if field is not None and (not field.isidentifier() or form or conversion):
      shown = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
      raise ValueError(
        f"template {template!r}: {{{shown}}} must be a field's plain name; write {{{{ and }}}} for literal braces"
      )
  return [(literal, field) for literal, field, *_ in parsed]
