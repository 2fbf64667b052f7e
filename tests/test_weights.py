"""Checkpoint folders as others write them: shards, Flax's msgpack, public config.json files; and damaged ones."""

import functools
import json

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from gfn_jax.models import load_pretrained, save_pretrained
from gfn_jax.models.architectures import read_config
from gfn_jax.models.rotary import Llama3Scaling
from testing import FAMILIES, run_python, tiny_hf_config, tiny_pretrained, torch_model

cached_pretrained = functools.cache(tiny_pretrained)


def assert_same_params(ours, expected):
  jax.tree.map(np.testing.assert_array_equal, ours, expected)


def error_of(folder, **options):
  """The one line that loading it raises; it names the folder or the file."""
  with pytest.raises(ValueError) as caught:
    load_pretrained(folder, **options)
  message = str(caught.value)
  assert "\n" not in message and len(message) < 1000
  return message


def write_config(folder, family="gptj", **fields):
  (folder / "config.json").write_text(json.dumps(tiny_hf_config(family) | fields))


# Shards of safetensors.


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_transformers(tmp_path, family):
  model = torch_model(tiny_hf_config(family))
  model.save_pretrained(tmp_path / "single")
  model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
  shards = list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))
  assert len(shards) > 2 and not (tmp_path / "sharded/model.safetensors").exists()
  assert_same_params(load_pretrained(tmp_path / "sharded").params, load_pretrained(tmp_path / "single").params)


@pytest.fixture
def sharded(tmp_path):
  """A sound checkpoint of our own in three shards, for a test to spoil."""
  save_pretrained(tmp_path, cached_pretrained())
  for file in tmp_path.glob("tokenizer*"):
    file.unlink()
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  (tmp_path / "model.safetensors").unlink()
  names, weight_map = sorted(tensors), {}
  for i in range(3):
    file = f"model-{i + 1:05}-of-00003.safetensors"
    weight_map |= {name: file for name in names[i::3]}
    safetensors.numpy.save_file({name: tensors[name] for name in names[i::3]}, tmp_path / file)
  write_index(tmp_path, weight_map)
  return tmp_path, weight_map


