"""Sweeps: what the configs list, the command line, and that no run is lost or run twice, whoever is killed."""

from collections import Counter
import importlib
import json
import os
import pathlib
import re
import shlex
import signal
import stat
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags
import pytest
import submitit

from configs import arith
from gfn_jax.config import METHODS, flatten, grid
from launch.jobs import Job, Local, Slurm, execute
from launch.runs import Run, parse_shard, resolve, run_name, write_record
from testing import REPOSITORY, assert_one_line, run_commands

CONFIGS = ("arith", "infill", "next_sentence", "rng", "subj")


def names(config):
  """Of the sweeps of a config, as its error message lists them."""
  with pytest.raises(ValueError, match="sweep 'nothing' is unknown: choose from ") as error:
    importlib.import_module(f"configs.{config}").sweep("nothing")
  return str(error.value).rpartition("choose from ")[2].split(", ")


SWEEPS = [(config, name) for config in CONFIGS for name in names(config)]


def as_main_reads(arguments):
  """The config that these flags give."""
  values = flags.FlagValues()
  argv = ["main", *arguments]
  config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
  flags.DEFINE_string("workdir", None, "", values)
  values(argv)
  return values.config


@pytest.mark.parametrize("config, name", SWEEPS)
def test_a_sweeps_command_lines_give_valid_configs_in_folders_of_their_own(config, name, tmp_path):
  file = str(REPOSITORY / "configs" / f"{config}.py")
  pairs = importlib.import_module(f"configs.{config}").sweep(name)
  assert len({run_name(*pair) for pair in pairs}) == len(pairs) > 1
  for run in resolve(file, name, common={"checkpoint.every_steps": 4000}):
    config = as_main_reads(run.flags(file, tmp_path))
    assert config.variant == run.variant
    fields = flatten(config)
    assert {k: fields[k] for k in run.overrides} == json.loads(json.dumps(run.overrides))  # tuples as lists
    assert fields == flatten(run.config) and run.num_steps == config.train.num_steps
    assert config.checkpoint.every_steps == 4000


def test_the_tables_of_the_paper_are_listed():
  listed = {f"{config}/{name}" for config, name in SWEEPS}
  assert listed >= {"arith/smoke", "arith/table4", "arith/table_e3", "arith/objectives", "arith/misspecified"}
  assert listed >= {"subj/table3", "subj/table_d4", "infill/table2", "next_sentence/fig3", "rng/fig2"}
  arith, subj = (importlib.import_module(f"configs.{c}") for c in ("arith", "subj"))
  assert [fields["method"] for _, fields in arith.sweep("smoke")] == list(METHODS)
  assert Counter(variant for variant, _ in subj.sweep("table3")) == {"": 9, "sft": 9}
  assert len(arith.sweep("table4")) == 12
  of_paper = resolve(str(REPOSITORY / "configs" / "subj.py"), "table3", "paper")
  assert Counter(run.config.variant for run in of_paper) == {"paper": 9, "paper_sft": 9}


def test_at_the_papers_size_baselines_have_the_papers_settings():
  """And not those that were chosen for the embedded LM."""
  runs = resolve(str(REPOSITORY / "configs" / "arith.py"), "table4", "paper")
  found = {run.config.method: (run.config.train.learning_rate, run.config.train.num_steps) for run in runs}
  assert found == {"gfn": (1e-4, 1000), "sft": (1e-4, 10), "ppo": (1e-4, 1000), "grpo": (1e-4, 1000)}
  assert {run.config.ppo.kl_coefficient for run in runs} == {0.2}
  runs = resolve(str(REPOSITORY / "configs" / "infill.py"), "table2", "paper")
  of_sft = next(run.config for run in runs if run.config.method == "sft")
  assert of_sft.train.num_queries * of_sft.sampler.num_samples == 256
  assert (of_sft.train.num_steps, of_sft.train.learning_rate) == (35, 1e-4)


