"""Finished runs, read from their folders and from those of sweeps."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import os
import re
import statistics
from typing import Any

from gfn_jax.files import Path, is_remote, read_json, to_path
from gfn_jax.metrics import read_jsonl
from gfn_jax.results import measured

_OF_A_ROUND = re.compile(r"/round\d+$")  # expectation-maximisation repeats the last round's keys without it


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    folder: its workdir.
    task: its name, as in `results`.
    config: dotted field -> value.
    results: `<task>/<method>/<metric>[/<slice>]` -> value; `step_seconds` among them, the median of the steps.
    commit: of the source tree that ran; `devices`: what they were, "1 x cpu".
    sweep: the name of the sweep that it belongs to; None for a single run.
    sweep_command: the sweep's command; None for a single run.
    varied: the config fields that its sweep sets, but for the seed.
  """

  folder: Path
  task: str
  config: Mapping[str, Any]
  results: Mapping[str, float]
  commit: str
  devices: str
  sweep: str | None = None
  sweep_command: str | None = None
  varied: tuple[str, ...] = ()

  @property
  def method(self) -> str:
    return self.config["method"]

  @functools.cached_property
  def samples(self) -> list[dict]:
    """The records of samples.jsonl that the final evaluation left, each with its method."""
    rounds = sorted(self.folder.glob("round*/e"), key=lambda p: int(p.parent.name.removeprefix("round")))
    records = [r for r in read_jsonl((rounds[-1] if rounds else self.folder) / "samples.jsonl") if "method" in r]
    last = max((r["step"] for r in records), default=0)
    return [r for r in records if r["step"] == last]


def read_runs(folders: Sequence[str | os.PathLike]) -> tuple[list[Run], list[Path]]:
  """The finished runs of workdirs and of sweeps' folders, each once, and the workdirs of those that have not ended.

  Raises:
    ValueError: a folder is neither, or a file in it is damaged; named.
  """
  found: dict[Path, Run | None] = {}
  named: dict[Path, Path] = {}
  for folder in map(to_path, folders):
    if (folder / "sweep.json").is_file():
      sweep = _read(folder / "sweep.json", ("name", "command", "runs"))
      fields = {f.removeprefix("config.") for r in sweep["runs"].values() for f in r.get("overrides", {})} - {"seed"}
      of_sweep = {"sweep": sweep["name"], "sweep_command": sweep["command"], "varied": tuple(sorted(fields))}
      workdirs = [folder / name for name in sweep["runs"]]
    elif (folder / "config.json").is_file():
      of_sweep, workdirs = {}, [folder]
    else:
      raise ValueError(f"{folder} is no run and no sweep: it has neither config.json nor sweep.json")
    for workdir in workdirs:
      key = workdir if is_remote(workdir) else workdir.resolve()
      if key not in found or of_sweep:  # named twice, it belongs to its sweep
        named[key], found[key] = workdir, _read_run(workdir, of_sweep)
  return [r for r in found.values() if r], [named[k] for k, r in found.items() if r is None]


def _read(path: Path, needs: Sequence[str]) -> dict:
  content = read_json(path)
  for name in needs:
    if name not in content:
      raise ValueError(f"{path} is damaged: it has no {name!r}")
  return content


def _read_run(workdir: Path, of_sweep: Mapping[str, Any]) -> Run | None:
  if not (workdir / "config.json").is_file() or not (workdir / "results.json").is_file():
    return None
  record = _read(workdir / "config.json", ("config",))
  results = read_json(workdir / "results.json")
  config = record["config"]
  missing = [f for f in ("task", "method", "seed", "name", "variant") if f not in config]
  if missing:
    raise ValueError(f"{workdir / 'config.json'} is damaged: it has no {missing[0]!r}")
  if results.get("meta/num_steps", math.inf) < config.get("train.num_steps", 0):
    return None  # it goes on for more steps than these results are of
  values = {k: float(v) for k, v in measured(results).items() if not _OF_A_ROUND.search(k)}
  task = next(iter(values), config["name"]).partition("/")[0]  # config.task may be a file and a class
  seconds = [r["step_seconds"] for r in read_jsonl(workdir / "metrics.jsonl") if "step_seconds" in r]
  if seconds:
    values[f"{task}/{config['method']}/step_seconds"] = statistics.median(seconds)
  devices = record.get("devices", [])
  # Older files have the devices' names alone: "cpu:0".
  kinds = record.get("device_kinds") or sorted({d.partition(":")[0] for d in devices})
  return Run(
    workdir, task, config, values, record.get("commit", "unknown"), f"{len(devices)} x {', '.join(kinds)}", **of_sweep
  )
