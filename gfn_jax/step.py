"""A training step: `train_step`, a pure function, and what is fixed while it compiles."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gfn_jax import losses, policy
from gfn_jax.config import num_micro_batches
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.parallel import DATA_AXIS, micro_batches
from gfn_jax.types import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """What is fixed while a step compiles.

  `num_epochs` updates are made on a step's batch. `bin_by_bin`: the bins of its trees are computed one after another:
  one program serves any number of them, and holds the activations of one. For policy gradients alone: `min_length` is
  the sampler's, and `policy_gradient` are arguments of `losses.ppo_terms` or `grpo_terms`.
  """

  model: ModelConfig
  loss_name: str
  subtb_lambda: float
  num_samples: int
  num_micro_batches: int
  max_length: int
  stop_token_id: int
  dropout: bool
  remat: str = "none"
  min_length: int = 0
  num_epochs: int = 1
  policy_gradient: Mapping[str, float] = dataclasses.field(default_factory=dict)
  bin_by_bin: bool = False


def objective(
  settings: StepSettings,
  params: dict,
  allowed_tokens: jax.Array,
  reward_temperature: jax.Array,
  dropout_key: jax.Array | None,
  trained: dict[str, Any],
  batch: Batch,
  bin_number: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
  """The loss of a (micro-)batch before its division: numerator, denominator, and sums over the rows for the log.

  `bin_number`: of the rows that stand in this bin of its trees alone.
  """
  here = jnp.ones(batch.length.shape, bool)
  if bin_number is not None:
    trees, here = policy.trees_of_bin(batch.trees, bin_number)
    acts = batch.acts and batch.acts.replace(mask=batch.acts.mask & here[:, None])
    batch = batch.replace(trees=trees, terminable=batch.terminable & here[:, None], acts=acts)
  states = policy.tree_states(
    settings.model, params, trained["lora"], batch.trees, dropout_key=dropout_key, remat=settings.remat
  )
  log_pf, log_pterm = policy.score_trees(
    settings.model, params, states, batch.trees, batch.length, batch.action_mask, allowed_tokens=allowed_tokens,
    stop_token_id=settings.stop_token_id, max_length=settings.max_length,
  )  # fmt: skip
  log_prob = losses.act_log_probs(log_pf, log_pterm, batch.length, settings.min_length)
  match settings.loss_name:
    case "sft":  # it knows no reward
      terms = losses.sft_terms(log_pf, log_pterm, batch.terminable, batch.action_mask)
    case "ppo":
      value = policy.of_prefixes(policy.state_values(trained["value"], states), batch.trees)
      terms = losses.ppo_terms(log_prob, value, batch.acts, **settings.policy_gradient)
    case "grpo":
      terms = losses.grpo_terms(log_prob, batch.acts, **settings.policy_gradient)
    case name:
      log_partition = trained.get("log_partition")
      if log_partition is not None:
        log_partition = jnp.repeat(log_partition[batch.query_ids], settings.num_samples)
      terms = losses.loss_terms(
        name, log_pf, log_pterm, batch.log_reward_untempered / reward_temperature, batch.terminable,
        subtb_lambda=settings.subtb_lambda, log_partition=log_partition, num_samples=settings.num_samples,
      )  # fmt: skip
  end = batch.length[:, None]
  log_q = log_pf.sum(-1) + jnp.take_along_axis(log_pterm, end, axis=1)[:, 0]
  of_rows = {"rows": jnp.ones_like(log_q), "log_pf_mean": log_q, "length_mean": batch.length.astype(jnp.float32)}
  if settings.loss_name != "sft":
    of_rows["log_reward_mean"] = jnp.take_along_axis(batch.log_reward_untempered, end, axis=1)[:, 0]
  sums = {name: jnp.where(here, values, 0.0).sum() for name, values in of_rows.items()}
  return terms[0], (terms[1], sums)


def train_step(
  settings: StepSettings,
  optimizer: optax.GradientTransformation,
  params: dict,
  allowed_tokens: jax.Array,
  reward_temperature: jax.Array,
  key: jax.Array,
  state: TrainState,
  batch: Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step, on one device's share of the batch, mapped over the axis `data`.

  Numerator, denominator and gradients are summed over micro-batches and devices before they are divided, so the
  result does not depend on how many carried them (but for the adapter's dropout, where it is on: each micro-batch draws
  its own, by its place in the whole batch, and so does each bin where they go one by one). Returns the new state and
  metrics (the mean over epochs), both the same on every device.
  """
  rows = micro_batches(batch, settings.num_micro_batches)
  all_batches = settings.num_micro_batches * jax.lax.axis_size(DATA_AXIS)
  of_batch = functools.partial(objective, settings, params, allowed_tokens, reward_temperature)

  def update(carry, epoch):
    trained, opt_state = carry

    def terms(trained, micro, index, bin_number=None):
      index += epoch * all_batches + jax.lax.axis_index(DATA_AXIS) * settings.num_micro_batches
      dropout_key = jax.random.fold_in(key, index) if settings.dropout else None
      if settings.dropout and bin_number is not None:
        dropout_key = jax.random.fold_in(dropout_key, bin_number)
      return of_batch(dropout_key, trained, micro, bin_number)

    def accumulate(total, xs):
      micro, _ = xs

      def add(bin_number, total):
        (numerator, aux), grads = jax.value_and_grad(terms, has_aux=True)(trained, *xs, bin_number)
        return jax.tree.map(jnp.add, total, ((numerator, aux), grads))

      if settings.bin_by_bin:
        return jax.lax.fori_loop(0, micro.trees.num_bins[0], add, total), None
      return add(None, total), None

    first = jax.tree.map(lambda x: x[0], rows)
    shapes = jax.eval_shape(jax.value_and_grad(terms, has_aux=True), trained, first, 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, (rows, jnp.arange(settings.num_micro_batches)))
    if jax.lax.axis_size(DATA_AXIS) > 1:  # XLA refuses a sum over one device beside a `model` axis of several
      total = jax.lax.psum(total, DATA_AXIS)
    (numerator, (denominator, sums)), grads = total

    scale = jnp.where(denominator > 0, 1 / jnp.where(denominator > 0, denominator, 1.0), 0.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = optimizer.update(grads, opt_state, trained)
    number = sums.pop("rows")
    metrics = {k: v / number for k, v in sums.items()}
    metrics |= {"loss": numerator * scale, "grad_norm": optax.tree.norm(grads["lora"])}
    return (optax.apply_updates(trained, updates), opt_state), metrics

  carry = (state.trained, state.opt_state)
  if settings.num_epochs == 1:
    carry, metrics = update(carry, 0)
  else:
    carry, metrics = jax.lax.scan(update, carry, jnp.arange(settings.num_epochs))
    metrics = jax.tree.map(jnp.mean, metrics)
  return TrainState(state.step + 1, *carry), metrics


def step_settings(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  stop_token_id: int,
  num_devices: int,
  bin_by_bin: bool = False,
) -> StepSettings:
  """What a config fixes of a step whose batch is shared by `num_devices` (the size of the axis `data`).

  `bin_by_bin`: as its trees are padded.
  """
  method, supervised, gradients = config.method, config.method == "sft", {}
  # Policy gradients compare the policy with itself before the update: no dropout in between.
  dropout = config.lora.dropout > 0 and method in ("gfn", "sft")
  if method == "ppo":
    gradients = {k: config.ppo[k] for k in ("clip", "value_clip")}
  elif method == "grpo":
    gradients = {k: config.grpo[k] for k in ("clip", "kl_coefficient")}
  return StepSettings(
    model, config.loss.name if method == "gfn" else method, config.loss.subtb_lambda,
    1 if supervised else config.sampler.num_samples,
    num_micro_batches(config, num_devices), config.sampler.max_length, stop_token_id, dropout, config.model.remat,
    config.sampler.min_length, num_epochs(config), gradients, bin_by_bin,
  )  # fmt: skip


def num_epochs(config: ml_collections.ConfigDict) -> int:
  """Updates that are made on a step's batch."""
  return config[config.method].num_epochs if config.method in ("ppo", "grpo") else 1


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW with linear warm-up, perhaps linear decay, and clipping for the adapter; Adam for what stands beside it."""
  c = config.train
  warmup = max(1, c.warmup_steps)
  rate = optax.linear_schedule(c.learning_rate / warmup, c.learning_rate, warmup)
  if c.decay_steps:
    decay = optax.linear_schedule(c.learning_rate, 0.0, max(1, c.decay_steps - warmup))
    rate = optax.join_schedules([rate, decay], [warmup])
  epochs = num_epochs(config)
  adapter = optax.chain(
    optax.clip_by_global_norm(c.clip_norm),
    optax.adamw(lambda count: rate(count // epochs), b1=0.9, b2=0.99, weight_decay=c.weight_decay),
  )
  optimizers = {
    "lora": adapter,
    "log_partition": optax.adam(config.loss.log_partition_learning_rate),
    "value": optax.adam(config.ppo.value_learning_rate),
  }
  return optax.multi_transform(optimizers, lambda tree: {k: k for k in tree})