def test_every_method_is_tuned_by_nine_trials_on_problems_that_no_table_is_made_of():
  runs = [fields for _, fields in importlib.import_module("configs.arith").sweep("tuning")]
  assert Counter(fields["method"] for fields in runs) == dict.fromkeys(METHODS, 9)
  assert len({tuple(fields.items()) for fields in runs}) == 36
  assert {fields["eval.split"] for fields in runs} == {"validation"}


def test_grid():
  assert grid({"a": (1, 2), "b.c": "x"}) == [{"a": 1, "b.c": "x"}, {"a": 2, "b.c": "x"}]


def test_run_name():
  assert run_name("", {"method": "ppo", "seed": 1}) == "method=ppo,seed=1"
  assert run_name("smoke", {"loss.subtb_lambda": 0.5}) == "smoke,subtb_lambda=0.5"
  assert run_name("", {"model.name": "runs/my lm"}) == "name=runs_my_lm"
  assert run_name("", {}) == "default"


@pytest.fixture
def config_file(tmp_path):
  """A config whose sweeps are what slips look like."""
  file = tmp_path / "own.py"
  file.write_text(
    "from configs.arith import get_config\n"
    "SWEEPS = {'two': [('', {'seed': 0}), ('', {'seed': 1})], 'same': [('', {'seed': 0})] * 2,\n"
    "  'variants': [('smoke', {})], 'wrong': [('', {'eval.num_votes': 0})]}\n"
    "def sweep(name, variant):\n  return SWEEPS[name]\n"
  )
  return str(file)


def test_resolve(config_file):
  first, second = resolve(config_file, "two", "smoke", {"data.seed": 3})
  config = arith.get_config("smoke")
  config.data.seed = 3
  assert first == Run("seed=0", "smoke", {"seed": 0}, {"data.seed": 3}, config) and first.num_steps == 4
  assert second.flags("own.py", pathlib.Path("f")) == (
    "--config=own.py:smoke", "--workdir=f/seed=1", "--config.seed=1", "--config.data.seed=3",
  )  # fmt: skip


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("same",), "two runs that would be called 'seed=0'"),
    (("two", "", {"seed": 3}), "--config.seed: sweep 'two' sets it itself"),
    (("variants", "smollm2"), "config variant 'smollm2_smoke' is unknown"),
    (("wrong",), "run 'num_votes=0': config.eval.num_votes is 0: must be positive"),
  ],
)
def test_resolve_refuses(config_file, arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    resolve(config_file, *arguments)


def test_shards_are_a_partition():
  runs = list(range(10))
  shards = [runs[parse_shard(f"{i}/4")] for i in range(4)]
  assert shards[1] == [1, 5, 9]
  assert sorted(run for shard in shards for run in shard) == runs


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "0/0"])
def test_a_wrong_shard(text):
  with pytest.raises(ValueError, match=re.escape(f"--shard={text}: must be i/n")):
    parse_shard(text)


def test_the_record_of_a_sweep(tmp_path):
  runs = [Run("seed=1", "smoke", {"seed": 1}, {"data.seed": 3}, arith.get_config("smoke"))]
  for command in ("first", "again"):
    write_record(tmp_path, "configs/own.py", "two", command, runs)
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
      "config": "configs/own.py", "name": "two", "command": command,
      "runs": {"seed=1": {"variant": "smoke", "overrides": {"seed": 1}}},
    }  # fmt: skip
  with pytest.raises(ValueError, match="holds another sweep: its name is 'two', not 'three'"):
    write_record(tmp_path, "configs/own.py", "three", "", runs)


# A run: notes its start and, once a file "go" is there, its end; SIGTERM makes it save and exit, as gfn_jax.main does.
RUN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def note(what):
  with open(folder.parent / "events", "a") as file:
    file.write(f"{what} {folder.name} {os.getpid()} {os.getppid()}\\n")
def leave(*_):
  note("saved")
  sys.exit(143)
