"""Times a config's own training steps: whole ones as they run, then ones whose phases are waited for one by one.

Phases are the calls of the run's own parts: nothing is computed that training does not compute. The loss, its gradient
and the optimiser are one program, and so are the reward's trunk and branches.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import datetime
import functools
import itertools
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from gfn_jax.benchmark import work
from gfn_jax.benchmark.peaks import copy_peak, matmul_peak
from gfn_jax.benchmark.stopwatch import CompileLog, Stopwatch, in_place_of
from gfn_jax.flops import decode_bytes
from gfn_jax.metrics import MetricsWriter, StepLog
from gfn_jax.models import LoraConfig
from gfn_jax.models.decoder import param_dtype
from gfn_jax.parallel import platform_of
from gfn_jax.rewards import Reward
from gfn_jax.sampler import crowds, shares_of
from gfn_jax.train import Run, set_up
from gfn_jax.types import Trajectory
from gfn_jax.version import __version__
from gfn_jax.workdir import git_commit

PHASES = ("prefill", "decode", "tool rounds", "reward", "loss and update", "host")
MIN_WARM_UP, MAX_WARM_UP = 2, 12  # steps; it is over with one that compiles nothing
NOTABLE_SECONDS = 0.1  # what compiles faster is a helper, no program of a step


def check_method(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a step has other phases than those timed here."""
  if config.method != "gfn":
    raise ValueError(f"config.method {config.method!r}: only steps of 'gfn' are timed")


class Steps:
  """Makes a run's steps one after the other, logged as in training. A context manager."""

  def __init__(self, config: ml_collections.ConfigDict, num_steps: int):
    """`num_steps`: about how many will be made."""
    self._config, self._num_steps, self._made = config, num_steps, 0
    self._stack, self.compiled = contextlib.ExitStack(), CompileLog()

  def __enter__(self) -> "Steps":
    """Sets up the run; `compiled` logs what is compiled from here on."""
    config, enter = self._config, self._stack.enter_context
    enter(self.compiled)
    enter(contextlib.redirect_stdout(sys.stderr))  # stdout is for the table
    self.run, self._state = set_up(config)
    self.run.collector.seed_replay()
    writer = enter(MetricsWriter(pathlib.Path(enter(tempfile.TemporaryDirectory())), 0, self._num_steps))
    rows = config.train.num_queries * config.sampler.num_samples
    self._log = StepLog(writer, 0, self._num_steps, config.train.log_every, rows)
    self._steps = None  # going on, of the run as it is
    return self

  def __exit__(self, *exc) -> None:
    self._stack.close()

  @property
  def lora(self) -> LoraConfig:
    """The adapter's."""
    return self._state.trained["lora"].config

  def step(self, run: Run) -> tuple[float, bool]:
    """The next step, by this run or one made of it: its seconds, and whether anything was compiled."""
    compiled, begin = len(self.compiled.seconds), time.perf_counter()
    if run is not self.run:  # for one step
      self._steps, steps = None, run.steps(self._state, range(self._made, self._made + 1))
    else:
      steps = self._steps = self._steps or run.steps(self._state, range(self._made, sys.maxsize))
    self._state, metrics, sampled = next(steps)
    self._made += 1
    self._log.step(self._made, metrics, sampled)
    return time.perf_counter() - begin, len(self.compiled.seconds) > compiled

  def wait(self) -> None:
    """Until the last step's update is done."""
    jax.block_until_ready(self._state)

  def warm_up(self) -> int:
    """Steps until one compiles nothing; how many."""
    compiled = True
    while self._made < MIN_WARM_UP or (compiled and self._made < MAX_WARM_UP):
      _, compiled = self.step(self.run)
    return self._made


def clean(once: Callable[[], tuple[Any, bool]], repeats: int) -> list[Any]:
  """What `once() -> (result, compiled)` gives in steps that compile nothing; others are made again, within reason."""
  results = []
  for _ in range(4 * repeats + MAX_WARM_UP):
    result, compiled = once()
    results += [] if compiled else [result]
    if len(results) == repeats:
      break
  return results or [result]


