"""The decoder and its checkpoints, against PyTorch's numbers and against itself."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gfn_jax.models import Pretrained, load_adapter, load_pretrained, logits, save_pretrained
from gfn_jax.models.architectures import read_config
from gfn_jax.models.decoder import Segment, causal_mask, hidden_states, output_logits, prompt_positions
from gfn_jax.models.lora import LoraConfig, init_lora
from testing import (
  FAMILIES,
  assert_logits,
  random_lora,
  shared_folder,
  tiny_hf_config,
  tiny_pretrained,
  tokens_and_mask,
  torch_logits,
  torch_model,
)

# Reference numbers.


@pytest.mark.parametrize("family", ("gptj", "gpt2", "gpt_neox", "llama_gqa_tied"))
@pytest.mark.parametrize("adapter", (False, True), ids=("base", "adapter"))
def test_torch_golden(family, adapter):
  folder = shared_folder() / "golden/hf" / family
  if adapter and not (folder / "lora").is_dir():
    pytest.skip(f"there are no reference numbers of an adapter for {family}")
  golden = np.load(folder / "lora/golden.npz" if adapter else folder / "golden.npz")
  pretrained = load_pretrained(folder)
  lora = load_adapter(folder / "lora", pretrained) if adapter else None
  assert_logits(logits(pretrained, golden["input_ids"], lora=lora), golden["logits"])
  mask = golden["attention_mask"]
  assert_logits(logits(pretrained, golden["padded_ids"], mask, lora), golden["padded_logits_maskpos"], mask)


@pytest.mark.parametrize("family", ("gptj", "gpt2"))
def test_flax_golden(family):
  folder = shared_folder() / "golden/flax" / family
  golden = np.load(folder / "golden.npz")
  pretrained = load_pretrained(folder)
  assert pretrained.tokenizer is None
  assert_logits(logits(pretrained, golden["input_ids"]), golden["logits"])
  mask = golden["attention_mask"]
  assert_logits(logits(pretrained, golden["input_ids"], mask), golden["logits_left_padded"], mask)


@pytest.mark.parametrize("family", ("gptj", "gpt2", "gpt_neox", "llama_gqa_tied"))
def test_half_precision_stays_near_the_golden_logits(family):
  folder = shared_folder() / "golden/hf" / family
  golden = np.load(folder / "golden.npz")
  pretrained = load_pretrained(folder, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(pretrained.params)} == {jnp.dtype("bfloat16")}
  ours = logits(pretrained, golden["input_ids"])
  assert ours.dtype == jnp.float32
  assert_logits(ours, golden["logits"], atol=0.03 * np.abs(golden["logits"]).max())


@pytest.mark.parametrize(
  "tokens, mask, message",
  (
    ([[1, 69]], None, "token 69: must be a token id of tiny/gptj, from 0 to 68"),
    ([[-100, 1]], [[0, 1]], "token -100: must be a token id of tiny/gptj, from 0 to 68"),
    ([[1] * 257] * 2, [[1] * 256 + [0], [1] * 257], "a row of 257 tokens: tiny/gptj has 256 positions"),
  ),
)
def test_logits_of_what_the_model_does_not_have(tokens, mask, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    logits(tiny_pretrained(), np.array(tokens), None if mask is None else np.array(mask))


def test_padding_takes_no_positions():
  pretrained = tiny_pretrained()
  tokens = np.array([[0] * 256 + [1, 2, 3]])
  padded = logits(pretrained, tokens, tokens > 0)
  assert_logits(padded[:, -3:], logits(pretrained, tokens[:, -3:]))


# Checkpoints written by transformers, and by us for transformers.

_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
VARIANTS = {family: tiny_hf_config(family) for family in FAMILIES} | {
  "gptj-n_inner": tiny_hf_config("gptj", n_inner=48, activation_function="gelu"),
  "gptj-full-rotary": tiny_hf_config("gptj", rotary_dim=8, n_layer=1),
  "gpt2-n_inner": tiny_hf_config("gpt2", n_inner=48, activation_function="relu", layer_norm_epsilon=1e-3),
  "gpt2-untied": tiny_hf_config("gpt2", tie_word_embeddings=False),
  "gpt_neox-sequential": tiny_hf_config("gpt_neox", use_parallel_residual=False),
  "gpt_neox-no-bias": tiny_hf_config("gpt_neox", attention_bias=False, rotary_pct=1.0),
  "llama-tied": tiny_hf_config("llama", tie_word_embeddings=True, num_key_value_heads=1),
  "llama-biases": tiny_hf_config("llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4),
  "llama-llama3": tiny_hf_config("llama", rope_scaling=_LLAMA3),
  "llama-linear": tiny_hf_config("llama", rope_scaling={"type": "linear", "factor": 4.0}),
  "mistral-no-window": tiny_hf_config("mistral", sliding_window=None),
  "qwen2-untied": tiny_hf_config("qwen2", tie_word_embeddings=False, use_sliding_window=False, sliding_window=3),
  "qwen3-biases": tiny_hf_config("qwen3", attention_bias=True, tie_word_embeddings=True),
}


def assert_same_model(pretrained, model):
  tokens, mask = tokens_and_mask(pretrained.config.vocab_size)
  expected = torch_logits(model, tokens)
  assert expected.std() > 0.5  # an all but constant model would agree with anything
  assert_logits(logits(pretrained, tokens), expected)
  assert_logits(logits(pretrained, tokens, mask), torch_logits(model, tokens, mask), mask)


@pytest.mark.parametrize("hf_config", VARIANTS.values(), ids=VARIANTS)
def test_loads_what_transformers_writes(tmp_path, hf_config):
  model = torch_model(hf_config)
  model.save_pretrained(tmp_path)
  assert_same_model(load_pretrained(tmp_path), model)


@pytest.mark.parametrize("hf_config", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_what_we_write(tmp_path, hf_config):
  pytest.importorskip("torch")
  import transformers

  pretrained = tiny_pretrained(family=hf_config["model_type"], **hf_config)
  save_pretrained(tmp_path, pretrained)
  model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert_same_model(pretrained, model.eval())
  assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keep_everything(tmp_path, family):
  pretrained = tiny_pretrained(family=family)
  save_pretrained(tmp_path, pretrained)
  loaded = load_pretrained(tmp_path)
  assert loaded.config == pretrained.config
  assert loaded.source == str(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, pretrained.params)
  text = "Question: 6 - 0 - 14 = ? Answer: 6 - 0 = 6, 6 - 14 = -8. The answer is -8."
  ids = loaded.tokenizer(text).input_ids
  assert ids == pretrained.tokenizer(text).input_ids
  assert loaded.tokenizer.decode(ids) == text


def test_half_precision_on_disk(tmp_path):
  pretrained = tiny_pretrained()
  save_pretrained(tmp_path, pretrained, dtype="float16")
  on_disk = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert {x.dtype for x in on_disk.values()} == {np.dtype("float16")}
  loaded = load_pretrained(tmp_path)
  rounded = jax.tree.map(lambda x: x.astype("float16").astype("float32"), pretrained.params)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_loads_half_precision_of_transformers(tmp_path, dtype):
  model = torch_model(VARIANTS["gptj"])
  import torch
  import transformers

  model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
  assert_same_model(load_pretrained(tmp_path), model)


def test_checkpoint_without_prefix_and_with_old_buffers(tmp_path):
  """As the hub's gpt2: no "transformer." in the names, and causal masks among the tensors."""
  pretrained = tiny_pretrained(family="gpt2")
  save_pretrained(tmp_path, pretrained)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
  tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 256, 256), np.float32) for i in range(2)}
  tensors["lm_head.weight"] = tensors["wte.weight"]
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path).params, pretrained.params)