signal.signal(signal.SIGTERM, leave)
note("start")
while not (folder.parent / "go").exists():
  time.sleep(0.02)
note("end")
(folder / "results.json").write_text('{"meta/num_steps": 5}')
"""

# A sweep of four of them in a folder.
SWEEP = f"""
import pathlib, sys, tempfile
from submitit.core.core import Job as SubmititJob
from launch.jobs import Job, Local, execute
SubmititJob._results_timeout_s = 0  # of a killed worker's results, on a file system that lags
folder = pathlib.Path(sys.argv[1])
command = lambda i: (sys.executable, "-S", "-c", {RUN!r}, str(folder / f"run{{i}}"))
jobs = [Job(folder / f"run{{i}}", command(i), 5) for i in range(4)]
with tempfile.TemporaryDirectory(dir=folder) as scratch:
  sys.exit(execute(jobs, Local(pathlib.Path(scratch)), 2))
"""


def start_sweep(folder):
  command = [sys.executable, "-c", SWEEP, str(folder)]
  return subprocess.Popen(
    command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
  )


def finish(sweep):
  """(exit code, stdout) of a sweep."""
  out, err = sweep.communicate(timeout=60)
  assert not err or err.startswith("stopping"), err
  return sweep.returncode, out


def events(folder):
  """(what, run, its process, its worker) so far."""
  file = folder / "events"
  rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
  return [(what, run, int(process), int(worker)) for what, run, process, worker in rows]


def wait_for_starts(folder, number):
  end = time.time() + 60
  while len(started := [e for e in events(folder) if e[0] == "start"]) < number:
    assert time.time() < end, f"{started}"
    time.sleep(0.05)
  return started


def wait_for_workers(folder, number):
  """Until that many of submitit's processes have begun with their jobs, those of killed sweeps included."""
  end = time.time() + 60
  while sum("Loading pickle" in log.read_text() for log in folder.glob("*/*_log.out")) < number:
    assert time.time() < end
    time.sleep(0.05)
  time.sleep(0.5)  # unpickled, it takes the lock at once


def go(folder):
  (folder / "go").touch()


def count(folder, what):
  return dict(Counter(e[1] for e in events(folder) if e[0] == what))


def assert_each_ended_once_and_alone(folder):
  assert count(folder, "end") == {f"run{i}": 1 for i in range(4)}
  for run in (f"run{i}" for i in range(4)):  # after an end nothing starts: nothing was run again, or beside it
    assert [e[0] for e in events(folder) if e[1] == run][-2:] == ["start", "end"]


ONCE = {f"run{i}": 1 for i in range(4)}


@pytest.mark.parametrize(
  "victims, starts",
  [
    ("sweep", ONCE),  # its two workers and runs live on, and the second sweep waits for them
    ("sweep and workers", ONCE),  # so do runs without a worker
    ("sweep, workers and runs", ONCE | {"run0": 2, "run1": 2}),
  ],
)
def test_a_killed_sweep_goes_on_and_nothing_is_lost_or_run_twice(victims, starts, tmp_path):
  first = start_sweep(tmp_path)
  running = wait_for_starts(tmp_path, 2)
  if victims == "sweep, workers and runs":
    os.killpg(first.pid, signal.SIGKILL)
  else:
    first.kill()
    for _, _, _, worker in running if "workers" in victims else ():
      os.kill(worker, signal.SIGKILL)
  first.wait()

  second = start_sweep(tmp_path)
  wait_for_workers(tmp_path, 4)
  go(tmp_path)
  code, out = finish(second)
  assert code == 0, out
  assert count(tmp_path, "start") == starts
  assert_each_ended_once_and_alone(tmp_path)
  assert re.findall(r"^(\d)/4 run\d: finished after \d+ s$", out, re.M) == ["1", "2", "3", "4"]

  assert finish(start_sweep(tmp_path)) == (0, "")  # everything is there
  assert count(tmp_path, "start") == starts


