"""The loss of a step by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import policy
from gfn_jax.prefix_tree import PADDING_ON_CPU, build_trees
from gfn_jax.step import StepSettings, objective
from gfn_jax.types import Acts, Batch, terminable_prefixes
from testing import random_lora, tiny_pretrained


@pytest.mark.parametrize("loss", ["subtb", "vargrad", "sft", "ppo", "grpo"])
def test_bins_one_by_one_add_up_to_all(loss):
  """Value, denominator, metrics and gradients; every array of a row in another bin must stay out of them."""
  rng, pretrained, (q, n, t, stop) = np.random.default_rng(0), tiny_pretrained(), (3, 4, 6, 3)
  length = rng.integers(0, t + 1, q * n).astype(np.int32)
  inside = np.arange(t) < length[:, None]
  tokens = np.where(inside, rng.integers(4, 20, (q * n, t)), 0).astype(np.int32)
  chosen = inside & (rng.random((q * n, t)) < 0.8)
  terminable = terminable_prefixes(length, chosen)
  prompts = [rng.integers(4, 20, 3 + i).astype(np.int32) for i in range(q)]
  trees = build_trees(prompts, tokens, length, 20, padding=PADDING_ON_CPU, whole=loss == "vargrad")
  (bins,) = trees.num_bins.tolist()
  assert bins > 1 and len(trees.tokens) == 16
  log_reward = np.where(terminable, rng.normal(-20, 3, terminable.shape), np.nan).astype(np.float32)
  log_reward[np.arange(q * n), length] = -20.0
  noise = rng.normal(size=(5, *terminable.shape)).astype(np.float32)
  batch = Batch(
    np.arange(q, dtype=np.int32), tokens, length, chosen, terminable, log_reward, trees, Acts(terminable, *noise)
  )
  gradient = {"ppo": {"clip": 0.2, "value_clip": 1.0}, "grpo": {"clip": 0.2, "kl_coefficient": 0.1}}.get(loss, {})
  settings = StepSettings(pretrained.config, loss, 0.9, n, 1, t, stop, False, policy_gradient=gradient)
  trained = {"lora": random_lora(pretrained)}
  if loss == "ppo":
    trained["value"] = jax.tree.map(lambda x: x + 0.1, policy.init_value_head(pretrained.config))
  allowed = jnp.asarray(np.arange(pretrained.config.vocab_size) < 20)
  of = functools.partial(objective, settings, pretrained.params, allowed, jnp.float32(1.3), None)
  of = jax.jit(jax.value_and_grad(of, has_aux=True))
  together = of(trained, batch)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(together))
  one_by_one = jax.tree.map(lambda *x: sum(x), *(of(trained, batch, jnp.int32(i)) for i in range(bins)))
  assert np.abs(together[0][0]) > 0.1
  for ours, theirs in zip(jax.tree.leaves(one_by_one), jax.tree.leaves(together)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
