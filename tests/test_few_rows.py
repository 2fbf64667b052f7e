"""Weights laid out for few rows: the same hidden states, keys, values and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax.models import few_rows
from gfn_jax.models.decoder import hidden_states, output_logits
from gfn_jax.models.prefix import encode_prompts
from testing import FAMILIES, random_lora, tiny_pretrained


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_what_base_and_adapter_do(family, adapted):
  """Biased, fused and gated projections, heads of their own, norms within attention, windows, and earlier segments."""
  pretrained = tiny_pretrained(seed=1, family=family)
  config, params = pretrained.config, pretrained.params
  lora = random_lora(pretrained) if adapted else None
  laid_out = jax.jit(few_rows.lay_out)(params, lora)
  assert len(laid_out["layers"]) == config.num_layers and ("head" in laid_out) == (not config.tied_embeddings)
  rng = np.random.default_rng(0)
  prompts = jnp.asarray(rng.integers(config.vocab_size, size=(2, 5)))
  prefix = encode_prompts(config, params, lora, prompts, jnp.ones(prompts.shape, bool))
  tokens = jnp.asarray(rng.integers(config.vocab_size, size=(2, 3, 1)))

  def forward(params, lora):
    positions, alone = jnp.full(tokens.shape, 5), jnp.ones((1, 1), bool)
    hidden, new = hidden_states(config, params, lora, tokens, positions, alone, prefix.segments(2))
    return hidden, new, output_logits(config, params, hidden[..., 0, :])

  expected, found = jax.jit(forward)(params, lora), jax.jit(forward)(params | laid_out, None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
  if adapted:  # which the adapter changes
    assert np.abs(expected[2] - forward(params, None)[2]).max() > 0.01
