"""What the backward pass computes again changes memory, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import policy
from gfn_jax.models.decoder import MAX_UNROLLED
from testing import random_lora, tiny_pretrained

Q, N, P, T = 2, 3, 5, 6


def loss_of(pretrained, remat, tokens):
  """(adapter's parameters, adapter) -> a scalar that every action's log-probability enters; with dropout."""
  vocab_size = pretrained.config.vocab_size
  prompts = jnp.arange(Q * P).reshape(Q, P) % vocab_size
  mask = jnp.arange(P) >= jnp.array([[0], [2]])
  length = jnp.full(len(tokens), tokens.shape[1])

  def loss(params, lora):
    log_pf, log_pterm = policy.score(
      pretrained.config, pretrained.params, lora.replace(params=params), prompts, mask, tokens, length,
      jnp.ones(tokens.shape, bool), allowed_tokens=jnp.ones(vocab_size, bool), stop_token_id=3,
      max_length=tokens.shape[1], dropout_key=jax.random.key(7), remat=remat,
    )  # fmt: skip
    return jnp.mean(log_pf**2) + jnp.mean(log_pterm**2)

  return loss


@pytest.mark.parametrize(
  ("num_layers", "remats"), ((2, ("full",)), (MAX_UNROLLED + 1, ("dots", "full"))), ids=("unrolled", "scanned")
)
def test_losses_and_gradients_stay_with_dropout_on(num_layers, remats):
  """The masks that the backward pass draws again are those of the forward pass."""
  pretrained = tiny_pretrained(n_layer=num_layers)
  lora = random_lora(pretrained, ("q_proj", "v_proj", "fc_in"), dropout=0.3)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, pretrained.config.vocab_size, (Q * N, T)))
  results = {}
  for remat in ("none", *remats):
    step = jax.jit(
      jax.value_and_grad(loss_of(pretrained, remat, tokens)), compiler_options={"xla_backend_optimization_level": 0}
    )
    results[remat] = step(lora.params, lora)
  plain, gradients = results.pop("none")
  if num_layers == 2:  # and dropout is on
    without = lora.replace(config=dataclasses.replace(lora.config, dropout=0.0))
    quiet = jax.jit(loss_of(pretrained, "none", tokens), compiler_options={"xla_backend_optimization_level": 0})
    assert abs(quiet(lora.params, without) - plain) > 1e-3
  for value, others in results.values():
    np.testing.assert_allclose(value, plain, rtol=1e-6)

    def compare(ours, expected):
      assert np.abs(expected).max() > 0
      np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    jax.tree.map(compare, others, gradients)


def test_memory_falls_from_none_to_full():
  pretrained = tiny_pretrained(n_layer=12)
  lora = random_lora(pretrained, ("q_proj",))
  tokens = jnp.zeros((Q * 32, 64), jnp.int32)

  def temporaries(remat):
    gradient = jax.jit(
      jax.grad(loss_of(pretrained, remat, tokens)), compiler_options={"xla_backend_optimization_level": 0}
    )
    return gradient.lower(lora.params, lora).compile().memory_analysis().temp_size_in_bytes

  assert temporaries("none") > 3 * temporaries("full")
