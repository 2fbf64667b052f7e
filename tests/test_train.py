"""The main job end to end on `:smoke`: its files, resuming, evaluation; and the training step by itself.

Runs are processes of their own, as a user's are. They share prepared data and compiled programs, so that only the first
one pays for them.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import arith
from gfn_jax import cli
from gfn_jax.datasets.expressions import question, split_of
from gfn_jax.evaluators.posterior import METRICS as POSTERIOR_METRICS
from gfn_jax.metrics import MetricsWriter, StepLog, read_jsonl
from gfn_jax.models import load_adapter, load_pretrained
from gfn_jax.train import train
from testing import QUICK_COMPILATION, REPOSITORY, damage_checkpoint, run_python

# Minutes in all on an idle machine; a busy one must not fail them.
pytestmark = pytest.mark.timeout(2700)

KINDS = ("3", "4", "5")
METHODS = ("gfn", "base", "base_3shot")
ACCURACIES = {f"arith/{m}/accuracy/{k}" for m in METHODS for k in KINDS}
POSTERIOR = {f"arith/gfn/{k}" for k in POSTERIOR_METRICS if k != "log_partition_upper"}  # nobody can draw its target
STEP_KEYS = {
  "step", "loss", "grad_norm", "log_reward_mean", "log_pf_mean", "length_mean", "replayed_queries", "replay_size",
  "reward_temperature", "trajectories_per_second", "step_seconds", "accuracy", "log_reward_policy_mean",
}  # fmt: skip
TIMES = {"trajectories_per_second", "step_seconds"}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder of workdirs, with what all runs share beside them."""
  return tmp_path_factory.mktemp("runs")


