"""config.train.max_staleness 1: whose samples a step learns from, in what order work is given out, exact resuming."""

import signal

import pytest

from configs import arith
from gfn_jax.config import validate
from gfn_jax.em import m_step
from test_config import config_with
from test_multiprocess import assert_same_run, complete, finish, records, train, wait_for
from testing import run_python

pytestmark = pytest.mark.timeout(2700)

STALE = "--config.train.max_staleness=1"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.parametrize(
  "fields, named",
  (
    ({"train__max_staleness": 2}, ["config.train.max_staleness 2", "choose from 0, 1"]),
    ({"train__max_staleness": -1}, ["config.train.max_staleness -1", "choose from 0, 1"]),
    *(
      ({"train__max_staleness": 1, "method": method}, ["config.train.max_staleness 1", "'gfn'", repr(method), "be 0"])
      for method in ("sft", "ppo", "grpo")
    ),
  ),
)
def test_where_it_cannot_hold_it_is_refused_in_one_line(fields, named):
  with pytest.raises(ValueError) as refused:
    validate(config_with(**fields), 1)
  assert "\n" not in str(refused.value)
  for part in named:
    assert part in str(refused.value)


def test_the_m_step_of_such_a_run_has_none(tmp_path):
  config = arith.get_config("smoke")
  config.train.max_staleness, config.em.num_rounds = 1, 1
  validate(config, 1)
  validate(m_step(config, tmp_path / "rationales.jsonl", 24), 1)


STEPS = """
import dataclasses, pathlib, tempfile
import jax, numpy as np
from configs import arith
from gfn_jax import data
from gfn_jax.checkpoint import Checkpoints
from gfn_jax.collect import Collector
from gfn_jax.train import set_up
from gfn_jax.types import LaggedState, TrainState

NUM_STEPS = 3
host = lambda tree: jax.tree.map(np.array, tree)

def assert_same(ours, theirs):
  ours, theirs = jax.tree.leaves(host(ours)), jax.tree.leaves(host(theirs))
  assert len(ours) == len(theirs) > 0
  for mine, other in zip(ours, theirs):
    np.testing.assert_array_equal(mine, other)

config = arith.get_config("smoke")
config.train.max_staleness, config.data.dir = 1, DATA
# Trees of one size: one update to compile. No demonstration fits, so the buffer fills with samples.
config.sampler.num_samples, config.sampler.max_length = 1, 8
run, state = set_up(config)
assert isinstance(state, LaggedState)
start = host(state)
assert_same(start.previous_lora, start.trained["lora"])

def fresh_run():
  # The run from its beginning, without compiling anything again.
  collector = Collector(run.parts, run.collector.table)
  collector.seed_replay()
  return dataclasses.replace(run, collector=collector), jax.device_put(start, run.shardings)

# 1. A plain loop that keeps all adapters: step k is sampled by the one that step k - 1 started from.
own, state = fresh_run()
state = TrainState(state.step, state.trained, state.opt_state)
adapters, found = [], []
for step in range(NUM_STEPS):
  adapters.append(host(state.trained["lora"]))
  key = data.step_key(config.seed, data.SAMPLE, step)
  draft = own.collector.begin(adapters[max(0, step - 1)], step, key)
  current = run.parts.sampler.finish(own.collector.begin(adapters[step], step, key).rollout)
  samples = own.collector.finish(draft)
  assert (current.log_pf == samples[0].log_pf).all() == (step == 0)  # samples tell whose they are
  batch, sampled = own.collector.batch(draft, samples)
  state, metrics = own._update(state, step, batch)
  found.append((host(batch), host(metrics), sampled, samples[0]))
last, buffer = host(state), own.collector.to_arrays()

# The run's own steps are these.
events, batches, drawn = [], [], []
own, state = fresh_run()

class Recorder:
  # A collector whose calls are noted.
  def __getattr__(self, name):
    def call(*args):
      step = args[1] if name == "begin" else args[0].step
      events.append((name, step))
      result = getattr(own.collector, name)(*args)
      if name == "batch":
        batches.append(host(result[0]))
      if name == "finish":
        drawn.append(result[0])
      return result
    return call

def update(*args):
  events.append(("update", int(args[4].step)))
  return own.update(*args)

noted, states = dataclasses.replace(own, collector=Recorder(), update=update), []
for (state, metrics, sampled), (batch, their_metrics, their_sampled, z) in zip(
  noted.steps(state, range(NUM_STEPS)), found, strict=True
):
  assert_same(metrics, their_metrics)
  assert_same(batches[-1], batch)
  assert_same(drawn[-1], z)
  assert {k: v for k, v in sampled.items() if k != "reward_temperature"} == their_sampled
  assert_same(state.previous_lora, adapters[int(state.step) - 1])
  states.append((host(state), own.collector.to_arrays()))
assert_same(TrainState(state.step, state.trained, state.opt_state), last)
assert_same(own.collector.to_arrays(), buffer)

# 2. The next step's samples are sent for before the update, and waited for after it.
expected = [("begin", 0)]
for step in range(NUM_STEPS):
  following = [("begin", step + 1)] if step + 1 < NUM_STEPS else []
  expected += [("finish", step), *following, ("batch", step), ("update", step)]
assert events == expected, events

# 3. From a checkpoint of any step the run goes on to the same bits.
for made in range(1, NUM_STEPS):
  checkpoints = Checkpoints(pathlib.Path(tempfile.mkdtemp()), None)
  checkpoints.save(made, *states[made - 1])
  checkpoints.wait()
  step, restored, arrays = checkpoints.restore(start)
  checkpoints.close()
  again, _ = fresh_run()
  again.collector.restore(arrays)
  *_, (state, _, _) = again.steps(jax.device_put(restored, run.shardings), range(step, NUM_STEPS))
  assert_same(state, states[-1][0])
  assert_same(again.collector.to_arrays(), buffer)
print("done")
"""


@pytest.mark.slow
def test_a_step_learns_from_the_adapter_before_the_last_update_and_the_run_goes_on_exactly(tmp_path):
  assert run_python(f"DATA = {str(tmp_path)!r}\n{STEPS}", timeout=900).endswith("done\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def stale(runs):
  """A run on one device."""
  complete(runs, "stale", 1, 1, STALE)
  return runs / "stale"


@pytest.mark.slow
def test_after_sigterm_and_kill_the_run_ends_with_the_same_bits(runs, stale):
  job = train(runs, "killed", 1, 1, STALE)
  for line in job[0].stdout:
    if line.startswith("step 1/"):  # printed while a later step runs
      job[0].send_signal(signal.SIGTERM)
      break
  ((code, out, err),) = finish(job)
  assert code == 143 and "SIGTERM: saved after step" in out, out + err
  job = train(runs, "killed", 1, 1, STALE)
  wait_for(runs / "killed" / "checkpoints" / "4" / "commit_success.txt", job)
  job[0].kill()
  finish(job)
  (runs / "killed" / "results.json").unlink(missing_ok=True)  # it was not killed in time
  said = complete(runs, "killed", 1, 1, STALE)
  assert "steps     0 of" not in said
  assert (runs / "killed" / ADAPTER).read_bytes() == (stale / ADAPTER).read_bytes()
  assert records(runs / "killed") == records(stale)


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices, fields", ((1, 2, ["--config.mesh.model=2"]), (2, 2, [])))
def test_devices_and_processes_do_not_change_such_a_run(runs, stale, processes, devices, fields):
  workdir = f"stale-{processes}-{devices}"
  complete(runs, workdir, processes, devices, STALE, *fields)
  assert_same_run(runs / workdir, stale)