def write_index(folder, weight_map, stem="model.safetensors"):
  (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_sound_shards(sharded):
  assert_same_params(load_pretrained(sharded[0]).params, cached_pretrained().params)


@pytest.mark.parametrize("outside", ("../x.safetensors", "{}/x.safetensors", "sub/x.safetensors", "..", "", "a\\x"))
def test_index_that_leaves_its_folder(sharded, outside):
  """A sound file stands there: it must not be read all the same."""
  folder, weight_map = sharded
  inner = folder / "inner"
  inner.mkdir()
  for file in [p for p in folder.iterdir() if p.is_file()]:
    file.rename(inner / file.name)
  moved = weight_map.popitem()[1]
  (inner / "sub").mkdir()
  for place in (folder, inner / "sub"):
    (place / "x.safetensors").write_bytes((inner / moved).read_bytes())
  outside = outside.replace("{}", str(folder))
  write_index(inner, {k: outside if v == moved else v for k, v in weight_map.items()})
  message = error_of(inner)
  assert str(inner / "model.safetensors.index.json") in message and repr(outside) in message


def test_missing_shard(sharded):
  folder, _ = sharded
  (folder / "model-00002-of-00003.safetensors").unlink()
  message = error_of(folder)
  assert "model.safetensors.index.json names 'model-00002-of-00003.safetensors', which is missing" in message


@pytest.mark.parametrize("index", ("{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}', "{", "[]"))
def test_damaged_index(sharded, index):
  folder, _ = sharded
  (folder / "model.safetensors.index.json").write_text(index)
  assert f"{folder / 'model.safetensors.index.json'} is damaged" in error_of(folder)


@pytest.mark.parametrize("keep", (0, 7, 200, -4))
def test_truncated_shard(sharded, keep):
  folder, _ = sharded
  shard = folder / "model-00003-of-00003.safetensors"
  shard.write_bytes(shard.read_bytes()[:keep])
  assert f"{shard} is damaged" in error_of(folder)


def test_tensors_that_do_not_fit_their_shards(sharded):
  """The index may say what it likes: what the files hold counts, and all that is wrong with them is listed."""
  folder, _ = sharded
  shard = folder / "model-00001-of-00003.safetensors"
  tensors = safetensors.numpy.load_file(shard)
  first, second, *_ = sorted(tensors)
  tensors["lm_head.extra"] = tensors.pop(first)
  tensors[second] = np.ones((3, 5), np.float32)
  safetensors.numpy.save_file(tensors, shard)
  message = error_of(folder)
  assert f"the weights in {folder} do not fit its config.json" in message
  for part in (f"missing: {first}", "surplus: lm_head.extra", f"mis-shaped: {second} ("):
    assert part in message


def test_the_same_tensor_in_two_shards_is_still_a_missing_one(sharded):
  folder, _ = sharded
  first, second = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
  second.write_bytes(first.read_bytes())
  assert "missing: " in error_of(folder)


# Pickles, and code.


@pytest.mark.parametrize("name", ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.00.pth"))
def test_pickles_are_refused_with_the_reason(tmp_path, name):
  write_config(tmp_path)
  (tmp_path / name).write_bytes(b"\x80\x04.")
  message = error_of(tmp_path)
  assert str(tmp_path) in message and "pickle runs code" in message and "model.safetensors" in message


def test_code_of_a_checkpoint_is_refused(sharded):
  folder, _ = sharded
  write_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
  (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
  assert "auto_map, trust_remote_code), which is never run" in error_of(folder) and not (folder / "ran").exists()


def test_code_of_a_tokenizer_is_refused(tmp_path):
  save_pretrained(tmp_path, cached_pretrained())
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass")
  try:
    load_pretrained(tmp_path)  # tokenizer.json says all there is to know
  except ValueError as e:
    assert "tokenizer" in str(e)
  assert not (tmp_path / "ran").exists()


def test_quantized_checkpoint_is_refused(sharded):
  folder, _ = sharded
  write_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
  assert "quantization_config" in error_of(folder) and "gptq" in error_of(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_of_the_folder_is_taken_whatever_the_family(tmp_path, family):
  """transformers puts some families' own class in the place of the one that tokenizer_config.json names."""
  pretrained = cached_pretrained(family=family)
  save_pretrained(tmp_path, pretrained)
  text = "Question: 6 - 0 - 14 = ? Answer: -8"
  assert load_pretrained(tmp_path).tokenizer(text).input_ids == pretrained.tokenizer(text).input_ids


# Flax's msgpack. The names, from transformers' Flax models of version 4: kernels are [inputs, outputs], but for GPT-2's
# FlaxConv1D, which keeps [outputs, inputs]; norms of GPTs have "scale", Llama's RMS norm has "weight".

_FLAX_GPT_LAYER = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "qkv": "attn.c_attn"}
FLAX_NAMES = {
  "gptj": ("transformer.h", {"attention_norm": "ln_1", "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"}
           | {"o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"},
           {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}),
  "gpt2": ("transformer.h", _FLAX_GPT_LAYER | {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
           {"embed": "transformer.wte", "position_embed": "transformer.wpe", "final_norm": "transformer.ln_f"}),
  "llama": ("model.layers", {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
            | {n: f"self_attn.{n}_proj" for n in "qkvo"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
            {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}),
}  # fmt: skip


def flax_leaves(family, dtype=np.float32):
  """"a.b" -> array, as transformers' Flax model of this family has it."""
  stack, of_layers, others = FLAX_NAMES[family]
  leaves = {}
  for path, array in flax.traverse_util.flatten_dict(cached_pretrained(family=family).params, sep=".").items():
    module, leaf = path.rsplit(".", 1)
    array = np.asarray(array, dtype)
    if module.startswith("layers."):
      for i, layer in enumerate(array):
        name = f"{stack}.{i}.{of_layers[module.removeprefix('layers.')]}"
        transposed = family == "gpt2" and leaf == "kernel"
        leaf_name = "weight" if family == "llama" and leaf == "scale" else leaf
        leaves[f"{name}.{leaf_name}"] = np.ascontiguousarray(layer.T if transposed else layer)
    else:
      leaves[f"{others[module]}.{'weight' if family == 'llama' and leaf == 'scale' else leaf}"] = array
  return leaves


def write_flax(folder, leaves, name="flax_model.msgpack"):
  tree = flax.traverse_util.unflatten_dict(leaves, sep=".")
  (folder / name).write_bytes(flax.serialization.to_bytes(tree))


@pytest.mark.parametrize("family", FLAX_NAMES)
def test_flax_msgpack(tmp_path, family):
  write_config(tmp_path, family)
  write_flax(tmp_path, flax_leaves(family))
  assert_same_params(load_pretrained(tmp_path).params, cached_pretrained(family=family).params)


@pytest.mark.parametrize("family", FLAX_NAMES)
def test_flax_shards(tmp_path, family):
  """Shards are split within a layer, and the index names leaves by "/"."""
  write_config(tmp_path, family)
  leaves = flax_leaves(family)
  weight_map = {}
  for i in range(3):
    names = list(leaves)[i::3]
    file = f"flax_model-{i + 1:05}-of-00003.msgpack"
    write_flax(tmp_path, {name: leaves[name] for name in names}, file)
    weight_map |= {name.replace(".", "/"): file for name in names}
  write_index(tmp_path, weight_map, "flax_model.msgpack")
  assert_same_params(load_pretrained(tmp_path).params, cached_pretrained(family=family).params)


def test_flax_leaves_in_pieces(tmp_path, monkeypatch):
  """Flax cuts leaves of over 2^30 bytes; here, of over 1,000."""
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
  write_config(tmp_path)
  write_flax(tmp_path, flax_leaves("gptj"))
  assert b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
  assert_same_params(load_pretrained(tmp_path).params, cached_pretrained().params)


def test_flax_bfloat16(tmp_path):
  write_config(tmp_path)
  write_flax(tmp_path, flax_leaves("gptj", jnp.bfloat16))
  rounded = jax.tree.map(lambda x: x.astype("bfloat16"), cached_pretrained().params)
  assert_same_params(load_pretrained(tmp_path, "bfloat16").params, rounded)
  assert_same_params(load_pretrained(tmp_path).params, jax.tree.map(lambda x: x.astype("float32"), rounded))


def test_safetensors_are_taken_before_msgpack(sharded):
  folder, _ = sharded
  (folder / "flax_model.msgpack").write_bytes(b"never read")
  assert_same_params(load_pretrained(folder).params, cached_pretrained().params)


@pytest.mark.parametrize("cut", (0, 1, 50, -1, -5000))
def test_truncated_msgpack(tmp_path, cut):
  write_config(tmp_path)
  write_flax(tmp_path, flax_leaves("gptj"))
  file = tmp_path / "flax_model.msgpack"
  file.write_bytes(file.read_bytes()[:cut])
  assert f"{file} is damaged" in error_of(tmp_path)


def test_random_damage_to_msgpack_never_escapes(tmp_path):
  """Whatever a flipped bit makes of the file: a model, or one line."""
  write_config(tmp_path)
  write_flax(tmp_path, flax_leaves("gptj"))
  file = tmp_path / "flax_model.msgpack"
  sound, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
  headers = [i for i in range(len(sound)) if sound[i : i + 2] in (b"\x81\xa6", b"\xc7\x01", b"\xc8\x10")]
  outcomes = set()
  for _ in range(60):
    damaged = bytearray(sound)
    at = int(rng.choice(headers)) + int(rng.integers(6)) if headers and rng.random() < 0.7 else int(rng.integers(2000))
    damaged[at] ^= 1 << int(rng.integers(8))
    file.write_bytes(damaged)
    try:
      load_pretrained(tmp_path)
      outcomes.add("loaded")
    except ValueError as e:
      assert "\n" not in str(e) and str(tmp_path) in str(e)
      outcomes.add("refused")
  assert outcomes == {"loaded", "refused"}


def test_flax_leaves_that_do_not_fit(tmp_path):
  write_config(tmp_path)
  leaves = flax_leaves("gptj")
  leaves["transformer.h.7.ln_1.bias"] = leaves.pop("transformer.h.0.ln_1.bias")
  leaves["transformer.ln_f.scale"] = leaves["transformer.ln_f.scale"][:-1]
  write_flax(tmp_path, leaves)
  message = error_of(tmp_path)
  assert "missing: transformer.h.0.ln_1.bias" in message and "surplus: transformer.h.7.ln_1.bias" in message
  assert "mis-shaped: transformer.ln_f.scale (31,) for (32,)" in message


# config.json.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_writes_is_accepted(family):
  config = transformers.AutoConfig.for_model(family)
  # Of GPT-J's and GPT-NeoX's several names for a size, config.json has one.
  read_config(config.to_dict())
  read_config(json.loads(config.to_json_string(use_diff=False)))
  read_config(json.loads(config.to_json_string()) | {"model_type": family} | config.to_dict())


# Fields of transformers' own configs that say nothing about a trained model's logits.
NEUTRAL = {
  "attention_dropout", "attn_pdrop", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "embd_pdrop",
  "eos_token_id", "hidden_dropout", "initializer_range", "output_attentions", "output_hidden_states", "pad_token_id",
  "pretraining_tp", "resid_pdrop", "return_dict", "summary_first_dropout", "summary_proj_to_labels",
  "summary_use_proj", "use_cache",
}  # fmt: skip
# That change nothing in these families.
FAMILY_NEUTRAL = {
  "gpt2": {"reorder_and_upcast_attn"},  # scores are in float32
  "qwen2": {"max_window_layers"},  # without use_sliding_window there are no windows
  "qwen3": {"max_window_layers"},
}


def changed(value):
  """Another value of the kind."""
  return not value if isinstance(value, bool) else 2 * value + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_honoured_or_refused(family):
  default = transformers.AutoConfig.for_model(family).to_dict()
  config = read_config(default)
  neutral = NEUTRAL | FAMILY_NEUTRAL.get(family, set())
  fields = {k: v for k, v in default.items() if isinstance(v, bool | int | float) and k not in neutral}
  assert len(fields) > 8
  for name, value in fields.items():
    try:
      other = read_config(default | {name: changed(value)})
    except ValueError as e:
      assert name in str(e) or str(changed(value)) in str(e), (name, str(e))
    else:
      assert other != config, f"{family} option {name}={changed(value)!r} is ignored"
  for name in neutral & {k for k, v in default.items() if isinstance(v, bool | int | float)}:
    assert read_config(default | {name: changed(default[name])}) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ("rope_parameters", "names of before"))
def test_rotary_options_are_honoured_or_refused(family, form):
  config = tiny_hf_config(family)
  if family in ("gpt2", "gptj"):
    for option in ("rope_theta", "rope_scaling", "rope_parameters"):
      value = 5e5 if option == "rope_theta" else {"rope_type": "linear", "factor": 2.0}
      with pytest.raises(ValueError, match=option):
        read_config(config | {option: value})
    return
  for name in ("rope_theta", "rotary_emb_base", "rotary_pct", "rope_scaling"):
    config.pop(name, None)

  def rotary(**fields):
    theta, share = fields.pop("theta", None), fields.pop("share", None)
    names = {"rope_theta": theta, "partial_rotary_factor": share}
    if form == "rope_parameters":
      given = {"rope_parameters": {"rope_type": "default"} | {k: v for k, v in names.items() if v is not None} | fields}
    elif family == "gpt_neox":
      given = {"rotary_emb_base": theta, "rotary_pct": share, "rope_scaling": fields or None}
    else:
      given = names | {"rope_scaling": fields or None}
    given = {k: v for k, v in given.items() if v is not None}
    return read_config(config | given).rotary

  plain = rotary()
  assert plain.theta == 10_000 and plain.scaling is None
  assert rotary(theta=7000.0).theta == 7000
  assert rotary(share=0.5).dim == (16 if family == "qwen3" else 8) // 2
  assert rotary(rope_type="linear", factor=4.0).scaling == 4.0
  llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
  assert rotary(rope_type="llama3", **llama3).scaling == Llama3Scaling(**llama3)
  for kind in ("dynamic", "yarn", "longrope", "proportional", "su"):
    with pytest.raises(ValueError, match=f"'{kind}'.*default, linear, llama3"):
      rotary(rope_type=kind, factor=4.0)
  for fields, part in (
    ({"rope_type": "linear"}, "'factor'"),
    ({"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}, "attention_factor=0.5"),
    ({"rope_type": "linear", "type": "llama3", "factor": 2.0}, "linear and llama3"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
    ({"share": 0.0}, "turns 0 of"),
    ({"share": 1.5}, "turns (12 of 8|24 of 16)"),
    ({"theta": 0.0}, "rope_theta=0.0"),
    ({"rope_type": "linear", "factor": 0.0}, "factor=0.0"),
    ({"rope_type": "linear", "factor": "x"}, "factor='x'"),
  ):
    with pytest.raises(ValueError, match=part):
      rotary(**fields)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
  "option",
  (
    "logit_scale", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv",
    "num_experts", "qkv_bias", "alibi", "use_bidirectional_attention", "is_encoder_decoder", "residual_multiplier",
    "partial_rotary",
  ),
)  # fmt: skip
def test_unknown_options_are_refused_by_name(family, option):
  with pytest.raises(ValueError, match=f"{family} option {option}=1.5 is not supported"):
    read_config(tiny_hf_config(family, **{option: 1.5}))


@pytest.mark.parametrize(
  ("family", "fields", "part"),
  (
    ("gptj", {"n_head": 5}, "5 heads for 32 channels"),
    ("qwen2", {"num_attention_heads": 5}, "5 heads for 32 channels"),
    ("llama", {"num_attention_heads": 3, "num_key_value_heads": 2}, "num_kv_heads=2 must divide num_heads=3"),
    ("llama", {"hidden_size": "big"}, "hidden_size='big'|wrong kind"),
    ("llama", {"num_hidden_layers": 0}, "num_layers=0"),
    ("llama", {"num_attention_heads": 0}, "num_heads=0|num_kv_heads"),
    ("qwen2", {"num_attention_heads": 0}, "wrong kind"),
    ("gptj", {"n_layer": -1}, "num_layers=-1"),
    ("gptj", {"vocab_size": 1.5}, "vocab_size=1.5|wrong kind"),
    ("gptj", {"rotary_dim": 5}, "turns 5 of 8"),
    ("gptj", {"rotary_dim": 64}, "turns 64 of 8"),
    ("llama", {"head_dim": 7}, "turns 7 of 7"),
    ("mistral", {"sliding_window": -2}, "sliding_window=-2"),
  ),
)
def test_sizes_that_cannot_be(family, fields, part):
  with pytest.raises(ValueError, match=part):
    read_config(tiny_hf_config(family) | fields)


# As the files of the hub have them.
_CLS = {
  "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
  "summary_type": "cls_index", "summary_use_proj": True,
  "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
_LLAMA3 = {
  "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}  # fmt: skip
PUBLIC = {
  "gpt2": (
    {
      "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
      "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
      "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
      "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
    } | _CLS,
    {"mlp_size": 3072, "rotary": None, "tied_embeddings": True},
  ),
  "gpt2-medium": (
    {
      "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
      "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
      "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24,
      "n_positions": 1024, "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1, "vocab_size": 50257,
    } | _CLS,
    {"hidden_size": 1024, "num_layers": 24},
  ),
  "gpt2-xl": (
    {
      "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
      "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
      "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48,
      "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1, "vocab_size": 50257,
    } | _CLS,
    {"hidden_size": 1600, "head_dim": 64},
  ),
  "gpt-j-6b": (
    {
      "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
      "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "gradient_checkpointing": False,
      "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 4096, "n_head": 16,
      "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
      "scale_attn_weights": True, "tie_word_embeddings": False, "tokenizer_class": "GPT2Tokenizer",
      "transformers_version": "4.18.0.dev0", "use_cache": True, "vocab_size": 50400,
    } | _CLS | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}}},
    {"num_layers": 28, "head_dim": 256, "mlp_size": 16384, "head_bias": True},
  ),
  "pythia-70m": (
    {
      "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
      "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
      "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
      "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
      "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    },
    {"residual": "parallel", "biased": ("qkv", "o", "up", "down")},
  ),
  "smollm2-135m-instruct": (
    {
      "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
      "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
      "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
      "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
      "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
      "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
      "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "use_cache": True,
      "vocab_size": 49152,
    },
    {"head_dim": 64, "num_kv_heads": 3, "tied_embeddings": True},
  ),
  "llama-3.1-8b-instruct": (
    {
      "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
      "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
      "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
      "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
      "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": _LLAMA3, "rope_theta": 500000.0,
      "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
      "vocab_size": 128256,
    },
    {"num_kv_heads": 8, "head_dim": 128, "max_positions": 131072},
  ),
  "mistral-7b-v0.1": (
    {
      "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
      "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
      "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
      "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
      "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    {"sliding_window": 4096, "num_kv_heads": 8},
  ),
  "mistral-7b-v0.3": (
    {
      "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
      "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
      "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
      "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
      "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
      "use_cache": True, "vocab_size": 32768,
    },
    {"sliding_window": None, "vocab_size": 32768},
  ),
  "qwen2.5-0.5b": (
    {
      "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
      "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
      "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
      "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
      "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
      "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
      "vocab_size": 151936,
    },
    {"sliding_window": None, "biased": ("q", "k", "v"), "tied_embeddings": True},
  ),
  "qwen3-0.6b": (
    {
      "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
      "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
      "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
      "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
      "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
      "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
      "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    {"head_dim": 128, "qk_norm": True},
  ),
  "gemma-2b": (
    {
      "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
      "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh",
      "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192,
      "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
      "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
      "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
    },
    {"activation": "gelu_pytorch_tanh", "num_kv_heads": 1, "tied_embeddings": True, "norm": "rms_plus_one"},
  ),
}  # fmt: skip
ROTARIES = {
  "gpt-j-6b": (64, 10_000.0, True, None),
  "pythia-70m": (16, 10_000.0, False, None),
  "smollm2-135m-instruct": (64, 100_000.0, False, None),
  "llama-3.1-8b-instruct": (128, 500_000.0, False, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
  "mistral-7b-v0.3": (128, 1e6, False, None),
  "qwen2.5-0.5b": (64, 1e6, False, None),
  "gemma-2b": (256, 10_000.0, False, None),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_config(name):
  hf_config, expected = PUBLIC[name]
  config = read_config(hf_config)
  assert {field: getattr(config, field) for field in expected} == expected
  if name in ROTARIES:
    r = config.rotary
    assert (r.dim, r.theta, r.interleaved, r.scaling) == ROTARIES[name]


# Memory.

_WRITE = """
import json, pathlib
import ml_dtypes, numpy as np, safetensors.numpy

folder, (L, D, F, V, heads, kv_heads) = pathlib.Path({folder!r}), {sizes}
fields = dict(model_type="llama", hidden_size=D, num_hidden_layers=L, num_attention_heads=heads,
              num_key_value_heads=kv_heads, intermediate_size=F, vocab_size=V, max_position_embeddings=64,
              rms_norm_eps=1e-5, tie_word_embeddings=True)
K = D * kv_heads // heads
(folder / "config.json").write_text(json.dumps(fields))
layer = {{"self_attn.q_proj": (D, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D),
         "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
         "input_layernorm": (D,), "post_attention_layernorm": (D,)}}
shapes = {{f"model.layers.{{i}}.{{n}}.weight": s for i in range(L) for n, s in layer.items()}}
shapes |= {{"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}}
rng, names, weight_map = np.random.default_rng(0), sorted(shapes), {{}}
for i in range(4):
  part = names[i * len(names) // 4 : (i + 1) * len(names) // 4]
  file = f"model-{{i + 1:05}}-of-00004.safetensors"
  tensors = {{n: rng.standard_normal(shapes[n], np.float32).astype(ml_dtypes.bfloat16) for n in part}}
  safetensors.numpy.save_file(tensors, folder / file)
  weight_map |= dict.fromkeys(part, file)
(folder / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": weight_map}}))
"""

_MEASURE = """
import json, resource
import jax
from gfn_jax.models import load_pretrained

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_pretrained({tiny!r}, {dtype!r})  # what imports and first compilations need is no part of it
before = peak()
params = load_pretrained({folder!r}, {dtype!r}).params
leaves = jax.tree.leaves(params)
jax.block_until_ready(leaves)
print(json.dumps([peak() - before, sum(x.nbytes for x in leaves), params["embed"]["embedding"].nbytes]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  ("sizes", "dtype", "at_least"),
  (
    ((12, 768, 2304, 49152, 12, 4), "bfloat16", 190e6),
    ((12, 768, 2304, 49152, 12, 4), "float32", 380e6),
    ((16, 2048, 8192, 128256, 32, 8), "bfloat16", 2.4e9),  # 1.2 billion parameters: Llama 3.2 1B
  ),
  ids=("100M-bfloat16", "100M-float32", "1B-bfloat16"),
)
def test_loading_holds_the_model_and_one_tensor(tmp_path, sizes, dtype, at_least):
  """The largest resident size in loading from four shards, over that of the imports alone."""
  tiny, folder = tmp_path / "tiny", tmp_path / "model"
  save_pretrained(tiny, cached_pretrained(family="llama"))
  for file in tiny.glob("tokenizer*"):
    file.unlink()
  folder.mkdir()
  run_python(_WRITE.format(folder=str(folder), sizes=sizes))
  out = run_python(_MEASURE.format(tiny=str(tiny), folder=str(folder), dtype=dtype))
  growth, model, largest = json.loads(out.splitlines()[-1])
  assert model > at_least
  print(f"{dtype}: peak {growth / 1e6:.0f} MB for {model / 1e6:.0f} MB and a largest tensor of {largest / 1e6:.0f} MB")
  assert growth <= 1.15 * model + largest
