"""Adapters in PEFT's format: PEFT reads ours, we read PEFT's, and what does not fit is named."""

import json

import numpy as np
import pytest
import safetensors.numpy

from gfn_jax.models import load_adapter, load_pretrained, logits, save_adapter
from gfn_jax.models.architectures import lora_targets
from testing import (
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
}


@pytest.fixture(scope="module", params=("gptj", "gpt2"))
def base(request, tmp_path_factory):
  """(family, folder of a checkpoint of transformers, ours loaded from it)."""
  pytest.importorskip("peft")
  folder = tmp_path_factory.mktemp(request.param)
  model = torch_model(tiny_hf_config(request.param))
  model.save_pretrained(folder)
  return request.param, folder, load_pretrained(folder)


def torch_base(folder):
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_adapted_model(pretrained, lora, peft_model):
  tokens, mask = tokens_and_mask(pretrained.config.vocab_size)
  ours, theirs = logits(pretrained, tokens, mask, lora), torch_logits(peft_model, tokens, mask)
  assert_logits(ours, theirs, mask)
  assert np.abs(ours - logits(pretrained, tokens, mask))[mask].max() > 0.1  # the adapter does something


@pytest.mark.parametrize("rslora", (False, True), ids=("lora", "rslora"))
@pytest.mark.parametrize("which", (0, 1, -1))
def test_peft_loads_ours(base, tmp_path, which, rslora):
  import peft

  family, folder, pretrained = base
  lora = random_lora(pretrained, TARGETS[family][which], rslora=rslora, dropout=0.1)
  save_adapter(tmp_path, lora, pretrained)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
  model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path).eval()
  assert_same_adapted_model(pretrained, lora, model)

  loaded = load_adapter(tmp_path, pretrained)
  assert loaded.config == lora.config
  for name, leaves in lora.params["layers"].items():
    for key, leaf in leaves.items():
      np.testing.assert_array_equal(loaded.params["layers"][name][key], leaf)


@pytest.mark.parametrize("rslora", (False, True), ids=("lora", "rslora"))
@pytest.mark.parametrize("which", (0, 1, -1))
def test_we_load_pefts(base, tmp_path, which, rslora):
  import peft
  import torch

  family, folder, pretrained = base
  torch.manual_seed(1)
  config = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=list(TARGETS[family][which]), fan_in_fan_out=family == "gpt2",
    use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM",
  )  # fmt: skip
  model = peft.get_peft_model(torch_base(folder), config).eval()
  model.save_pretrained(tmp_path)
  assert_same_adapted_model(pretrained, load_adapter(tmp_path, pretrained), model)


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
