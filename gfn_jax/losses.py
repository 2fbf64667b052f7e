"""GFlowNet objectives: arrays in, scalars out.

Notation of all of them, for one trajectory z_1:T with prefixes t = 0..T (S = T + 1 of them):

    u[t] = sum_{k<t} log_pf[k] - log_reward[t] + log_pterm[t]

At the optimum u is the same at every terminable prefix, and equals -log_partition. Common to all:

  * Gradients flow through log_pf and log_pterm (and log_partition), never through log_reward.
  * log_pterm and log_reward at prefixes that are not terminable, and everything past a row's last terminable prefix,
    are unspecified: NaN there changes neither value nor gradients. log_pf inside a gap that a tool wrote counts.
  * Arithmetic is float32 at least, whatever the inputs' dtype.
  * `<name>_terms` returns (numerator, denominator), sums over the rows it is given, so that micro-batches and devices
    add theirs up before the one division; the denominator depends on no parameter. `<name>_loss` divides.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from gfn_jax.types import Acts, Array

LOSS_NAMES = ("subtb", "tb", "vargrad", "db")  # GFlowNet objectives: what config.loss.name may be
PREFIX_LOSSES = ("subtb", "db")  # which compare prefixes of a sample, and not whole samples alone

Terms = tuple[Float[jax.Array, ""], Float[jax.Array, ""]]


def subtb_terms(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  *,
  subtb_lambda: ArrayLike = 1.0,
) -> Terms:
  """Numerator and denominator of `subtb_loss`, summed over the rows given. See there."""
  log_pf, log_pterm, log_reward, terminable = _prepare(log_pf, log_pterm, log_reward, terminable)
  decay = jnp.asarray(subtb_lambda, log_pf.dtype)
  zero = _zero_rows(log_pf, log_pterm, log_reward, terminable)

  def visit(carry, prefix):
    last, weight, mean, scatter, numerator, denominator = carry
    stops = prefix[-1]
    last, increment, _ = _advance(last, prefix)
    # Of the terminable i < j with weights lambda^(j-i-1): their sum, the mean of u[i] - u[j], the squares about it.
    mean = jnp.where(weight > 0, mean - increment, 0.0)
    numerator += jnp.where(stops, weight * mean**2 + scatter, 0.0)
    denominator += jnp.where(stops, weight, 0.0)
    # On to j + 1: all weights decay, and j joins them at a distance of 0 from itself (Welford's update).
    weight, scatter = decay * weight, decay * scatter
    kept = jnp.where(stops, weight / (weight + 1.0), 1.0)
    scatter += jnp.where(stops, kept * mean**2, 0.0)
    return (last, weight + stops, kept * mean, scatter, numerator, denominator), None

  start = (_Last(terminable[:, 0] & False, zero, zero, zero), zero, zero, zero, zero, zero)
  (*_, numerator, denominator), _ = jax.lax.scan(visit, start, _by_prefix(log_pf, log_pterm, log_reward, terminable))
  return numerator.sum(), denominator.sum()


def subtb_loss(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  *,
  subtb_lambda: ArrayLike = 1.0,
  axis_name: Any = None,
) -> Float[jax.Array, ""]:
  """Subtrajectory balance where every prefix may stop: Eq. 3 of Hu et al., ICLR 2024 (arXiv 2310.04363).

      loss = sum_{i<j} lambda^(j-i-1) (u[j] - u[i])^2 / sum_{i<j} lambda^(j-i-1)

  over pairs 0 <= i < j <= T of terminable prefixes of all rows, one division for the batch. Gaps count tokens. One scan
  over the prefixes, O(S) time and memory, in which u itself never appears: |u| may be 1e3 where differences are 1e-2.

  Args:
    log_pf: log q(z_t | z_<t), nats; 0 where a tool wrote the token.
    log_pterm: log q(stop | z_1:t), nats.
    log_reward: log R(z_1:t stop), nats, tempered. Not differentiated.
    terminable: where stopping is possible.
    subtb_lambda: lambda in [0, 1]; 1 weights all pairs equally, 0 keeps only neighbouring tokens.
    axis_name: mapped axes over which numerator and denominator are summed. The value is then that of the global batch
      on every device. Gradients of replicated parameters come from `subtb_terms` instead: how `grad` treats a psum
      differs between the modes of pmap and shard_map.

  Returns:
    The loss, nats squared; 0, with zero gradients, for a batch without a pair.
  """
  terms = subtb_terms(log_pf, log_pterm, log_reward, terminable, subtb_lambda=subtb_lambda)
  return _divide(terms, axis_name)


def tb_terms(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  log_partition: Float[Array, "B"],
) -> Terms:
  """Numerator and denominator of `tb_loss`, summed over the rows given. See there."""
  chex.assert_equal_shape_prefix([log_pf, log_partition], 1)
  log_ratio, complete = _log_ratio(log_pf, log_pterm, log_reward, terminable)
  residual = jnp.where(complete, jnp.asarray(log_partition, log_ratio.dtype) - log_ratio, 0.0)
  return jnp.sum(residual**2), jnp.sum(complete, dtype=residual.dtype)


def tb_loss(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  log_partition: Float[Array, "B"],
  *,
  axis_name: Any = None,
) -> Float[jax.Array, ""]:
  """Trajectory balance (Malkin et al., 2022): the mean over rows of (log_partition + u[end])^2.

  `end` is a row's last terminable prefix; a row that has none is left out.

  Args:
    log_pf, log_pterm, log_reward, terminable, axis_name: as in `subtb_loss`.
    log_partition: the learned log partition function of each row's query, nats. Differentiated.

  Returns:
    The loss, nats squared; 0, with zero gradients, for a batch without a row.
  """
  return _divide(tb_terms(log_pf, log_pterm, log_reward, terminable, log_partition), axis_name)


def vargrad_terms(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  *,
  num_samples: int,
) -> Terms:
  """Numerator and denominator of `vargrad_loss`, summed over the rows given (whole groups). See there."""
  if num_samples < 1 or log_pf.shape[0] % num_samples:
    raise ValueError(f"num_samples={num_samples} must be at least 1 and divide the {log_pf.shape[0]} rows into groups")
  log_ratio, complete = _log_ratio(log_pf, log_pterm, log_reward, terminable)
  log_ratio, complete = log_ratio.reshape(-1, num_samples), complete.reshape(-1, num_samples)
  count = jnp.sum(complete, axis=1, keepdims=True)
  mean = jnp.sum(jnp.where(complete, log_ratio, 0.0), axis=1, keepdims=True) / jnp.maximum(count, 1)
  deviation = jnp.where(complete, log_ratio - mean, 0.0)
  return jnp.sum(deviation**2), jnp.sum(complete, dtype=deviation.dtype)


def vargrad_loss(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  *,
  num_samples: int,
  axis_name: Any = None,
) -> Float[jax.Array, ""]:
  """VarGrad (Richter et al., 2020): trajectory balance with a query's log_partition estimated from its samples.

  The estimate is the group's mean of -u[end] = log R - log q, and the loss the mean over rows of (u[end] + estimate)^2,
  the variance within groups. Gradients through the estimate cancel. A row without a terminable prefix is left out.

  Args:
    log_pf, log_pterm, log_reward, terminable, axis_name: as in `subtb_loss`; a group must not be split over devices.
    num_samples: rows of a group; they are consecutive.

  Returns:
    The loss, nats squared; 0, with zero gradients, for a batch without a row.

  Raises:
    ValueError: the rows are no whole number of groups.
  """
  return _divide(vargrad_terms(log_pf, log_pterm, log_reward, terminable, num_samples=num_samples), axis_name)


def db_terms(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
) -> Terms:
  """Numerator and denominator of `db_loss`, summed over the rows given. See there."""
  log_pf, log_pterm, log_reward, terminable = _prepare(log_pf, log_pterm, log_reward, terminable)
  zero = _zero_rows(log_pf, log_pterm, log_reward, terminable)

  def visit(carry, prefix):
    last, numerator, denominator = carry
    last, increment, has_pair = _advance(last, prefix)
    return (last, numerator + jnp.where(has_pair, increment, 0.0) ** 2, denominator + has_pair), None

  start = (_Last(terminable[:, 0] & False, zero, zero, zero), zero, zero)
  (_, numerator, denominator), _ = jax.lax.scan(visit, start, _by_prefix(log_pf, log_pterm, log_reward, terminable))
  return numerator.sum(), denominator.sum()


def db_loss(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  *,
  axis_name: Any = None,
) -> Float[jax.Array, ""]:
  """Detailed balance where every prefix may stop (Deleu et al., 2022): the mean of (u[j] - u[i])^2 over neighbours.

  i < j are consecutive *terminable* prefixes of a row: a gap that a tool wrote is bridged.

  Args:
    log_pf, log_pterm, log_reward, terminable, axis_name: as in `subtb_loss`.

  Returns:
    The loss, nats squared; 0, with zero gradients, for a batch without a pair.
  """
  return _divide(db_terms(log_pf, log_pterm, log_reward, terminable), axis_name)


def sft_terms(
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  action_mask: Bool[Array, "B T"],
) -> Terms:
  """Supervised fine-tuning: -log q(Z stop) of demonstrations Z, in nats, and the number of tokens it is a sum over.

  Args:
    log_pf, log_pterm, terminable: as in `subtb_loss`; a row ends at its last terminable prefix.
    action_mask: the tokens that the demonstrator chose; the stop is one more.
  """
  log_ratio, complete = _log_ratio(log_pf, log_pterm, jnp.zeros_like(log_pterm), terminable)
  tokens = jnp.where(complete, action_mask.sum(axis=1) + 1, 0)
  return jnp.where(complete, log_ratio, 0.0).sum(), tokens.sum().astype(log_ratio.dtype)


def act_log_probs(
  log_pf: Float[Array, "B T"], log_pterm: Float[Array, "B S"], length: Int[Array, "B"], min_length: int
) -> Float[jax.Array, "B S"]:
  """log of the probability of what was done at each prefix of a row: its next token, and at its end the stop.

  That of a sampler which cannot stop before `min_length`: there a token has q(z_t) / (1 - q(stop)), so that what is
  learned on-policy is learned of the policy that acts. Past the end: unspecified.
  """
  prefixes = jnp.arange(log_pterm.shape[1])
  log_goes_on = jnp.log1p(-jnp.exp(jnp.minimum(log_pterm, -1e-6)))  # bounded, and so is its gradient
  log_act = jnp.pad(log_pf, ((0, 0), (0, 1))) - jnp.where(prefixes < min_length, log_goes_on, 0.0)
  return jnp.where(prefixes == jnp.asarray(length)[:, None], log_pterm, log_act)


def ppo_terms(
  log_prob: Float[Array, "B S"],
  value: Float[Array, "B S"],
  acts: Acts,
  *,
  clip: float,
  value_clip: float,
) -> Terms:
  """Proximal policy optimisation (Schulman et al., 2017, Eq. 9, without the entropy), meant over the acts.

      -min(r A, clip(r, 1 - clip, 1 + clip) A) + max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2) / 2

  The two have no parameter in common (`policy.state_values`), and so need no weights.

  Args:
    log_prob: of the acts under the policy, nats. value: its predictions. acts: what was measured before the update.
  """
  near = acts.value + jnp.clip(value - acts.value, -value_clip, value_clip)
  value_loss = jnp.maximum((value - acts.value_target) ** 2, (near - acts.value_target) ** 2) / 2
  loss = _clipped(log_prob, acts, clip) + value_loss
  return jnp.where(acts.mask, loss, 0.0).sum(), acts.mask.sum().astype(loss.dtype)


_LARGEST_LOG_RATIO = 60.0  # nats; e^88 is no float32


def grpo_terms(log_prob: Float[Array, "B S"], acts: Acts, *, clip: float, kl_coefficient: float) -> Terms:
  """Group-relative policy optimisation (Shao et al., 2024, Eq. 3): meant over a row's acts, and then over the rows.

  The penalty is their Eq. 4, p / q - log(p / q) - 1 >= 0 for the reference's p. With one update a step and advantages
  that are centred only, and without the penalty, this is REINFORCE with the group's mean as its baseline, each row's
  gradient over its number of acts.

  Args:
    log_prob: of the acts under the policy, nats. acts: what was measured before the update.
  """
  log_ratio = jnp.minimum(jnp.where(acts.mask, acts.log_reference - log_prob, 0.0), _LARGEST_LOG_RATIO)
  loss = _clipped(log_prob, acts, clip) + kl_coefficient * (jnp.expm1(log_ratio) - log_ratio)
  number = acts.mask.sum(axis=1)
  rows = jnp.where(acts.mask, loss, 0.0).sum(axis=1) / jnp.maximum(number, 1)
  return rows.sum(), (number > 0).sum().astype(loss.dtype)


def _clipped(log_prob, acts: Acts, clip: float):
  ratio = jnp.exp(jnp.minimum(jnp.where(acts.mask, log_prob - acts.log_prob, 0.0), _LARGEST_LOG_RATIO))
  return -jnp.minimum(ratio * acts.advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * acts.advantage)


def loss_terms(
  name: str,
  log_pf: Float[Array, "B T"],
  log_pterm: Float[Array, "B S"],
  log_reward: Float[Array, "B S"],
  terminable: Bool[Array, "B S"],
  *,
  subtb_lambda: ArrayLike = 1.0,
  log_partition: Float[Array, "B"] | None = None,
  num_samples: int | None = None,
) -> Terms:
  """Numerator and denominator of the objective `name`, summed over the rows given.

  Args:
    name: one of `LOSS_NAMES`.
    log_pf, log_pterm, log_reward, terminable: as in `subtb_loss`.
    subtb_lambda: read by subtb. log_partition: needed by tb. num_samples: needed by vargrad.

  Raises:
    ValueError: an unknown name, or an argument that this objective needs is None.
  """
  arrays = (log_pf, log_pterm, log_reward, terminable)
  match name:
    case "subtb":
      return subtb_terms(*arrays, subtb_lambda=subtb_lambda)
    case "tb":
      if log_partition is None:
        raise ValueError("loss 'tb' needs log_partition, and it is None")
      return tb_terms(*arrays, log_partition)
    case "vargrad":
      if num_samples is None:
        raise ValueError("loss 'vargrad' needs num_samples, and it is None")
      return vargrad_terms(*arrays, num_samples=num_samples)
    case "db":
      return db_terms(*arrays)
  raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSS_NAMES)}")


class _Last(NamedTuple):
  """Per row, the last terminable prefix that the scan met: whether there is one, and log_pf summed since."""

  exists: Any
  log_pf_since: Any
  log_pterm: Any
  log_reward: Any


def _advance(last: _Last, prefix: tuple) -> tuple[_Last, Any, Any]:
  """Moves to the next prefix j.

  Returns:
    The new `last`; u[j] - u[i] for the previous terminable i; whether both exist (the difference is 0 otherwise).
    Rewards are subtracted from each other first: a sum with a log_reward of -1e3 would drown increments of 1e-2.
  """
  log_pf, log_pterm, log_reward, stops = prefix
  since = last.log_pf_since + log_pf
  has_pair = last.exists & stops
  increment = jnp.where(has_pair, since + ((log_pterm - last.log_pterm) - (log_reward - last.log_reward)), 0.0)
  moved = _Last(
    exists=last.exists | stops,
    log_pf_since=jnp.where(stops, 0.0, since),
    log_pterm=jnp.where(stops, log_pterm, last.log_pterm),
    log_reward=jnp.where(stops, log_reward, last.log_reward),
  )
  return moved, increment, has_pair


def _prepare(log_pf, log_pterm, log_reward, terminable):
  """Checks shapes, casts up to float32, and puts 0 where entries are unspecified, before any arithmetic meets them."""
  chex.assert_rank([log_pf, log_pterm, log_reward, terminable], 2)
  rows, num_tokens = log_pf.shape
  chex.assert_shape([log_pterm, log_reward, terminable], (rows, num_tokens + 1))
  dtype = jnp.result_type(log_pf, log_pterm, log_reward, jnp.float32)
  terminable = jnp.asarray(terminable)
  followed = jax.lax.cumsum(terminable[:, 1:].astype(jnp.int32), axis=1, reverse=True) > 0  # by a terminable prefix
  log_pf = jnp.where(followed, jnp.asarray(log_pf, dtype), 0.0)
  log_pterm = jnp.where(terminable, jnp.asarray(log_pterm, dtype), 0.0)
  log_reward = jnp.where(terminable, jax.lax.stop_gradient(jnp.asarray(log_reward, dtype)), 0.0)
  return log_pf, log_pterm, log_reward, terminable


def _log_ratio(log_pf, log_pterm, log_reward, terminable):
  """-u[end] = log R(Z) - log q(Z) of each row's last terminable prefix, and whether the row has one."""
  log_pf, log_pterm, log_reward, terminable = _prepare(log_pf, log_pterm, log_reward, terminable)
  end = terminable.shape[1] - 1 - jnp.argmax(terminable[:, ::-1], axis=1, keepdims=True)
  log_pterm, log_reward = (jnp.take_along_axis(x, end, axis=1)[:, 0] for x in (log_pterm, log_reward))
  return log_reward - (log_pf.sum(axis=1) + log_pterm), terminable.any(axis=1)


def _by_prefix(log_pf, log_pterm, log_reward, terminable):
  """[S, B] arrays for the scan; entry t of log_pf is what leads from prefix t - 1 to prefix t."""
  return jax.tree.map(jnp.transpose, (jnp.pad(log_pf, ((0, 0), (1, 0))), log_pterm, log_reward, terminable))


def _zero_rows(*arrays):
  """[B] zeros made of the inputs, so that under shard_map they vary over the axes that the scan's results vary over."""
  return sum(jnp.where(x[:, :1].any(axis=1), 0.0, 0.0).astype(arrays[0].dtype) for x in arrays)


def _divide(terms: Terms, axis_name: Any) -> Float[jax.Array, ""]:
  """numerator / denominator, summed over `axis_name` before; 0 where there is nothing to divide by."""
  numerator, denominator = terms if axis_name is None else jax.lax.psum(terms, axis_name)
  return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)