# Attention over shared segments.


@functools.partial(jax.jit, static_argnums=0)
def forward_jit(config, params, lora, tokens, positions, self_mask, segments, dropout_key):
  hidden, kv = hidden_states(config, params, lora, tokens, positions, self_mask, segments, dropout_key)
  return output_logits(config, params, hidden), kv


def forward(pretrained, lora, tokens, positions, self_mask, segments=(), dropout_key=None):
  """(logits, new keys and values)."""
  arrays = jnp.asarray(tokens), jnp.asarray(positions), self_mask
  return forward_jit(pretrained.config, pretrained.params, lora, *arrays, segments, dropout_key)


class Shared:
  """Context [C], prompts [Q, P] (left-padded), samples [Q, N, T], and a target [Y] behind each of their S prefixes."""

  C, Q, P, N, T, S, Y = 5, 2, 6, 3, 4, 5, 2

  def __init__(self, vocab_size):
    rng = np.random.default_rng(1)
    self.context = rng.integers(0, vocab_size, self.C)
    self.prompts = rng.integers(0, vocab_size, (self.Q, self.P))
    self.prompt_mask = np.array([[True] * 6, [False] * 2 + [True] * 4])
    self.samples = rng.integers(0, vocab_size, (self.Q, self.N, self.T))
    self.targets = rng.integers(0, vocab_size, self.Y)

  def by_segments(self, pretrained, lora=None):
    """(logits of the samples [Q, N, T, V], logits of the targets [Q, N, S, Y, V])."""
    context_mask = jnp.ones((1, self.C), bool)
    _, context = forward(pretrained, lora, self.context, jnp.arange(self.C), causal_mask(self.C))
    before = self.C + prompt_positions(jnp.asarray(self.prompt_mask))
    self_mask = causal_mask(self.P) & self.prompt_mask[:, None, :]
    context_segment = Segment(context, context_mask, jnp.arange(self.C)[None])
    _, prompt = forward(pretrained, lora, self.prompts, before, self_mask, [context_segment])
    start = self.C + self.prompt_mask.sum(-1)

    positions = jnp.broadcast_to(start[:, None, None] + jnp.arange(self.T), self.samples.shape)
    mask, at = self.prompt_mask[:, None, None, :], before[:, None, None, :]
    segments = [context_segment, Segment(prompt, mask, at)]
    z_positions = positions
    z_logits, sample = forward(pretrained, lora, self.samples, positions, causal_mask(self.T), segments)

    shape = (self.Q, self.N, self.S, self.Y)
    prefix = jnp.arange(self.S)[:, None]
    positions = jnp.broadcast_to(start[:, None, None, None] + prefix + jnp.arange(self.Y), shape)
    seen = (jnp.arange(self.T) < prefix)[None, None, :, None, :]  # prefix t sees the first t tokens of its sample
    segments = [
      context_segment,
      Segment(prompt, mask[:, None], at[:, None]),
      Segment(sample, seen, z_positions[:, :, None, None, :]),
    ]
    targets = jnp.broadcast_to(self.targets, shape)
    y_logits, _ = forward(pretrained, lora, targets, positions, causal_mask(self.Y), segments)
    return z_logits, y_logits

  def by_full_forwards(self, pretrained, lora=None):
    """The same numbers, every sequence written out and run by itself."""
    rows, size = [], self.C + self.P + self.T + self.Y
    for q in range(self.Q):
      prompt = np.asarray(self.prompts[q])[np.asarray(self.prompt_mask[q])]
      for n in range(self.N):
        for t in range(self.S):
          rows.append(np.concatenate([self.context, prompt, self.samples[q, n, :t], self.targets]))
    tokens = np.stack([np.pad(row, (size - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(size) >= size - len(row) for row in rows])
    full = logits(pretrained, tokens, mask, lora).reshape(self.Q, self.N, self.S, size, -1)
    return full[:, :, -1, -self.Y - self.T : -self.Y], full[..., -self.Y :, :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", (False, True), ids=("base", "adapter"))
def test_shared_segments_equal_full_forwards(family, adapter):
  pretrained = tiny_pretrained(family=family)
  lora = random_lora(pretrained) if adapter else None
  shared = Shared(pretrained.config.vocab_size)
  by_segments = jax.jit(lambda lora: shared.by_segments(pretrained, lora))(lora)
  for ours, full in zip(by_segments, shared.by_full_forwards(pretrained, lora)):
    assert ours.shape == full.shape
    np.testing.assert_allclose(ours, full, rtol=0, atol=5e-5)


# The last has groups of queries and a window.
@pytest.mark.parametrize("family", (pytest.param("gptj", marks=pytest.mark.slow), "gpt2", "mistral"))
def test_gradients_through_shared_segments(family):
  pretrained = tiny_pretrained(family=family)
  lora = random_lora(pretrained)
  shared = Shared(pretrained.config.vocab_size)

  def loss(params, run):
    z_logits, y_logits = run(pretrained, lora.replace(params=params))
    return jax.nn.log_softmax(z_logits)[..., 1].mean() + jax.nn.log_softmax(y_logits)[..., 2].mean()

  quick = {"xla_backend_optimization_level": 0}  # to compile is nearly all of this test's time
  gradient = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=quick)
  ours, full = gradient(lora.params, shared.by_segments), gradient(lora.params, shared.by_full_forwards)

  def compare(x, y):
    assert np.abs(y).max() > 0  # every leaf of the adapter is reached
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max())

  jax.tree.map(compare, ours, full)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_equals_the_full_forward(family):
  pretrained = tiny_pretrained(family=family)
  tokens, mask = (jnp.asarray(x) for x in tokens_and_mask(pretrained.config.vocab_size))
  full = logits(pretrained, tokens, mask)
  split = 10
  prompt_mask = mask[:, :split]
  self_mask = causal_mask(split) & prompt_mask[:, None, :]
  _, prompt = forward(pretrained, None, tokens[:, :split], prompt_positions(prompt_mask), self_mask)
  num_new = tokens.shape[1] - split
  pad = [(0, 0)] * 5
  pad[3] = (0, num_new)
  cache = jax.tree.map(lambda x: jnp.pad(x[..., :0, :], pad), prompt)
  for t in range(num_new):
    before, slots = prompt_mask.sum(-1, keepdims=True), jnp.arange(num_new)
    segments = [
      Segment(prompt, prompt_mask[:, None, :], prompt_positions(prompt_mask)[:, None, :]),
      Segment(cache, (slots < t)[None, None, :], (before + slots)[:, None, :]),
    ]
    positions = before + t
    new = tokens[:, split + t : split + t + 1]
    step, kv = forward(pretrained, None, new, positions, jnp.ones((1, 1), bool), segments)
    assert kv.keys.shape == (*cache.keys.shape[:3], 1, cache.keys.shape[-1])
    cache = jax.tree.map(lambda old, new, t=t: old.at[..., t, :].set(new[..., 0, :]), cache, kv)
    np.testing.assert_allclose(step[:, 0], full[:, split + t], rtol=0, atol=1e-5)


def test_padding_is_finite_and_never_matters():
  pretrained = tiny_pretrained()
  tokens, mask = tokens_and_mask(pretrained.config.vocab_size)
  other = np.where(mask, tokens, (tokens + 1) % pretrained.config.vocab_size)
  assert np.isfinite(logits(pretrained, tokens, mask)).all()
  assert_logits(logits(pretrained, other, mask), logits(pretrained, tokens, mask), mask, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_keep_float32_sums(family):
  """Rounded to bfloat16, logits of 16 to 32 would be 0.125 apart, and so would log-probabilities."""
  pretrained = tiny_pretrained(family=family)
  head = "embed" if pretrained.config.tied_embeddings else "head"
  params = pretrained.params | {head: jax.tree.map(lambda x: 40 * x, pretrained.params[head])}
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(50, pretrained.config.hidden_size)), jnp.bfloat16)
  ours = np.asarray(output_logits(pretrained.config, half, hidden))
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), half)[head]
  matrix = exact["embedding"].T if head == "embed" else exact["kernel"]
  expected = np.asarray(hidden, np.float64) @ matrix + exact.get("bias", 0.0)
  assert np.abs(expected).max() > 16
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


