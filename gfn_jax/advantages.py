"""What policy-gradient methods learn from: advantages, and the coefficient that keeps a policy near its reference."""

from jaxtyping import Bool, Float
import numpy as np

from gfn_jax.types import Array

_LARGEST_KL_ERROR = 0.2  # Ziegler et al., 2019


def gae(
  rewards: Float[Array, "B S"],
  values: Float[Array, "B S"],
  acts: Bool[Array, "B S"],
  discount: float,
  gae_lambda: float,
) -> tuple[Float[np.ndarray, "B S"], Float[np.ndarray, "B S"]]:
  """Generalised advantage estimation (Schulman et al., 2016), from one act of the policy to its next.

  Prefixes at which the tool writes are no states of the policy: they are passed over, and count no discount.

  Args:
    rewards: for what is done at each prefix, nats. values: predicted at each prefix. acts: where the policy acts.
    discount: gamma. gae_lambda: 0 is the temporal-difference error, 1 the whole return less the value.

  Returns:
    The advantages, and the returns that values are fitted to (advantage + value); 0 where the policy does not act.
  """
  rewards, values, acts = np.asarray(rewards, np.float64), np.asarray(values, np.float64), np.asarray(acts)
  advantages = np.zeros(rewards.shape)
  next_advantage, next_value = np.zeros(len(rewards)), np.zeros(len(rewards))
  for t in reversed(range(rewards.shape[1])):
    now = rewards[:, t] + discount * (next_value + gae_lambda * next_advantage) - values[:, t]
    advantages[:, t] = np.where(acts[:, t], now, 0.0)
    next_advantage = np.where(acts[:, t], now, next_advantage)
    next_value = np.where(acts[:, t], values[:, t], next_value)
  return advantages, np.where(acts, advantages + values, 0.0)


def whiten(x: Float[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[np.ndarray, "B S"]:
  """Mean 0 and deviation 1 over what `mask` keeps; 0 elsewhere."""
  x, kept = np.asarray(x), np.asarray(x)[mask]
  return np.where(mask, (x - kept.mean()) / (kept.std() + 1e-8), 0.0)


def explained_variance(values: Float[Array, "B S"], targets: Float[Array, "B S"], mask: Bool[Array, "B S"]) -> float:
  """1 - Var(target - value) / Var(target) over what `mask` keeps: 1 for a perfect critic, 0 for a constant one."""
  target, error = np.asarray(targets)[mask], (np.asarray(targets) - np.asarray(values))[mask]
  return float(1 - error.var() / target.var()) if target.size and target.var() > 0 else 0.0


def group_advantages(log_reward: Float[Array, "B"], num_samples: int, scale: bool) -> Float[np.ndarray, "B"]:
  """A row's reward less its group's mean, over the group's deviation where `scale` (GRPO: Shao et al., 2024, Eq. 3).

  Args:
    log_reward: nats. num_samples: rows of a group; they are consecutive.
  """
  groups = np.asarray(log_reward, np.float64).reshape(-1, num_samples)
  centred = groups - groups.mean(axis=1, keepdims=True)
  if scale:
    centred /= groups.std(axis=1, ddof=min(1, num_samples - 1), keepdims=True) + 1e-4
  return centred.reshape(-1)


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: int, num_rows: int) -> float:
  """The next coefficient of the KL penalty (Ziegler et al., 2019, section 2.2): up where KL is above its target.

  Args:
    kl: of the policy to its reference, nats a trajectory. target: nats. horizon: trajectories in which an error of 1
      would double the coefficient; num_rows: trajectories of this step.
  """
  error = np.clip(kl / target - 1, -_LARGEST_KL_ERROR, _LARGEST_KL_ERROR)
  return float(coefficient * (1 + error * num_rows / horizon))
