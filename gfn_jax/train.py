"""GFlowNet fine-tuning: `train(config, workdir)`, numbered phases in execution order.

A step: draw queries and behaviours by (seed, step); sample, with the calculator between rounds; score every prefix with
the frozen LM; feed the replay buffer; update the adapter. It is a function of (seed, step) and of what a checkpoint
holds.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gfn_jax import data, distributed, plots, policy
from gfn_jax import workdir as contract
from gfn_jax.checkpoint import Checkpoints
from gfn_jax.collect import Collector, DemonstrationCollector, Draft
from gfn_jax.config import flatten, validate
from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.evaluators.kept import KeptRows
from gfn_jax.evaluators.suite import Suite
from gfn_jax.experiment import build
from gfn_jax.files import Path
from gfn_jax.metrics import MetricsWriter, SilentWriter, StepLog
from gfn_jax.models import Lora, LoraConfig, Pretrained, init_lora, load_adapter, save_adapter
from gfn_jax.models.architectures import ModelConfig, lora_targets
from gfn_jax.models.partition import tree_shardings
from gfn_jax.on_policy import GRPOCollector, PPOCollector
from gfn_jax.parallel import (
  DATA_AXIS,
  all_devices,
  is_split,
  map_step_everywhere,
  mesh_of,
  num_shares,
  place,
  replicated,
  split,
)
from gfn_jax.preemption import EXIT_CODE, Preempted, Preemption
from gfn_jax.profiler import StepProfiler
from gfn_jax.results import results_table
from gfn_jax.selection import Selection
from gfn_jax.step import make_optimizer, step_settings, train_step
from gfn_jax.types import Batch, LaggedState, TrainState

COLLECTORS = {"gfn": Collector, "sft": DemonstrationCollector, "ppo": PPOCollector, "grpo": GRPOCollector}


def reward_temperature(config: ml_collections.ConfigDict, step: int) -> float:
  """T of R^(1/T) at a step: linear from start to end over the horizon, then constant."""
  c = config.reward
  share = min(1.0, step / c.temperature_horizon)
  return c.temperature_start + share * (c.temperature_end - c.temperature_start)


def _annealed_step(config: ml_collections.ConfigDict) -> int:
  """The first step at the last reward temperature of the run."""
  c = config.reward
  return 0 if c.temperature_start == c.temperature_end else min(c.temperature_horizon, config.train.num_steps)


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


@dataclasses.dataclass(frozen=True)
class Run:
  """What the steps of a run are made of.

  Attributes:
    parts, suite: as `experiment.build` makes them.
    collector: gives a step its batch.
    share: of a whole batch, what `update` takes of it.
    update: `train_step`, compiled.
    shardings: where the state lies.
  """

  parts: Parts
  suite: Suite
  collector: Collector
  share: Callable[[Batch], Batch]
  update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  shardings: Any

  def steps(
    self, state: TrainState, numbers: range, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[TrainState, dict[str, jax.Array], dict[str, float]]]:
    """Makes a step whenever one is asked for: sampling, scoring, replay, update. `state` is donated.

    A `LaggedState` has each step sampled by the adapter that the step before it started from. So the next step's
    samples can be sent for before the update: the devices work on them while the host makes this step's batch, and on
    the update while it answers the tool. The steps are functions of state, buffer and number all the same, whoever
    goes on with them.

    Yields:
      The new state, the update's metrics, which the device may still be working on, and those of the samples.
    """
    draft = None
    for number in numbers:
      if isinstance(state, LaggedState):
        draft = draft or self._begin(state.previous_lora, number)
        samples = self.collector.finish(draft, on_round)
        start = jax.tree.map(jnp.copy, state.trained["lora"])  # the update takes the state's own
        following = self._begin(start, number + 1) if number + 1 in numbers else None
        batch, sampled = self.collector.batch(draft, samples)
        updated, metrics = self._update(TrainState(state.step, state.trained, state.opt_state), number, batch)
        state, draft = LaggedState(**vars(updated), previous_lora=start), following
      else:
        batch, sampled = self.collector(state.trained, number, self._key(data.SAMPLE, number), on_round)
        state, metrics = self._update(state, number, batch)
      yield state, metrics, sampled | {"reward_temperature": reward_temperature(self.parts.config, number)}

  def _key(self, purpose: int, number: int) -> jax.Array:
    return data.step_key(self.parts.config.seed, purpose, number)

  def _begin(self, lora: Lora, number: int) -> Draft:
    return self.collector.begin(lora, number, self._key(data.SAMPLE, number))

  def _update(self, state: TrainState, number: int, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    parts = self.parts
    state, metrics = self.update(
      parts.params, jnp.asarray(parts.task.allowed_tokens), jnp.float32(reward_temperature(parts.config, number)),
      self._key(data.DROPOUT, number), state, self.share(batch),
    )  # fmt: skip
    distributed.settle(state)
    return state, metrics


def set_up(config: ml_collections.ConfigDict) -> tuple[Run, TrainState]:
  """The run of a config that `validate` has passed, and the state before its first step.

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  # The base model, the task, sampler, rewards and evaluations.
  parts, suite = build(config, jax.local_devices())
  pretrained, task, devices = parts.pretrained, parts.task, parts.devices
  model = pretrained.config

  # Adapter, buffer, optimiser, state.
  lora = starting_adapter(config, pretrained)
  reserved = len(task.context_tokens(config.reward.num_demonstrations)) + config.sampler.max_length
  table = data.query_table(task.examples, task, model.max_positions, reserved)
  collector = COLLECTORS[config.method](parts, table)
  trained = initial_trained(config, model, lora, len(task.examples))
  optimizer = make_optimizer(config)
  state = bare = TrainState(jnp.int32(0), trained, optimizer.init(trained))
  if config.train.max_staleness:
    state = LaggedState(**vars(bare), previous_lora=jax.tree.map(jnp.copy, lora))
  shares, bin_by_bin = num_shares(config.mesh.model), collector.padding.bin_by_bin
  settings = step_settings(config, model, task.stop_token_id, shares, bin_by_bin)
  update = functools.partial(train_step, settings, optimizer)
  if is_split(devices):
    mesh = mesh_of(devices)
    shardings = tree_shardings(model, mesh, state)
    update, share = map_step_everywhere(update, devices, tree_shardings(model, mesh, bare)), lambda batch: batch
  else:
    shardings, share = replicated(devices), functools.partial(split, devices=devices)
    update = jax.pmap(
      update, axis_name=DATA_AXIS, in_axes=(None,) * 5 + (0,), out_axes=None, devices=all_devices(), donate_argnums=(4,)
    )
  return Run(parts, suite, collector, share, update, shardings), jax.device_put(state, shardings)