# The adapter.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_fresh_lora_is_the_base_bit_for_bit(family, dtype):
  pretrained = tiny_pretrained(family=family)
  pretrained = Pretrained(
    pretrained.config, jax.tree.map(lambda x: jnp.asarray(x, dtype), pretrained.params), None, pretrained.source
  )
  config = LoraConfig(rank=4, alpha=8.0, targets=tuple(pretrained.config.projections()))
  lora = init_lora(pretrained.config, config, jax.random.key(0))
  tokens, mask = tokens_and_mask(pretrained.config.vocab_size)
  np.testing.assert_array_equal(logits(pretrained, tokens, mask, lora), logits(pretrained, tokens, mask))
  changed = logits(pretrained, tokens, mask, random_lora(pretrained))
  assert np.abs(changed - logits(pretrained, tokens, mask)).max() > 0.1


def test_dropout_needs_a_key():
  pretrained = tiny_pretrained()
  tokens = jnp.asarray(tokens_and_mask(pretrained.config.vocab_size)[0])
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  def run(dropout, key):
    lora = random_lora(pretrained, dropout=dropout)
    return np.asarray(forward(pretrained, lora, tokens, positions, causal_mask(tokens.shape[1]), (), key)[0])

  none, one, two = None, jax.random.key(1), jax.random.key(2)
  np.testing.assert_array_equal(run(0.5, none), run(0.0, none))
  np.testing.assert_array_equal(run(0.0, one), run(0.0, none))
  np.testing.assert_array_equal(run(0.5, one), run(0.5, one))
  assert np.abs(run(0.5, one) - run(0.5, none)).max() > 1e-3
  assert np.abs(run(0.5, one) - run(0.5, two)).max() > 1e-3


