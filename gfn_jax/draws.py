"""How a token is drawn from a distribution: temperature, top-k and top-p filters, and the draw itself."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np


def check_behavior(
  max_length: int, min_length: int, temperature: Float[np.ndarray, "*Q"], top_k: int | None, top_p: float | None
) -> None:
  """Raises ValueError, in one line, where these cannot say what to sample; before anything is loaded or compiled."""
  if not 0 <= min_length <= max_length or max_length < 1:
    raise ValueError(
      f"min_length {min_length} and max_length {max_length}: 0 <= min_length <= max_length, 1 <= max_length"
    )
  # Beyond these float32 no longer tells an allowed token from a forbidden one. NaN is not in the range either.
  wrong = [t for t in np.ravel(temperature).tolist() if not (t == 0 or 1e-6 <= t <= 1e6)]
  if wrong:
    raise ValueError(f"temperature {wrong[0]:g}: must be 0 (greedy) or between 1e-6 and 1e6")
  if top_k is not None and (not isinstance(top_k, int | np.integer) or top_k < 1):
    raise ValueError(f"top_k {top_k}: must be at least 1, and whole")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p {top_p:g}: must be above 0 and at most 1")


def nucleus(scores: Float[jax.Array, "*lead V"], top_p: float) -> Bool[jax.Array, "*lead V"]:
  """The fewest of the most probable whose renormalised probability reaches `top_p`, at least one.

  Of equal ones the first. Found by bisection over the bits of a probability, which order as it does: CPUs take longer
  to sort a large vocabulary.
  """
  p = jax.nn.softmax(scores, axis=-1)
  bits = jax.lax.bitcast_convert_type(p, jnp.int32)
  # From the small end, where float32 has digits left: what stands before a token is 1 - what begins with it.
  mass = lambda some: jnp.where(some, p, 0.0).sum(axis=-1, keepdims=True)  # noqa: E731

  def halve(_, between):
    low, high = between
    middle = (low + high) // 2
    enough = mass(bits <= middle) > 1 - top_p
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  top = bits.max(axis=-1, keepdims=True)
  _, least = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top), top))  # 1 is below 2^30
  equal = bits == least
  following = jax.lax.cumsum(jnp.where(equal, p, 0.0), axis=p.ndim - 1, reverse=True)
  first = jnp.arange(p.shape[-1]) == jnp.argmax(p, axis=-1, keepdims=True)
  return (bits > least) | (equal & (mass(bits < least) + following > 1 - top_p)) | first


def filter_tokens(
  scores: Float[jax.Array, "*lead V"], top_k: int | None, top_p: float | None
) -> tuple[Float[jax.Array, "*lead K"], Int[jax.Array, "*lead K"]]:
  """The tokens that top-k and then top-p (nucleus sampling) leave of a distribution.

  Args:
    scores: log-probabilities up to a constant, tempered already.
    top_k: how many of the most probable tokens are kept; None for all.
    top_p: of those, the fewest whose renormalised probability reaches it are kept, at least one; None for all.

  Returns:
    K = min(top_k, V) scores, -inf where top-p drops the token, and the tokens they belong to: from high to low, or
    without a top_k all in order. Of tokens with equal scores the one with the lower id is kept.
  """
  if top_k is None:
    tokens = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
  else:
    scores, tokens = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))
  return scores if top_p is None else jnp.where(nucleus(scores, top_p), scores, -jnp.inf), tokens


def block_size(number: int) -> int:
  """About its root; if possible such that whole blocks fall to each of 16, 8, 4 or 2 devices that share a vocabulary:
  they need not exchange it then."""
  root = math.isqrt(number)
  for shares in (16, 8, 4, 2):
    even = [size for size in range(root // 2 + 1, 2 * root) if number % (shares * size) == 0]
    if even:
      return min(even, key=lambda size: abs(size - root))
  return root


def draw_index(key: jax.Array, scores: Float[jax.Array, "V"]) -> Int[jax.Array, ""]:
  """An index drawn in proportion to exp(scores); one of -inf never is.

  The cumulative sum is inverted among about sqrt(V) blocks, and then within one: two random numbers a draw. Gumbel's
  trick (`jax.random.categorical`) takes V of them, which on CPUs cost more than the logits.
  """
  size = block_size(scores.shape[0])
  weights = jnp.exp(scores - scores.max())
  blocks = jnp.pad(weights, (0, -len(weights) % size)).reshape(-1, size)
  among, within = jax.random.uniform(key, (2,))

  def pick(weights, share):
    # Sums of a parallel scan can rise by a rounding where a weight is 0: only those of positive weights count.
    reached = jnp.where(weights > 0, jnp.cumsum(weights), 0.0)
    return jnp.argmax(reached > share * reached.max())

  block = pick(blocks.sum(-1), among)
  return block * size + pick(blocks[block], within)
