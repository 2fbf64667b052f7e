"""What a sweep is: the runs that a config file's `sweep(name)` lists, and the record of them."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

import ml_collections

from gfn_jax.config import require_fields, validate
from gfn_jax.files import finished_steps, read_json, write_text
from gfn_jax.named import load_named
from gfn_jax.workdir import require_same_config
from launch.jobs import locked


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a sweep.

  Attributes:
    name: of its folder.
    variant: of the config file.
    overrides: the fields that the sweep sets on top.
    common: those that the user sets for all of its runs.
    config: all of its fields.
  """

  name: str
  variant: str
  overrides: dict[str, Any]
  common: dict[str, Any]
  config: ml_collections.ConfigDict

  @property
  def num_steps(self) -> int:
    return self.config.train.num_steps

  def flags(self, config_file: str, folder: pathlib.Path) -> tuple[str, ...]:
    """Of its command line; `folder`: the sweep's."""
    config = config_file + (f":{self.variant}" if self.variant else "")
    fields = (f"--config.{k}={v}" for k, v in (self.overrides | self.common).items())
    return f"--config={config}", f"--workdir={folder / self.name}", *fields

  def state(self, folder: pathlib.Path) -> str:
    if finished_steps(folder / self.name) >= self.num_steps:
      return "finished"
    return "unfinished" if (folder / self.name / "config.json").exists() else "not started"


def run_name(variant: str, overrides: dict[str, Any]) -> str:
  """A folder's name that tells what is special of a run: "paper,method=ppo,seed=1"."""
  fields = [f"{field.rpartition('.')[2]}={value}" for field, value in overrides.items()]
  return re.sub(r"[^\w.=,+-]", "_", ",".join([variant] * bool(variant) + fields)) or "default"


def resolve(config_file: str, name: str, variant: str = "", common: dict[str, Any] | None = None) -> list[Run]:
  """The runs of a sweep, each of them checked.

  Args:
    config_file: with a function `sweep(name, variant)`.
    name: of the sweep.
    variant: in place of the default one.
    common: fields of all runs.

  Raises:
    ValueError: there is no such sweep or variant, one of its runs does not validate, or what is common contradicts it.
  """
  common = common or {}
  get_config = load_named(f"{config_file}:get_config")
  runs = {}
  for own, overrides in load_named(f"{config_file}:sweep")(name, variant):
    if both := overrides.keys() & common.keys():
      raise ValueError(f"--config.{min(both)}: sweep {name!r} sets it itself")
    folder = run_name(own, overrides)
    if folder in runs:
      raise ValueError(f"sweep {name!r} has two runs that would be called {folder!r}")
    own = "_".join(filter(None, (variant, own)))  # subj.py's "sft" at the paper's size is "paper_sft"
    try:
      config = get_config(own)
    except ValueError as e:
      raise ValueError(f"sweep {name!r} at variant {variant!r}: {e}") from None
    config.update_from_flattened_dict(overrides | common)
    require_fields(config)
    try:
      validate(config, num_devices=1)
    except ValueError as e:
      raise ValueError(f"run {folder!r}: {e}") from None
    runs[folder] = Run(folder, own, overrides, common, config)
  return list(runs.values())


def parse_shard(text: str) -> slice:
  """ "i/n" as the slice of the runs that it stands for.

  Raises:
    ValueError: it is no such thing.
  """
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(f"--shard={text}: must be i/n with i from 0 to n - 1, as 0/4")
  return slice(int(match[1]), None, int(match[2]))


def require_same_configs(folder: pathlib.Path, runs: Sequence[Run]) -> None:
  """Finished runs are skipped: those of other settings must not pass for this sweep's.

  Raises:
    ValueError: a run in the sweep's `folder` has another config; names the first field that differs.
  """
  for run in runs:
    require_same_config(run.config, folder / run.name / "config.json")


def write_record(folder: pathlib.Path, config_file: str, name: str, command: str, runs: Sequence[Run]) -> None:
  """sweep.json: what the sweep is, for those who read its runs. Pods of one sweep may write it at once.

  Raises:
    ValueError: the folder holds another sweep.
  """
  path = folder / "sweep.json"
  record = {
    "config": config_file,
    "name": name,
    "command": command,
    "runs": {run.name: {"variant": run.variant, "overrides": run.overrides} for run in runs},
  }
  with locked(folder):
    theirs = read_json(path) if path.exists() else record
    for key in ("config", "name"):
      if theirs.get(key) != record[key]:
        raise ValueError(f"{folder} holds another sweep: its {key} is {theirs.get(key)!r}, not {record[key]!r}")
    write_text(path, json.dumps(record, indent=2) + "\n")
