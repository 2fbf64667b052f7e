"""What llama.cpp's converter does to each architecture, and how it is undone: a row of `FAMILIES` each."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

Undo = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]  # (a tensor of the file, hf_config) -> Hugging Face's


@dataclasses.dataclass(frozen=True)
class Family:
  """An architecture of llama.cpp.

  Attributes:
    model_type: Hugging Face's.
    fields: metadata that must be there, less the architecture's name -> field of config.json.
    options: metadata that may be there -> (field of config.json, its value where the metadata is absent).
    constants: fields that the file does not tell.
    tensors: name in the file -> (name in the checkpoint, what undoes the converter). "{}" stands for the layer.
    rotary: how much of a head is rotated: "all", "part" (the file tells how much), or "none" (learned positions).
  """

  model_type: str
  fields: Mapping[str, str]
  options: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]]
  constants: Mapping[str, Any]
  tensors: Mapping[str, tuple[str, Undo]]
  rotary: str = "all"


def _same(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
  return tensor


def _transposed(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
  """[out, in] -> [in, out], as GPT-2's Conv1D keeps it."""
  return tensor.T


def _less_one(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
  """llama.cpp stores the scale; Gemma's checkpoints store what is added to one."""
  return tensor.astype(np.float32) - 1


def _half_split(heads: str) -> Undo:
  """Rows [heads * D, in] back in order: llama.cpp rotates neighbours (0 1)(2 3)..., transformers halves of a head."""

  def undo(tensor, config):
    pairs = tensor.reshape(config[heads], -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)

  return undo


def _qkv_by_head(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
  """[3 * heads * D, ...]: q of all heads, k of all, v of all -> q k v of each head in turn, as GPT-NeoX has them."""
  stacked = tensor.reshape(3, config["num_attention_heads"], -1, *tensor.shape[1:])
  return stacked.swapaxes(0, 1).reshape(tensor.shape)


def _modules(names: Mapping[str, str], leaves: tuple[str, ...], undo: Undo = _same) -> dict[str, tuple[str, Undo]]:
  return {f"{ours}.{leaf}": (f"{theirs}.{leaf}", undo) for ours, theirs in names.items() for leaf in leaves}


_SIZES = {
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
}
_RMS_SIZES = _SIZES | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEADS = {
  "attention.head_count_kv": ("num_key_value_heads", lambda c: c["num_attention_heads"]),
  "attention.key_length": ("head_dim", lambda c: c["hidden_size"] // c["num_attention_heads"]),
}
_NORMS = {
  "output_norm": "model.norm",
  "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
  "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
}
_LINEAR = {
  "token_embd": "model.embed_tokens",
  "output": "lm_head",
  "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
  "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
  "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
  "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
  "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
  "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
  "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_CONV1D = {
  "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
  "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
  "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
  "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}
_DECODER = _modules(_NORMS | _LINEAR, ("weight",))
_BOTH = ("weight", "bias")

FAMILIES: dict[str, Family] = {
  "llama": Family(
    "llama",
    _RMS_SIZES,
    _HEADS | {"attention.sliding_window": ("sliding_window", lambda c: None)},
    {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    _DECODER
    | {
      "blk.{}.attn_q.weight": ("model.layers.{}.self_attn.q_proj.weight", _half_split("num_attention_heads")),
      "blk.{}.attn_k.weight": ("model.layers.{}.self_attn.k_proj.weight", _half_split("num_key_value_heads")),
    },
  ),
  "qwen2": Family(
    "qwen2",
    _RMS_SIZES,
    _HEADS,
    {"hidden_act": "silu", "use_sliding_window": False},
    _DECODER | _modules({k: v for k, v in _LINEAR.items() if k.endswith(("_q", "_k", "_v"))}, _BOTH),
  ),
  "qwen3": Family(
    "qwen3",
    _RMS_SIZES,
    _HEADS,
    {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    _DECODER
    | {f"blk.{{}}.attn_{x}_norm.weight": (f"model.layers.{{}}.self_attn.{x}_norm.weight", _same) for x in "qk"},
  ),
  "gemma": Family(
    "gemma",
    _RMS_SIZES,
    _HEADS,
    {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
    _DECODER | _modules(_NORMS, ("weight",), _less_one),
  ),
  "gpt2": Family(
    "gpt2",
    {
      "context_length": "n_positions",
      "embedding_length": "n_embd",
      "block_count": "n_layer",
      "feed_forward_length": "n_inner",
      "attention.head_count": "n_head",
      "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    {},
    {"activation_function": "gelu_new"},
    _modules({"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output": "lm_head"}, ("weight",))
    | _modules(
      {
        "output_norm": "transformer.ln_f",
        "blk.{}.attn_norm": "transformer.h.{}.ln_1",
        "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
      },
      _BOTH,
    )
    | _modules(_CONV1D, ("bias",))
    | _modules(_CONV1D, ("weight",), _transposed),
    rotary="none",
  ),
  "gptneox": Family(
    "gpt_neox",
    _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    {},
    {"hidden_act": "gelu", "attention_bias": True},
    _modules({"token_embd": "gpt_neox.embed_in", "output": "embed_out"}, ("weight",))
    | _modules(
      {
        "output_norm": "gpt_neox.final_layer_norm",
        "blk.{}.attn_norm": "gpt_neox.layers.{}.input_layernorm",
        "blk.{}.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "blk.{}.attn_output": "gpt_neox.layers.{}.attention.dense",
        "blk.{}.ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "blk.{}.ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
      },
      _BOTH,
    )
    | _modules({"blk.{}.attn_qkv": "gpt_neox.layers.{}.attention.query_key_value"}, _BOTH, _qkv_by_head),
    rotary="part",
  ),
}
