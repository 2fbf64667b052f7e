"""TFDS builder of ROCStories, stories of five sentences (Mostafazadeh et al. 2016; paper section 4.2).

Splits: `test` and `train` by a seed, and `finetune`, all stories but the test ones, for the base model. The paper
fine-tuned its base on "the entirety of the stories dataset", test stories included; here they stay unseen.
"""

import csv
import dataclasses
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from gfn_jax.datasets import prepared, sources

NUM_SENTENCES = 5
COLUMNS = tuple(f"sentence{i}" for i in range(1, NUM_SENTENCES + 1))
NUM_TRAIN, NUM_TEST = 900, 100  # section 4.2
NUM_TRAIN_EMBEDDED, NUM_TEST_EMBEDDED = 32, 16


@dataclasses.dataclass
class RocStoriesConfig(tfds.core.BuilderConfig):
  """`files`: the CSVs; `num_train` and `num_test` stories are drawn by `seed`."""

  files: tuple[pathlib.Path, ...] = ()
  seed: int = 0
  num_train: int = NUM_TRAIN
  num_test: int = NUM_TEST


def make_config(
  source: str = sources.EMBEDDED, seed: int = 0, num_train: int | None = None, num_test: int | None = None
) -> RocStoriesConfig:
  """A config whose name tells its contents apart.

  Args:
    source: "embedded", a CSV with the columns storyid, storytitle, sentence1 to sentence5, or a folder whose CSVs are
      all such.
    seed: of the split.
    num_train, num_test: stories; None for the paper's 900 and 100, of the embedded ones for 32 and 16.

  Raises:
    ValueError: there is no such source; one line that says what to do.
  """
  path = sources.embedded("stories") if source == sources.EMBEDDED else pathlib.Path(source)
  files = sorted(path.glob("*.csv")) if source and path.is_dir() else [path] * path.is_file()
  if not files:
    raise ValueError(
      f"config.data.path {source!r} is no CSV of ROCStories and no folder with one, nor {sources.EMBEDDED!r}: "
      f"{RocStories.MANUAL_DOWNLOAD_INSTRUCTIONS}"
    )
  defaults = (NUM_TRAIN_EMBEDDED, NUM_TEST_EMBEDDED) if source == sources.EMBEDDED else (NUM_TRAIN, NUM_TEST)
  num_train, num_test = (d if n is None else n for n, d in zip((num_train, num_test), defaults))
  for name, number in (("training", num_train), ("test", num_test)):
    if number < 1:
      raise ValueError(f"{number} {name} stories: must be at least 1")
  name = f"stories_{prepared.digest(files, seed, num_train, num_test)}"
  return RocStoriesConfig(name=name, files=tuple(files), seed=seed, num_train=num_train, num_test=num_test)


def read_stories(path: pathlib.Path) -> list[list[str]]:
  """The five sentences of each story of a CSV, in order.

  Raises:
    ValueError: a column is missing, the file is empty, or a story has not five sentences; one line naming file and
      record.
  """
  stories = []
  try:
    with path.open(encoding="utf-8-sig", newline="") as file:
      reader = csv.DictReader(file)
      missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
      if missing:
        raise ValueError(f"{path} lacks the column {missing[0]}: it has {', '.join(reader.fieldnames or ()) or 'none'}")
      for row in reader:
        record = f"{path}, line {reader.line_num}, story {row.get('storyid')!r}"
        if None in row:  # what DictReader calls the rest of a row
          raise ValueError(f"{record}: more values than the header has columns")
        sentences = [" ".join((row[c] or "").split()) for c in COLUMNS]
        if not all(sentences):
          raise ValueError(f"{record}: five sentences are needed, {COLUMNS[sentences.index('')]} is empty")
        stories.append(sentences)
  except OSError as e:
    raise ValueError(f"{path} cannot be read: {e.strerror}") from None
  except (csv.Error, UnicodeDecodeError) as e:
    raise ValueError(f"{path} is no CSV: {e}") from None
  if not stories:
    raise ValueError(f"{path} has no stories")
  return stories


class RocStories(prepared.RecordsBuilder):
  """Everyday stories of five sentences each."""

  FEATURES = {  # noqa: RUF012
    "sentences": tfds.features.Sequence(tfds.features.Text(), length=NUM_SENTENCES),
  }
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "ask for the CSV files at https://www.cs.rochester.edu/nlp/rocstories/, and let config.data.path name one of them "
    "or their folder"
  )

  def splits(self) -> dict[str, list[dict]]:
    config = self.builder_config
    # A story that is there twice would be in test and in training.
    stories = list(dict.fromkeys(tuple(story) for file in config.files for story in read_stories(file)))
    if config.num_train + config.num_test > len(stories):
      raise ValueError(
        f"{config.num_train} training and {config.num_test} test stories: {', '.join(map(str, config.files))} has "
        f"{len(stories)} different ones"
      )
    order = np.random.default_rng(config.seed).permutation(len(stories)).tolist()
    test, train = order[: config.num_test], order[config.num_test : config.num_test + config.num_train]
    ids = {"train": train, "test": test, "finetune": sorted(order[config.num_test :])}
    return {split: [{"sentences": list(stories[i])} for i in ids_] for split, ids_ in ids.items()}


def load(config: RocStoriesConfig, split: str, data_dir: str | None = None) -> list[dict]:
  """The records {"sentences": five strings} of "train", "test" or "finetune".

  Returns:
    In the order of the draw; those of "finetune" in the order of the files. "finetune" holds the training stories too.
  """
  return prepared.load(RocStories, config, split, data_dir)
