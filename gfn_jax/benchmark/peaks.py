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


def best_seconds(function: Callable, carried: jax.Array, *others: jax.Array) -> float:
  """Of a few calls `carried = function(carried, *others)`, the fastest; it is compiled before."""
  carried = jax.block_until_ready(function(carried, *others))
  seconds = []
  for _ in range(TRIALS):
    begin = time.perf_counter()
    carried = jax.block_until_ready(function(carried, *others))
    seconds.append(time.perf_counter() - begin)
  return min(seconds)


def matmul_peak(dtype: jnp.dtype, devices: Sequence[jax.Device]) -> float:
  """FLOP/s of all devices together in the decoder's own product, at the square size where it is large enough."""
  product = jax.pmap(matmul, devices=devices)
  width, best = 512, 0.0
  while width <= MAX_WIDTH:
    # Random: of constants, for which it draws less power, a GPU makes faster products. By the root they stay in range.
    draw = jax.pmap(lambda key, n=width: (jax.random.normal(key, (n, n)) / n**0.5).astype(dtype), devices=devices)
    x, w = (draw(jax.random.split(jax.random.key(seed), len(devices))) for seed in (0, 1))
    seconds = best_seconds(product, x, w)
    best = max(best, len(devices) * 2 * width**3 / seconds)
    if seconds > MIN_SECONDS:
      break
    width *= 2
  return best


def copy_peak(devices: Sequence[jax.Device]) -> float:
  """Bytes/s, read and written, of all devices together while they go once over an array that stays in its place."""
  add = jax.pmap(lambda x: x + 1, devices=devices, donate_argnums=0)
  x = add(jnp.ones((len(devices), COPIED_BYTES // 4), jnp.float32))
  return 2 * len(devices) * COPIED_BYTES / best_seconds(add, x)
