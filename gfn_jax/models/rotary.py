"""Rotary position embeddings: which channels turn, how fast, and how they are paired."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3's stretch of low frequencies; the fields of config.json's `rope_scaling`."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Rotary:
  """`dim` channels of each head turn; the rest stay.

  Attributes:
    interleaved: neighbours are paired (GPT-J); else channel i and i + dim / 2.
    scaling: a factor by which all positions are divided, Llama 3's rule, or None.
  """

  dim: int
  theta: float = 10_000.0
  interleaved: bool = False
  scaling: float | Llama3Scaling | None = None


def frequencies(rotary: Rotary) -> Float[Array, "half"]:
  """Radians a position by which each of the dim / 2 pairs turns."""
  f = rotary.theta ** -(jnp.arange(0, rotary.dim, 2) / rotary.dim)
  s = rotary.scaling
  if s is None:
    return f
  if not isinstance(s, Llama3Scaling):
    return f / s
  # Pairs that turn often within the original context stay, those that turn seldom are slowed, with a ramp between.
  turns = s.original_max_position_embeddings * f / (2 * np.pi)
  kept = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
  return kept * f + (1 - kept) * f / s.factor


def rotate(
  x: Float[Array, "*lead N H Dh"], cos: Array, sin: Array, interleaved: bool
) -> Float[Array, "*lead N H Dh"]:
  """Turns the first 2 * cos.shape[-1] channels by angles of which `cos` and `sin` [*lead, N, half] are given."""
  half = cos.shape[-1]
  rotary, rest = jnp.split(x, [2 * half], axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  if interleaved:
    even, odd = rotary[..., 0::2], rotary[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(rotary.shape)
  else:
    first, second = jnp.split(rotary, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
