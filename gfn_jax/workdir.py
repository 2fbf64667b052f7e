"""The files of a run and the contract around them: who may go on with a workdir, and what a finished run leaves."""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
import ml_collections

from gfn_jax import distributed
from gfn_jax.config import first_difference, flatten, num_micro_batches
from gfn_jax.data import num_by_behavior
from gfn_jax.files import Path, is_remote, reason, to_path, write_text
from gfn_jax.files import finished_steps as finished_steps
from gfn_jax.losses import PREFIX_LOSSES
from gfn_jax.models import Pretrained
from gfn_jax.task import Task
from gfn_jax.version import __version__


def prepare(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> Path:
  """Makes the folder, or checks that it holds a run of this config. Called by all processes.

  Raises:
    ValueError: the folder or URL cannot be written, is not one to all processes, or holds another run; names the first
      field that differs.
  """
  path = to_path(workdir)
  if is_remote(path) and config.profile:
    raise ValueError(f"config.profile: a trace is written into a folder, and {os.fspath(path)!r} is a URL")
  try:
    path.mkdir(parents=True, exist_ok=True)
    probes = [path / f".writable{index}" for index in range(jax.process_count())]
    write_text(probes[jax.process_index()], "")
    distributed.wait_for_all("a probe of the workdir")
    shared = all(probe.exists() for probe in probes)
    if distributed.any_of(not shared):
      raise ValueError(f"workdir {os.fspath(path)!r} is not the same folder to all {len(probes)} processes")
    probes[jax.process_index()].unlink()
  except jax.errors.JaxRuntimeError:  # another process has died
    raise
  except Exception as e:  # a bucket's libraries have many
    if isinstance(e, ValueError) or not (is_remote(path) or isinstance(e, OSError)):
      raise
    raise ValueError(f"workdir {os.fspath(path)!r} cannot be written: {reason(e)}") from None
  require_same_config(config, path / "config.json")
  return path


def require_same_config(config: ml_collections.ConfigDict, record: Path) -> None:
  """Raises ValueError where `record`, as `write_config` writes it, is of another run; it may be missing."""
  if not record.exists():
    return
  try:
    theirs = dict(json.loads(record.read_text())["config"])
  except (ValueError, KeyError, TypeError):
    raise ValueError(f"{record} is damaged: choose another folder") from None
  difference = first_difference(json.loads(json.dumps(flatten(config))), theirs)
  if difference:
    raise ValueError(f"workdir {os.fspath(record.parent)!r} holds another run: {difference}")


def config_hash(config: ml_collections.ConfigDict) -> str:
  """Tells runs of different settings apart, the seed included."""
  return hashlib.sha256(json.dumps(flatten(config), sort_keys=True).encode()).hexdigest()[:16]


def git_commit() -> str:
  """The commit of the source tree that runs, "-dirty" behind it where files were changed; "unknown" outside one."""

  def git(*arguments):
    here = pathlib.Path(__file__)
    command = ["git", *arguments]
    return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True).stdout

  try:
    git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)  # an installed copy may stand in another repository
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def write_config(workdir: Path, config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> None:
  """config.json: the resolved config, versions, commit and devices. The first process writes."""
  if not distributed.is_first():
    return
  import flax
  import numpy
  import optax
  import orbax.checkpoint
  import transformers

  modules = {
    "jax": jax,
    "flax": flax,
    "optax": optax,
    "orbax": orbax.checkpoint,
    "transformers": transformers,
    "numpy": numpy,
  }
  record = {
    "config": flatten(config),
    "versions": {"gfn_jax": __version__, "python": platform.python_version()}
    | {name: module.__version__ for name, module in modules.items()},
    "commit": git_commit(),
    "devices": [str(d) for d in devices],
    "device_kinds": sorted({d.device_kind for d in devices}),
  }
  write_text(workdir / "config.json", json.dumps(record, indent=2) + "\n")


def write_results(path: Path, config: ml_collections.ConfigDict, results: Mapping, seconds: float) -> None:
  """results.json: one flat object; everything timed under time/."""
  record = dict(results) | {
    "meta/seed": config.seed,
    "meta/commit": git_commit(),
    "meta/config_hash": config_hash(config),
    "meta/num_steps": config.train.num_steps,
    "time/total_seconds": round(seconds, 1),  # of the last session, where the run was interrupted
  }
  write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def write_model_card(
  workdir: Path,
  config: ml_collections.ConfigDict,
  pretrained: Pretrained,
  results: Mapping[str, float],
  task: Task,
  reward_temperature: float,
  num_steps: int,
) -> None:
  """adapter/README.md: base, task, its reward in words, seed, and how close the policy is to the posterior.

  Args:
    reward_temperature: at the end of training, at which it was measured. num_steps: that the adapter has learned for.
  """
  rows = "\n".join(f"| `{k}` | {v:.4g} |" for k, v in sorted(results.items()) if k.split("/")[1] == config.method)
  kind, aim = {
    "gfn": ("GFlowNet", f"samples Z in proportion to R(Z)^(1/{reward_temperature:g}),"),
    "sft": ("supervised", "imitates the demonstrations; it was measured by"),
  }.get(config.method, (config.method.upper(), "seeks the largest reward,"))
  objective = config.loss.name if config.method == "gfn" else config.method
  text = f"""---
base_model: {pretrained.source}
library_name: peft
tags: [{kind.lower()}, lora, {task.name}]
---

# {task.name}: a {kind} sampler on {pretrained.source}

A LoRA adapter (rank {config.lora.rank}, alpha {config.lora.alpha:g}) that {aim}
R(Z) = {task.reward_text(config)}.
Loss {objective}, {num_steps} steps, seed {config.seed}, gfn_jax {__version__}.

Licence: that of the base model, {pretrained.licence}.

    from peft import PeftModel
    model = PeftModel.from_pretrained(base, "adapter")  # base: the model above, as transformers loads it

| measured on held-out problems | |
|---|---|
{rows}

`log_ratio_variance` is the variance of log R / T - log q within a query, in nats²: 0 for an exact sampler.
"""
  write_text(workdir / "adapter" / "README.md", text)


def plan(
  config: ml_collections.ConfigDict,
  pretrained: Pretrained,
  trained: Any,
  devices: Sequence[jax.Device],
  first_step: int,
  workdir: Path,
) -> str:
  """What is about to run, in a few lines."""
  # A quantised kernel's scales are no parameters of their own.
  is_kernel = lambda x: hasattr(x, "qvalue")  # noqa: E731
  sizes = lambda tree: (getattr(x, "qvalue", x).size for x in jax.tree.leaves(tree, is_leaf=is_kernel))  # noqa: E731
  count = lambda tree: sum(sizes(tree))  # noqa: E731
  c, m = config, pretrained.config
  rows = c.train.num_queries * c.sampler.num_samples
  micro_batches = num_micro_batches(c, len(devices) // c.mesh.model)
  r, objective, behaviors = c.reward, c.method, ""
  if c.method == "gfn":
    behaviors = " ({} replayed, {} tempered)".format(*num_by_behavior(c.behavior, c.train.num_queries))
    some = f" of {n} prefixes a sample" if (n := c.loss.num_prefixes) and c.loss.name in PREFIX_LOSSES else ""
    objective = f"{c.loss.name}{some}, reward temperature {r.temperature_start:g} to {r.temperature_end:g} "
    objective += f"over {r.temperature_horizon} steps"
  precision = c.model.quantization or c.model.dtype
  shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
  shared += f", {c.mesh.model} to a copy of the model" if c.mesh.model > 1 else ""
  return "\n".join([
    f"model     {pretrained.source} ({m.family}, {count(pretrained.params):,} parameters, {precision})",
    f"trained   {count(trained):,} parameters (LoRA rank {c.lora.rank} on {', '.join(c.lora.targets)})",
    f"devices   {len(devices)} x {devices[0].device_kind}{shared}",
    f"batch     {c.train.num_queries} queries{behaviors} x {c.sampler.num_samples} samples = {rows} trajectories a "
    f"step, {micro_batches} micro-batch{'es' if micro_batches > 1 else ''} a device",
    f"objective {objective}",
    f"steps     {first_step} of {c.train.num_steps} made; everything goes to {workdir}",
  ])  # fmt: skip
