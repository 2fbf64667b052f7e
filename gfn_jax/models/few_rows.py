"""Weights laid out for products of few rows on CPUs, which those of decoding are.

XLA's CPU backend copies a layer's kernels out of their stack before it reads them, and packs the second operand of a
product: with x W that is the kernel, which has far more numbers than a few rows of x. So a layer's kernels stand by
themselves here, transposed, and go first: (W' x')'. The adapter is added into them: its own products would be many, and
small.
"""

import jax
from jaxtyping import Array, Float

from gfn_jax.models.lora import Lora, merged_layers

MOST_ROWS = 128  # with more the two are as fast


def lay_out(params: dict, lora: Lora | None) -> dict:
  """What `decoder` takes in place of these parts of `params`, and of `lora`: as many bytes again.

  Args:
    params: a base that is not quantised.

  Returns:
    "layers", a list in which "transposed" [outputs, inputs] stands for "kernel", and likewise an untied "head".
  """
  layers = params["layers"] if lora is None else merged_layers(params["layers"], lora)
  number = len(jax.tree.leaves(layers)[0])
  laid_out = [
    {name: _transposed({k: x[layer] for k, x in module.items()}) for name, module in layers.items()}
    for layer in range(number)
  ]
  return {"layers": laid_out} | ({"head": _transposed(params["head"])} if "head" in params else {})


def _transposed(module: dict) -> dict:
  """A module's parameters, with its kernel, if it has one, transposed."""
  return {("transposed" if k == "kernel" else k): (x.T if k == "kernel" else x) for k, x in module.items()}


def product(x: Float[Array, "R K"], transposed: Float[Array, "M K"]) -> Float[Array, "R M"]:
  """x W of few rows. The barriers keep XLA from turning the operands round again."""
  keep = jax.lax.optimization_barrier
  return keep(transposed @ keep(x.T)).T