class PhaseTimer:
  """A run whose steps are waited for phase by phase, and counted by hand."""

  def __init__(self, steps: Steps):
    self._steps, self._watch = steps, Stopwatch()
    self._run = dataclasses.replace(steps.run, update=self._update)
    self._fresh: tuple[np.ndarray, Trajectory, np.ndarray] | None = None
    self._batch: Any = None

  @contextlib.contextmanager
  def attached(self) -> Iterator[None]:
    """While it lasts, timed calls stand where the parts' methods would be."""
    parts, collector, watch = self._run.parts, self._run.collector, self._watch
    prefill, decode, score = parts.sampler.prefill, parts.sampler.decode, collector.score

    def timed_decode(lora, prefix, temperature, state):
      active, length = np.array(state.active), np.array(state.length)  # before the state is donated
      state = watch("decode", decode, lora, prefix, temperature, state)
      shares = shares_of(parts.pretrained.config, platform_of(parts.devices))
      watch.calls[-1].trips = work.decode_trips(crowds(active[0].size, shares), active, length, state)
      return state

    def timed_score(score_trees, *args):
      results = watch("reward", score_trees, *args)
      watch.calls[-1].trips = (float(args[-1]),)  # where it goes from block to block
      return results

    def seen(ids, z, wanted):
      self._fresh = ids, z, wanted
      return score(ids, z, wanted)

    with contextlib.ExitStack() as stack:
      place = lambda *args: stack.enter_context(in_place_of(*args))  # noqa: E731
      place(parts.sampler, "prefill", functools.partial(watch, "prefill", prefill))
      place(parts.sampler, "decode", timed_decode)
      place(collector, "score", seen)
      if isinstance(parts.reward, Reward):  # a known reward asks no model
        for model in filter(None, (parts.reward.model, parts.reward.prior)):
          place(model, "score_trees", functools.partial(timed_score, model.score_trees))
      yield

  def _update(self, *args):
    self._batch = args[-1]
    out = self._watch("loss and update", self._steps.run.update, *args)
    self._watch.calls[-1].trips = (float(np.ravel(self._batch.trees.num_bins)[0]),)  # where it goes from bin to bin
    return out

  def once(self) -> tuple[dict[str, dict[str, float]], bool]:
    """A step: name of a phase -> its `seconds`, `flops_by_hand`, `flops_run`, ...; whether anything was compiled."""
    self._watch.calls.clear()
    self._fresh = None
    seconds, compiled = self._steps.step(self._run)
    return self._phases(seconds), compiled

  def _phases(self, seconds: float) -> dict[str, dict[str, float]]:
    found = {name: {"seconds": 0.0, "flops_by_hand": 0.0, "flops_run": 0.0} for name in PHASES}
    for call in self._watch.calls:
      found[call.name]["seconds"] += call.seconds
      found[call.name]["flops_run"] += self._watch.flops(call)
    rounds = [call for call in self._watch.calls if call.name == "decode"]
    found["tool rounds"]["seconds"] = sum(b.begin - a.end for a, b in itertools.pairwise(rounds))
    found["host"]["seconds"] = seconds - sum(phase["seconds"] for phase in found.values())
    if self._fresh is not None:  # None where every query of the step was replayed
      self._count_sampling(found, sum(sum(call.trips) for call in rounds))
      self._count_reward(found["reward"])
    parts, batch = self._run.parts, self._batch
    prompt = self._run.collector.table[np.ravel(batch.query_ids)].prompt_mask.sum(-1)
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    learned = work.prompts(prompt)
    learned += work.prefixes(prompt, tokens, batch.length.ravel(), parts.config.sampler.max_length)
    found["loss and update"]["flops_by_hand"] = learned.with_gradient(parts.pretrained.config, self._steps.lora)
    return found

  def _count_sampling(self, found: dict[str, dict[str, float]], trips: float) -> None:
    """Adds what prefill and decode must compute and, in `trips` of its loop on each device, read."""
    parts, (ids, z, _), lora = self._run.parts, self._fresh, self._steps.lora
    model, prompt_mask = parts.pretrained.config, self._run.collector.table[ids].prompt_mask
    prompt, sampler = prompt_mask.sum(-1), parts.config.sampler
    rows = work.samples(np.repeat(prompt, sampler.num_samples), z.length, sampler.max_length)
    found["prefill"]["flops_by_hand"] = work.prompts(prompt).forward(model, lora)
    itemsize = param_dtype(parts.params).itemsize
    read = functools.partial(
      decode_bytes, model, lora, itemsize=itemsize, kernel_itemsize=1 if parts.config.model.quantization else itemsize
    )
    # A trip reads the weights, and each prompt's keys once; a token those of its own row.
    weights, keys = read(keys=0), trips * prompt_mask.sum() + (z.length * (z.length + 1.0) / 2).sum()
    found["decode"] |= {
      "flops_by_hand": rows.forward(model, lora),
      "tokens": float(z.length.sum()),
      "bytes": trips * len(parts.devices) * weights + read(keys=keys) - weights,
    }

  def _count_reward(self, phase: dict[str, float]) -> None:
    """Adds what the frozen LM must compute, trunk and branches apart."""
    parts, (ids, z, wanted) = self._run.parts, self._fresh
    if not isinstance(parts.reward, Reward):
      return
    queries = self._run.collector.table[ids]
    context = len(parts.task.context_tokens(parts.config.reward.num_demonstrations))
    _, target_mask = parts.reward.targets(queries)
    passes = work.rewards(queries.reward_prompt_mask.sum(-1), target_mask.sum(-1), z, context, wanted)
    for name, one in zip(("trunk", "branches"), passes):
      phase |= {f"flops_{name}": one.forward(parts.pretrained.config, None), f"tokens_{name}": float(one.tokens)}
      phase["flops_by_hand"] += phase[f"flops_{name}"]


