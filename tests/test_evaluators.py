"""Evaluators on samplers and rewards whose numbers are known."""

import jax
import ml_collections
import numpy as np
import pytest

from configs import arith
from gfn_jax.evaluators import accuracy, posterior
from gfn_jax.evaluators.evaluator import Evaluator, Parts
from gfn_jax.evaluators.posterior import posterior_quality
from gfn_jax.experiment import build
from gfn_jax.sampler import Sampler
from gfn_jax.task import Task
from gfn_jax.tasks.arith import ArithTask
from gfn_jax.types import Example, Trajectory
from testing import tiny_pretrained

EXAMPLES = [Example(x, None, "y", "") for x in "abcd"]
LOG_Q = np.array([[-1.0, -2.0, -4.0], [-3.0, -3.5, -1.0], [-2.0, -5.0, -2.5], [-1.0, -1.0, -6.0]])


class Letters(Task):
  start_tokens = ()
  targets = None  # what `target_samples` gives

  def __init__(self):
    pass

  def encode(self, text):
    return [ord(c) for c in text]

  encode_after = encode

  def target_samples(self, example, num_samples, reward_temperature, rng):
    return self.targets


class KnownSampler(Sampler):
  """Samples of two tokens, whose log q stands in LOG_Q: -0.5 for stopping, the rest for the first token."""

  min_length = 0

  def __init__(self):
    pass

  def __call__(self, lora, prompt_tokens, prompt_mask, *, num_samples, temperature, key, on_round):
    del lora, prompt_mask, key, on_round
    assert (temperature == 1).all()
    queries = prompt_tokens[:, -1] - ord("a")
    log_q = LOG_Q[queries, :num_samples].reshape(-1)
    rows = len(log_q)
    log_pf = np.stack([log_q + 0.5, np.zeros(rows)], axis=1)
    log_pterm = np.tile([-9.0, -9.0, -0.5], (rows, 1))  # of its prefixes, the last is the whole
    tokens = np.tile(np.repeat(queries, num_samples)[:, None], (1, 2))
    return Trajectory(tokens, np.full(rows, 2), np.ones((rows, 2), bool), log_pf, log_pterm)