def test_dropout_differs_by_layer():
  """Without a key of its own for each layer, the layers of the scan would all drop the same channels."""
  pretrained = tiny_pretrained()
  # Two equal layers and a constant input: with equal masks the second layer's adapter would repeat the first's pattern.
  same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), pretrained.params["layers"])
  same = jax.tree.map_with_path(lambda path, x: jnp.zeros_like(x) if path[0].key in ("o", "down") else x, same)
  pretrained = Pretrained(pretrained.config, {**pretrained.params, "layers": same}, None, "same")
  lora = random_lora(pretrained, ("k_proj",), dropout=0.5)
  params = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), lora.params)
  tokens = jnp.asarray([[3, 4, 5]])

  def keys(dropout_key):
    positions = jnp.zeros_like(tokens)
    return forward(pretrained, lora.replace(params=params), tokens, positions, causal_mask(3), (), dropout_key)[1].keys

  plain, dropped = keys(None), keys(jax.random.key(0))
  np.testing.assert_array_equal(plain[0], plain[1])
  assert np.abs(dropped[0] - dropped[1]).max() > 1e-3


# Bad input: one line that names the value.


@pytest.fixture
def folder(tmp_path):
  """A sound checkpoint without a tokenizer, for a test to spoil."""
  save_pretrained(tmp_path / "model", dataclasses.replace(tiny_pretrained(), tokenizer=None))
  return tmp_path / "model"


