"""Random numbers: targets, rewards, the exact distribution of a policy."""

import json
import math

import jax
import ml_collections
import numpy as np
import pytest

from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.evaluators.numbers import Histogram, Numbers, distances, histogram_kl, number_log_probs
from gfn_jax.evaluators.posterior import posterior_quality
from gfn_jax.models import load_pretrained, logits
from gfn_jax.tasks.rng import NumberReward, RngTask, log_target
from testing import random_lora

RNG = {"low": 0, "high": 12, "target": "uniform", "parameter": None, "table": None, "prompt": None, "penalty": None}


def config(max_length=4, method="gfn", **changes):
  return ml_collections.ConfigDict({
    "rng": RNG | changes,
    "method": method,
    "data": {"seed": 0},
    "model": {"name": "embedded/arith-2m"},
    "sampler": {"max_length": max_length, "min_length": 0},
    "eval": {"num_votes": 3000, "max_length": max_length},
  })  # fmt: skip


@pytest.fixture(scope="module")
def base():
  return load_pretrained("embedded/arith-2m")


def make_task(base, **changes):
  return RngTask(config(**changes), base.tokenizer, base.config.vocab_size)


def make_parts(base, max_length=4, **changes):
  task = make_task(base, max_length=max_length, **changes)
  sampler = task.make_sampler(base, max_length=max_length)
  reward = task.make_reward(None, base, {}, None, [])
  return Parts(config(max_length, **changes), base, base.params, task, sampler, reward, jax.devices())


# ---- Targets


def test_targets_against_their_definitions():
  def check(found, weights):
    total = sum(weights.values())
    assert found.keys() == weights.keys()
    for n, w in weights.items():
      assert math.exp(found[n]) == pytest.approx(w / total)

  check(log_target("uniform", 3, 7, None, None), dict.fromkeys(range(3, 8), 1.0))
  check(log_target("poisson", 2, 9, 2.5, None), {n: 2.5**n / math.factorial(n) for n in range(2, 10)})
  check(log_target("binomial", 0, 6, 0.3, None), {n: math.comb(6, n) * 0.3**n * 0.7 ** (6 - n) for n in range(7)})
  check(log_target("geometric", 0, 5, 0.2, None), {n: 0.8**n for n in range(6)})


def test_a_table_is_a_target(tmp_path):
  path = tmp_path / "table.json"
  path.write_text(json.dumps({"3": 1, "5": 3.0, "7": 0}))
  found = log_target("table", 0, 9, None, str(path))
  assert {n: round(math.exp(p), 6) for n, p in found.items()} == {3: 0.25, 5: 0.75}  # weight 0 is not of the support


@pytest.mark.parametrize(
  "arguments, named",
  (
    (("normal", 0, 9, None, None), "'normal' is unknown: choose from uniform"),
    (("uniform", 5, 4, None, None), "low 5 is above config.rng.high 4"),
    (("poisson", 0, 9, None, None), "parameter is None: for a poisson target it must be positive"),
    (("binomial", 0, 9, 1.0, None), "parameter is 1.0: for a binomial target it must lie between 0 and 1"),
    (("geometric", -1, 9, 0.5, None), "low is -1"),
    (("table", 0, 9, None, None), "table is missing"),
    (("table", 0, 9, None, "/nowhere.json"), "'/nowhere.json' is no file"),
  ),
)
def test_what_is_no_target_is_named(arguments, named):
  with pytest.raises(ValueError, match=named):
    log_target(*arguments)


@pytest.mark.parametrize(
  "content, named",
  (('{"a": 1}', "'a': 1"), ('{"12": 1}', "'12': 1"), ('{"1": -2}', "'1': -2"), ("[1]", "a list in place of an object")),
)
def test_a_bad_table_is_named(tmp_path, content, named):
  path = tmp_path / "table.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=named):
    log_target("table", 0, 9, None, str(path))


# ---- Tokens


@pytest.mark.parametrize("changes", ({}, {"low": -3, "high": 30}, {"prompt": "A number:"}, {"prompt": "A number: "}))
def test_prompt_and_number_are_the_text_that_the_tokenizer_reads(base, changes):
  task = make_task(base, **changes)
  for n, tokens in task.number_tokens.items():
    assert task.decode([*task.encode_prompt(task.prompt), *tokens]) == f"{task.prompt}{n}"
    assert [*task.encode_prompt(task.prompt), *tokens] == base.tokenizer.encode(f"{task.prompt}{n}")


def test_a_range_that_max_length_cannot_hold_is_named(base):
  with pytest.raises(ValueError, match="max_length 1: the longest number has [2-9] tokens"):
    make_task(base, max_length=1, low=123456, high=123457)


def test_a_penalty_that_rewards_is_refused(base):
  with pytest.raises(ValueError, match="config.rng.penalty is -1: must not be negative"):
    make_task(base, penalty=-1.0)


# ---- Reward


def test_the_reward_by_hand():
  reward = NumberReward({(5,): -1.0, (5, 6): -2.0, (7, 8): -3.0}, penalty=10.0)._log_reward
  rows = np.array([[5, 6, 6, 5], [7, 8, 0, 0], [9, 5, 5, 6]])
  assert [[reward(tuple(row[:t].tolist())) for t in range(5)] for row in rows] == [
    [-10, -1, -2, -10, -20],  # nothing is no number; then a number, a number, one wrong token, two
    [-10, -10, -3, -10, -20],  # 7 begins a number and is none
    [-10, -10, -20, -30, -40],
  ]


