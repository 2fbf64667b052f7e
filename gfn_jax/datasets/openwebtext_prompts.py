"""TFDS builder of prompts for sentence continuation (paper section 4.1): 1-3 sentences each, cut from web text.

Splits: `train`, `validation` and `test`, by count. The paper has 1,000 prompts, 50 of them for validation.

A document gives at most one prompt: 1, 2 or 3 sentences in a row of one paragraph, each with 5 to 30 tokens and whole
(it ends with its mark; its quotation marks and brackets are closed). How many is drawn first, among the numbers that
the document offers, then where. A line break ends a paragraph; `sentences` has the rule of sentences.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import pathlib
import re

import numpy as np
import tensorflow_datasets as tfds

from gfn_jax.datasets import json_lines, prepared, sentences, sources

KINDS = ("prompts", "documents", "blocks")
SPLITS = ("train", "validation", "test")
NUMBERS = (950, 50, 200)  # of each split; the first two are those of section 4.1 and appendix B
NUMBERS_EMBEDDED = (32, 8, 8)
MAX_SENTENCES = 3
MIN_TOKENS, MAX_TOKENS = 5, 30  # of a sentence

_WORD_OR_MARK = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_WHOLE = re.compile(r"""["“‘'(]?[^\W_a-z].*[.!?…]["'”’)]*""")
_PAIRS = ("“”", "()", "[]")


@dataclasses.dataclass
class PromptsConfig(tfds.core.BuilderConfig):
  """What `make_config` was given; `numbers` is the size of each of `SPLITS`."""

  file: pathlib.Path = pathlib.Path()
  kind: str = "prompts"
  seed: int = 0
  numbers: tuple[int, int, int] = NUMBERS
  count_tokens: Callable[[str], int] | None = None


def count_words(text: str) -> int:
  """Words and punctuation marks."""
  return len(_WORD_OR_MARK.findall(text))


def make_config(
  source: str = sources.EMBEDDED,
  kind: str = "prompts",
  seed: int = 0,
  *,
  num_train: int | None = None,
  num_validation: int | None = None,
  num_test: int | None = None,
  count_tokens: Callable[[str], int] | None = None,
  tokenizer_name: str = "",
) -> PromptsConfig:
  """A config whose name tells its contents apart.

  Args:
    source: "embedded", a file, or a file of a data set on the hub, as
      "Skylion007/openwebtext/plain_text/train-00000-of-00080.parquet". A .parquet or .jsonl file has its texts in the
      field `text`; any other is plain text.
    kind: what a text is. "prompts": a ready prompt, one a line of a plain file; taken as it is. "documents": a document
      to cut a prompt from, one a line of a plain file. "blocks": documents of a plain file with blank lines between
      them, in which a single line break is only a space.
    seed: of cutting, and of who comes into which split.
    num_train, num_validation, num_test: prompts; None for `NUMBERS`, of the embedded ones for `NUMBERS_EMBEDDED`.
    count_tokens: the tokens of a sentence, as a tokenizer counts them; None for words and punctuation marks.
    tokenizer_name: which tokenizer that is, for the config's name.

  Raises:
    ValueError: no such source, an unknown kind, a number below 0 or no training prompts; one line that says what to do.
  """
  if kind not in KINDS:
    raise ValueError(f"kind {kind!r} of prompts is unknown: choose from {', '.join(KINDS)}")
  if (count_tokens is None) != (not tokenizer_name):
    raise ValueError(f"tokenizer_name {tokenizer_name!r}: count_tokens needs the name of its tokenizer, and only it")
  defaults = NUMBERS_EMBEDDED if source == sources.EMBEDDED else NUMBERS
  given = (num_train, num_validation, num_test)
  numbers = tuple(d if n is None else n for n, d in zip(given, defaults))
  for split, number, least in zip(SPLITS, numbers, (1, 0, 0)):
    if number < least:
      raise ValueError(f"{number} {split} prompts: must be at least {least}")
  file = _find(source)
  if kind == "blocks" and file.suffix in (".parquet", ".jsonl"):
    raise ValueError(f"config.data.path {source!r}: blocks are of plain text; the texts of {file.suffix} are documents")
  name = f"{kind}_{prepared.digest([file], file.suffix, kind, seed, numbers, tokenizer_name)}"
  return PromptsConfig(name=name, file=file, kind=kind, seed=seed, numbers=numbers, count_tokens=count_tokens)


def _find(source: str) -> pathlib.Path:
  file = sources.embedded("prompts.txt") if source == sources.EMBEDDED else pathlib.Path(source)
  if file.is_file():
    return file
  owner, _, rest = source.partition("/")
  name, _, inside = rest.partition("/")
  if inside and sources.is_hub_id(f"{owner}/{name}") and not file.is_dir():
    return sources.hub_file(f"{owner}/{name}", inside)
  raise ValueError(
    f"config.data.path {source!r} is no file: name one with prompts or documents, a hub data set's file as "
    f"owner/name/file.parquet, or {sources.EMBEDDED!r}"
  )


def read_texts(file: pathlib.Path, blocks: bool = False) -> Iterator[str]:
  """The texts of a file, one by one as they are read, empty ones left out.

  Args:
    file: .parquet or .jsonl with a field `text`, or plain text.
    blocks: in plain text a text is what stands between blank lines, instead of a line.

  Raises:
    ValueError: the file cannot be read, or a record has no text; one line naming it.
  """
  if file.suffix == ".jsonl":
    texts = (json_lines.text_field(file, number, record, "text") for number, record in json_lines.read_objects(file))
  elif file.suffix == ".parquet":
    texts = _parquet_texts(file)
  else:
    texts = _blocks(_lines(file)) if blocks else _lines(file)
  return (text.strip() for text in texts if text.strip())


def _lines(file: pathlib.Path) -> Iterator[str]:
  try:
    with file.open(encoding="utf-8-sig") as lines:
      yield from lines
  except OSError as e:
    raise ValueError(f"{file} cannot be read: {e.strerror}") from None
  except UnicodeDecodeError as e:
    raise ValueError(f"{file} is no UTF-8 text: {e}") from None


def _blocks(lines: Iterable[str]) -> Iterator[str]:
  block: list[str] = []
  for line in lines:
    if line.strip():
      block.append(line.strip())
    else:
      yield " ".join(block)
      block = []
  yield " ".join(block)


def _parquet_texts(file: pathlib.Path) -> Iterator[str]:
  import pyarrow
  from pyarrow import parquet

  try:
    table = parquet.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
      raise ValueError(f"{file} has no column 'text': it has {', '.join(table.schema_arrow.names)}")
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
      for text in batch.column(0).to_pylist():
        if not isinstance(text, str):
          raise ValueError(f"{file}, record {number}: field 'text' must be text, not {type(text).__name__}")
        yield text
        number += 1
  except (OSError, pyarrow.ArrowInvalid) as e:
    raise ValueError(f"{file} is no parquet file that can be read: {' '.join(str(e).split())[:200]}") from None


def cut(document: str, rng: np.random.Generator, count_tokens: Callable[[str], int] = count_words) -> str | None:
  """A prompt from a document, by the rule of this module; None where the document offers none."""
  runs: dict[int, list[str]] = {}
  for paragraph in document.splitlines():
    parts = sentences.split(paragraph)
    good = [_is_whole(s) and MIN_TOKENS <= count_tokens(s) <= MAX_TOKENS for s in parts]
    for start in range(len(parts)):
      for number in range(1, MAX_SENTENCES + 1):
        if start + number > len(parts) or not good[start + number - 1]:
          break
        runs.setdefault(number, []).append(" ".join(parts[start : start + number]))
  if not runs:
    return None
  choices = runs[int(rng.choice(sorted(runs)))]
  return choices[rng.integers(len(choices))]


def _is_whole(sentence: str) -> bool:
  closed = sentence.count('"') % 2 == 0 and all(sentence.count(a) == sentence.count(b) for a, b in _PAIRS)
  return closed and _WHOLE.fullmatch(sentence) is not None


def read_prompts(config: PromptsConfig) -> list[str]:
  """As many different prompts as the config needs, in the order of the file, which is read no further than that.

  Raises:
    ValueError: the file has not as many, or a bad record; one line naming it.
  """
  found: dict[str, None] = {}
  needed = sum(config.numbers)
  for i, text in enumerate(read_texts(config.file, blocks=config.kind == "blocks")):
    if config.kind != "prompts":
      text = cut(text, np.random.default_rng((config.seed, i)), config.count_tokens or count_words)
    if text is not None:
      found[text] = None
      if len(found) == needed:
        return list(found)
  sizes = ", ".join(f"{number} {split}" for number, split in zip(config.numbers, SPLITS))
  raise ValueError(f"{config.file} has {len(found)} different prompts: {needed} are asked for ({sizes})")


class OpenwebtextPrompts(prepared.RecordsBuilder):
  """Prompts of 1-3 sentences."""

  FEATURES = {"prompt": tfds.features.Text()}  # noqa: RUF012

  def splits(self) -> dict[str, list[dict]]:
    config = self.builder_config
    prompts = read_prompts(config)
    order = np.random.default_rng(config.seed).permutation(len(prompts))
    ends = np.cumsum(config.numbers)
    parts = {split: order[end - number : end] for split, end, number in zip(SPLITS, ends, config.numbers)}
    return {split: [{"prompt": prompts[i]} for i in ids] for split, ids in parts.items() if len(ids)}


def load(config: PromptsConfig, split: str, data_dir: str | None = None) -> list[dict]:
  """The records {"prompt": str} of "train", "validation" or "test"; [] for a split of size 0."""
  if split in SPLITS and not config.numbers[SPLITS.index(split)]:
    return []  # TFDS has no empty splits
  return prepared.load(OpenwebtextPrompts, config, split, data_dir)
