"""Advantages and the KL controller, against cases worked out by hand and a plain double loop."""

import numpy as np
import pytest

from gfn_jax.advantages import adapt_kl_coefficient, explained_variance, gae, group_advantages, whiten


def test_gae_by_hand():
  # Two acts, discount 0.5, lambda 0.5. The last: 4 - 2 = 2. The first: 1 + 0.5 * 2 - 3 + 0.5 * 0.5 * 2 = -0.5.
  advantages, targets = gae(np.array([[1.0, 4.0]]), np.array([[3.0, 2.0]]), np.array([[True, True]]), 0.5, 0.5)
  np.testing.assert_allclose(advantages, [[-0.5, 2.0]])
  np.testing.assert_allclose(targets, [[2.5, 4.0]])


def test_gae_passes_over_what_the_tool_writes():
  rewards, values = np.array([[1.0, 7.0, 4.0, 9.0]]), np.array([[3.0, 50.0, 2.0, 60.0]])
  advantages, targets = gae(rewards, values, np.array([[True, False, True, False]]), 0.5, 0.5)
  np.testing.assert_allclose(advantages, [[-0.5, 0.0, 2.0, 0.0]])
  np.testing.assert_allclose(targets, [[2.5, 0.0, 4.0, 0.0]])


@pytest.mark.parametrize("discount, gae_lambda", ((1.0, 1.0), (0.9, 0.95), (1.0, 0.0)))
def test_gae_is_the_weighted_sum_of_its_definition(discount, gae_lambda):
  rng = np.random.default_rng(0)
  rewards, values, acts = rng.normal(size=(5, 9)), rng.normal(size=(5, 9)), rng.random((5, 9)) < 0.7
  advantages, _ = gae(rewards, values, acts, discount, gae_lambda)
  for row in range(5):
    at = np.flatnonzero(acts[row])
    r, v = rewards[row, at], np.append(values[row, at], 0.0)
    errors = r + discount * v[1:] - v[:-1]
    for i in range(len(at)):
      expected = sum((discount * gae_lambda) ** (j - i) * errors[j] for j in range(i, len(at)))
      assert advantages[row, at[i]] == pytest.approx(expected)
  if discount == gae_lambda == 1:  # the whole return less the value
    returns = np.where(acts, rewards, 0.0)[:, ::-1].cumsum(axis=1)[:, ::-1]
    np.testing.assert_allclose(advantages[acts], (returns - values)[acts])


def test_explained_variance():
  targets, mask = np.array([[1.0, 3.0, 100.0]]), np.array([[True, True, False]])
  assert explained_variance(targets, targets, mask) == 1
  assert explained_variance(np.full((1, 3), 7.0), targets, mask) == 0
  assert explained_variance(np.array([[1.0, 2.0, 0.0]]), targets, mask) == pytest.approx(1 - 0.25)
  assert explained_variance(targets, np.ones((1, 3)), mask) == 0  # nothing to explain


def test_whitening():
  x, mask = np.array([[1.0, 3.0, 100.0], [5.0, 100.0, 7.0]]), np.array([[1, 1, 0], [1, 0, 1]], bool)
  white = whiten(x, mask)
  np.testing.assert_allclose(white[mask], (x[mask] - 4) / np.sqrt(5), rtol=1e-6)
  assert (white[~mask] == 0).all()


def test_group_advantages_by_hand():
  log_reward = np.array([-1.0, -3.0, 10.0, 10.0])
  np.testing.assert_allclose(group_advantages(log_reward, 2, scale=False), [1, -1, 0, 0])
  one = 1 / (2**0.5 + 1e-4)  # the deviation of -1 and -3 is the root of 2
  np.testing.assert_allclose(group_advantages(log_reward, 2, scale=True), [one, -one, 0, 0])
  assert (group_advantages(log_reward, 1, scale=True) == 0).all()


def test_the_kl_coefficient_follows_its_target():
  # Ziegler et al., 2019: the error is clipped to 20%.
  assert adapt_kl_coefficient(0.2, 6.6, 6.0, 10_000, 1_000) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
  assert adapt_kl_coefficient(0.2, 60.0, 6.0, 10_000, 1_000) == pytest.approx(0.2 * 1.02)
  assert adapt_kl_coefficient(0.2, 0.0, 6.0, 10_000, 1_000) == pytest.approx(0.2 * 0.98)
