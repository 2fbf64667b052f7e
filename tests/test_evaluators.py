"""Evaluators on samplers and rewards whose numbers are known."""

import jax
import numpy as np
import pytest

from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.evaluators.posterior import posterior_quality
from gfn_jax.sampler import Sampler
from gfn_jax.task import Task
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


def quality(log_reward, temperature):
  parts = Parts(None, tiny_pretrained(), {}, Letters(), KnownSampler(), KnownReward(log_reward), [])
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
