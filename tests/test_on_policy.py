"""The reward-maximising baselines as a user runs them: PPO and GRPO on `arith.py:smoke`, whole and in two halves."""

import functools
import json
import math

import pytest

from gfn_jax.metrics import read_jsonl
from testing import run_python

pytestmark = pytest.mark.timeout(900)

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


@pytest.mark.parametrize("method", ("ppo", pytest.param("grpo", marks=pytest.mark.slow)))
def test_a_baseline_trains_and_is_tested_under_its_name(runs, method):
  workdir = runs(method) / method
  steps = steps_of(workdir)
  assert [r["step"] for r in steps] == [1, 2, 3]
  assert all(math.isfinite(r["loss"]) and r["log_reward_policy_mean"] < 0 and r["grad_norm"] > 0 for r in steps)
  assert steps[0]["kl_reference"] == pytest.approx(0, abs=1e-4)  # a fresh adapter is the base
  assert abs(steps[2]["kl_reference"]) > 1e-6
  results = json.loads((workdir / "results.json").read_text())
  assert f"arith/{method}/accuracy/3" in results


def test_the_kl_coefficient_of_ppo_adapts(runs):
  first, second, _ = (r["kl_coefficient"] for r in steps_of(runs("ppo") / "ppo"))
  assert first == 0.2
  assert second == pytest.approx(0.2 * (1 - 0.2 * 16 / 10_000))  # no KL yet: below its target, by 16 trajectories


def test_a_run_in_two_halves_has_the_same_bits(runs):
  halves, whole = (runs("ppo") / name for name in ("halves", "ppo"))
  name = "adapter/adapter_model.safetensors"
  assert (halves / name).read_bytes() == (whole / name).read_bytes()
  assert [r["kl_coefficient"] for r in steps_of(halves)] == [r["kl_coefficient"] for r in steps_of(whole)]
