"""Adapters in PEFT's format: PEFT reads ours, we read PEFT's, and what does not fit is named."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from gfn_jax.config import base_config
from gfn_jax.models import load_adapter, load_pretrained, logits, merge_lora, save_adapter, save_pretrained
from gfn_jax.models.architectures import lora_targets
from gfn_jax.train import starting_adapter
from testing import (
  FAMILIES,
  assert_logits,
  random_lora,
  tiny_hf_config,
  tiny_pretrained,
  tokens_and_mask,
  torch_logits,
  torch_model,
)

TARGETS = {
  "gptj": (("k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
  "gpt2": (("c_attn",), ("c_attn", "c_proj", "c_fc"), ("attn.c_proj",)),
  "gpt_neox": (("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),),
  "llama": (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),),
}
for _family in FAMILIES:
  TARGETS.setdefault(_family, TARGETS["llama"])
# (family, targets, rslora): all of them for the first two families, which are all that orientations differ in.
CASES = [
  (family, targets, rslora)
  for family in FAMILIES
  for targets in TARGETS[family]
  for rslora in ((False, True) if family in ("gptj", "gpt2") else (False,))
]
case_ids = [f"{family}-{targets[0]}-{len(targets)}{'-rslora' * rslora}" for family, targets, rslora in CASES]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
  """family -> (folder of a checkpoint of transformers, ours loaded from it)."""
  pytest.importorskip("peft")

  @functools.cache
  def make(family):
    folder = tmp_path_factory.mktemp(family)
    torch_model(tiny_hf_config(family)).save_pretrained(folder)
    return folder, load_pretrained(folder)

  return make


def torch_base(folder):
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_adapted_model(pretrained, lora, peft_model):
  tokens, mask = tokens_and_mask(pretrained.config.vocab_size)
  ours, theirs = logits(pretrained, tokens, mask, lora), torch_logits(peft_model, tokens, mask)
  assert_logits(ours, theirs, mask)
  assert np.abs(ours - logits(pretrained, tokens, mask))[mask].max() > 0.1  # the adapter does something


@pytest.mark.parametrize(("family", "targets", "rslora"), CASES, ids=case_ids)
def test_peft_loads_ours(base_of, tmp_path, family, targets, rslora):
  import peft

  folder, pretrained = base_of(family)
  lora = random_lora(pretrained, targets, rslora=rslora, dropout=0.1 * (family == "gptj"))
  save_adapter(tmp_path, lora, pretrained)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
  model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path).eval()
  assert_same_adapted_model(pretrained, lora, model)

  loaded = load_adapter(tmp_path, pretrained)
  assert loaded.config == lora.config
  for name, leaves in lora.params["layers"].items():
    for key, leaf in leaves.items():
      np.testing.assert_array_equal(loaded.params["layers"][name][key], leaf)


@pytest.mark.parametrize(("family", "targets", "rslora"), CASES, ids=case_ids)
def test_we_load_pefts(base_of, tmp_path, family, targets, rslora):
  import peft
  import torch

  folder, pretrained = base_of(family)
  torch.manual_seed(1)
  config = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=list(targets), fan_in_fan_out=family == "gpt2",
    use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM",
  )  # fmt: skip
  model = peft.get_peft_model(torch_base(folder), config).eval()
  model.save_pretrained(tmp_path)
  assert_same_adapted_model(pretrained, load_adapter(tmp_path, pretrained), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_base_and_adapter(base_of, tmp_path, family):
  """Here, in transformers, and as peft merges it."""
  import peft

  folder, pretrained = base_of(family)
  lora = random_lora(pretrained, rslora=family == "gptj")
  kept = jax.tree.map(np.array, pretrained.params)
  merged = merge_lora(pretrained, lora)
  jax.tree.map(np.testing.assert_array_equal, pretrained.params, kept)  # the base stays
  tokens, mask = tokens_and_mask(pretrained.config.vocab_size)
  expected = logits(pretrained, tokens, mask, lora)
  assert np.abs(expected - logits(pretrained, tokens, mask))[mask].max() > 0.1
  assert_logits(logits(merged, tokens, mask), expected, mask)
  save_pretrained(tmp_path / "merged", merged)
  assert_logits(torch_logits(torch_base(tmp_path / "merged"), tokens, mask), expected, mask)
  save_adapter(tmp_path / "adapter", lora, pretrained)
  theirs = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "adapter").merge_and_unload()
  assert_logits(torch_logits(theirs, tokens, mask), expected, mask)


def test_a_merge_rounds_once():
  """The sum is made in float32: half a step of bfloat16 from what it should be, and no more."""
  pretrained = tiny_pretrained()
  half = dataclasses.replace(pretrained, params=jax.tree.map(lambda x: x.astype("bfloat16"), pretrained.params))
  lora = random_lora(half, ("q_proj",))
  merged = merge_lora(half, lora).params["layers"]["q"]["kernel"]
  a, b = (np.asarray(lora.params["layers"]["q"][k], np.float64) for k in ("lora_a", "lora_b"))
  exact = np.asarray(half.params["layers"]["q"]["kernel"], np.float64) + lora.config.scale * (a @ b)
  assert merged.dtype == "bfloat16"
  assert (np.abs(np.asarray(merged, np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 1e-9).all()


# config.lora.init_from.


def config_with(path, **fields):
  config = base_config()
  config.lora.update({"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj"), "init_from": str(path)} | fields)
  return config


def test_a_run_starts_from_pefts_adapter(base_of, tmp_path):
  import peft

  folder, pretrained = base_of("llama")
  options = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
  )
  model = peft.get_peft_model(torch_base(folder), options).eval()
  model.save_pretrained(tmp_path)
  lora = starting_adapter(config_with(tmp_path, dropout=0.25), pretrained)
  assert lora.config.dropout == 0.25  # the run's own
  assert_same_adapted_model(pretrained, lora, model)
  fresh = starting_adapter(config_with(tmp_path, init_from=None), pretrained)
  tokens, _ = tokens_and_mask(pretrained.config.vocab_size)
  np.testing.assert_array_equal(logits(pretrained, tokens, lora=fresh), logits(pretrained, tokens))


@pytest.mark.parametrize(
  ("fields", "parts"),
  (
    ({"rank": 8}, ("config.lora.rank is 8", "has 4")),
    ({"alpha": 16.0}, ("config.lora.alpha is 16.0", "has 8.0")),
    ({"targets": ("q_proj", "k_proj")}, ("config.lora.targets is ('q', 'k')", "has ('q', 'v')")),
    ({"rslora": True}, ("config.lora.rslora is True", "has False")),
    ({"init_from": "nowhere"}, ("nowhere is no adapter",)),
  ),
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_refuses_another_adapter_by_name(adapter, fields, parts):
  pretrained, path = adapter
  starting_adapter(config_with(path), pretrained)
  with pytest.raises(ValueError) as caught:
    starting_adapter(config_with(path, **fields), pretrained)
  for part in (*parts, fields.get("init_from", str(path))):
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_target_names():
  gptj, gpt2 = tiny_pretrained().config, tiny_pretrained(family="gpt2").config
  assert lora_targets(gptj, ("v_proj", "q_proj")) == ("q", "v")
  assert lora_targets(gpt2, ("c_proj",)) == ("o", "down")
  assert lora_targets(gpt2, ("mlp.c_proj",)) == ("down",)
  cases = (gptj, "c_attn", "attn.q_proj"), (gpt2, "q_proj", "attn.c_attn"), (gptj, "proj", "fc_in")
  for config, target, choice in cases:
    with pytest.raises(ValueError, match=f"'{target}'.*{config.family}.*{choice}"):
      lora_targets(config, (target,))


# Bad input: one line that names the value.


@pytest.fixture
def adapter(tmp_path):
  """(model, folder of a sound adapter for it)."""
  pretrained = tiny_pretrained()
  save_adapter(tmp_path / "adapter", random_lora(pretrained, ("q_proj", "v_proj")), pretrained)
  return pretrained, tmp_path / "adapter"


def error_of(path, pretrained):
  with pytest.raises(ValueError) as caught:
    load_adapter(path, pretrained)
  message = str(caught.value)
  assert "\n" not in message and str(path) in message and len(message) < 1000
  return message


def edit_config(path, **fields):
  config = json.loads((path / "adapter_config.json").read_text())
  (path / "adapter_config.json").write_text(json.dumps(config | fields))


def test_missing_files(adapter):
  pretrained, path = adapter
  (path / "adapter_model.safetensors").unlink()
  assert "adapter_model.safetensors is missing" in error_of(path, pretrained)
  (path / "adapter_config.json").unlink()
  assert "adapter_config.json is missing" in error_of(path, pretrained)
  assert "adapter_config.json is missing" in error_of(path / "nope", pretrained)


@pytest.mark.parametrize("keep", (0, 4, 100, -100))
def test_truncated_weights(adapter, keep):
  pretrained, path = adapter
  weights = path / "adapter_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:keep])
  assert "damaged" in error_of(path, pretrained)


@pytest.mark.parametrize("text", ("", "{", "[1]", "\xff\x00"))
def test_damaged_config(adapter, text):
  pretrained, path = adapter
  (path / "adapter_config.json").write_bytes(text.encode("latin-1"))
  assert "damaged" in error_of(path, pretrained)


def test_config_that_lacks_a_field(adapter):
  pretrained, path = adapter
  config = json.loads((path / "adapter_config.json").read_text())
  del config["r"]
  (path / "adapter_config.json").write_text(json.dumps(config))
  assert "lacks the field 'r'" in error_of(path, pretrained)


@pytest.mark.parametrize(
  ("fields", "part"),
  (
    ({"use_dora": True}, "use_dora=True"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8}"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern={'q_proj': 8}"),
    ({"bias": "all"}, "bias='all'"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    ({"layers_to_transform": [0]}, "layers_to_transform=[0]"),
    ({"target_modules": ".*q_proj"}, "target_modules='.*q_proj'"),
    ({"target_modules": ["q_proj", "w_proj"]}, "'w_proj'"),
  ),
  ids=lambda value: value.split("=")[0].strip("'") if isinstance(value, str) else "",
)
def test_unsupported(adapter, fields, part):
  pretrained, path = adapter
  edit_config(path, **fields)
  assert part in error_of(path, pretrained)


def test_adapter_of_another_model(adapter):
  path = adapter[1]
  wider = tiny_pretrained(n_embd=48)
  message = error_of(path, wider)
  assert "does not fit tiny/gptj" in message and "(4, 32)" in message and "(4, 48)" in message
  assert "h.2.attn.q_proj.lora_A.weight is missing" in error_of(path, tiny_pretrained(n_layer=3))
  assert "surplus" in error_of(path, tiny_pretrained(n_layer=1))
  assert "'attn.q_proj'" in error_of(path, tiny_pretrained(family="gpt2"))


def test_surplus_tensor(adapter):
  pretrained, path = adapter
  tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
  safetensors.numpy.save_file(tensors | {"extra": np.ones(1)}, path / "adapter_model.safetensors")
  assert "surplus tensor extra" in error_of(path, pretrained)
