"""A base in 8 bits: what is stored, how far its logits move, and all that must run on it."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gfn_jax
from gfn_jax.models import load_pretrained, logits, merge_lora, save_pretrained
from gfn_jax.models.quantization import matmul, quantize
from gfn_jax.rewards import prefix_log_rewards
from testing import FAMILIES, random_lora, tiny_pretrained, tokens_and_mask


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """family -> a folder with its tiny model."""
  root = tmp_path_factory.mktemp("quantization")

  @functools.cache
  def folder(family):
    save_pretrained(root / family, plain_pretrained(family))
    return root / family

  return folder


plain_pretrained = functools.cache(lambda family: tiny_pretrained(family=family))


@functools.cache
def load(folder, quantization="int8", dtype="float32"):
  pytest.importorskip("qwix")
  return load_pretrained(folder, dtype, quantization=quantization)


def dequantized(pretrained):
  """The same numbers in plain arrays."""
  plain = lambda x: x.qvalue.astype(x.scale.dtype) * x.scale if hasattr(x, "qvalue") else x  # noqa: E731
  params = jax.tree.map(plain, pretrained.params, is_leaf=lambda x: hasattr(x, "qvalue"))
  return dataclasses.replace(pretrained, params=params)


def nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_rounding(dtype):
  """To the nearest of 127 steps of each output's largest magnitude."""
  pytest.importorskip("qwix")
  kernel = np.random.default_rng(0).standard_normal((64, 5)) * 10.0 ** np.arange(5)
  q = quantize(kernel.astype(jnp.dtype(dtype)), "int8")
  assert (q.qvalue.dtype, q.qvalue.shape) == (jnp.int8, (64, 5))
  assert (q.scale.dtype, q.scale.shape) == (jnp.dtype(dtype), (1, 5))
  step = np.abs(kernel).max(0) / 127
  back = np.asarray(q.qvalue, np.float64) * np.asarray(q.scale, np.float64)
  # bfloat16 rounds the scale too, of which a value may hold 127.
  assert (np.abs(back - kernel) / step).max() <= (0.51 if dtype == "float32" else 1.1)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)), jnp.dtype(dtype))
  expected = np.asarray(x, np.float64) @ back
  error = np.abs(np.asarray(matmul(x, q), np.float64) - expected) / np.abs(expected).max(0)
  assert error.max() < (1e-5 if dtype == "float32" else 0.02)
  gradient = jax.grad(lambda x: matmul(x, q).astype(jnp.float32)[:, 0].sum())(x)
  expected = np.broadcast_to(back[:, 0], x.shape)
  np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored(folders, family):
  pretrained, plain = load(folders(family)), plain_pretrained(family)
  c = pretrained.config
  for name, (inputs, outputs) in c.projections().items():
    kernel = pretrained.params["layers"][name]["kernel"]
    assert (kernel.qvalue.dtype, kernel.qvalue.shape) == (jnp.int8, (c.num_layers, inputs, outputs))
    assert (kernel.scale.dtype, kernel.scale.shape) == (jnp.float32, (c.num_layers, 1, outputs))
    kept = 1 / 4 + 1 / inputs  # a scale for each output
    share = nbytes(kernel) / nbytes(plain.params["layers"][name]["kernel"])
    assert share == pytest.approx(kept, rel=1e-6)
    np.testing.assert_allclose(
      dequantized(pretrained).params["layers"][name]["kernel"], plain.params["layers"][name]["kernel"],
      rtol=0, atol=float(kernel.scale.max()) * 0.51,
    )  # fmt: skip
  # Embeddings, norms, biases and the head stay as they were.
  others = jax.tree.map_with_path(
    lambda path, x: x if path[-1].key != "kernel" or path[0].key == "head" else 0, plain.params
  )
  same = jax.tree.map(
    lambda x: 0 if hasattr(x, "qvalue") else x, pretrained.params, is_leaf=lambda x: hasattr(x, "qvalue")
  )
  jax.tree.map(np.testing.assert_array_equal, same, others)