def test_a_killed_run_is_reported_and_run_again_by_the_same_command(tmp_path):
  first = start_sweep(tmp_path)
  os.kill(next(e[2] for e in wait_for_starts(tmp_path, 2) if e[1] == "run0"), signal.SIGKILL)
  wait_for_starts(tmp_path, 3)
  go(tmp_path)
  code, out = finish(first)
  assert code == 1
  assert re.search(r"^0/4 run0: failed after \d+ s: killed by SIGKILL \(.*/run0/stderr.log\)$", out, re.M)
  assert count(tmp_path, "end") == {"run1": 1, "run2": 1, "run3": 1}  # the others went on

  code, out = finish(start_sweep(tmp_path))
  assert (code, out.count("finished")) == (0, 1)
  assert count(tmp_path, "start") == ONCE | {"run0": 2}
  assert_each_ended_once_and_alone(tmp_path)


def test_a_killed_worker_is_reported_and_its_run_is_not_doubled(tmp_path):
  first = start_sweep(tmp_path)
  os.kill(next(e[3] for e in wait_for_starts(tmp_path, 2) if e[1] == "run0"), signal.SIGKILL)
  wait_for_starts(tmp_path, 3)
  go(tmp_path)
  code, out = finish(first)
  assert code == 1
  assert re.search("run0: failed after .*: its worker ended without a result", out)
  assert finish(start_sweep(tmp_path))[0] == 0
  assert count(tmp_path, "start") == ONCE
  assert_each_ended_once_and_alone(tmp_path)


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_a_stopped_sweep_lets_its_runs_save(how, tmp_path):
  first = start_sweep(tmp_path)
  wait_for_starts(tmp_path, 2)
  if how == "SIGTERM":
    first.terminate()
  else:
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
  code, out = finish(first)
  assert code == 143
  assert len(re.findall(r"^0/4 run[01]: interrupted .*: the same command goes on with it$", out, re.M)) == 2
  assert count(tmp_path, "saved") == {"run0": 1, "run1": 1}
  go(tmp_path)
  assert finish(start_sweep(tmp_path))[0] == 0
  assert_each_ended_once_and_alone(tmp_path)


def test_a_sweep_that_waits_for_an_earlier_ones_run_can_be_stopped(tmp_path):
  first = start_sweep(tmp_path)
  wait_for_starts(tmp_path, 2)
  first.kill()
  first.wait()
  second = start_sweep(tmp_path)
  wait_for_workers(tmp_path, 4)
  second.terminate()
  assert finish(second)[0] == 143
  assert count(tmp_path, "start") == {"run0": 1, "run1": 1}
  assert not count(tmp_path, "saved")  # the earlier sweep's runs are not its own
  go(tmp_path)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # of the workers
  monkeypatch.setattr("launch.jobs.POLL_SECONDS", 0.05)
  return tmp_path / "scratch"


def python(code):
  return (sys.executable, "-S", "-c", code)


def test_a_run_that_fails_is_reported_and_the_others_go_on(scratch, tmp_path, capsys):
  save = "import pathlib; pathlib.Path({!r}).write_text('{{\"meta/num_steps\": 5}}')"
  jobs = [
    Job(tmp_path / "bad", python("import sys; sys.exit('first line\\nerror: no such day')"), 5),
    Job(tmp_path / "empty", python("print('nothing done')"), 5),
    Job(tmp_path / "good", python(save.format(str(tmp_path / "good" / "results.json"))), 5),
  ]
  assert execute(jobs, Local(scratch), 3) == 1
  out = sorted(capsys.readouterr().out.splitlines())
  assert len(out) == 3
  assert re.search(
    r"bad: failed after \d+ s: exit code 1: error: no such day \(.*/bad/stderr.log\)$", "\n".join(out), re.M
  )
  assert re.search(r"empty: failed after \d+ s: it left no results.json \(", "\n".join(out))
  assert (tmp_path / "empty" / "stdout.log").read_text() == "nothing done\n"
  assert (tmp_path / "bad" / "stderr.log").read_text() == "first line\nerror: no such day\n"
  assert jobs[2].is_finished() and not jobs[0].is_finished()

  # A longer run than the finished one is not finished.
  assert not Job(tmp_path / "good", (), 6).is_finished()