def environment(runs):
  return os.environ | {
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(runs / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": QUICK_COMPILATION,
  }


def command(runs, *arguments, module="gfn_jax.main"):
  return [sys.executable, "-m", module, "--config=configs/arith.py:smoke", f"--config.data.dir={runs}/tfds", *arguments]


def run(runs, *arguments, module="gfn_jax.main"):
  """Runs a command line to its end."""
  return subprocess.run(
    command(runs, *arguments, module=module), env=environment(runs), cwd=REPOSITORY, capture_output=True, text=True,
    timeout=900,
  )  # fmt: skip


def start(runs, *arguments):
  """Starts a training run; its stdout can be read line by line."""
  return subprocess.Popen(
    command(runs, *arguments), env=environment(runs), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def snapshot(folder):
  """Every file below a folder: its bytes and when it was written."""
  return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def training_records(workdir):
  """metrics.jsonl's lines of steps, without what a clock decides."""
  records = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def results_of(workdir):
  """results.json, without what a clock decides."""
  return {k: v for k, v in json.loads((workdir / "results.json").read_text()).items() if not k.startswith("time/")}


@pytest.fixture(scope="module")
def smoke(runs):
  """(workdir, stdout) of one uninterrupted run."""
  done = run(runs, f"--workdir={runs}/smoke")
  assert done.returncode == 0, done.stdout + done.stderr
  return runs / "smoke", done.stdout


def test_a_person_sees_the_plan_the_steps_and_the_table(smoke):
  workdir, out = smoke
  lines = out.splitlines()
  assert lines[0].startswith("model     embedded/arith-2m (gptj, 1,9")
  batch = "batch     4 queries (1 replayed, 2 tempered) x 4 samples = 16 trajectories"
  for begin in ("trained", "devices   1 x cpu", batch, "objective subtb", "steps     0"):
    assert any(line.startswith(begin) for line in lines[:6]), begin
  for step in range(1, NUM_STEPS + 1):  # without a terminal: a line a logged step
    (line,) = [x for x in lines if x.startswith(f"step {step}/{NUM_STEPS} ")]
    for part in ("loss", "logR", "traj/s", "ETA"):
      assert part in line
  assert any(x.startswith("evaluation after step 2") for x in lines)
  assert any("log R" in x and "log q" in x and "Question: " in x for x in lines)
  for row in ("| base  ", "| base, 3 demonstrations", "| GFlowNet fine-tuning"):
    assert any(line.startswith(row) for line in lines)
  assert "\r" not in out and "it/s" not in out  # no progress bar
  assert str(workdir) in lines[-1]


def test_config_json(smoke):
  record = json.loads((smoke[0] / "config.json").read_text())
  assert record.keys() == {"config", "versions", "commit", "devices", "device_kinds"}
  assert record["config"]["train.num_steps"] == NUM_STEPS and record["config"]["task"] == "arith"
  assert {"gfn_jax", "jax", "flax", "optax", "numpy", "python"} <= record["versions"].keys()
  assert len(record["devices"]) == 1


def test_metrics_jsonl_has_a_line_a_step(smoke):
  records = read_jsonl(smoke[0] / "metrics.jsonl")
  steps = [r for r in records if "loss" in r]
  assert [r["step"] for r in steps] == list(range(1, NUM_STEPS + 1))
  for r in steps:
    # Accuracy is of the policy's own samples: a step may have none.
    assert STEP_KEYS - {"accuracy", "log_reward_policy_mean"} <= r.keys() <= STEP_KEYS
    assert all(math.isfinite(v) for v in r.values())
    assert r["loss"] >= 0 and r["log_pf_mean"] < 0 and r["log_reward_mean"] < 0
  assert any("accuracy" in r for r in steps)
  assert [r["replayed_queries"] for r in steps] == [1.0] * NUM_STEPS  # every query has a demonstration to replay
  fields = json.loads((smoke[0] / "config.json").read_text())["config"]
  start, end, horizon = (fields[f"reward.temperature_{name}"] for name in ("start", "end", "horizon"))
  expected = [start + (end - start) * step / horizon for step in range(NUM_STEPS)]
  assert horizon > NUM_STEPS and [r["reward_temperature"] for r in steps] == pytest.approx(expected)
  (validation,) = [r for r in records if "loss" not in r and r["step"] == 2]
  assert {f"arith/validation/accuracy/{k}" for k in KINDS} <= validation.keys()
  (final,) = [r for r in records if "loss" not in r and r["step"] == NUM_STEPS]
  assert final.keys() == {"step"} | ACCURACIES | POSTERIOR


def test_results_json(smoke):
  results = json.loads((smoke[0] / "results.json").read_text())
  meta = {"meta/seed", "meta/commit", "meta/config_hash", "meta/num_steps"}
  assert results.keys() == ACCURACIES | POSTERIOR | meta | {"time/total_seconds"}
  assert all(0 <= results[k] <= 1 for k in ACCURACIES)
  assert results["meta/seed"] == 0 and results["meta/num_steps"] == NUM_STEPS
  assert results["arith/gfn/log_ratio_variance"] > 0 and -1 <= results["arith/gfn/log_reward_correlation"] <= 1


def test_samples_jsonl(smoke):
  records = read_jsonl(smoke[0] / "samples.jsonl")
  assert {r["step"] for r in records} == {2, NUM_STEPS}
  assert {r["method"] for r in records if r["step"] == NUM_STEPS} == set(METHODS)
  for r in records:
    assert {"X", "Z", "Y", "log_q", "log_R", "right"} <= r.keys()
    assert r["X"].startswith("Question: ") and r["Y"].startswith(". The answer is ")
    assert r["log_q"] < 0 and r["log_R"] < 0
    answer = re.search(r"= *(-?\d+)[^=]*$", r["Z"])  # the number after the last "="
    assert r["right"] == (answer is not None and r["Y"] == f". The answer is {answer[1]}.")


def test_the_adapter_loads_and_has_a_model_card(smoke):
  adapter = load_adapter(smoke[0] / "adapter", load_pretrained("embedded/arith-2m"))
  assert adapter.config.rank == 16
  assert all(float(jnp.abs(leaves["lora_b"]).max()) > 0 for leaves in adapter.params["layers"].values())
  card = (smoke[0] / "adapter" / "README.md").read_text()
  for part in ("base_model: embedded/arith-2m", "Licence", "seed 0", "subtb", "3 demonstrations", "log_ratio_variance"):
    assert part in card


def test_plots_events_and_checkpoints_exist(smoke):
  for name in ("accuracy", "log_reward", "loss"):
    assert (smoke[0] / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert [p for p in (smoke[0] / "tensorboard").iterdir() if p.stat().st_size > 100]
  assert sorted(p.name for p in (smoke[0] / "checkpoints").iterdir()) == ["2", "4"]
  assert not [p for p in smoke[0].rglob("*") if p.suffix in (".pkl", ".pickle") or ".tmp" in p.name]


def test_peft_computes_what_we_compute(smoke):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  import transformers

  from gfn_jax.models import logits

  workdir, _ = smoke
  pretrained = load_pretrained("embedded/arith-2m")
  folder = REPOSITORY / "gfn_jax" / "embedded" / "arith-2m"
  base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  model = peft.PeftModel.from_pretrained(base, workdir / "adapter").eval()
  tokens = np.array([pretrained.tokenizer.encode("Question: 6 - 0 - 4 = ? Answer: 6 - 0 = 6, 6 - 4 = 2")])
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  lora = load_adapter(workdir / "adapter", pretrained)
  np.testing.assert_allclose(np.asarray(logits(pretrained, tokens, lora=lora)), theirs, rtol=0, atol=2e-3)


def test_a_finished_run_says_so_and_changes_nothing(smoke, runs):
  workdir, _ = smoke
  before = snapshot(workdir)
  done = run(runs, f"--workdir={workdir}")
  assert done.returncode == 0 and "finished already (4 steps)" in done.stdout and str(workdir) in done.stdout
  assert snapshot(workdir) == before


def untimed_results(workdir):
  """The lines of results.json, without what a clock decides."""
  return [line for line in (workdir / "results.json").read_text().splitlines() if '"time/' not in line]


@pytest.fixture(scope="module")
def again(smoke, runs):
  """The workdir of another run of the same config."""
  done = run(runs, f"--workdir={runs}/again")
  assert done.returncode == 0, done.stderr
  return runs / "again"


def test_the_same_seed_gives_the_same_results(again, smoke):
  assert len(untimed_results(smoke[0])) > 10
  assert untimed_results(again) == untimed_results(smoke[0])


def test_a_kill_between_the_last_evaluation_and_the_results_records_it_once(again, smoke, runs):
  (again / "results.json").unlink()
  done = run(runs, f"--workdir={again}")
  assert done.returncode == 0 and "evaluation after step 4" in done.stdout, done.stderr
  assert untimed_results(again) == untimed_results(smoke[0])
  for name in ("metrics.jsonl", "samples.jsonl"):
    ours, theirs = ([r for r in read_jsonl(w / name) if "loss" not in r] for w in (again, smoke[0]))
    assert ours == theirs


def test_another_config_in_the_same_workdir_is_refused(smoke, runs):
  workdir, _ = smoke
  before = snapshot(workdir)
  done = run(runs, f"--workdir={workdir}", "--config.loss.subtb_lambda=0.9", "--config.train.num_steps=9")
  assert done.returncode == 2
  assert done.stderr == (
    f"error: workdir {str(workdir)!r} holds another run: config.loss.subtb_lambda is 0.9 here and 1.0 there\n"
  )
  assert snapshot(workdir) == before


def test_a_slip_that_shows_when_the_buffer_is_filled_can_be_mended(tmp_path):
  config = arith.get_config("smoke")
  config.data.dir, config.replay.seed_from = str(tmp_path / "tfds"), "inverse_prompt"
  config.data.unseeded_weight = 1.0
  with pytest.raises(ValueError, match="the arith task has no inverse prompt"):
    train(config.lock(), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_evaluate_writes_over_no_run(smoke, runs):
  before = snapshot(smoke[0])
  done = run(runs, f"--output={smoke[0]}/results.json", module="gfn_jax.evaluate")
  assert done.returncode == 2 and "stands for the end of the run in" in done.stderr
  assert snapshot(smoke[0]) == before


def test_evaluate_gives_the_runs_own_numbers(smoke, runs):
  workdir, _ = smoke
  done = run(runs, f"--adapter={workdir}/adapter", f"--output={runs}/evaluated.json", module="gfn_jax.evaluate")
  assert done.returncode == 0, done.stderr
  ours, theirs = json.loads((runs / "evaluated.json").read_text()), json.loads((workdir / "results.json").read_text())
  assert {k: v for k, v in ours.items() if k.startswith("arith/")} == {
    k: v for k, v in theirs.items() if k.startswith("arith/")
  }
  assert "| GFlowNet fine-tuning" in done.stdout
  assert not (runs / "evaluated.json.part").exists()  # it has served


def test_evaluate_takes_all_problems_of_a_file_and_no_adapter_means_the_base(smoke, runs):
  del smoke  # it has filled the compilation cache
  problems = {"1 + 2 + 3": 6, "9 - 9 - 9": -9, "1 + 1 + 1 + 1 + 1 + 1": 6}
  file = runs / "problems.jsonl"
  file.write_text("\n".join(json.dumps({"str_query": question(p), "num_sol": v}) for p, v in problems.items()))
  done = run(
    runs, f"--output={runs}/file.json", f"--config.data.test_path={file}", "--config.eval.num_validation=0",
    "--config.eval.num_test=1", "--config.eval.zero_shot_cue= Think.", module="gfn_jax.evaluate",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  results = json.loads((runs / "file.json").read_text())
  keys = {f"arith/{m}/accuracy/{k}" for m in ("base", "base_zero_shot", "base_3shot") for k in ("3", "6")}
  assert {k for k in results if k.startswith("arith/")} == keys
  assert results["meta/num_steps"] == NUM_STEPS and results["time/total_seconds"] > 0


def test_test_problems_are_test_problems(smoke):
  questions = [r["X"] for r in read_jsonl(smoke[0] / "samples.jsonl") if r["step"] == NUM_STEPS]
  assert {split_of(q.removeprefix("Question: ").removesuffix(" = ? Answer:")) for q in questions} == {"test"}


def wait_for(path, process, seconds=900):
  """Until a path exists, while the process lives."""
  deadline = time.time() + seconds
  while not path.exists():
    assert process.poll() is None, process.communicate()
    assert time.time() < deadline, f"{path} did not appear"
    time.sleep(0.02)


@pytest.fixture(scope="module")
def interrupted(smoke, runs):
  """A run that had SIGTERM, then kill -9, then its newest checkpoint damaged: (workdir, what the sessions said)."""
  del smoke  # it has filled the compilation cache
  workdir = runs / "interrupted"
  said = {}

  first = start(runs, f"--workdir={workdir}")
  try:
    for line in first.stdout:
      if line.startswith("step 1/"):  # printed while a later step runs
        first.send_signal(signal.SIGTERM)
        break
    out, err = first.communicate(timeout=900)
    said["SIGTERM"] = first.returncode, out, err
    # A kill in mid-write leaves half a line.
    with (workdir / "metrics.jsonl").open("a") as f:
      f.write('{"step": 3, "loss": 1')

    second = start(runs, f"--workdir={workdir}")
    wait_for(workdir / "checkpoints" / str(NUM_STEPS) / "commit_success.txt", second)
    second.kill()
    out, err = second.communicate(timeout=60)
    said["kill"] = second.returncode, out, err
    fewer = run(runs, f"--workdir={workdir}", "--config.train.num_steps=2")
    said["fewer"] = fewer.returncode, fewer.stdout, fewer.stderr
  finally:
    for process in (first, *([second] if "SIGTERM" in said else [])):
      process.kill()
      process.wait()

  damage_checkpoint(workdir / "checkpoints" / str(NUM_STEPS))
  done = run(runs, f"--workdir={workdir}")
  said["resumed"] = done.returncode, done.stdout, done.stderr
  return workdir, said


def test_sigterm_saves_and_exits_143(interrupted):
  code, out, err = interrupted[1]["SIGTERM"]
  assert code == 143, out + err
  assert "SIGTERM: saved after step" in out and "run the same command to go on" in out


def test_a_killed_run_goes_on(interrupted):
  code, out, _ = interrupted[1]["kill"]
  assert code == -signal.SIGKILL
  assert any(f"steps     {n} of {NUM_STEPS} made" in out for n in (1, 2, 3)), out


def test_fewer_steps_than_were_made_are_refused(interrupted):
  code, _, err = interrupted[1]["fewer"]
  assert code == 2 and err.startswith("error: config.train.num_steps is 2, but ") and "made 4 steps already" in err


def test_a_damaged_checkpoint_is_skipped_with_a_warning(interrupted):
  code, out, err = interrupted[1]["resumed"]
  assert code == 0, out + err
  assert "checkpoint 4 is damaged and skipped" in err
  assert any(f"steps     {n} of {NUM_STEPS} made" in out for n in (1, 2, 3)), out


def test_an_interrupted_run_ends_with_the_same_bits(interrupted, smoke):
  ours, theirs = interrupted[0], smoke[0]
  name = "adapter/adapter_model.safetensors"
  assert (ours / name).read_bytes() == (theirs / name).read_bytes()
  assert training_records(ours) == training_records(theirs)  # each step exactly once
  assert results_of(ours) == results_of(theirs)


def test_evaluations_are_recorded_once(interrupted, smoke):
  """Validations and the final one, whenever the interruptions came."""
  for name in ("metrics.jsonl", "samples.jsonl"):
    ours, theirs = ([r for r in read_jsonl(w / name) if "loss" not in r] for w in (interrupted[0], smoke[0]))
    assert ours == theirs
    assert {r["step"] for r in ours} == {2, NUM_STEPS}


@pytest.mark.slow  # the interrupted run above is resumed too
def test_two_steps_and_two_more_are_four(smoke, runs):
  """num_steps may grow: N steps equal N/2 and N/2 more."""
  workdir = runs / "halves"
  for steps in (2, NUM_STEPS):
    done = run(runs, f"--workdir={workdir}", f"--config.train.num_steps={steps}")
    assert done.returncode == 0, done.stderr
  name = "adapter/adapter_model.safetensors"
  assert (workdir / name).read_bytes() == (smoke[0] / name).read_bytes()
  assert training_records(workdir) == training_records(smoke[0])


OTHER_LOSSES = """
import sys
from configs import arith
from gfn_jax import cli
from gfn_jax.metrics import read_jsonl
from gfn_jax.train import train

for name in ("tb", "vargrad", "db"):
  config = arith.get_config("smoke")
  config.loss.name, config.data.dir, config.train.num_steps = name, DATA, 3
  config.train.micro_batch_queries = 2
  config.eval.baselines, config.eval.num_validation, config.eval.num_test = False, 0, 1
  config.debug_nans = config.profile = name == "tb"
  cli.prepare_jax(config)
  assert train(config.lock(), f"{RUNS}/{name}") == 0
  assert len([r for r in read_jsonl(f"{RUNS}/{name}/metrics.jsonl") if "loss" in r]) == 3
"""


@pytest.fixture(scope="module")
def other_losses(smoke, runs):
  """Runs of the other objectives, the first with debug_nans and profile."""
  del smoke
  code = f"DATA, RUNS = {str(runs / 'tfds')!r}, {str(runs)!r}\n{OTHER_LOSSES}"
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment(runs), cwd=REPOSITORY, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return runs


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["tb", "vargrad", "db"])
def test_other_objectives_train(loss, other_losses):
  losses = [r["loss"] for r in read_jsonl(other_losses / loss / "metrics.jsonl") if "loss" in r]
  assert len(losses) == 3 and all(math.isfinite(x) and x > 0 for x in losses)


@pytest.mark.slow
def test_profile_writes_a_trace(other_losses):
  assert list((other_losses / "tb" / "profile").rglob("*.xplane.pb"))
  assert not (other_losses / "db" / "profile").exists()


TRAIN_STEP = """
import functools
import jax, jax.numpy as jnp, numpy as np, optax
from testing import random_lora, tiny_pretrained
from gfn_jax.parallel import place, split
from gfn_jax.prefix_tree import build_trees
from gfn_jax.step import StepSettings, train_step
from gfn_jax.types import Batch, TrainState, terminable_prefixes

Q, N, P, T = 8, 2, 5, 6
rng = np.random.default_rng(0)
pretrained = tiny_pretrained()
vocabulary, stop = pretrained.config.vocab_size, 3
allowed = rng.random(vocabulary) < 0.5
allowed[stop] = True
length = rng.integers(0, T + 1, Q * N).astype(np.int32)
inside = np.arange(T) < length[:, None]
tokens = np.where(inside, rng.choice(np.flatnonzero(allowed), (Q * N, T)), 0).astype(np.int32)
action_mask = inside & (rng.random((Q * N, T)) < 0.8)
prompts = [rng.integers(0, vocabulary, n).astype(np.int32) for n in rng.integers(3, P + 1, Q)]
rows = (
  np.arange(Q, dtype=np.int32), tokens, length, action_mask, terminable_prefixes(length, action_mask),
  rng.normal(-20, 3, (Q * N, T + 1)).astype(np.float32),
)
# An optimiser that takes no step and keeps the gradient as its state.
keep = optax.GradientTransformation(
  lambda trained: jax.tree.map(jnp.zeros_like, trained),
  lambda gradient, state, trained: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)
trained = {"lora": random_lora(pretrained), "log_partition": jnp.arange(Q, dtype=jnp.float32)}
# (devices, micro-batches, bin by bin)
layouts = {"subtb": ((1, 1, False), (1, 4, False), (4, 1, True)), "tb": ((1, 1, False), (1, 1, True), (4, 2, False))}
for loss in layouts:
  mine = trained if loss == "tb" else {"lora": trained["lora"]}
  results = []
  for num_devices, micro_batches, bin_by_bin in layouts[loss]:
    devices = jax.devices()[:num_devices]
    shares = num_devices * micro_batches
    trees = build_trees(prompts, tokens, length, P + T if bin_by_bin else 192, shares)
    assert not bin_by_bin or trees.num_bins[0] > 1
    batch = Batch(*rows, trees)
    settings = StepSettings(pretrained.config, loss, 0.9, N, micro_batches, T, stop, False, bin_by_bin=bin_by_bin)
    step = jax.pmap(
      functools.partial(train_step, settings, keep), axis_name="data", in_axes=(None,) * 5 + (0,), out_axes=None,
      devices=devices,
    )
    state = place(TrainState(jnp.int32(0), mine, keep.init(mine)), devices)
    state, metrics = step(
      place(pretrained.params, devices), jnp.asarray(allowed), jnp.float32(1.3), jax.random.key(0), state,
      split(batch, devices),
    )
    gradients = [np.asarray(x) for x in jax.tree.leaves(state.opt_state)]
    results.append((gradients, {k: float(v) for k, v in metrics.items()}, int(state.step)))
  for gradients, metrics, made in results:
    assert made == 1
    for ours, theirs in zip(gradients, results[0][0]):
      assert np.abs(theirs).max() > 1e-4
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    for name, value in metrics.items():
      np.testing.assert_allclose(value, results[0][1][name], rtol=1e-5, err_msg=name)
    assert metrics["loss"] > 0.01
  print(loss, results[0][1]["loss"])
"""


@pytest.mark.slow
def test_devices_and_micro_batches_do_not_change_the_step():
  out = run_python(TRAIN_STEP, devices=4, timeout=900)
  assert [line.split()[0] for line in out.splitlines()] == ["subtb", "tb"]


class RecordingWriter(MetricsWriter):
  """Keeps what it is told, and writes nothing."""

  def __init__(self):
    self.written, self.shown = [], []

  def write(self, step, values):
    self.written.append((step, dict(values)))

  def progress(self, step, shown, eta_seconds):
    self.shown.append((step, shown, eta_seconds))


def step_log(writer, log_every=1):
  return StepLog(writer, first_step=0, num_steps=5, log_every=log_every, rows_per_step=16)


VALUES = {"loss": 2.0, "log_reward_mean": -3.0}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(loss):
  writer = RecordingWriter()
  log = step_log(writer)
  log.step(1, VALUES, {})
  log.step(2, VALUES | {"loss": jnp.float32(loss)}, {})
  with pytest.raises(FloatingPointError, match=f"the loss is {loss} at step 2"):
    log.flush()
  assert [s for s, _ in writer.written] == [1]


def test_metrics_are_read_a_step_late_and_logged_every_so_many_steps():
  writer = RecordingWriter()
  log = step_log(writer, log_every=2)
  for step in range(1, 6):
    log.step(step, VALUES, {"accuracy": 0.5})
    assert all(s < step for s, _ in writer.written)
  log.flush()
  log.flush()
  assert [s for s, _ in writer.written] == [2, 4, 5]  # the last one always
  assert writer.shown[0][1]["acc"] == "50%" and writer.shown[-1][2] == 0
  assert writer.written[0][1].keys() == {*VALUES, "accuracy", *TIMES}


def test_a_step_lasts_from_one_to_the_next_however_late_it_is_read(monkeypatch):
  now = 100.0
  monkeypatch.setattr("gfn_jax.metrics.time.monotonic", lambda: now)
  writer = RecordingWriter()
  log = step_log(writer)
  now = 102.0
  log.step(1, VALUES, {})
  log.flush()  # as before a checkpoint: at once
  now = 105.0
  log.step(2, VALUES, {})
  now = 109.0
  log.flush()
  assert [values["step_seconds"] for _, values in writer.written] == [2, 3]


def test_an_evaluation_is_nobodys_time_but_the_wait_for_the_step_before_it_is(monkeypatch):
  now = 100.0

  class Late:
    def __float__(self):  # the device has a second's work left
      nonlocal now
      now += 1
      return 2.0

  monkeypatch.setattr("gfn_jax.metrics.time.monotonic", lambda: now)
  writer = RecordingWriter()
  log = step_log(writer)
  now = 102.0
  log.step(1, VALUES | {"loss": Late()}, {})
  with log.paused():
    assert now == 103
    now = 150.0
  now = 152.0
  log.step(2, VALUES, {})
  log.flush()
  assert [values["step_seconds"] for _, values in writer.written] == [2, 3]


def smoke_config(**fields):
  from configs import arith

  config = arith.get_config("smoke")
  config.update(fields)
  return config


def test_deterministic_asks_gpus_for_deterministic_kernels(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  cli.prepare_jax(smoke_config())
  assert "deterministic" not in os.environ["XLA_FLAGS"]
  cli.prepare_jax(smoke_config(deterministic=True))
  assert os.environ["XLA_FLAGS"].split() == [
    "--xla_force_host_platform_device_count=1", "--xla_gpu_deterministic_ops=true",
  ]  # fmt: skip
  # And XLA knows the flag: it would refuse to start with an unknown one.
  run_python("import jax; assert jax.numpy.ones(2).sum() == 2")


def test_debug_nans_stops_at_the_first_nan():
  before = jax.config.jax_debug_nans
  try:
    cli.prepare_jax(smoke_config(debug_nans=True))
    with pytest.raises(FloatingPointError, match="nan"):
      jax.jit(lambda x: x / x)(jnp.zeros(2)).block_until_ready()
  finally:
    jax.config.update("jax_debug_nans", before)
