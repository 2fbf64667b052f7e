"""Every task's `:smoke` variant as a user runs it: the contract's files, resuming a finished run, evaluating again."""

import json

import numpy as np
import pytest

from gfn_jax.metrics import read_jsonl
from gfn_jax.models import load_adapter, load_pretrained
from testing import run_commands

pytestmark = pytest.mark.timeout(1200)

RUNS = {  # name -> (arguments, result keys that must be there, plots beside log_reward.png and loss.png)
  "rng": (
    ["--config=configs/rng.py:smoke"],
    [f"rng/{m}/{k}" for m in ("gfn", "base") for k in ("kl_q_target", "kl_target_q", "total_variation", "valid_mass")]
    + ["rng/gfn/histogram/valid_share", "rng/gfn/log_partition_lower", "rng/gfn/log_partition_upper"],
    ["numbers.png"],
  ),
  "next_sentence": (
    ["--config=configs/next_sentence.py:smoke"],
    [
      f"next_sentence/{m}/max_log_likelihood"
      for m in ("gfn", "base", "greedy", "sampling_0.8", "top_k_50", "nucleus_0.9", "beam", "diverse_beam")
    ],
    [],
  ),
  "infill": (
    ["--config=configs/infill.py:smoke"],
    ["infill/gfn/bleu4", "infill/gfn/gleu4", "infill/base/bleu4", "infill/gfn/log_reward"],
    [],
  ),
  "jsonl": (
    ["--config=configs/jsonl.py:smoke"],
    ["jsonl/gfn/log_reward", "jsonl/gfn/log_reward_best", "jsonl/gfn/distinct_share", "jsonl/base/log_reward"],
    [],
  ),
  "six_words": (
    ["--config=configs/six_words.py:smoke"],
    ["six_words/gfn/right", "six_words/gfn/log_reward"],
    [],
  ),
  "arith_sft": (
    ["--config=configs/arith.py:smoke", "--config.method=sft", "--config.train.keep=best", "--config.train.patience=1"],
    ["arith/sft/accuracy/3", "arith/base/accuracy/3"],
    ["accuracy.png"],
  ),
}


FAST = ("rng",)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's name and arguments -> its workdir and what it printed. Made when it is asked for, and again each time."""
  folder = tmp_path_factory.mktemp("runs")

  def run(name, arguments):
    command = ["gfn_jax.main", *arguments, f"--config.data.dir={folder}/tfds", f"--workdir={folder}/{name}"]
    ((code, out, stderr),) = run_commands([command])
    assert code == 0, f"{command}\n{stderr}"
    return folder / name, out

  return run


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_the_contracts_files_are_there(run, name):
  arguments, keys, plots = RUNS[name]
  workdir, out = run(name, arguments)
  results = json.loads((workdir / "results.json").read_text())
  assert [k for k in keys if k not in results] == []
  assert all(np.isfinite(v) for v in results.values() if isinstance(v, float))
  assert [p for p in [*plots, "loss.png"] if not (workdir / "plots" / p).stat().st_size > 5000] == []
  records = read_jsonl(workdir / "samples.jsonl")
  assert records and all({"step", "X", "Z"} <= set(r) for r in records)
  fields = json.loads((workdir / "config.json").read_text())["config"]
  adapter = load_adapter(workdir / "adapter", load_pretrained(fields["model.name"]))
  assert adapter.config.rank == fields["lora.rank"]
  assert "R(Z) = " in (workdir / "adapter" / "README.md").read_text()
  assert f"| {keys[0].partition('/')[0]} " in out  # the table
  if name == "arith_sft":
    check_supervised_fine_tuning(workdir, out)


def check_supervised_fine_tuning(workdir, out):
  """Its metrics, and the best of its evaluations."""
  steps = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  assert steps and not any("log_reward_mean" in r for r in steps)
  assert "best evaluation was after step" in out
  assert list(workdir.glob("best/*/adapter_model.safetensors"))


@pytest.mark.slow
def test_a_round_of_expectation_maximisation(run):
  workdir, out = run("subj", ["--config=configs/subj.py:smoke"])
  results = json.loads((workdir / "results.json").read_text())
  for method in ("gfn", "gfn_sft", "base", "zero_shot", "4_shot"):
    assert 0 <= results[f"subj/{method}/accuracy/4"] <= 1
  assert results["subj/gfn_sft/accuracy/4"] == results["subj/gfn_sft/accuracy/4/round0"]
  assert "E-step" in out and "M-step" in out
  rationales = read_jsonl(workdir / "round0" / "rationales.jsonl")
  assert len(rationales) == 4 * 3 and all(r["Y"].startswith(", so it is") for r in rationales)
  fields = [json.loads((workdir / "round0" / s / "config.json").read_text())["config"] for s in "em"]
  assert [f["method"] for f in fields] == ["gfn", "sft"]
  a, b = (load_adapter(workdir / "round0" / s / "adapter", load_pretrained("embedded/arith-2m")) for s in "em")
  for lora in (a, b):  # both have learnt something
    assert max(np.abs(x["lora_b"]).max() for x in lora.params["layers"].values()) > 0
  shares = [r for r in read_jsonl(workdir / "round0" / "e" / "samples.jsonl") if "share" in r]
  assert shares and all(0 < r["share"] <= 1 for r in shares)
  assert "finished already" in run("subj", ["--config=configs/subj.py:smoke"])[1]
