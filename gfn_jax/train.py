"""GFlowNet fine-tuning: `train(config, workdir)`, numbered phases in execution order.

A step: draw queries and behaviours by (seed, step); sample, with the calculator between rounds; score every prefix with
the frozen LM; feed the replay buffer; update the adapter. It is a function of (seed, step) and of what a checkpoint
holds.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from gfn_jax import data, losses, plots, policy
from gfn_jax import workdir as contract
from gfn_jax.checkpoint import Checkpoints
from gfn_jax.collect import Collector, DemonstrationCollector
from gfn_jax.config import flatten, num_micro_batches, validate
from gfn_jax.experiment import build
from gfn_jax.metrics import MetricsWriter, StepLog
from gfn_jax.models import Lora, LoraConfig, Pretrained, init_lora, load_adapter, save_adapter
from gfn_jax.models.architectures import ModelConfig, lora_targets
from gfn_jax.on_policy import GRPOCollector, PPOCollector
from gfn_jax.parallel import DATA_AXIS, micro_batches, place, split
from gfn_jax.preemption import EXIT_CODE, Preempted, Preemption
from gfn_jax.profiler import StepProfiler
from gfn_jax.results import results_table
from gfn_jax.selection import Selection
from gfn_jax.types import Batch, TrainState

COLLECTORS = {"gfn": Collector, "sft": DemonstrationCollector, "ppo": PPOCollector, "grpo": GRPOCollector}


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """What is fixed while a step compiles.

  `num_epochs` updates are made on a step's batch; `policy_gradient` are arguments of `losses.ppo_terms` or
  `grpo_terms`.
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
  num_epochs: int = 1
  policy_gradient: Mapping[str, float] = dataclasses.field(default_factory=dict)


