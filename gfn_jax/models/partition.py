"""How a model is split over the devices of the mesh axis `model`: the spec of each parameter of base and adapter.

Attention is split by heads, the MLP by its inner channels, embedding and head by the vocabulary: a projection that
widens (q, k, v, gate, up) is split by its outputs, the one that brings its results together again (o, down) by its
inputs, and an adapter follows its projection. Norms and learned positions are whole everywhere. What the activations
look like is XLA's to work out.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfn_jax.models.architectures import ModelConfig

MODEL_AXIS = "model"

# Leaf -> the split axis of one layer's array; a leaf that is not here is whole.
_BY_OUTPUTS = {"kernel": (None, MODEL_AXIS), "bias": (MODEL_AXIS,), "lora_b": (None, MODEL_AXIS)}
_BY_INPUTS = {"kernel": (MODEL_AXIS, None), "lora_a": (MODEL_AXIS, None)}
_SPLIT = {  # module -> its leaves. GPT-2's qkv is cut across the borders of q, k and v: right, and XLA sorts it out
  **dict.fromkeys(("q", "k", "v", "qkv", "gate", "up"), _BY_OUTPUTS),
  **dict.fromkeys(("o", "down"), _BY_INPUTS),
  "embed": {"embedding": (MODEL_AXIS, None)},
  "head": {"kernel": (None, MODEL_AXIS), "bias": (MODEL_AXIS,)},
}
_BY_VOCABULARY = ("embed", "head")


def _sizes(model: ModelConfig) -> dict[str, int]:
  """What must fall into equal parts. A vocabulary need not: it is then whole on each device."""
  return {"heads": model.num_heads, "key-value heads": model.num_kv_heads, "MLP channels": model.mlp_size}


def largest_split(model: ModelConfig, num_devices: int) -> int:
  """The most devices, among the divisors of `num_devices`, that one copy of the model can be split over."""
  return math.gcd(num_devices, *_sizes(model).values())


def check_split(model: ModelConfig, num_shards: int) -> None:
  """Raises ValueError, naming what does not divide and the choices, where the model cannot be split so."""
  most = math.gcd(*_sizes(model).values())
  for name, size in _sizes(model).items():
    if num_shards < 1 or size % num_shards:
      choices = ", ".join(str(m) for m in range(1, most + 1) if most % m == 0)
      raise ValueError(
        f"{size} {name} of a {model.family} model cannot be split over {num_shards} devices: choose from {choices}"
      )


def parameter_spec(model: ModelConfig, num_shards: int, path: str) -> PartitionSpec:
  """The spec of one parameter of the base or of an adapter.

  A vocabulary that does not fall into `num_shards` equal parts is whole on each device: splitting the hidden axis in
  its place would sum logits [.., V] over the devices, and such vocabularies (GPT-2's 50,257) belong to small models.

  Args:
    path: its names from the root, "embed.embedding", "layers.q.kernel"; the layers' have a leading layer axis. Names
      before these change nothing, so that an optimiser's moments are split as the parameters that they belong to.
  """
  *parents, module, leaf = ["", *path.split(".")]
  axes = _SPLIT.get(module, {}).get(leaf)
  if axes is None or (module in _BY_VOCABULARY and model.vocab_size % num_shards):
    return PartitionSpec()
  return PartitionSpec(*([None] if "layers" in parents else []), *axes)


def shardings(model: ModelConfig, mesh: Mesh) -> Callable[[str], NamedSharding]:
  """Path -> where a parameter of the base goes, as `load_pretrained` takes it.

  Args:
    mesh: with the axis `model`; the parameters are the same along its other axes.

  Raises:
    ValueError: the model cannot be split over that axis.
  """
  num_shards = mesh.shape[MODEL_AXIS]
  check_split(model, num_shards)
  return lambda path: NamedSharding(mesh, parameter_spec(model, num_shards, path))


def tree_shardings(model: ModelConfig, mesh: Mesh, tree: Any) -> Any:
  """The sharding of each leaf of a base, an adapter, or a tree that holds their like (an optimiser's state).

  Raises:
    ValueError: the model cannot be split over the mesh's axis `model`.
  """
  of_path = shardings(model, mesh)

  def sharding(keys, leaf):
    path, kernel, _ = jax.tree_util.keystr(keys, simple=True, separator=".").partition(".kernel")
    spec = of_path(path + kernel).spec  # values and scales of a quantised kernel are split as it is ...
    # ... but for a scale's axes of size 1.
    return NamedSharding(mesh, PartitionSpec(*(None if n == 1 else axis for axis, n in zip(spec, leaf.shape))))

  return jax.tree_util.tree_map_with_path(sharding, tree)
