"""The loss of a step by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import policy
from gfn_jax.on_policy import measure
from gfn_jax.prefix_tree import PADDING_ON_CPU, build_trees
from gfn_jax.step import StepSettings, objective
from gfn_jax.types import Acts, Batch, terminable_prefixes
from testing import random_lora, tiny_pretrained

Q, N, T, STOP = 3, 4, 6, 3


def make_batch(whole=False):
  """A tiny model and a batch of several bins, whose acts are noise."""
  rng, pretrained = np.random.default_rng(0), tiny_pretrained()
  length = rng.integers(0, T + 1, Q * N).astype(np.int32)
  inside = np.arange(T) < length[:, None]
  tokens = np.where(inside, rng.integers(4, 20, (Q * N, T)), 0).astype(np.int32)
  chosen = inside & (rng.random((Q * N, T)) < 0.8)
  terminable = terminable_prefixes(length, chosen)
  prompts = [rng.integers(4, 20, 3 + i).astype(np.int32) for i in range(Q)]
  trees = build_trees(prompts, tokens, length, 20, padding=PADDING_ON_CPU, whole=whole)
  assert trees.num_bins[0] > 1 and len(trees.tokens) == 16
  log_reward = np.where(terminable, rng.normal(-20, 3, terminable.shape), np.nan).astype(np.float32)
  acts = Acts(terminable, *rng.normal(size=(5, *terminable.shape)).astype(np.float32))
  queries = np.arange(Q, dtype=np.int32)
  return pretrained, Batch(queries, tokens, length, chosen, terminable, log_reward, trees, acts)


def trained_on(pretrained):
  """An adapter, and a critic that predicts something."""
  value = jax.tree.map(lambda x: x + 0.1, policy.init_value_head(pretrained.config))
  return {"lora": random_lora(pretrained), "value": value}


ALLOWED = np.arange(tiny_pretrained().config.vocab_size) < 20


@pytest.mark.parametrize("loss", ["subtb", "vargrad", "sft", "ppo", "grpo"])
def test_bins_one_by_one_add_up_to_all(loss):
  """Value, denominator, metrics and gradients: what is another bin's stays out of them."""
  pretrained, batch = make_batch(whole=loss == "vargrad")
  gradient = {"ppo": {"clip": 0.2, "value_clip": 1.0}, "grpo": {"clip": 0.2, "kl_coefficient": 0.1}}.get(loss, {})
  settings = StepSettings(pretrained.config, loss, 0.9, N, 1, T, STOP, False, policy_gradient=gradient)
  trained = {k: v for k, v in trained_on(pretrained).items() if k == "lora" or loss == "ppo"}
  of = functools.partial(objective, settings, pretrained.params, jnp.asarray(ALLOWED), jnp.float32(1.3), None)
  of = jax.jit(jax.value_and_grad(of, has_aux=True))
  together = of(trained, batch)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(together)) and abs(together[0][0]) > 0.1
  bins = (of(trained, batch, jnp.int32(i)) for i in range(batch.trees.num_bins[0]))
  one_by_one = jax.tree.map(lambda *x: sum(x), *bins)
  for ours, theirs in zip(jax.tree.leaves(one_by_one), jax.tree.leaves(together)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_acts_are_measured_bin_by_bin_as_all_at_once():
  pretrained, batch = make_batch()
  found = []
  for bin_by_bin in (True, False):
    of = functools.partial(measure, pretrained.config, STOP, 0, T, 1, bin_by_bin)
    found.append(jax.jit(of)(pretrained.params, jnp.asarray(ALLOWED), trained_on(pretrained), batch))
  for one_by_one, together in zip(*found):
    together = np.where(batch.terminable, together, 0)
    assert np.abs(together).max() > 0.1
    np.testing.assert_allclose(np.where(batch.terminable, one_by_one, 0), together, rtol=1e-4, atol=1e-5)
