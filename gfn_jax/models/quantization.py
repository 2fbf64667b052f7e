"""Weight-only quantisation of the frozen base, through qwix: kernels in 8 bits, one scale for each output."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

QUANTIZATIONS = ("int8",)


def quantize(kernel: np.ndarray, quantization: str) -> Any:
  """A kernel [inputs, outputs] -> qwix's QArray: qvalue int8 [inputs, outputs], scale [1, outputs] in its dtype.

  Raises:
    ValueError: qwix is not installed.
  """
  try:
    import qwix
  except ImportError:
    raise ValueError(f"quantization {quantization!r} needs qwix: pip install 'gfn-jax[int8]'") from None
  return qwix.quantize(jnp.asarray(kernel), jnp.dtype(quantization), channelwise_axes=(1,))


def matmul(x: Array, kernel: Any) -> Array:
  """x @ kernel, which may be quantised; differentiable in x."""
  if not hasattr(kernel, "qvalue"):
    return x @ kernel if x.dtype == jnp.float32 else _half_matmul(x, kernel)
  import qwix

  return qwix.dot(x, kernel)


def _sum_in_float32(x: Array, y: Array) -> Array:
  return jax.lax.dot(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


# CPUs with bfloat16 instructions use them only where the result is asked for in float32, in the backward pass too.
@jax.custom_vjp
def _half_matmul(x: Float[Array, "N K"], kernel: Float[Array, "K M"]) -> Float[Array, "N M"]:
  return _sum_in_float32(x, kernel)


_half_matmul.defvjp(
  lambda x, kernel: (_sum_in_float32(x, kernel), (x, kernel)),
  lambda saved, g: (_sum_in_float32(g, saved[1].T), _sum_in_float32(saved[0].T, g)),
)
