"""Runs a sweep of a config: python -m launch.sweep --config=configs/arith.py --name=table4 [--workers=N] [--dry-run]

The runs are those that `sweep(name)` of the config file lists. Run again, the same command skips what is finished and
goes on with the rest. A variant of the config (configs/arith.py:paper) takes the place of the default one in each run;
any --config.field=value is for all runs, and refused where runs of other values are there. The sweep's folder,
runs/<config>[-<variant>]-<name>, holds a workdir for each run and sweep.json, which says what they are.
"""

import pathlib
import shlex
import sys
import tempfile

from absl import flags
from ml_collections import config_flags

from gfn_jax import cli
from gfn_jax.files import local_path
from launch.jobs import Job, Local, Slurm, execute
from launch.runs import parse_shard, require_same_configs, resolve, write_record

cli.define_config()
_NAME = flags.DEFINE_string("name", None, "The sweep, as table4: one that the config file's sweep() knows.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; by default runs/<config>[-<variant>]-<name>.")
_WORKERS = flags.DEFINE_integer("workers", None, "Runs at once; by default 1, on Slurm all.", lower_bound=1)
_CLUSTER = flags.DEFINE_enum("cluster", "local", ["local", "slurm"], "Where the runs run.")
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of a run; 0, on this machine: all that the sweep sees.", lower_bound=0)
_PARTITION = flags.DEFINE_string("partition", None, "Slurm: the partition.")
_HOURS = flags.DEFINE_float(
  "hours", 24.0, "Slurm: time of a job; a longer run saves and is queued again.", lower_bound=0.1
)
_SHARD = flags.DEFINE_string("shard", "0/1", "i/n: every n-th run from run i on, for pod i of n.")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Prints the command line of each run and its state, and runs nothing.")


def main() -> int:
  config_file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
  common, name = config_flags.get_override_values(flags.FLAGS["config"]), _NAME.value
  if not name:
    raise ValueError("--name is missing: a sweep of the config file, as --name=smoke")
  shard = parse_shard(_SHARD.value)
  runs = resolve(config_file, name, variant, common)
  default = "-".join(filter(None, [pathlib.Path(config_file).stem, variant, name]))
  folder = local_path(_WORKDIR.value or f"runs/{default}")
  require_same_configs(folder, runs)

  command = lambda run: ["-m", "gfn_jax.main", *run.flags(config_file, folder)]  # noqa: E731
  if _DRY_RUN.value:
    for run in runs[shard]:
      print(f"{run.state(folder):<12} {shlex.join(['python', *command(run)])}")
    return 0

  sweep = ["python", "-m", "launch.sweep", f"--config={config_file}" + (f":{variant}" if variant else "")]
  sweep += [f"--name={name}", *([f"--workdir={folder}"] if _WORKDIR.value else [])]
  sweep += [f"--config.{field}={value}" for field, value in common.items()]
  write_record(folder, config_file, name, shlex.join(sweep), runs)

  jobs = [Job((folder / r.name).absolute(), (sys.executable, *command(r)), r.num_steps) for r in runs[shard]]
  if _CLUSTER.value == "slurm":
    cluster = Slurm(folder / "slurm", _PARTITION.value, _GPUS.value, _HOURS.value)
    return execute(jobs, cluster, _WORKERS.value or len(jobs))
  with tempfile.TemporaryDirectory(dir=folder, prefix=".jobs-") as scratch:
    return execute(jobs, Local(pathlib.Path(scratch), _GPUS.value), _WORKERS.value or 1)


if __name__ == "__main__":
  cli.launch(main)