class KnownReward:
  """log R of a whole Z; a prefix would spoil the sum."""

  def __init__(self, log_reward):
    self._log_reward = log_reward

  def __call__(self, queries, tokens, length, wanted):
    assert (wanted == (np.arange(3) == length[:, None])).all()
    values = np.full(wanted.shape, 1e6)
    values[:, 2] = self._log_reward[tokens[:: len(tokens) // len(queries), 0]].reshape(-1)
    return values


def quality(log_reward, temperature, sampler=KnownSampler):
  parts = Parts(None, tiny_pretrained(), {}, Letters(), sampler(), KnownReward(log_reward), [])
  found = posterior_quality(
    None, parts, EXAMPLES, num_calls=2, num_samples=3, reward_temperature=temperature, key=jax.random.key(0)
  )
  return dict(found)


def test_an_exact_policy_has_no_variance():
  """log R = T (log q + log Z), with a log Z for each query."""
  log_z = np.array([[-7.0], [3.0], [-20.0], [0.0]])
  found = quality(1.5 * (LOG_Q + log_z), temperature=1.5)
  assert found["log_ratio_variance"] == pytest.approx(0, abs=1e-9)
  assert found["log_reward_correlation"] == pytest.approx(1)
  assert found["effective_sample_share"] == pytest.approx(1)
  assert found["log_partition_lower"] == pytest.approx(log_z.mean())  # the bound is tight


def test_quality_against_plain_numpy():
  log_reward = np.random.default_rng(0).normal(-5, 3, LOG_Q.shape)
  found = quality(log_reward, temperature=2.0)
  expected = np.mean([np.var(r / 2 - q) for r, q in zip(log_reward, LOG_Q)])
  assert found["log_ratio_variance"] == pytest.approx(expected)
  a, b = (np.concatenate([row - row.mean() for row in x]) for x in (log_reward / 2, LOG_Q))
  assert found["log_reward_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
  weights = np.exp(log_reward / 2 - LOG_Q)
  shares = [row.sum() ** 2 / (row**2).sum() / len(row) for row in weights]
  assert found["effective_sample_share"] == pytest.approx(np.mean(shares))
  assert found["log_partition_lower"] == pytest.approx(np.mean(log_reward / 2 - LOG_Q))
  assert found["length_mean"] == 2 and found["distinct_samples"] == 1  # a query's samples are the same two tokens
  assert "log_partition_upper" not in found  # the task has no exact samples


def test_short_z_that_are_never_drawn_loosen_no_bound():
  """A stop had the probability 1/4 or 1/2 at two prefixes: what is drawn is drawn more often than q says."""

  class Closed(KnownSampler):
    min_length = 2

    def __call__(self, *args, **kwargs):
      z = super().__call__(*args, **kwargs)
      z.log_pterm[:, :2] = np.log(np.repeat([[0.25, 0.25], [0.5, 0.25]], 3, axis=0))  # of a call's two queries
      return z

  log_z = np.array([[-7.0], [3.0], [-20.0], [0.0]])
  found = quality(LOG_Q + log_z, 1.0, Closed)
  assert found["log_ratio_variance"] == pytest.approx(0, abs=1e-9)  # of q itself, which is exact
  drawn_of_all = np.log(0.75) + np.log([0.75, 0.5]).mean()  # of an even and of an odd query
  assert found["log_partition_lower"] == pytest.approx(log_z.mean() + drawn_of_all)
  assert found["effective_sample_share"] == pytest.approx(1)


def test_the_upper_bound_of_equal_queries_is_measured_once(monkeypatch):
  asked = []

  class Drawn(Letters):
    def target_samples(self, example, num_samples, reward_temperature, rng):
      asked.append(example.prompt)
      return [["abcd".index(example.prompt)] * 2] * num_samples

  monkeypatch.setattr(
    posterior.scoring, "log_q", lambda lora, parts, query, rows: LOG_Q[query.prompt_tokens[0, -1] - ord("a")]
  )
  log_reward = np.random.default_rng(1).normal(-5, 3, LOG_Q.shape)
  config = ml_collections.ConfigDict({"sampler": {"max_length": 2}})
  parts = Parts(config, tiny_pretrained(), {}, Drawn(), KnownSampler(), KnownReward(log_reward), [])
  a, b, c, _ = EXAMPLES
  found = dict(posterior_quality(
    None, parts, [a, b, a, c], num_calls=2, num_samples=3, reward_temperature=2.0, key=jax.random.key(0)
  ))  # fmt: skip
  assert sorted(asked) == ["a", "b", "c"]
  bounds = (log_reward / 2 - LOG_Q).mean(axis=1)[[0, 1, 0, 2]]
  assert found["log_partition_upper"] == pytest.approx(bounds.mean())


class Guesses(Task):
  """The first of a problem's samples is its answer: "0", "3", "6", ... with three samples each."""

  def __init__(self):
    pass

  def predict(self, samples):
    return str(samples[0][0])


class Numbered(Sampler):
  """Row r is the one token r."""

  def __init__(self):
    pass

  def draw(self, lora, prompt_tokens, prompt_mask, *, num_samples, temperature, key, on_round):
    del lora, prompt_mask, temperature, key, on_round
    rows = len(prompt_tokens) * num_samples
    column = np.arange(rows)[:, None]
    return Trajectory(column, np.ones(rows, int), np.ones((rows, 1), bool), np.zeros((rows, 1)), np.zeros((rows, 2)))


def test_accuracy_of_each_kind_and_every_sample_of_the_shown_problems(monkeypatch):
  kinds = {"3": [Example("x", None, "y", str(3 * i)) for i in range(5)], "4": [Example("x", None, "y", "15")] * 2}
  config = ml_collections.ConfigDict({"eval": {"num_votes": 3, "max_length": 1, "temperature": 0.1}})
  monkeypatch.setattr(accuracy, "SHOWN", 4)
  monkeypatch.setattr(Evaluator, "_sampler", lambda self: Numbered())
  monkeypatch.setattr(accuracy, "query_table", lambda examples, *_: Queried(np.arange(len(examples))))
  monkeypatch.setattr(
    accuracy, "sample_records",
    lambda task, reward, queries, z: [{"query": q, "Z": n} for q, n in zip(queries.index.repeat(3), z.tokens[:, 0])],
  )  # fmt: skip
  evaluator = accuracy.Accuracy(Parts(config, tiny_pretrained(), {}, Guesses(), Numbered(), None, []))
  assert dict(evaluator(None, kinds, jax.random.key(0))) == {"accuracy/3": 1.0, "accuracy/4": 0.5}
  shown = [(r["kind"], int(r["query"]), int(r["Z"])) for r in evaluator.samples]
  assert shown == [("3", q, 3 * q + i) for q in range(4) for i in range(3)] + [
    ("4", q, 3 * q + i) for q in (5, 6) for i in range(3)
  ]


class Queried:
  """Queries that tell which they are."""

  prompt_mask = None

  def __init__(self, index):
    self.index = self.prompt_tokens = index

  def __getitem__(self, index):
    return Queried(self.index[index])


@pytest.mark.parametrize(
  "name, needed", {"reasons": "labels", "histogram": "number_tokens", "sentences": "config.next_sentence"}.items()
)
def test_an_evaluator_of_another_task_is_refused_before_anything_runs(name, needed):
  config = arith.get_config("smoke")
  config.eval.test_evaluators = (name,)
  with pytest.raises(ValueError, match=f"evaluator '{name}' .* does not fit the task 'arith', without {needed}$"):
    build(config, jax.local_devices()[:1])


def test_what_training_goes_by_must_be_there(monkeypatch):
  config = arith.get_config("smoke")
  monkeypatch.setattr(ArithTask, "validation_examples", lambda self, number: {"3": []})
  with pytest.raises(ValueError, match="'arith' has no validation problems: config.eval.num_validation must be 0"):
    build(config, jax.local_devices()[:1])
  monkeypatch.undo()
  config.train.keep, config.behavior.buffer, config.behavior.tempered = "best", 1.0, 0.0
  with pytest.raises(ValueError, match=r"config.train.keep and .* config.behavior.buffer 1.0 of .* is all"):
    build(config, jax.local_devices()[:1])


def test_a_card_names_all_that_the_reward_is_made_of():
  config, task = arith.get_config("smoke"), Task.__new__(Task)
  config.reward.num_demonstrations = 0
  task.examples = [Example("x", None, "y", "")]
  assert task.reward_text(config) == "p_LM(Z | X) p_LM(Y | X, Z)"
  config.reward.update({"alpha": 2.0, "beta": -0.5, "rival_penalty": 50.0, "adapter": "round/m"})
  task.examples, task.log_constraint = [Example("x", None, "", "")], lambda example, tokens: 0.0
  found = task.reward_text(config)
  assert found.startswith("p_LM(Z | X)^2 p_LM(Z)^-0.5 c(Z)") and "50 nats" in found and found.endswith("round/m")


def test_as_many_demonstrations_as_there_are():
  task = Task.__new__(Task)
  task.demonstrations = [Example(x, None, "", "") for x in "abc"]
  assert [e.prompt for e in task.shown(2)] == ["a", "b"] and len(task.shown(3, seed=0)) == 3
  with pytest.raises(ValueError, match=r"4 demonstrations \(.*config.eval.shots\): the .* task has 3"):
    task.shown(4)