def test_memory_is_about_a_quarter(tmp_path):
  """Where inputs are many, as in models worth quantising."""
  wide = tiny_pretrained(family="llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=3)
  save_pretrained(tmp_path, wide)
  pretrained = load(tmp_path)
  kernels = {n: x["kernel"] for n, x in pretrained.params["layers"].items() if "kernel" in x}
  share = nbytes(kernels) / nbytes({n: wide.params["layers"][n]["kernel"] for n in kernels})
  assert 0.25 < share < 0.26


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_move_a_little(folders, family):
  """By rounding, and by nothing else: those of the dequantised base are the same."""
  pretrained, plain = load(folders(family)), plain_pretrained(family)
  tokens, mask = tokens_and_mask(plain.config.vocab_size)
  ours, exact = (np.asarray(logits(p, tokens, mask))[mask] for p in (pretrained, plain))
  error = np.sqrt(np.mean((ours - exact) ** 2)) / exact.std()
  assert 1e-4 < error < 0.05, error
  np.testing.assert_allclose(ours, np.asarray(logits(dequantized(pretrained), tokens, mask))[mask], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_gradients_of_the_adapter_are_those_of_the_dequantised_base(folders, family):
  pretrained = load(folders(family))
  lora = random_lora(pretrained)
  tokens, _ = tokens_and_mask(pretrained.config.vocab_size)

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  @jax.grad
  def gradient(params, base):
    scores = logits(dataclasses.replace(pretrained, params=base), tokens, None, lora.replace(params=params))
    return jax.nn.log_softmax(scores)[..., 1].mean()

  ours, expected = (gradient(lora.params, p.params) for p in (pretrained, dequantized(pretrained)))

  def compare(x, y):
    assert np.abs(y).max() > 0
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-4 * np.abs(y).max())

  jax.tree.map(compare, ours, expected)


def test_bfloat16(folders):
  pretrained, plain = (load(folders("gptj"), q, "bfloat16") for q in ("int8", None))
  assert {x.dtype for x in jax.tree.leaves(dequantized(pretrained).params)} == {jnp.dtype("bfloat16")}
  tokens, mask = tokens_and_mask(plain.config.vocab_size)
  ours, exact = (np.asarray(logits(p, tokens, mask, random_lora(p)))[mask] for p in (pretrained, plain))
  assert 1e-4 < np.sqrt(np.mean((ours - exact) ** 2)) / exact.std() < 0.1


def test_samples_and_rewards(folders):
  """Sampling and scoring run on it, and agree with the dequantised base."""
  pretrained = load(folders("gptj"))
  plain = dequantized(pretrained)
  lora = random_lora(pretrained)
  texts = [
    gfn_jax.sample(p, lora, ["Question: 6 - 0"], 2, max_length=5, temperature=0.0, seed=0) for p in (pretrained, plain)
  ]
  assert texts[0] == texts[1] and texts[0][0][0]
  tokens, lengths = np.arange(12).reshape(3, 4), np.array([4, 2, 0])
  rewards = [
    prefix_log_rewards(p, context=[3, 4], prompt=[5, 6, 7], tokens=tokens, lengths=lengths, target=[8, 9])
    for p in (pretrained, plain)
  ]
  assert np.isfinite(rewards[0]).all()
  np.testing.assert_allclose(*rewards, rtol=0, atol=1e-3)


def test_it_is_neither_merged_nor_saved(folders, tmp_path):
  pretrained = load(folders("gptj"))
  with pytest.raises(ValueError, match="was loaded quantised: load it without quantization to merge"):
    merge_lora(pretrained, random_lora(pretrained))
  with pytest.raises(ValueError, match="was loaded quantised: load it without quantization to save"):
    save_pretrained(tmp_path / "saved", pretrained)
  assert not (tmp_path / "saved").exists()


def test_unknown_quantization(folders):
  with pytest.raises(ValueError, match="quantization 'int3' is unknown: choose from int8"):
    load_pretrained(folders("gptj"), quantization="int3")


def test_without_qwix(folders, monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ValueError, match=r"^quantization 'int8' needs qwix: pip install 'gfn-jax\[int8\]'$"):
    load_pretrained(folders("gptj"), quantization="int8")
