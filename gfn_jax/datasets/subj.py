"""TFDS builder of SUBJ, sentences about films that are objective or subjective (Pang & Lee 2004; paper section 4.3).

Splits: `train` and `test`. The paper learns from 10, 20 or 50 labelled sentences; its three seeds change the model's
initial values and the order of batches, never the sentences. Its released sets are nested (the 10 begin the 20, which
begin the 50), so the first n of its train.50.jsonl are the sets of Table 3.
"""

import dataclasses
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from gfn_jax.datasets import json_lines, prepared, sources

LABELS = ("objective", "subjective")  # a label's number is its place
FILES = {"train": "train.jsonl", "test": "test.jsonl"}


@dataclasses.dataclass
class SubjConfig(tfds.core.BuilderConfig):
  """`files`: each split's JSON lines."""

  files: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)


def make_config(source: str = sources.EMBEDDED) -> SubjConfig:
  """A config whose name tells its contents apart.

  Args:
    source: "embedded", a folder with train.jsonl and test.jsonl (fields text, label: 0 objective, 1 subjective, and
      perhaps label_text), or a data set with these files on the hub, as "SetFit/subj".

  Raises:
    ValueError: there is no such source; one line that says what to do.
  """
  folder = sources.embedded("subj") if source == sources.EMBEDDED else pathlib.Path(source)
  if source and folder.is_dir():
    files = {split: folder / name for split, name in FILES.items()}
    for file in files.values():
      if not file.is_file():
        raise ValueError(f"config.data.path {source!r} has no {file.name}: it must hold {' and '.join(FILES.values())}")
  elif sources.is_hub_id(source):
    files = {split: sources.hub_file(source, name) for split, name in FILES.items()}
  else:
    raise ValueError(
      f"config.data.path {source!r} is no folder: name one with {' and '.join(FILES.values())}, a hub data set as "
      f"SetFit/subj, or {sources.EMBEDDED!r}"
    )
  return SubjConfig(name=f"subj_{prepared.digest(files.values())}", files=files)


def read_records(path: pathlib.Path) -> list[dict]:
  """The {"text", "label"} of a JSON-lines file, in order; label is one of `LABELS`.

  Raises:
    ValueError: a bad record or no record; one line that names file and line.
  """
  records = []
  for number, raw in json_lines.read_objects(path):
    text = json_lines.text_field(path, number, raw, "text")
    label = raw.get("label")
    if type(label) is not int or label not in range(len(LABELS)):  # True is an int too
      raise ValueError(f"{path}, line {number}: label {label!r} must be 0 (objective) or 1 (subjective)")
    if not text.strip():
      raise ValueError(f"{path}, line {number}: text is empty")
    if raw.get("label_text", LABELS[label]) != LABELS[label]:
      raise ValueError(f"{path}, line {number}: label_text {raw['label_text']!r} contradicts label {label}")
    records.append({"text": text.strip(), "label": LABELS[label]})
  if not records:
    raise ValueError(f"{path} has no records")
  return records


class Subj(prepared.RecordsBuilder):
  """Sentences about films: objective (plot) or subjective (opinion)."""

  FEATURES = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=list(LABELS))}  # noqa: RUF012

  def splits(self) -> dict[str, list[dict]]:
    return {split: read_records(file) for split, file in self.builder_config.files.items()}


def load(config: SubjConfig, split: str, data_dir: str | None = None) -> list[dict]:
  """The records {"text": str, "label": "objective" or "subjective"} of "train" or "test", in their order."""
  records = prepared.load(Subj, config, split, data_dir)
  return [{"text": r["text"], "label": LABELS[r["label"]]} for r in records]


def labelled_subset(records: list[dict], number: int, seed: int | None = None) -> list[dict]:
  """The few labelled records that a run learns from.

  Args:
    records: of the train split.
    number: how many; the paper's are 10, 20 and 50.
    seed: None for the first `number`, which is how the paper's sets stand in its files; else a random set in random
      order with as many of each label (of an odd number the one more is objective).

  Raises:
    ValueError: there are not as many.
  """
  if seed is None:
    if not 1 <= number <= len(records):
      raise ValueError(f"{number} labelled records: must be from 1 to {len(records)}, which the data has")
    return records[:number]
  rng = np.random.default_rng(seed)
  drawn = []
  for label, share in zip(LABELS, (number - number // 2, number // 2)):
    ids = [i for i, r in enumerate(records) if r["label"] == label]
    if not 0 <= share <= len(ids):
      raise ValueError(f"{number} labelled records, {share} of them {label}: the data has {len(ids)} of those")
    drawn += rng.choice(ids, share, replace=False).tolist()
  return [records[i] for i in rng.permutation(drawn)]


def held_out(records: list[dict], number: int, labelled: list[dict]) -> list[dict]:
  """The first `number` records whose text none of the labelled ones has.

  Args:
    records: of the test split; or of train, to validate on.

  Raises:
    ValueError: there are not as many.
  """
  taken = {r["text"] for r in labelled}
  left = list({r["text"]: r for r in records if r["text"] not in taken}.values())
  if not 1 <= number <= len(left):
    raise ValueError(
      f"{number} held-out records (config.eval.num_test, config.eval.num_validation): must be from 1 to {len(left)}, "
      "which are left beside the labelled ones"
    )
  return left[:number]