def error_of(*args, **kwargs):
  with pytest.raises(ValueError) as caught:
    load_pretrained(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message and len(message) < 1000
  return message


def test_missing_files(folder):
  (folder / "model.safetensors").unlink()
  assert "model has no weights: model.safetensors or flax_model.msgpack" in error_of(folder)
  (folder / "config.json").unlink()
  message = error_of(folder)
  assert str(folder) in message and "has no config.json" in message


@pytest.mark.parametrize("keep", (0, 4, 100, -1000))
def test_truncated_safetensors(folder, keep):
  weights = folder / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:keep])
  assert f"{weights} is damaged" in error_of(folder)


@pytest.mark.parametrize("damage", (b"", b"\x00", b"not msgpack at all", None), ids=("empty", "number", "text", "cut"))
def test_damaged_msgpack(folder, damage):
  import flax.serialization

  (folder / "model.safetensors").unlink()
  if damage is None:
    damage = flax.serialization.msgpack_serialize({"transformer": {"wte": {"embedding": np.ones((69, 32))}}})[:-100]
  (folder / "flax_model.msgpack").write_bytes(damage)
  assert f"{folder / 'flax_model.msgpack'} is damaged" in error_of(folder)


@pytest.mark.parametrize("text", ("", "{", "[1]", "\xff\x00", '"gptj"'))
def test_damaged_config(folder, text):
  (folder / "config.json").write_bytes(text.encode("latin-1"))
  assert f"{folder / 'config.json'} is damaged" in error_of(folder)