def _open_writer(config: ml_collections.ConfigDict, workdir: Path, first_step: int) -> MetricsWriter:
  """Of metrics, in the first process; all of them go on when its files stand as the run left them."""
  writer = SilentWriter()
  if distributed.is_first():
    writer = MetricsWriter(
      workdir, first_step, config.train.num_steps, wandb_project=config.wandb_project, config=flatten(config)
    )
  distributed.wait_for_all("metrics.jsonl")
  return writer


def train(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, preemption: Preemption | None = None
) -> int:
  """Runs, or goes on with, the run in `workdir`; the exit code: 0 when finished, 143 after SIGTERM.

  Several processes make one run: all call this, and the first one writes the files (checkpoints are written by all).
  `preemption`: of whoever runs more than this, in use; None: one of its own.

  Raises:
    ValueError: a slip of the user's, in one line.
    FloatingPointError: a loss that is not finite, naming the step.
  """
  with Preemption() if preemption is None else contextlib.nullcontext(preemption) as told:
    try:
      return _train(config, workdir, told)
    except Preempted:  # what was there is there
      print("SIGTERM: before the first step of this session; run the same command to go on", flush=True)
      return EXIT_CODE


def _train(config: ml_collections.ConfigDict, workdir: str | os.PathLike, preemption: Preemption) -> int:
  # 1. Check everything that can be checked before anything compiles.
  started, everywhere = time.time(), all_devices()
  validate(config, num_shares(config.mesh.model))
  workdir = contract.prepare(config, workdir)
  finished = contract.finished_steps(workdir)
  if finished >= config.train.num_steps:
    print(f"{workdir}: finished already ({finished} steps); results in {workdir / 'results.json'}")
    return 0

  # 2. Base model, task, sampler, rewards, evaluations; adapter, buffer, optimiser, state.
  run, state = set_up(config)
  preemption.check()
  suite, collector, pretrained, task = run.suite, run.collector, run.parts.pretrained, run.parts.task
  suite.require_test_problems()
  devices, trained = run.parts.devices, state.trained
  key = functools.partial(data.step_key, config.seed)

  # 3. Go on from the newest whole checkpoint.
  checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
  restored = checkpoints.restore(state)
  first_step = 0
  if restored is not None:
    first_step, state, arrays = restored[0], jax.device_put(restored[1], run.shardings), restored[2]
    if first_step > config.train.num_steps:
      raise ValueError(
        f"config.train.num_steps is {config.train.num_steps}, but {workdir} has made {first_step} steps already"
      )
    collector.restore(arrays)
  print(contract.plan(config, pretrained, trained, everywhere, first_step, workdir), flush=True)

  # 4. The buffer. What is known of the run is written behind it: a slip that shows here can be mended.
  if restored is None:
    if said := collector.seed_replay(preemption.check):
      print(f"replay buffer: {said}", flush=True)
    if "log_partition" in trained and len(collector.replay):  # far nearer than 0, where the LM rewards
      start = collector.replay.log_partition_bounds(len(task.examples), reward_temperature(config, 0))
      state = state.replace(trained=trained | {"log_partition": place(jnp.asarray(start), devices)})
  contract.write_config(workdir, config, everywhere)

  rows_per_step = config.train.num_queries * config.sampler.num_samples
  with (
    contextlib.closing(checkpoints),
    _open_writer(config, workdir, first_step) as writer,
    StepProfiler(config.profile and distributed.is_first(), workdir / "profile") as profiler,
  ):
    selection = Selection(config.train, workdir, f"{task.name}/validation/log_ratio_variance", _annealed_step(config))
    log = StepLog(writer, first_step, config.train.num_steps, config.train.log_every, rows_per_step)

    def save() -> None:
      log.flush()
      writer.publish()
      checkpoints.save(int(state.step), state, collector.to_arrays())

    try:
      # 5. The steps. Metrics of a step are read while the next one runs.
      steps = run.steps(state, range(first_step, config.train.num_steps), preemption.check)
      for step in range(first_step, config.train.num_steps):
        preemption.check()
        # Before the step, not after the last one: a run that goes on from a checkpoint of this step makes it too.
        if step and step % config.eval.every_steps == 0 and config.eval.num_validation:
          with log.paused():
            values, samples = suite.validate(
              state.trained["lora"], reward_temperature(config, step), key(data.EVALUATE, step), preemption.check
            )
            log.evaluation(step, values, samples)
            selection.consider(step, values, state.trained["lora"], pretrained)
          if selection.is_over():
            writer.say(f"no better evaluation since step {selection.best_step}: stopped after step {step}")
            break
        profiler.before_step()
        state, metrics, sampled = next(steps)
        done = step + 1
        log.step(done, metrics, sampled)
        if done % config.checkpoint.every_steps == 0:
          save()
      profiler.stop()
      checkpoints.wait()
      save()  # where it stopped early, too
      checkpoints.wait()

      # 6. The final evaluation, the adapter, the report.
      final_temperature = reward_temperature(config, config.train.num_steps)
      lora, learned_steps = state.trained["lora"], int(state.step)
      if config.train.keep == "best":
        values, _ = suite.validate(lora, final_temperature, key(data.EVALUATE, learned_steps), preemption.check)
        selection.consider(learned_steps, values, lora, pretrained)
        lora, learned_steps = place(selection.load(pretrained), devices), selection.best_step
        writer.say(f"the best evaluation was after step {selection.best_step}")
      if distributed.is_first():
        save_adapter(workdir / "adapter", jax.tree.map(np.asarray, lora), pretrained)
      distributed.wait_for_all("the adapter")
      tests = KeptRows(workdir / "tests.json", contract.config_hash(config), workdir / "adapter")
      results, samples = suite.test(
        lora, final_temperature, key(data.EVALUATE, 0), preemption.check, writer.say, tests.get
      )
      log.evaluation(int(state.step), results, samples)
      if distributed.is_first():
        contract.write_model_card(workdir, config, pretrained, results, task, final_temperature, learned_steps)
    except Preempted:  # between rounds: state and buffer are those of the last whole step
      checkpoints.wait()
      save()
      checkpoints.wait()
      print(f"SIGTERM: saved after step {int(state.step)}; run the same command to go on", flush=True)
      return EXIT_CODE
  if distributed.is_first():
    plots.plot_run(workdir, task.name)
    contract.write_results(workdir / "results.json", config, results, time.time() - started)
    tests.forget()
  distributed.wait_for_all("results.json")
  if results:  # an M-step is not tested by itself
    print(results_table(results))
  print(f"{workdir}: adapter/, results.json, samples.jsonl, plots/", flush=True)
  return 0