def objective(
  settings: StepSettings,
  params: dict,
  allowed_tokens: jax.Array,
  reward_temperature: jax.Array,
  dropout_key: jax.Array | None,
  trained: dict[str, Any],
  batch: Batch,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
  """The loss of a (micro-)batch before its division: numerator, denominator, and sums over the rows for the log."""
  states = policy.prefix_states(
    settings.model, params, trained["lora"], batch.prompt_tokens, batch.prompt_mask, batch.tokens,
    dropout_key=dropout_key, remat=settings.remat,
  )  # fmt: skip
  log_pf, log_pterm = policy.score_states(
    settings.model, params, states, batch.tokens, batch.length, batch.action_mask, allowed_tokens=allowed_tokens,
    stop_token_id=settings.stop_token_id, max_length=settings.max_length,
  )  # fmt: skip
  log_prob = losses.act_log_probs(log_pf, log_pterm, batch.length)
  match settings.loss_name:
    case "sft":  # it knows no reward
      terms = losses.sft_terms(log_pf, log_pterm, batch.terminable, batch.action_mask)
    case "ppo":
      value = policy.state_values(trained["value"], states)
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
  sums = {
    "rows": jnp.float32(end.shape[0]),
    "log_pf_mean": log_q.sum(),
    "length_mean": batch.length.sum().astype(jnp.float32),
  }
  if settings.loss_name != "sft":
    sums["log_reward_mean"] = jnp.take_along_axis(batch.log_reward_untempered, end, axis=1).sum()
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
  its own). Returns the new state and metrics (the mean over epochs), both the same on every device.
  """
  rows = micro_batches(batch, settings.num_micro_batches)
  key = jax.random.fold_in(key, jax.lax.axis_index(DATA_AXIS))
  of_batch = functools.partial(objective, settings, params, allowed_tokens, reward_temperature)

  def update(carry, epoch):
    trained, opt_state = carry

    def terms(trained, micro, index):
      index += epoch * settings.num_micro_batches
      return of_batch(jax.random.fold_in(key, index) if settings.dropout else None, trained, micro)

    def accumulate(total, xs):
      (numerator, aux), grads = jax.value_and_grad(terms, has_aux=True)(trained, *xs)
      return jax.tree.map(jnp.add, total, ((numerator, aux), grads)), None

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
    metrics |= {"loss": numerator * scale, "grad_norm": optax.tree.norm(grads)}
    return (optax.apply_updates(trained, updates), opt_state), metrics

  carry = (state.trained, state.opt_state)
  if settings.num_epochs == 1:
    carry, metrics = update(carry, 0)
  else:
    carry, metrics = jax.lax.scan(update, carry, jnp.arange(settings.num_epochs))
    metrics = jax.tree.map(jnp.mean, metrics)
  return TrainState(state.step + 1, *carry), metrics


def step_settings(
  config: ml_collections.ConfigDict, model: ModelConfig, stop_token_id: int, num_devices: int
) -> StepSettings:
  """What a config fixes of a step whose batch is shared by `num_devices` (the size of the axis `data`)."""
  method, supervised, gradients = config.method, config.method == "sft", {}
  if method == "ppo":
    gradients = {k: config.ppo[k] for k in ("clip", "value_clip", "value_weight")}
  elif method == "grpo":
    gradients = {k: config.grpo[k] for k in ("clip", "kl_coefficient")}
  return StepSettings(
    model, config.loss.name if method == "gfn" else method, config.loss.subtb_lambda,
    1 if supervised else config.sampler.num_samples,
    num_micro_batches(config, num_devices), config.sampler.max_length, stop_token_id, config.lora.dropout > 0,
    config.model.remat, num_epochs(config), gradients,
  )  # fmt: skip


def num_epochs(config: ml_collections.ConfigDict) -> int:
  """Updates that are made on a step's batch."""
  return config[config.method].num_epochs if config.method in ("ppo", "grpo") else 1


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW with linear warm-up, perhaps linear decay, and clipping for adapter and critic; Adam for log_partition."""
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
  log_partition = optax.adam(config.loss.log_partition_learning_rate)
  labels = {"lora": "adapter", "value": "adapter", "log_partition": "log_partition"}
  return optax.multi_transform(
    {"adapter": adapter, "log_partition": log_partition}, lambda tree: {k: labels[k] for k in tree}
  )


def reward_temperature(config: ml_collections.ConfigDict, step: int) -> float:
  """T of R^(1/T) at a step: linear from start to end over the horizon, then constant."""
  c = config.reward
  share = min(1.0, step / c.temperature_horizon)
  return c.temperature_start + share * (c.temperature_end - c.temperature_start)


def starting_adapter(config: ml_collections.ConfigDict, pretrained: Pretrained) -> Lora:
  """A fresh adapter, or that of config.lora.init_from.

  Raises:
    ValueError: an adapter that is not as config.lora says, or of another model.
  """
  c = config.lora
  wanted = LoraConfig(c.rank, c.alpha, lora_targets(pretrained.config, tuple(c.targets)), c.dropout, c.rslora)
  if c.init_from is None:
    return init_lora(pretrained.config, wanted, data.step_key(config.seed, data.INIT, 0))
  lora = load_adapter(c.init_from, pretrained)
  for field in ("rank", "alpha", "targets", "rslora"):
    ours, theirs = getattr(wanted, field), getattr(lora.config, field)
    if ours != theirs:
      raise ValueError(f"config.lora.{field} is {ours!r}, but the adapter {c.init_from!r} has {theirs!r}")
  return lora.replace(config=wanted)


def initial_trained(
  config: ml_collections.ConfigDict, model: ModelConfig, lora: Lora, num_queries: int
) -> dict[str, Any]:
  """What a run trains: the adapter, and beside it what its method needs."""
  trained: dict[str, Any] = {"lora": lora}
  if config.method == "gfn" and config.loss.name == "tb":
    trained["log_partition"] = jnp.zeros(num_queries)
  if config.method == "ppo":
    trained["value"] = policy.init_value_head(model)
  return trained


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> int:
  """Runs, or goes on with, the run in `workdir`; the exit code: 0 when finished, 143 after SIGTERM.

  Raises:
    ValueError: a slip of the user's, in one line.
    FloatingPointError: a loss that is not finite, naming the step.
  """
  # 1. Check everything that can be checked before anything compiles.
  started, devices = time.time(), jax.local_devices()
  validate(config, len(devices))
  workdir = contract.prepare(config, workdir)
  finished = contract.finished_steps(workdir)
  if finished >= config.train.num_steps:
    print(f"{workdir}: finished already ({finished} steps); results in {workdir / 'results.json'}")
    return 0

  # 2. The base model, the task, sampler, rewards and evaluations.
  parts, suite = build(config, devices)
  pretrained, params, task = parts.pretrained, parts.params, parts.task
  model = pretrained.config

  # 3. Adapter, buffer, optimiser, state.
  lora = starting_adapter(config, pretrained)
  key = functools.partial(data.step_key, config.seed)
  reserved = len(task.context_tokens(config.reward.num_demonstrations)) + config.sampler.max_length
  table = data.query_table(task.examples, task, model.max_positions, reserved)
  collector = COLLECTORS[config.method](parts, table)
  trained = initial_trained(config, model, lora, len(task.examples))
  optimizer = make_optimizer(config)
  state = place(TrainState(jnp.int32(0), trained, optimizer.init(trained)), devices)
  settings = step_settings(config, model, task.stop_token_id, len(devices))
  update = jax.pmap(
    functools.partial(train_step, settings, optimizer), axis_name=DATA_AXIS, in_axes=(None,) * 5 + (0,), out_axes=None,
    devices=devices, donate_argnums=(4,),
  )  # fmt: skip

  # 4. Go on from the newest whole checkpoint.
  checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
  restored = checkpoints.restore(state)
  first_step = 0
  if restored is not None:
    first_step, state, arrays = restored[0], place(restored[1], devices), restored[2]
    if first_step > config.train.num_steps:
      raise ValueError(
        f"config.train.num_steps is {config.train.num_steps}, but {workdir} has made {first_step} steps already"
      )
    collector.restore(arrays)
  contract.write_config(workdir, config, devices)
  print(contract.plan(config, pretrained, trained, devices, first_step, workdir), flush=True)

  rows_per_step = config.train.num_queries * config.sampler.num_samples
  with (
    Preemption() as preemption,
    MetricsWriter(
      workdir, first_step, config.train.num_steps, wandb_project=config.wandb_project, config=flatten(config)
    ) as writer,
    StepProfiler(config.profile, workdir / "profile") as profiler,
  ):
    selection = Selection(config.train, workdir, f"{task.name}/validation/log_ratio_variance")
    log = StepLog(writer, first_step, config.train.num_steps, config.train.log_every, rows_per_step)
    try:
      # 5. The steps. Metrics of a step are read while the next one runs.
      if restored is None:
        seeds = collector.seed_replay()
        if config.replay.seed_from == "inverse_prompt" and len(seeds):
          print(f"replay buffer: {len(collector.replay)} rationales by inverse prompting", flush=True)
        elif task.num_seeded and config.method in ("gfn", "sft"):
          fit = f"{len(seeds)} of {task.num_seeded} demonstrations fit {config.sampler.max_length} tokens"
          print(f"replay buffer: {fit}", flush=True)
        if "log_partition" in trained and len(seeds):  # a bound on it from below, and far nearer than 0
          start = jnp.full(len(task.examples), seeds.mean() / reward_temperature(config, 0))
          state = state.replace(trained=state.trained | {"log_partition": place(start, devices)})
      allowed = jnp.asarray(task.allowed_tokens)
      for step in range(first_step, config.train.num_steps):
        preemption.check()
        temperature = reward_temperature(config, step)
        # Before the step, not after the last one: a run that goes on from a checkpoint of this step makes it too.
        if step and step % config.eval.every_steps == 0 and config.eval.num_validation:
          values, samples = suite.validate(
            state.trained["lora"], temperature, key(data.EVALUATE, step), preemption.check
          )
          log.evaluation(step, values, samples)
          selection.consider(step, values, state.trained["lora"], pretrained)
          if selection.is_over():
            writer.say(f"no better evaluation since step {selection.best_step}: stopped after step {step}")
            break
        profiler.before_step()
        batch, sampled = collector(state.trained, step, key(data.SAMPLE, step), preemption.check)
        state, metrics = update(
          params, allowed, jnp.float32(temperature), key(data.DROPOUT, step), state, split(batch, devices)
        )
        done = step + 1
        log.step(done, metrics, sampled | {"reward_temperature": temperature})
        if done == config.train.num_steps or done % config.checkpoint.every_steps == 0:
          log.flush()
          checkpoints.save(done, state, collector.to_arrays())
      profiler.stop()
      checkpoints.wait()

      # 6. The final evaluation, the adapter, the report.
      final_temperature = reward_temperature(config, config.train.num_steps)
      lora = state.trained["lora"]
      if config.train.keep == "best":
        values, _ = suite.validate(lora, final_temperature, key(data.EVALUATE, int(state.step)), preemption.check)
        selection.consider(int(state.step), values, lora, pretrained)
        lora = place(selection.load(pretrained), devices)
        writer.say(f"the best evaluation was after step {selection.best_step}")
      results, samples = suite.test(lora, final_temperature, key(data.EVALUATE, 0), preemption.check, writer.say)
      log.evaluation(config.train.num_steps, results, samples)
      lora = jax.tree.map(np.asarray, lora)
      save_adapter(workdir / "adapter", lora, pretrained)
      contract.write_model_card(workdir, config, pretrained, results, task.reward_text(config))
    except Preempted:  # between rounds: state and buffer are those of the last whole step
      log.flush()
      checkpoints.wait()
      checkpoints.save(int(state.step), state, collector.to_arrays())
      checkpoints.wait()
      print(f"SIGTERM: saved after step {int(state.step)}; run the same command to go on", flush=True)
      return EXIT_CODE
    finally:
      checkpoints.close()
  plots.plot_run(workdir, task.name)
  contract.write_results(workdir / "results.json", config, results, time.time() - started)
  if results:  # an M-step is not tested by itself
    print(results_table(results))
  print(f"{workdir}: adapter/, results.json, samples.jsonl, plots/", flush=True)
  return 0
