"""The reward-maximising baselines as a user runs them: PPO and GRPO on `arith.py:smoke`, whole and in two halves."""

import functools
import json
import math

import ml_collections
import numpy as np
import pytest

from gfn_jax.metrics import read_jsonl
from gfn_jax.on_policy import GRPOCollector, PPOCollector
from gfn_jax.types import Acts
from testing import run_python

pytestmark = pytest.mark.timeout(900)


def collector(kind, **settings):
  """One that knows its settings, and nothing to sample with."""
  made = kind.__new__(kind)
  made._config = ml_collections.ConfigDict(settings)
  return made


def acts_of(mask, log_ratio, value):
  """Acts whose log-ratio to the base is given."""
  zeros = np.zeros(mask.shape)
  return Acts(mask, log_ratio - 5.0, zeros - 5.0, zeros, value, zeros)


def test_ppo_pays_for_each_act_and_earns_at_the_last():
  """Two rows: act, tool, act, stop; and act, stop. Undiscounted returns less the value, by hand."""
  mask = np.array([[True, False, True, True], [True, True, False, False]])
  log_ratio = np.array([[1.0, 9.0, 2.0, 3.0], [-1.0, 0.5, 9.0, 9.0]])
  value = np.array([[10.0, 99.0, 20.0, 30.0], [40.0, 50.0, 99.0, 99.0]])
  ppo = {"discount": 1.0, "gae_lambda": 1.0, "kl_target": 6.0, "kl_horizon": 100}
  made = collector(PPOCollector, ppo=ppo)
  made._kl_coefficient = 0.5
  acts, metrics = made._advantages(acts_of(mask, log_ratio, value), np.array([-8.0, -3.0]), kl=12.0)
  returns = np.array([[-11.0, 0, -10.5, -9.5], [-2.75, -3.25, 0, 0]])  # -8 - 0.5 * (1 + 2 + 3), ...
  np.testing.assert_allclose(acts.value_target, returns)
  advantage = (returns - value)[mask]
  np.testing.assert_allclose(acts.advantage[mask], (advantage - advantage.mean()) / advantage.std(), rtol=1e-6)
  assert (acts.advantage[~mask] == 0).all() and metrics["kl_coefficient"] == 0.5
  assert made._kl_coefficient == pytest.approx(0.5 * (1 + 0.2 * 2 / 100))  # twice the target, clipped to 1.2


def test_grpo_gives_each_act_its_samples_advantage():
  mask = np.array([[True, False], [True, True], [True, True], [True, False]])
  zeros = np.zeros(mask.shape)
  made = collector(GRPOCollector, sampler={"num_samples": 2}, grpo={"scale": False})
  acts, _ = made._advantages(acts_of(mask, zeros, zeros), np.array([1.0, 3.0, -4.0, -4.0]), kl=0.0)
  np.testing.assert_array_equal(acts.advantage, [[-1, 0], [1, 1], [0, 0], [0, 0]])


RUNS = """
from configs import arith
from gfn_jax import cli
from gfn_jax.train import train

def run(method, steps, workdir):
  config = arith.get_config("smoke")
  config.method, config.data.dir, config.train.num_steps = method, DATA, steps
  config.train.micro_batch_queries = 2
  config.eval.baselines, config.eval.num_validation, config.eval.num_test = False, 0, 1
  config.ppo.kl_target = 1e-3
  cli.prepare_jax(config)
  assert train(config.lock(), f"{DATA}/{workdir}") == 0

"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """method -> the folder of its runs: whole, and for PPO in two halves. Made when it is asked for."""
  folder = tmp_path_factory.mktemp("on_policy")

  @functools.cache
  def made(method):
    halves = 'run("ppo", 1, "halves"); run("ppo", 3, "halves")' if method == "ppo" else ""
    run_python(f'DATA = {str(folder)!r}\n{RUNS}\nrun("{method}", 3, "{method}")\n{halves}', timeout=900)
    return folder

  return made


def steps_of(workdir):
  return [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("method", ("ppo", "grpo"))
def test_a_baseline_trains_and_is_tested_under_its_name(runs, method):
  workdir = runs(method) / method
  steps = steps_of(workdir)
  assert [r["step"] for r in steps] == [1, 2, 3]
  assert all(math.isfinite(r["loss"]) and r["log_reward_policy_mean"] < 0 and r["grad_norm"] > 0 for r in steps)
  assert steps[0]["kl_reference"] == pytest.approx(0, abs=1e-4)  # a fresh adapter is the base
  assert abs(steps[2]["kl_reference"]) > 1e-6
  results = json.loads((workdir / "results.json").read_text())
  assert f"arith/{method}/accuracy/3" in results


@pytest.mark.slow
def test_the_kl_coefficient_of_ppo_adapts(runs):
  first, second, _ = (r["kl_coefficient"] for r in steps_of(runs("ppo") / "ppo"))
  assert first == 0.2
  assert second == pytest.approx(0.2 * (1 - 0.2 * 16 / 10_000))  # no KL yet: below its target, by 16 trajectories


@pytest.mark.slow
def test_a_run_in_two_halves_has_the_same_bits(runs):
  halves, whole = (runs("ppo") / name for name in ("halves", "ppo"))
  name = "adapter/adapter_model.safetensors"
  assert (halves / name).read_bytes() == (whole / name).read_bytes()
  assert [r["kl_coefficient"] for r in steps_of(halves)] == [r["kl_coefficient"] for r in steps_of(whole)]