def median_phases(steps: list[dict[str, dict[str, float]]], matmul: float, copy: float) -> dict[str, dict[str, float]]:
  """Of several steps, phase by phase and number by number; rates are medians of the steps' own."""
  found = {}
  for name in PHASES:
    mine = [dict(step[name]) for step in steps]
    for phase in mine:
      if phase["flops_run"] and phase["seconds"]:
        phase["flops_per_second"] = phase["flops_run"] / phase["seconds"]
        phase["share_of_matmul_peak"] = phase["flops_per_second"] / matmul
      if phase.get("bytes"):
        phase["bytes_per_second"] = phase["bytes"] / phase["seconds"]
        phase["share_of_copy_peak"] = phase["bytes_per_second"] / copy
    found[name] = {k: statistics.median(p[k] for p in mine if k in p) for k in {k: 0 for p in mine for k in p}}
  return found


def measure(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
  """What a step of a validated config costs.

  Args:
    repeats: steps, of either kind, of which the medians are taken.

  Returns:
    Plain JSON: seconds, FLOPs, bytes and rates, under the names of the table.
  """
  devices = jax.local_devices()
  with Steps(config, MAX_WARM_UP + 2 * repeats) as steps:
    warm_up = steps.warm_up()
    whole = clean(lambda: steps.step(steps.run), repeats)
    steps.wait()
    timer = PhaseTimer(steps)
    with timer.attached():
      phased = clean(timer.once, repeats)
    compiled, parts = steps.compiled.seconds, steps.run.parts
  memory, of = peak_memory(devices)  # before the peaks, which have arrays of their own
  dtype = param_dtype(parts.params)
  matmul, copy = matmul_peak(dtype, devices), copy_peak(devices)
  phases = median_phases(phased, matmul, copy)
  seconds = statistics.median(whole)
  rows = config.train.num_queries * config.sampler.num_samples
  return {
    "config": f"{config.name}{':' if config.variant else ''}{config.variant}",
    "model": parts.pretrained.source,
    "parameters": sum(x.size for x in jax.tree.leaves(parts.params)),
    "dtype": config.model.quantization or dtype.name,
    "num_queries": config.train.num_queries,
    "num_samples": config.sampler.num_samples,
    "max_length": config.sampler.max_length,
    "repeats": repeats,
    "warm_up_steps": warm_up,
    "step_seconds": seconds,
    "step_seconds_all": whole,
    "trajectories_per_second": rows / seconds,
    "tokens_per_second": phases["decode"].get("tokens", 0.0) / seconds,
    "phases": phases,
    "matmul_peak_flops_per_second": matmul,
    "copy_peak_bytes_per_second": copy,
    "compiled_programs": len(compiled),
    "compiled_notable_programs": sum(s > NOTABLE_SECONDS for s in compiled),
    "compile_seconds": sum(compiled),
    "peak_memory_bytes": memory,
    "peak_memory_of": of,
    "devices": [str(d) for d in devices],
    "device_kind": devices[0].device_kind,
    "versions": {"gfn_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
    "commit": git_commit(),
    "date": datetime.date.today().isoformat(),
  }


def peak_memory(devices: Sequence[jax.Device]) -> tuple[int, str]:
  """Bytes, and of what: the fullest device, or the process where devices do not tell."""
  stats = [d.memory_stats() or {} for d in devices]
  if all("peak_bytes_in_use" in s for s in stats):
    return max(s["peak_bytes_in_use"] for s in stats), "device"
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