@pytest.mark.parametrize("num_gpus, devices", [(0, "as it was"), (2, "2,3")])
def test_gpus_of_a_slot(num_gpus, devices, scratch, tmp_path, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "as it was")
  job = Job(tmp_path / "run", python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"), 1)
  assert Local(scratch, num_gpus).submit(job, slot=1).result() == (0, "")
  assert (tmp_path / "run" / "stdout.log").read_text() == devices + "\n"


# Slurm as submitit calls it: jobs start at once, on this machine.
SLURM = {
  "sbatch": """
    n=$(ls "$SLURM_TEST" | wc -l)
    cp "$1" "$SLURM_TEST.sh"
    SLURM_JOB_ID=$n setsid bash "$1" >/dev/null 2>&1 &
    echo $! > "$SLURM_TEST/$n"
    echo "Submitted batch job $n"
  """,
  "srun": """
    while [[ "$1" == --* ]]; do [[ "$1" == --unbuffered ]] || shift; shift; done
    exec "$@"
  """,
  "sacct": """
    echo "JobID|State|NodeList"
    for file in "$SLURM_TEST"/*; do
      state=COMPLETED
      kill -0 "$(cat "$file")" 2>/dev/null && state=RUNNING
      echo "$(basename "$file")|$state|here"
    done
  """,
  "scontrol": """
    SLURM_JOB_ID=$2 setsid bash "$SLURM_TEST.sh" >/dev/null 2>&1 &
    echo $! > "$SLURM_TEST/$2"
  """,
}


@pytest.fixture
def slurm(scratch, tmp_path, monkeypatch):
  (tmp_path / "bin").mkdir()
  (tmp_path / "jobs").mkdir()
  for name, text in SLURM.items():
    file = tmp_path / "bin" / name
    file.write_text("#!/bin/bash\n" + text + "\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
  monkeypatch.setenv("SLURM_TEST", str(tmp_path / "jobs"))
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  return Slurm(scratch, "gpu", num_gpus=2, hours=1.5)


def test_slurm_jobs_are_found_again_not_submitted_twice(slurm, tmp_path, capsys):
  job = Job(tmp_path / "run0", (*python(RUN), str(tmp_path / "run0")), 5)
  first = slurm.submit(job, 0)
  wait_for_starts(tmp_path, 1)
  sbatch = (tmp_path / "jobs.sh").read_text()
  for line in ("--partition=gpu", "--gpus-per-node=2", "--time=90"):
    assert f"#SBATCH {line}\n" in sbatch
  again = slurm.submit(job, 0)
  assert isinstance(again, submitit.SlurmJob) and again.job_id == first.job_id
  go(tmp_path)
  assert execute([job], slurm, 1) == 0
  assert re.fullmatch(r"1/1 run0: finished after \d+ s\n", capsys.readouterr().out)
  assert count(tmp_path, "start") == {"run0": 1}
  assert len(list((tmp_path / "jobs").iterdir())) == 1


def test_a_run_whose_time_on_slurm_is_up_saves_and_is_queued_again(slurm, tmp_path):
  job = Job(tmp_path / "run0", (*python(RUN), str(tmp_path / "run0")), 5)
  submitted = slurm.submit(job, 0)
  (_, _, run, worker), *_ = wait_for_starts(tmp_path, 1)
  os.kill(worker, signal.SIGUSR2)  # as Slurm does, a while before it kills
  wait_for_starts(tmp_path, 2)
  assert [e[0] for e in events(tmp_path)] == ["start", "saved", "start"]
  assert events(tmp_path)[1][2] == run
  go(tmp_path)
  assert submitted.result() == (0, "")
  assert job.is_finished()


def test_slurm_that_is_not_here(scratch):
  with pytest.raises(ValueError, match="--cluster=slurm: .*srun"):
    Slurm(scratch, None, 0, 1.0)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  """(exit code, stdout, stderr) of `python -m launch.sweep`, by case."""
  folder = tmp_path_factory.mktemp("sweep")
  for method in ("gfn", "sft"):
    (folder / f"smoke,method={method}").mkdir()
    config = flatten(arith.get_config("smoke")) | {"method": method, "data.dir": "elsewhere"}
    (folder / f"smoke,method={method}" / "config.json").write_text(json.dumps({"config": config}))
  (folder / "smoke,method=gfn" / "results.json").write_text('{"meta/num_steps": 4}')
  (folder / "none.py").write_text("from configs.arith import get_config\n")
  (folder / "other").mkdir()
  (folder / "other" / "sweep.json").write_text('{"config": "configs/arith.py", "name": "table4"}')
  smoke, where = ["--config=configs/arith.py", "--name=smoke"], f"--workdir={folder}"
  cases = {
    "dry-run": [*smoke, where, "--dry-run", "--config.data.dir=/a b"],
    "shard": [*smoke, where, "--dry-run", "--shard=1/2"],
    "no name": ["--config=configs/arith.py"],
    "unknown name": ["--config=configs/arith.py", "--name=table9"],
    "no sweep": [f"--config={folder}/none.py", "--name=smoke"],
    "no config": ["--name=smoke"],
    "unknown field": [*smoke, "--config.data.direction=1"],
    "shard out of range": [*smoke, "--shard=2/2"],
    "no workers": [*smoke, "--workers=0"],
    "no slurm": [*smoke, f"--workdir={folder}/slurm", "--cluster=slurm"],
    "another sweep": [*smoke, f"--workdir={folder}/other"],
    "other fields": [*smoke, where, "--config.train.learning_rate=1", "--config.loss.subtb_lambda=0.5"],
  }
  return dict(zip(cases, run_commands([["launch.sweep", *arguments] for arguments in cases.values()]))), folder


def test_dry_run_prints_command_lines_and_states(commands):
  results, folder = commands
  code, out, err = results["dry-run"]
  assert (code, err) == (0, "")
  lines = out.splitlines()
  assert len(lines) == len(METHODS)
  states = ["finished", "unfinished"] + ["not started"] * len(METHODS)
  for line, state, method in zip(lines, states, METHODS):
    assert line.startswith(state + " ")
    assert shlex.split(line.removeprefix(state)) == [
      "python", "-m", "gfn_jax.main", "--config=configs/arith.py:smoke", f"--workdir={folder}/smoke,method={method}",
      f"--config.method={method}", "--config.data.dir=/a b",
    ]  # fmt: skip
  assert not (folder / "sweep.json").exists()  # nor by the one of other fields
  assert [line.split("--workdir=")[1] for line in results["shard"][1].splitlines()] == [
    line.split("--workdir=")[1].replace(" '--config.data.dir=/a b'", "") for line in lines[1::2]
  ]


@pytest.mark.parametrize(
  "case, named",
  [
    ("no name", ["--name is missing"]),
    ("unknown name", ["'table9'", "smoke, tuning, table4, table_e3, objectives, staleness, misspecified"]),
    ("no sweep", ["none.py has no 'sweep'"]),
    ("no config", ["--config is missing"]),
    ("unknown field", ["direction"]),
    ("shard out of range", ["--shard=2/2", "i from 0 to n - 1"]),
    ("no workers", ["workers", "0"]),
    ("no slurm", ["--cluster=slurm", "srun"]),
    ("another sweep", ["other holds another sweep", "'table4'", "'smoke'"]),
    ("other fields", ["smoke,method=gfn' holds another run: config.loss.subtb_lambda is 0.5 here and 1.0 there"]),
  ],
)
def test_a_slip_gets_one_line(case, named, commands):
  code, _, err = commands[0][case]
  assert_one_line(code, err, named)
