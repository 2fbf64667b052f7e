"""Diversity of samples, by hand."""

import numpy as np
import pytest

from gfn_jax.evaluators.diversity import mean_pairwise_cosine_distance


def test_by_hand():
  """cos: 0 of a right angle, 0.6 of (1, 0) and (3, 4), 0.8 of (0, 1) and (3, 4), -1 of opposites."""
  embeddings = np.array(
    [
      [[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]],  # (1 + 0.4 + 0.2) / 3
      [[1.0, 1.0], [2.0, 2.0], [0.5, 0.5]],  # alike
      [[1.0, 0.0], [-3.0, 0.0], [1.0, 0.0]],  # (2 + 0 + 2) / 3, the most that three samples reach beside 120 degrees
    ]
  )
  found = mean_pairwise_cosine_distance(embeddings)
  np.testing.assert_allclose(found, [1.6 / 3, 0.0, 4.0 / 3], atol=1e-12)
  assert found.shape == (3,) and found.dtype == np.float64
  np.testing.assert_allclose(mean_pairwise_cosine_distance(embeddings[:1, :2]), [1.0], atol=1e-12)


def test_against_a_double_loop():
  embeddings = np.random.default_rng(0).standard_normal((4, 8, 16)).astype(np.float32)
  expected = []
  for samples in embeddings:
    pairs = [(a, b) for i, a in enumerate(samples) for b in samples[i + 1 :]]
    expected.append(np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))
    assert len(pairs) == 28
  np.testing.assert_allclose(mean_pairwise_cosine_distance(embeddings), expected, rtol=1e-5)


def test_what_has_no_distance_is_refused():
  with pytest.raises(ValueError, match="1 samples of a prompt: a pair needs at least 2"):
    mean_pairwise_cosine_distance(np.ones((2, 1, 3)))
  with pytest.raises(ValueError, match="length 0"):
    mean_pairwise_cosine_distance(np.array([[[1.0, 0.0], [0.0, 0.0]]]))
