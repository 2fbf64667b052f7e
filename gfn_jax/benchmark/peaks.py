"""What the devices can do at best: matrix products and copies, measured in this process."""

from collections.abc import Callable, Sequence
import time

import jax
import jax.numpy as jnp

from gfn_jax.models.quantization import matmul

TRIALS = 5
MIN_SECONDS = 0.03  # of a trial, beside which a call's overhead is small
MAX_WIDTH = 8192
COPIED_BYTES = 2**28  # on each device: more than caches hold


def best_seconds(function: Callable, *args: jax.Array) -> float:
  """Of a few calls of a compiled function, the fastest; it is compiled before."""
  jax.block_until_ready(function(*args))
  seconds = []
  for _ in range(TRIALS):
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    seconds.append(time.perf_counter() - begin)
  return min(seconds)


def matmul_peak(dtype: jnp.dtype, devices: Sequence[jax.Device]) -> float:
  """FLOP/s of all devices together in the decoder's own product, at the square size where it is large enough."""
  product = jax.pmap(matmul, devices=devices)
  width, best = 512, 0.0
  while width <= MAX_WIDTH:
    x = jnp.ones((len(devices), width, width), dtype)
    seconds = best_seconds(product, x, x)
    best = max(best, len(devices) * 2 * width**3 / seconds)
    if seconds > MIN_SECONDS:
      break
    width *= 2
  return best


def copy_peak(devices: Sequence[jax.Device]) -> float:
  """Bytes/s, read and written, of all devices together while they copy an array."""
  x = jnp.ones((len(devices), COPIED_BYTES // 4), jnp.float32)
  return 2 * x.nbytes / best_seconds(jax.pmap(lambda x: x + 1, devices=devices), x)  # a mere copy may be elided
