"""What differs between families of causal LMs: one table from Hugging Face names and options to one decoder.

A family is a row of `ARCHITECTURES`: how its config.json is read, and under which module names its weights stand. The
decoder never asks for a family; it reads a `ModelConfig`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The decoder's own description of a model. Sizes are counts; `rotary_dim` 0 means learned positions."""

  family: str
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_size: int
  max_positions: int
  activation: str
  norm_eps: float
  parallel_residual: bool  # attention and MLP read the same normed input (GPT-J)
  rotary_dim: int
  fused_qkv: bool  # one projection writes q, k and v (GPT-2's c_attn)
  attention_bias: bool
  head_bias: bool
  tied_embeddings: bool

  def projections(self) -> dict[str, tuple[int, int]]:
    """name -> (inputs, outputs) of every linear map of a layer; the names that LoRA can adapt."""
    d, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
    attention = {"qkv": (d, q + 2 * kv)} if self.fused_qkv else {"q": (d, q), "k": (d, kv), "v": (d, kv)}
    return {**attention, "o": (q, d), "up": (d, self.mlp_size), "down": (self.mlp_size, d)}


@dataclasses.dataclass(frozen=True)
class Module:
  """Where a module of ours stands in a checkpoint. `kind` decides leaf names and the orientation of kernels."""

  hf_name: str  # "{}" stands for the layer
  kind: str  # linear (torch keeps [out, in]), conv1d (torch [in, out], Flax [out, in]), norm, embedding


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A family.

  Attributes:
    read_config: config.json -> ModelConfig.
    modules: path in our tree ("layers.q") -> Module.
    optional_prefix: what some checkpoints leave out of every name.
    required: options of config.json that the decoder honours at these values only; absent means the first.
  """

  read_config: Callable[[Mapping[str, Any]], ModelConfig]
  modules: Mapping[str, Module]
  optional_prefix: str
  required: Mapping[str, tuple[Any, ...]]


ACTIVATIONS = {
  "gelu_new": lambda x: nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "silu": nn.silu,
}


def _gptj_config(c: Mapping[str, Any]) -> ModelConfig:
  return ModelConfig(
    family="gptj",
    vocab_size=c["vocab_size"],
    hidden_size=c["n_embd"],
    num_layers=c["n_layer"],
    num_heads=c["n_head"],
    num_kv_heads=c["n_head"],
    head_dim=c["n_embd"] // c["n_head"],
    mlp_size=c.get("n_inner") or 4 * c["n_embd"],
    max_positions=c["n_positions"],
    activation=c.get("activation_function", "gelu_new"),
    norm_eps=c.get("layer_norm_epsilon", 1e-5),
    parallel_residual=True,
    rotary_dim=c.get("rotary_dim", 64) or c["n_embd"] // c["n_head"],
    fused_qkv=False,
    attention_bias=False,
    head_bias=True,
    tied_embeddings=c.get("tie_word_embeddings", False),
  )


def _gpt2_config(c: Mapping[str, Any]) -> ModelConfig:
  return ModelConfig(
    family="gpt2",
    vocab_size=c["vocab_size"],
    hidden_size=c["n_embd"],
    num_layers=c["n_layer"],
    num_heads=c["n_head"],
    num_kv_heads=c["n_head"],
    head_dim=c["n_embd"] // c["n_head"],
    mlp_size=c.get("n_inner") or 4 * c["n_embd"],
    max_positions=c["n_positions"],
    activation=c.get("activation_function", "gelu_new"),
    norm_eps=c.get("layer_norm_epsilon", 1e-5),
    parallel_residual=False,
    rotary_dim=0,
    fused_qkv=True,
    attention_bias=True,
    head_bias=False,
    tied_embeddings=c.get("tie_word_embeddings", True),
  )


ARCHITECTURES: dict[str, Architecture] = {
  "gptj": Architecture(
    read_config=_gptj_config,
    modules={
      "embed": Module("transformer.wte", "embedding"),
      "layers.attention_norm": Module("transformer.h.{}.ln_1", "norm"),
      "layers.q": Module("transformer.h.{}.attn.q_proj", "linear"),
      "layers.k": Module("transformer.h.{}.attn.k_proj", "linear"),
      "layers.v": Module("transformer.h.{}.attn.v_proj", "linear"),
      "layers.o": Module("transformer.h.{}.attn.out_proj", "linear"),
      "layers.up": Module("transformer.h.{}.mlp.fc_in", "linear"),
      "layers.down": Module("transformer.h.{}.mlp.fc_out", "linear"),
      "final_norm": Module("transformer.ln_f", "norm"),
      "head": Module("lm_head", "linear"),
    },
    optional_prefix="transformer.",
    required={
      "scale_attn_weights": (True,),
      "tie_word_embeddings": (False,),
      "activation_function": tuple(ACTIVATIONS),
    },
  ),
  "gpt2": Architecture(
    read_config=_gpt2_config,
    modules={
      "embed": Module("transformer.wte", "embedding"),
      "position_embed": Module("transformer.wpe", "embedding"),
      "layers.attention_norm": Module("transformer.h.{}.ln_1", "norm"),
      "layers.qkv": Module("transformer.h.{}.attn.c_attn", "conv1d"),
      "layers.o": Module("transformer.h.{}.attn.c_proj", "conv1d"),
      "layers.mlp_norm": Module("transformer.h.{}.ln_2", "norm"),
      "layers.up": Module("transformer.h.{}.mlp.c_fc", "conv1d"),
      "layers.down": Module("transformer.h.{}.mlp.c_proj", "conv1d"),
      "final_norm": Module("transformer.ln_f", "norm"),
      "head": Module("lm_head", "linear"),
    },
    optional_prefix="transformer.",
    required={
      "scale_attn_weights": (True,),
      "scale_attn_by_inverse_layer_idx": (False,),
      "add_cross_attention": (False,),
      "activation_function": tuple(ACTIVATIONS),
    },
  ),
}


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
  """config.json -> ModelConfig.

  Raises:
    ValueError: a family or an option that the decoder does not honour, or a missing field; named, with the choices.
  """
  family = hf_config.get("model_type")
  if family not in ARCHITECTURES:
    raise ValueError(f"model_type {family!r} is not supported: choose one of {', '.join(ARCHITECTURES)}")
  architecture = ARCHITECTURES[family]
  for option, allowed in architecture.required.items():
    if hf_config.get(option, allowed[0]) not in allowed:
      raise ValueError(
        f"{family} option {option}={hf_config[option]!r} is not supported: must be {' or '.join(map(repr, allowed))}"
      )
  try:
    return architecture.read_config(hf_config)
  except KeyError as e:
    raise ValueError(f"config.json of a {family} model lacks the field {e.args[0]!r}") from None


def lora_targets(config: ModelConfig, targets: tuple[str, ...]) -> tuple[str, ...]:
  """Hugging Face module names, as users and PEFT write them ("q_proj", "mlp.c_proj"), -> our projection names.

  Raises:
    ValueError: a name that fits no projection of this family.
  """
  names = {
    name: ARCHITECTURES[config.family].modules[f"layers.{name}"].hf_name.split("{}.")[1]
    for name in config.projections()
  }
  found = set()
  for target in targets:
    hits = [n for n, hf in names.items() if hf == target or hf.endswith("." + target)]
    if not hits:
      choices = ", ".join(names.values())
      raise ValueError(f"LoRA target {target!r} is no projection of {config.family}: choose from {choices}")
    found.update(hits)
  return tuple(n for n in names if n in found)
