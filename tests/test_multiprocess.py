"""One run by several processes: the same numbers as by one, a death that ends the job, SIGTERM, other machines later.

Real processes on the loopback, each with forced CPU devices.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from gfn_jax.metrics import read_jsonl
from testing import QUICK_COMPILATION, REPOSITORY

pytestmark = pytest.mark.timeout(2700)

NUM_STEPS = 20


def environment(devices, **more):
  return os.environ | {
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILATION}",
    **more,
  }


def start(command, processes, devices, **more):
  """Starts one job: a command in so many processes, that find each other where there are several."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  env = environment(devices, **more)
  if processes > 1:
    env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
  return [
    subprocess.Popen(
      command, env=env | {"JAX_PROCESS_ID": str(i)}, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]  # fmt: skip


def finish(job, timeout=900):
  """(exit code, stdout, stderr) of each process; none is left behind."""
  try:
    return [(p.returncode, *out) for p, out in ((p, p.communicate(timeout=timeout)) for p in job)]
  finally:
    for p in job:
      p.kill()
      p.wait()


def train(runs, workdir, processes, devices, *arguments):
  """Starts a training run of the smoke test's problem, with little around it."""
  command = [
    sys.executable, "-m", "gfn_jax.main", "--config=configs/arith.py:smoke", f"--config.data.dir={runs}/tfds",
    f"--workdir={runs / workdir}", f"--config.train.num_steps={NUM_STEPS}", "--config.eval.baselines=False",
    "--config.seed=1",
    "--config.eval.num_validation=0", "--config.eval.num_test=10", *(["--multihost"] if processes > 1 else []),
    *arguments,
  ]  # fmt: skip
  cache = {"JAX_COMPILATION_CACHE_DIR": str(runs / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return start(command, processes, devices, **cache)


def complete(runs, workdir, processes, devices, *arguments):
  """Runs one to its end; what its first process printed."""
  done = finish(train(runs, workdir, processes, devices, *arguments))
  assert [code for code, *_ in done] == [0] * processes, done
  return done[0][1]


def records(workdir):
  """metrics.jsonl's lines of steps, without what a clock decides."""
  timed = ("trajectories_per_second", "step_seconds")
  return [{k: v for k, v in r.items() if k not in timed} for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]


def accuracies(workdir):
  return {k: v for k, v in json.loads((workdir / "results.json").read_text()).items() if "/accuracy" in k}


def assert_same_run(ours, theirs):
  """The same steps to 1e-5, what was sampled and kept among them; the same accuracy.

  After the first ones to 3e-4: AdamW makes of a rounding in a gradient near 0 a whole step.
  """
  ours_steps, theirs_steps = records(ours), records(theirs)
  assert [r["step"] for r in ours_steps] == [*range(1, NUM_STEPS + 1)]
  for mine, other in zip(ours_steps, theirs_steps, strict=True):
    norms = [r.pop("grad_norm") for r in (mine, other)]  # of sums that nearly cancel
    early = mine["step"] <= 5
    assert norms[0] == pytest.approx(norms[1], rel=1e-3 if early else 5e-3)
    assert mine == pytest.approx(other, rel=1e-5 if early else 3e-4)
  assert accuracies(ours) == accuracies(theirs) and max(accuracies(ours).values()) > 0


def wait_for(path, job, seconds=900):
  """Until a path exists, while the job lives."""
  deadline = time.time() + seconds
  while not path.exists():
    assert all(p.poll() is None for p in job), finish(job)
    assert time.time() < deadline, f"{path} did not appear"
    time.sleep(0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(runs):
  """A run on one device."""
  complete(runs, "one", 1, 1)
  return runs / "one"


@pytest.fixture(scope="module")
def two(runs):
  """The same run by two processes with two devices each."""
  said = complete(runs, "two", 2, 2)
  assert "devices   4 x cpu in 2 processes" in said
  return runs / "two"


@pytest.mark.slow
def test_four_devices_make_the_run_of_one(runs, one):
  complete(runs, "four", 1, 4)
  assert_same_run(runs / "four", one)


@pytest.mark.slow
def test_two_processes_test_and_choose_as_one_does(runs):
  """Held-out problems while training, the best adapter, the base beside it: what a run is by default."""
  whole = (
    "--config.train.num_steps=4", "--config.eval.every_steps=2", "--config.eval.num_validation=4",
    "--config.eval.baselines=True", "--config.train.keep=best",
  )  # fmt: skip
  complete(runs, "chosen_by_one", 1, 1, *whole)
  said = complete(runs, "chosen_by_two", 2, 2, *whole)
  ours, theirs = (json.loads((runs / f"chosen_by_{n}" / "results.json").read_text()) for n in ("two", "one"))
  measured = {k: v for k, v in theirs.items() if k.startswith("arith/")}
  assert {"arith/base_3shot/accuracy/5", "arith/gfn/log_ratio_variance"} <= measured.keys()
  assert {k: v for k, v in ours.items() if k in measured} == pytest.approx(measured, rel=1e-4)
  assert len([line for line in said.splitlines() if "the best evaluation was after step" in line]) == 1


@pytest.mark.slow
def test_a_split_model_makes_the_run_of_a_whole_one(runs, one):
  """Sampled, scored, trained and tested as data 2 x model 2."""
  said = complete(runs, "split", 1, 4, "--config.mesh.model=2")
  assert "devices   4 x cpu, 2 to a copy of the model" in said
  assert_same_run(runs / "split", one)


@pytest.mark.slow
def test_a_split_model_in_two_processes_makes_that_run_and_one_goes_on_with_it(runs, one):
  """A group of two devices in each: sampled, scored and tested by itself, trained as data 2 x model 2."""
  said = complete(runs, "split_in_two", 2, 2, "--config.mesh.model=2")
  assert "devices   4 x cpu in 2 processes, 2 to a copy of the model" in said
  assert_same_run(runs / "split_in_two", one)

  workdir = shutil.copytree(runs / "split_in_two", runs / "merged")
  (workdir / "results.json").unlink()
  shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
  assert f"steps     {NUM_STEPS - 2} of {NUM_STEPS} made" in complete(runs, workdir.name, 1, 1)
  assert_same_run(workdir, one)


@pytest.mark.slow
def test_a_group_of_devices_lies_within_a_process(runs):
  done = finish(train(runs, "too_wide", 2, 2, "--config.mesh.model=4"), timeout=300)
  refused = [error.splitlines()[-1] for code, _, error in done if code == 2]  # the first to say so may end the other
  assert refused and all(code for code, *_ in done), done
  for line in refused:
    assert line.startswith("error: process ")
    assert line.endswith("config.mesh.model 4: the 2 devices of a process do not fall into groups of as many")


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(one, two):
  assert_same_run(two, one)
  assert len(json.loads((two / "config.json").read_text())["devices"]) == 4
  assert {p.name for p in two.iterdir()} >= {"adapter", "plots", "samples.jsonl", "results.json"}
  assert not [p for p in two.rglob("*") if ".tmp" in p.name or ".writable" in p.name]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_death_ends_the_job_which_then_goes_on_to_the_same_bits(runs, two, victim):
  workdir = runs / f"killed{victim}"
  job = train(runs, workdir.name, 2, 2)
  try:
    wait_for(workdir / "checkpoints" / "2" / "commit_success.txt", job)
    job[victim].kill()
    begin = time.time()
    job[1 - victim].wait(60)
    print(f"the other ended after {time.time() - begin:.1f} s")
  finally:
    done = finish(job)
  assert done[victim][0] == -signal.SIGKILL
  assert done[1 - victim][0] not in (0, 143) and "another" in done[1 - victim][2] and "died" in done[1 - victim][2]
  assert not (workdir / "results.json").exists()

  said = complete(runs, workdir.name, 2, 2)
  assert any(f"steps     {n} of {NUM_STEPS} made" in said for n in (2, 4))
  name = "adapter/adapter_model.safetensors"
  assert (workdir / name).read_bytes() == (two / name).read_bytes()
  assert records(workdir) == records(two)
  assert accuracies(workdir) == accuracies(two)


@pytest.mark.slow
def test_sigterm_to_one_saves_on_all_and_one_process_goes_on(runs, two):
  workdir = runs / "preempted"
  job = train(runs, workdir.name, 2, 2)
  try:
    for line in job[0].stdout:
      if line.startswith("step 1/"):  # printed while a later step runs
        job[1].send_signal(signal.SIGTERM)
        break
  finally:
    done = finish(job)
  assert [code for code, *_ in done] == [143, 143], done
  (saved,) = [line for line in done[0][1].splitlines() if line.startswith("SIGTERM: saved after step")]
  assert "SIGTERM" not in done[1][1]  # the first alone speaks
  step = int(saved.split()[4].rstrip(";"))
  assert 1 <= step < NUM_STEPS and (workdir / "checkpoints" / str(step)).is_dir()

  assert f"steps     {step} of {NUM_STEPS} made" in complete(runs, workdir.name, 1, 4)
  assert_same_run(workdir, two)


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(runs, one):
  workdir = shutil.copytree(one, runs / "grown")
  (workdir / "results.json").unlink()
  shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
  assert f"steps     {NUM_STEPS - 2} of {NUM_STEPS} made" in complete(runs, workdir.name, 2, 2)
  assert_same_run(workdir, one)


EXCHANGE = """
import jax, numpy as np
from gfn_jax import distributed

distributed.initialize()
me = jax.process_index()
for number in (1, 2, 5):
  whole = np.arange(number * 6, dtype=np.int32).reshape(number * 3, 2)
  own = distributed.share(number)
  got = distributed.gather({"a": whole[own.start * 3 : own.stop * 3], "b": whole[own.start * 3 : own.stop * 3, 0] > 4},
                           number, 3)
  np.testing.assert_array_equal(got["a"], whole)
  np.testing.assert_array_equal(got["b"], whole[:, 0] > 4)
  assert got["a"].dtype == np.int32 and got["b"].dtype == bool and got["a"].flags.writeable
assert distributed.share(5) == (slice(0, 3), slice(3, 5))[me] and distributed.share(1) == (slice(0, 1), slice(1, 1))[me]
assert distributed.any_of(me == 1) is True and distributed.any_of(False) is False
np.testing.assert_array_equal(distributed.of_first(np.array([np.nan, me], np.float32)), [np.nan, 0])
print("this is process", me)
with distributed.failing_together():
  if me == 1:
    raise ValueError("the disk\\nis full")
  distributed.wait_for_all("the end")
"""


def test_what_processes_tell_each_other_and_how_they_fail():
  first, second = finish(start([sys.executable, "-c", EXCHANGE], 2, 2), timeout=300)
  assert second[0] == 2 and "error: process 1 of 2: the disk is full\n" in second[2]
  assert first[0] not in (0, 2) and "died" in first[2]
  assert "this is process 0" in first[1] and "this is" not in second[1]  # the first alone speaks


def test_a_process_that_cannot_join_says_so(tmp_path):
  command = [sys.executable, "-m", "gfn_jax.main", "--multihost", "--config=configs/arith.py:smoke"]
  env = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two"}
  ((code, _, error),) = finish(start([*command, f"--workdir={tmp_path}/run"], 1, 1, **env), timeout=300)
  assert code == 2 and error.startswith("error: --multihost: jax.distributed.initialize failed: ") and "'two'" in error
