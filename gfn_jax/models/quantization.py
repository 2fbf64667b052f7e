"""Weight-only quantisation of the frozen base, through qwix: kernels in 8 bits, one scale for each output."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
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
    return x @ kernel
  import qwix

  return qwix.dot(x, kernel)