@pytest.mark.parametrize(
  ("fields", "parts"),
  (
    ({"model_type": "mamba9"}, ("'mamba9'", "gptj", "gpt2")),
    (
      {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
      ("scale_attn_by_inverse_layer_idx=True", "False"),
    ),
    ({"tie_word_embeddings": True}, ("tie_word_embeddings=True", "False")),
    ({"activation_function": "swiglu7"}, ("activation_function='swiglu7'", "gelu_new")),
  ),
  ids=("family", "option", "tied", "activation"),
)
def test_unsupported(folder, fields, parts):
  (folder / "config.json").write_text(json.dumps(tiny_hf_config() | fields))
  message = error_of(folder)
  for part in parts:
    assert part in message


def test_config_that_lacks_a_field(folder):
  config = tiny_hf_config()
  del config["n_embd"]
  (folder / "config.json").write_text(json.dumps(config))
  message = error_of(folder)
  assert "'n_embd'" in message and "gptj" in message


def test_tensors_that_do_not_fit(folder):
  weights = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(weights)
  tensors["transformer.h.1.mlp.fc_in.weight"] = np.ones((128, 31), np.float32)
  tensors["transformer.extra.weight"] = tensors.pop("transformer.h.0.ln_1.bias")
  safetensors.numpy.save_file(tensors, weights)
  message = error_of(folder)
  assert str(folder) in message
  assert "missing: transformer.h.0.ln_1.bias" in message
  assert "surplus: transformer.extra.weight" in message
  assert "mis-shaped: transformer.h.1.mlp.fc_in.weight (31, 128) for (32, 128)" in message


def test_many_tensors_that_do_not_fit_are_one_line(folder):
  safetensors.numpy.save_file({f"x{i}": np.ones(1) for i in range(500)}, folder / "model.safetensors")
  assert "missing: " in error_of(folder)


def test_unknown_names(folder):
  message = error_of(folder, dtype="float8")
  assert "'float8'" in message and "bfloat16" in message
  for name in ("./nope", "nope", "/nope/nope", "~/nope", "a/b/c"):
    assert repr(name) in error_of(name)


def test_embedded_models_stay_inside_the_package(folder, monkeypatch):
  assert "'embedded/nope'" in error_of("embedded/nope")
  # A sound model that could be reached by walking out of the package must not be.
  import gfn_jax.models.hub as hub

  package = folder.parent / "package"
  shutil.copytree(folder, package / "embedded" / "inside")
  monkeypatch.setattr(hub.importlib.resources, "files", lambda name: package)
  assert load_pretrained("embedded/inside").config == read_config(tiny_hf_config())
  for name in ("embedded/../../model", f"embedded/{folder}", "embedded/", "embedded/.", "embedded/inside/../inside"):
    message = error_of(name)
    assert repr(name) in message and "choose from embedded/inside" in message
