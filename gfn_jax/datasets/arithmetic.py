"""TFDS builder of the paper's arithmetic problems (section 4.4), generated from a seed or read from the released files.

Splits: `train` (X, Y), `demonstrations` (X, Z, Y), and `validation_k`, `test_k` for k = 3, 4, 5 operands. Training
problems have 3 or 4 operands. No test or validation expression is part of a generated one; of the released ones it is
different as a whole.
"""

import dataclasses
import json
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from gfn_jax.datasets import expressions, prepared

NUM_TRAIN, NUM_DEMONSTRATIONS, NUM_VALIDATION, NUM_TEST = 1000, 50, 100, 500
EVALUATED_OPERANDS = (3, 4, 5)
RELEASED_FILES = {"train": "hw_1000.json", "demonstrations": "train_50_no_tool.json"}


@dataclasses.dataclass
class ArithmeticConfig(tfds.core.BuilderConfig):
  """`seed` of generated problems; `path`: a folder with the paper's released JSON files for the training side."""

  seed: int = 0
  path: str | None = None


def make_config(seed: int, path: str | None = None) -> ArithmeticConfig:
  """A config whose name tells its contents apart, so that a prepared data set is never taken for another.

  Raises:
    ValueError: `path` lacks one of the released files.
  """
  if path is None:
    return ArithmeticConfig(name=f"seed{seed}", seed=seed)
  files = [pathlib.Path(path) / name for name in RELEASED_FILES.values()]
  for file in files:
    if not file.is_file():
      need = " and ".join(RELEASED_FILES.values())
      raise ValueError(f"config.data.path {path!r} has no {file.name}: it must hold {need}")
  return ArithmeticConfig(name=f"json_{prepared.digest(files)}_seed{seed}", seed=seed, path=path)


def read_records(file: str | pathlib.Path) -> list[dict]:
  """Records of a JSON list or of JSON lines with str_query, num_sol and perhaps str_rationale.

  Raises:
    ValueError: one line naming the file and the record.
  """
  file = pathlib.Path(file)
  try:
    text = file.read_text()
    raw = json.loads(text) if text.lstrip().startswith("[") else [json.loads(r) for r in text.splitlines() if r.strip()]
  except OSError as e:
    raise ValueError(f"{file} cannot be read: {e.strerror}") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"{file} is no JSON list and no JSON lines: {e}") from None
  if not raw:
    raise ValueError(f"{file} has no records")
  records = []
  for i, r in enumerate(raw):
    if not isinstance(r, dict) or not isinstance(r.get("str_query"), str) or not isinstance(r.get("num_sol"), int):
      raise ValueError(f"{file}, record {i}: str_query (text) and num_sol (integer) are needed")
    records.append({"prompt": r["str_query"], "rationale": str(r.get("str_rationale") or ""), "answer": r["num_sol"]})
  return records


class Arithmetic(prepared.RecordsBuilder):
  """Integer addition and subtraction, step by step."""

  FEATURES = {  # noqa: RUF012 (TFDS's own form)
    "prompt": tfds.features.Text(),
    "rationale": tfds.features.Text(),
    "answer": tfds.features.Scalar(np.int64),
  }

  def splits(self) -> dict[str, list[dict]]:
    """In order: the first demonstrations are the reward's."""
    config = self.builder_config
    rng = np.random.default_rng(config.seed)
    if config.path is None:
      trained = _distinct(rng, "train", (3, 4), NUM_TRAIN + NUM_DEMONSTRATIONS, set())
      sides = {"demonstrations": trained[:NUM_DEMONSTRATIONS], "train": trained[NUM_DEMONSTRATIONS:]}
      records = {side: [_record(e, with_steps=side == "demonstrations") for e in es] for side, es in sides.items()}
    else:
      records = {side: read_records(pathlib.Path(config.path) / name) for side, name in RELEASED_FILES.items()}
    # Generated problems are disjoint by their hash; released ones know nothing of it.
    seen = {expressions.expression_of(r["prompt"]) for rs in records.values() for r in rs}
    for split, number in (("validation", NUM_VALIDATION), ("test", NUM_TEST)):
      for k in EVALUATED_OPERANDS:
        records[f"{split}_{k}"] = [_record(e, with_steps=True) for e in _distinct(rng, split, (k,), number, seen)]
    return records


def _distinct(rng, split: str, operands: tuple[int, ...], number: int, exclude: set[str]) -> list[str]:
  found: dict[str, None] = {}
  for _ in range(1000 * number):
    if len(found) == number:
      return list(found)
    expression = expressions.expression_for(rng, int(rng.choice(operands)), split)
    if expression not in exclude:
      found[expression] = None
  raise ValueError(
    f"only {len(found)} of {number} {split} problems with {operands} operands are left by the training data"
  )


def _record(expression: str, with_steps: bool) -> dict:
  steps, answer = expressions.solve(expression)
  return {"prompt": expressions.question(expression), "rationale": steps if with_steps else "", "answer": answer}


def load(config: ArithmeticConfig, split: str, data_dir: str | None = None) -> list[dict]:
  """The records {"prompt": str, "rationale": str, "answer": int} of a split, in order."""
  return prepared.load(Arithmetic, config, split, data_dir)