# ---- What is measured


def test_distances_against_plain_python():
  rng = np.random.default_rng(0)
  q, p = rng.dirichlet(np.ones(6)) * 0.7, rng.dirichlet(np.ones(6))
  found = distances(np.log(q), np.log(p))
  share = q / q.sum()
  assert found["valid_mass"] == pytest.approx(0.7)
  assert found["kl_q_target"] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(share, p)))
  assert found["kl_target_q"] == pytest.approx(sum(b * math.log(b / a) for a, b in zip(share, p)))
  assert found["total_variation"] == pytest.approx((sum(abs(a - b) for a, b in zip(q, p)) + 0.3) / 2)


def test_a_perfect_policy_is_at_no_distance():
  log_p = np.log(np.array([0.2, 0.3, 0.5]))
  found = distances(log_p, log_p)
  assert found == pytest.approx({"valid_mass": 1, "kl_q_target": 0, "kl_target_q": 0, "total_variation": 0}, abs=1e-12)


def test_probabilities_of_numbers_against_full_forward_passes(base):
  """Token by token, over the whole vocabulary, the stop included."""
  parts = make_parts(base)
  lora = random_lora(base)
  found = number_log_probs(lora, parts)
  task = parts.task
  prompt = task.encode_prompt(task.prompt)
  for n in (0, 7, 10, 12):
    whole = [*prompt, *task.number_tokens[n], task.stop_token_id]
    scores = np.asarray(logits(base, np.array([whole]), lora=lora))[0]
    log_probs = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)) - scores.max(
      -1, keepdims=True
    )
    at = range(len(prompt), len(whole))
    assert found[n] == pytest.approx(sum(log_probs[i - 1, whole[i]] for i in at), abs=1e-4)


def test_evaluators_agree_with_each_other(base):
  """The histogram's shares are the exact probabilities, as far as samples tell. At one token nothing need stop."""
  parts = make_parts(base, max_length=1, high=9, prompt="Question: 2 + 5 - 1 + 3 = ? Answer: 2 + 5 = 7, 7 - ")
  exact = Numbers(parts)
  values = dict(exact(None, {}, jax.random.key(0)))
  assert values["valid_mass"] > 0.2  # the prompt asks for a number
  assert [r["Z"] for r in exact.samples] == [str(n) for n in range(10)]
  sampled = Histogram(parts)
  found = dict(sampled(None, {}, jax.random.key(0)))
  assert found["histogram/valid_share"] == pytest.approx(values["valid_mass"], abs=0.04)
  for a, b in zip(exact.samples, sampled.samples):
    assert b["count"] / 3000 == pytest.approx(math.exp(a["log_q"]), abs=0.04)


def test_the_bounds_enclose_the_partition_function(base):
  """R sums to 1 over numbers and to next to nothing over the rest: log Z = 0."""
  parts = make_parts(base, prompt="2 + 5 = ", penalty=40.0)
  found = dict(
    posterior_quality(
      None, parts, parts.task.examples, num_calls=1, num_samples=200, reward_temperature=1.0, key=jax.random.key(1)
    )
  )
  assert found["log_partition_lower"] < 0 < found["log_partition_upper"]


def test_what_is_no_number_has_a_millionth_of_the_target(base):
  task = make_task(base)
  numbers, log_reward = set(task.number_tokens.values()), task.make_reward(None, base, {}, None, ())._log_reward
  starts = {tokens[:t] for tokens in numbers for t in range(len(tokens) + 1)}
  # One wrong token stands for all: none of them begins a number, and they cost the same.
  wrong = next(t for t in range(base.config.vocab_size) if not any((*s, t) in starts for s in starts))
  number = [base.config.vocab_size - sum(len(s) == len(x) + 1 and s[:-1] == x for s in starts) for x in starts]
  mass = sum(n * math.exp(log_reward((*start, wrong))) for n, start in zip(number, starts))
  assert 0.5e-6 < mass < 1e-6
  assert sum(math.exp(log_reward(n)) for n in numbers) == pytest.approx(1)


def test_histogram_kl_by_hand():
  log_p = {0: math.log(0.5), 1: math.log(0.25), 2: math.log(0.25)}
  expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25)
  assert histogram_kl({0: 3, 1: 1, 2: 0}, log_p) == pytest.approx(expected)


def test_supervised_fine_tuning_shows_numbers_drawn_from_the_target(base):
  task = make_task(base, method="sft", target="geometric", parameter=0.4, high=3, num_demonstrations=20000)
  assert task.num_seeded == len(task.examples) == 20000
  shown = [task.rationale_tokens(e, 4) for e in task.examples]
  shares = np.array([sum(tuple(z) == task.number_tokens[n] for z, _ in shown) for n in range(4)]) / 20000
  weights = np.array([0.6**n for n in range(4)])
  np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.02)
  assert all(mask == [True] * len(z) for z, mask in shown)
  assert task.validation_examples(2) == {"": [task.example_of(task.prompt)] * 2}


def test_samples_of_the_target_are_tempered(base):
  task = make_task(base, target="geometric", parameter=0.4, high=3)
  drawn = task.target_samples(task.examples[0], 20000, 2.0, np.random.default_rng(0))
  shares = np.array([sum(tuple(d) == task.number_tokens[n] for d in drawn) for n in range(4)]) / 20000
  weights = np.array([0.6 ** (n / 2) for n in range(4)])
  np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.02)
