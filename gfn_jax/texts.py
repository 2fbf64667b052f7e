"""A user's texts as rows of tokens: read, tokenised, held out, shuffled and laid out in batches."""

from collections.abc import Iterator, Sequence
import os
import pathlib

from jaxtyping import Bool, Int
import numpy as np

from gfn_jax.data import pad_right, step_rng
from gfn_jax.datasets import json_lines
from gfn_jax.models import Pretrained
from gfn_jax.models.text import TextCodec

JSON_LINES = (".jsonl", ".json")

# Streams of host randomness, beside those of `data`.
SPLIT_STREAM, ORDER_STREAM = 2, 3

_MIN_WIDTH = 16  # tokens


def read_texts(path: str | os.PathLike, field: str = "text") -> dict[int, str]:
  """Line number (from 1) -> text, of a file with a text a line, or, where it ends in .jsonl or .json, an object a line.

  Blank lines are left out. Of a line of text only its end is cut off; a UTF-8 byte-order mark is no part of it.

  Args:
    field: of JSON lines: text, or a list of texts, which a space joins (sentences of a story).

  Raises:
    ValueError: the file cannot be read or has no texts, or a line is bad; one line that names both.
  """
  path, texts = pathlib.Path(path), {}
  if path.suffix.lower() in JSON_LINES:
    texts = {number: _field_text(path, number, record, field) for number, record in json_lines.read_objects(path)}
  else:
    try:
      with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
          if line.strip():
            texts[number] = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as e:
      raise ValueError(f"{path}, line {number}: {e}") from None
    except OSError as e:
      raise ValueError(f"{path} cannot be read: {e.strerror}") from None
  if not texts:
    raise ValueError(f"{path} has no texts")
  return texts


def _field_text(path: pathlib.Path, number: int, record: dict, field: str) -> str:
  parts = record.get(field)
  records = [{field: part} for part in parts] if isinstance(parts, list) else [record]
  text = " ".join(json_lines.text_field(path, number, record, field) for record in records)
  if not text.strip():
    raise ValueError(f"{path}, line {number}: field {field!r} is empty")
  return text


def tokenize(texts: dict[int, str], pretrained: Pretrained, source: str) -> tuple[list[list[int]], int]:
  """Rows as the model is to learn them, and how many were cut.

  A row is what the tokenizer puts before every text (Llama's beginning of sequence, nothing in GPT-2), the text, and
  the end-of-text token, by which the model learns to stop. A row that the model has no positions for is cut, and so has
  no end.

  Args:
    texts: as `read_texts` returns them; `source`: the file, for errors.

  Raises:
    ValueError: there is no tokenizer, it has no end-of-text token, or it makes nothing of a text.
  """
  tokenizer = pretrained.tokenizer
  if tokenizer is None:
    raise ValueError(f"model {pretrained.source!r} has no tokenizer")
  if tokenizer.eos_token_id is None:
    raise ValueError(f"the tokenizer of {pretrained.source!r} has no end-of-text token: nothing could end a text")
  start = TextCodec(tokenizer).start_tokens
  ids = tokenizer(list(texts.values()), add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
  empty = next((number for number, row in zip(texts, ids) if not row), None)
  if empty is not None:
    raise ValueError(f"{source}, line {empty}: the tokenizer of {pretrained.source!r} makes no tokens of it")
  longest = pretrained.config.max_positions + 1  # the last token of a row is predicted and never read
  rows = [[*start, *row, tokenizer.eos_token_id] for row in ids]
  return [row[:longest] for row in rows], sum(len(row) > longest for row in rows)


def split(num_texts: int, share: float) -> tuple[np.ndarray, np.ndarray]:
  """(training, validation) indices; the draw is the same for every seed, so that runs can be compared.

  Raises:
    ValueError: nothing is left to train on.
  """
  num_held_out = max(1, round(share * num_texts)) if share else 0
  if num_held_out >= num_texts:
    raise ValueError(
      f"config.data.validation_share {share} holds out {num_held_out} of {num_texts} texts: none is left to train on"
    )
  order = step_rng(0, SPLIT_STREAM, 0).permutation(num_texts)
  return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def epoch_order(seed: int, epoch: int, num_texts: int) -> np.ndarray:
  """The order in which an epoch (from 0) goes through the training texts."""
  return step_rng(seed, ORDER_STREAM, epoch).permutation(num_texts)


def bucket(width: int, longest: int) -> int:
  """The width that rows of up to `width` tokens are padded to: 16, 24, 32, 48, 64, 96, ..., at most `longest`.

  So a run compiles a handful of programs, and pads rows of 16 tokens and more by less than a half.
  """
  power = max(_MIN_WIDTH, 1 << (width - 1).bit_length())
  between = max(_MIN_WIDTH, 3 * power // 4)
  return min(between if width <= between else power, longest)


def lay_out(
  rows: Sequence[list[int]], num_rows: int, num_groups: int, longest: int
) -> Iterator[tuple[Int[np.ndarray, "R N"], Bool[np.ndarray, "R N"]]]:
  """The rows of one batch in groups of like length, each right-padded to a width of its own: tokens and mask.

  Args:
    rows: at most `num_rows`; what is missing is filled up with rows that are all padding.
    num_groups: divides `num_rows`. Groups without a token are left out.
    longest: positions of the model: a row of N tokens reads N - 1 of them.
  """
  rows, size = sorted(rows, key=len, reverse=True), num_rows // num_groups
  for begin in range(0, len(rows), size):
    group = rows[begin : begin + size]
    yield pad_right([*group, *[[]] * (size - len(group))], 1 + bucket(len(group[0]) - 1, longest))
