"""FLOPs and bytes of the decoder, counted by hand from its shapes, and those of the products that a program makes.

    forward_flops(model, lora, tokens=N, keys=M, outputs=K)                 # N tokens that each attend to M positions
    backward_flops(model, lora, tokens=N, keys=M, outputs=K, remat="none")  # what training the adapter adds to it
    decode_bytes(model, lora, keys=M, itemsize=4)                           # what one decoding step reads
    program_flops(function, *args, while_trips=(10,))                       # matrix products that `function` makes

A multiply-add is two FLOPs. Matrix products are counted: projections, adapters, attention's scores and weighted values,
and the output projection at the positions where it is read. Norms, activations, softmax, rotary embedding and lookups
are not: XLA counts up to 15% more with them on small models, and next to nothing on large ones.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.lora import LoraConfig

_ATTENTION = ("q", "k", "v", "qkv")
_MLP = ("gate", "up", "down")


def _kernels(model: ModelConfig, names: tuple[str, ...] | None = None) -> int:
  """Weights of a layer's projections, all or those named."""
  return sum(a * b for name, (a, b) in model.projections().items() if names is None or name in names)


def _adapters(model: ModelConfig, lora: LoraConfig | None) -> int:
  """Weights of a layer's adapters."""
  return sum(lora.rank * sum(model.projections()[name]) for name in lora.targets) if lora else 0


def _attention(model: ModelConfig, keys: float) -> float:
  """Multiply-adds of a token's attention in a layer: scores, and weighted values."""
  return 2 * model.num_heads * model.head_dim * keys


def forward_flops(model: ModelConfig, lora: LoraConfig | None, *, tokens: float, keys: float, outputs: float) -> float:
  """FLOPs of a forward pass.

  Args:
    model: the base; `lora`: its adapter, None where it is off.
    tokens: that pass through the layers, of all rows together.
    keys: positions that a token attends to, itself among them: a mean over the tokens. Those that a mask hides count
      where a program multiplies by them; by a sequence of its own, n / 2 + 1 / 2 on average.
    outputs: positions, of all rows together, whose logits are computed.
  """
  layer = _kernels(model) + _adapters(model, lora) + _attention(model, keys)
  return 2 * (tokens * model.num_layers * layer + outputs * model.hidden_size * model.vocab_size)


def backward_flops(
  model: ModelConfig, lora: LoraConfig, *, tokens: float, keys: float, outputs: float, remat: str = "none"
) -> float:
  """FLOPs that the gradient of an adapter adds to the forward pass. Arguments as of `forward_flops`.

  Through a frozen kernel, and the output projection, only the activations' gradient passes: as many FLOPs as forward. A
  product of two activations (attention) and an adapter have two gradients: twice as many. The first layer's input is
  frozen, so that nothing passes through the projections that read it, nor through an MLP beside attention without an
  adapter. `remat` adds what is computed again: attention for "dots", the layers' whole forward pass for "full".
  """
  layer = _kernels(model) + 2 * (_adapters(model, lora) + _attention(model, keys))
  again = {"none": 0.0, "dots": _attention(model, keys)}
  again["full"] = _kernels(model) + _adapters(model, lora) + _attention(model, keys)
  beside = () if model.residual == "sequential" else _MLP[:2] if set(_MLP) & set(lora.targets) else _MLP
  spared = _kernels(model, _ATTENTION + beside)
  layers = model.num_layers * (layer + again[remat]) - spared
  return 2 * (tokens * layers + outputs * model.hidden_size * model.vocab_size)


def decode_bytes(
  model: ModelConfig, lora: LoraConfig | None, *, keys: float, itemsize: int, kernel_itemsize: int | None = None
) -> float:
  """Bytes that one decoding step must read: every weight once, and the keys and values of earlier tokens.

  Args:
    keys: positions, of all rows together, whose keys and values are read; what rows share counts once.
    itemsize: bytes of a parameter and of a key's channel. kernel_itemsize: of a layer's kernels, where quantised.
  """
  kernels = model.num_layers * _kernels(model) * (kernel_itemsize or itemsize)
  head = model.hidden_size * model.vocab_size * itemsize
  adapters = 4 * model.num_layers * _adapters(model, lora)
  return kernels + head + adapters + 2 * keys * model.num_layers * model.num_kv_heads * model.head_dim * itemsize


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
  for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
    if isinstance(value, Jaxpr | ClosedJaxpr):
      yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _product_flops(equation: JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  return 2 * math.prod(out) * math.prod(left[i] for i in contracted)


def _jaxpr_flops(jaxpr: Jaxpr, while_trips: Iterator[float]) -> float:
  total = 0
  for equation in jaxpr.eqns:
    match equation.primitive.name:
      case "dot_general":
        total += _product_flops(equation)
        continue
      case "scan":
        times = equation.params["length"]
      case "while":
        times = next(while_trips, 1)
      case "shard_map":
        # Shapes in it are those of a share; axes that XLA partitions by itself have left them whole.
        shape = equation.params["mesh"].shape
        times = math.prod(shape[axis] for axis in equation.params["newly_manual_axes"])
      case _:
        times = 1
    total += times * sum(_jaxpr_flops(inner, while_trips) for inner in _inner(equation))
  return total


def program_flops(function: Callable, *args: Any, while_trips: Sequence[float] = ()) -> float:
  """FLOPs of the matrix products in `function(*args)`, padding and masked positions included, over all devices.

  Args:
    function: is traced, not run. Arrays of JAX among `args` may be shapes (`jax.ShapeDtypeStruct`).
    while_trips: how often the body of each `while_loop` runs, in the program's order, which a trace cannot tell; once
      where this says nothing.
  """
  leaves, structure = jax.tree.flatten(args)
  traced = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)}

  def of(arrays):
    return function(*jax.tree.unflatten(structure, [arrays.get(i, x) for i, x in enumerate(leaves)]))

  return _jaxpr_flops(jax.make_jaxpr(of)(traced).jaxpr, iter(while_trips))


def adapter_bytes(model: ModelConfig, lora: LoraConfig) -> int:
  """Bytes of an adapter, in float32."""
  return 4 * model.num_layers * _adapters(model, lora)


def activation_bytes(
  model: ModelConfig, lora: LoraConfig | None, *, tokens: float, keys: float, outputs: float, itemsize: int
) -> float:
  """Bytes that the matrix products of a forward pass read and write beside the weights.

  Each product reads its operand from memory and writes its result there; softmax, norms and activations, which
  compilers fuse with products, are not counted. Scores and logits are float32. Arguments as of `forward_flops`;
  `itemsize`: bytes of a channel.
  """
  kernels = sum(a + b for a, b in model.projections().values())
  attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
  adapters = sum(sum(model.projections()[name]) + 2 * lora.rank for name in lora.targets) if lora else 0
  layer = itemsize * (kernels + attention) + 4 * adapters + 2 * 4 * model.num_heads * keys
  return tokens * model.num_layers * layer + outputs * (itemsize * model.hidden_size + 4 * model.vocab_size)
