"""A device's share of a model that is split over several, as `models.partition` splits it: sizes, and what is summed.

XLA sums the results of a split product where it is made, in float32, each product's by itself.
"""

import dataclasses

from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.lora import LoraConfig

_NARROWING = ("o", "down")  # split by their inputs: each device has a part of every sum


def splits_vocabulary(model: ModelConfig, num_shards: int) -> bool:
  """Whether embedding and head are split too; else they are whole on each device."""
  return model.vocab_size % num_shards == 0


def shard_of(model: ModelConfig, num_shards: int) -> ModelConfig:
  """What one device computes: a model of fewer heads, MLP channels and, where that divides, tokens.

  Its projections have the shapes that the device holds, and so have their adapters: one half of an adapter is split as
  its projection is, the other is whole on each device. The functions of `flops` count the device's share by it.
  """
  return dataclasses.replace(
    model,
    num_heads=model.num_heads // num_shards,
    num_kv_heads=model.num_kv_heads // num_shards,
    mlp_size=model.mlp_size // num_shards,
    vocab_size=model.vocab_size // (num_shards if splits_vocabulary(model, num_shards) else 1),
  )


def _sums(model: ModelConfig, lora: LoraConfig | None, names: list[str]) -> int:
  """Numbers a token that the products of these projections, and the split halves of their adapters, add up."""
  ranks = sum(lora.rank for name in names if name in lora.targets) if lora else 0
  return len(names) * model.hidden_size + ranks


def summed_bytes(model: ModelConfig, lora: LoraConfig | None, num_shards: int, *, tokens: float) -> float:
  """Bytes that each device puts into sums over the others in a forward pass; 0 where the model is whole.

  Layers' results come together in o and down, embeddings where the vocabulary is split. Not counted are a few numbers
  for each position whose logits are computed, and what GPT-2's fused projection, which is cut across the borders of q,
  k and v, moves.

  Args:
    model: the whole base; `lora`: its adapter, None where it is off.
    tokens: that pass through the layers, of all of a device's rows together.
  """
  if num_shards == 1:
    return 0.0
  layer = _sums(model, lora, [name for name in model.projections() if name in _NARROWING])
  embedding = model.hidden_size if splits_vocabulary(model, num_shards) else 0
  return 4 * tokens * (model.num_layers * layer + embedding)


def summed_gradient_bytes(
  model: ModelConfig, lora: LoraConfig, num_shards: int, *, tokens: float, outputs: float
) -> float:
  """The same of the gradient of an adapter: gradients of what q, k, v, gate, up and the head read are sums.

  `outputs`: positions whose logits are computed. The first layer's input is frozen, as in `flops.backward_flops`.
  """
  if num_shards == 1:
    return 0.0
  widening = [name for name in model.projections() if name not in _NARROWING]
  spared = [name for name in widening if name not in ("gate", "up") or model.residual != "sequential"]
  layers = model.num_layers * _sums(model, lora, widening) - len(spared) * model.hidden_size
  head = model.hidden_size if splits_vocabulary(model, num_shards) else 0
  return 4 * (tokens * layers + outputs * head)
