"""Expectation-maximisation with latent Z (paper section 3.2 and 4.3): `run(config, workdir)`.

A round is two runs of `train`, each of which can be interrupted and goes on:

  round0/e   the E-step: a sampler q(Z | X) of the posterior under the LM as it is
  round0/m   the M-step: an adapter of the LM itself, fine-tuned on X, Y and Z drawn from q
  round1/e   a sampler of the posterior under that LM ...

The evaluation after each M-step samples reasons from q and concludes with the fine-tuned LM.
"""

from collections.abc import Callable
import json
import math
import os
import time

import jax
import ml_collections

from gfn_jax import data, distributed
from gfn_jax import workdir as contract
from gfn_jax.config import validate
from gfn_jax.evaluators.kept import KeptRows
from gfn_jax.experiment import build
from gfn_jax.files import Path, absolute, write_text
from gfn_jax.models import load_adapter
from gfn_jax.parallel import all_devices, num_shares, place
from gfn_jax.preemption import EXIT_CODE, Preempted, Preemption
from gfn_jax.results import measured, results_table
from gfn_jax.task import Task
from gfn_jax.tasks import require_abilities
from gfn_jax.train import reward_temperature, train

MICRO_BATCH = 32  # rows of one backward pass of the M-step


def e_step(config: ml_collections.ConfigDict, adapter: Path | None) -> ml_collections.ConfigDict:
  """The run that fits q; `adapter`: of the LM that the last M-step left."""
  step = config.copy_and_resolve_references()
  with step.unlocked():
    step.em.num_rounds = 0
    step.reward.adapter = config.reward.adapter if adapter is None else os.fspath(adapter)
  return step


def m_step(config: ml_collections.ConfigDict, rationales: Path, max_length: int) -> ml_collections.ConfigDict:
  """The run that fits a fresh adapter of the LM to `rationales`, supervised; `max_length`: tokens of Z and Y."""
  em, step = config.em, config.copy_and_resolve_references()
  with step.unlocked():
    step.method, step.em.num_rounds, step.em.rationales_path = "sft", 0, os.fspath(rationales)
    step.lora.init_from = step.reward.adapter = None
    step.sampler.min_length, step.sampler.max_length, step.sampler.num_samples = 0, max_length, 1
    step.train.num_queries = em.batch_size
    step.train.micro_batch_queries = math.gcd(em.batch_size * config.mesh.model // jax.device_count(), MICRO_BATCH)
    step.train.num_steps, step.train.learning_rate = em.num_steps, em.learning_rate
    step.train.warmup_steps, step.train.decay_steps = em.warmup_steps, 0
    step.train.keep, step.train.patience, step.eval.num_validation = "last", 0, 0
    step.train.max_staleness = 0
    step.eval.baselines, step.eval.evaluators, step.eval.test_evaluators = False, (), ()
  return step


def learned_length(config: ml_collections.ConfigDict, task: Task) -> int:
  """The most tokens that an M-step learns of a record: of Z and Y, or of a label.

  At that length a stop is free: where labels are as long as each other, nothing is learned of where they end.
  """
  if config.em.objective == "label":
    return max(len(task.encode_after(f" {label}")) for label in task.labels)
  return config.sampler.max_length + max(len(task.encode_after(e.target)) for e in task.examples)


def sample_rationales(
  config: ml_collections.ConfigDict, adapter: Path, output: Path, on_round: Callable[[], None]
) -> int:
  """Draws config.em.num_rationales Z a training query from q, at temperature 1, into JSON lines of X, Z, Y.

  Returns:
    The most tokens that an M-step learns of a record. Draws nothing where the file is there already.
  """
  parts, _ = build(config, jax.local_devices())
  task = parts.task
  if not distributed.any_of(output.exists()):
    queries = data.query_table(task.examples, task, parts.pretrained.config.max_positions, config.sampler.max_length)
    n = config.em.num_rationales
    z = parts.sampler.draw(
      place(load_adapter(adapter, parts.pretrained), parts.devices), queries.prompt_tokens, queries.prompt_mask,
      num_samples=n, temperature=1.0, key=data.step_key(config.seed, data.SAMPLE, config.train.num_steps),
      on_round=on_round,
    )  # fmt: skip
    rows = (task.decode(row[:length]) for row, length in zip(z.tokens.tolist(), z.length))
    records = [
      {"X": task.examples[i // n].prompt, "Z": text, "Y": task.examples[i // n].target} for i, text in enumerate(rows)
    ]
    if distributed.is_first():
      write_text(output, "".join(json.dumps(r) + "\n" for r in records))
    distributed.wait_for_all("the rationales")
  return learned_length(config, task)


def evaluate_pair(
  config: ml_collections.ConfigDict, sampler: Path, conclusions: Path, on_round: Callable[[], None]
) -> dict[str, float]:
  """The test of q's reasons with the fine-tuned LM's conclusions: "subj/gfn_sft/accuracy/10", ..."""
  step = e_step(config, conclusions)
  with step.unlocked():
    step.eval.baselines = False
  parts, suite = build(step, jax.local_devices())
  lora = place(load_adapter(sampler, parts.pretrained), parts.devices)
  key = data.step_key(config.seed, data.EVALUATE, 0)
  tests = KeptRows(conclusions.parent.parent / "tests.json", contract.config_hash(step), sampler, conclusions)
  results, _ = suite.test(lora, reward_temperature(config, config.train.num_steps), key, on_round, keep=tests.get)
  return {k.replace(f"/{config.method}/", f"/{config.method}_sft/", 1): v for k, v in results.items()}


def _require_same_steps(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Raises ValueError where reasons were drawn from a q of fewer or more steps, which M-steps have learned from."""
  if not any(workdir.glob("round*/rationales.jsonl")):
    return
  before = json.loads((workdir / "config.json").read_text())["config"]["train.num_steps"]
  if before != config.train.num_steps:
    raise ValueError(
      f"config.train.num_steps {config.train.num_steps}: workdir {os.fspath(workdir)!r} holds rounds of {before} steps "
      "and LMs that have learned from their reasons: choose another workdir"
    )


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> int:
  """Runs, or goes on with, config.em.num_rounds rounds in `workdir`; exit codes as of `train`.

  results.json has the last round's keys, and every round's with /round0, /round1, ... behind them.

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  with Preemption() as preemption:
    try:
      return _run(config, workdir, preemption)
    except Preempted:
      print("SIGTERM: between the steps of a round; run the same command to go on", flush=True)
      return EXIT_CODE


def _run(config: ml_collections.ConfigDict, workdir: str | os.PathLike, preemption: Preemption) -> int:
  started, devices = time.time(), all_devices()
  validate(config, num_shares(config.mesh.model))
  require_abilities(config)
  workdir = contract.prepare(config, workdir)
  workdir = absolute(workdir)  # steps' configs name files of other steps, and must not depend on how it was spelled
  if contract.finished_steps(workdir) >= config.train.num_steps:
    print(f"{workdir}: finished already; results in {workdir / 'results.json'}")
    return 0
  _require_same_steps(config, workdir)
  adapter, results = None, {}
  for index in range(config.em.num_rounds):
    folder = workdir / f"round{index}"
    print(f"round {index + 1} of {config.em.num_rounds}, E-step", flush=True)
    expectation = e_step(config, adapter)
    code = train(expectation.lock(), folder / "e", preemption)
    if not index:  # behind all that a slip can show in
      contract.write_config(workdir, config, devices)
    if code:
      return code
    sampler = folder / "e" / "adapter"
    rationales = folder / "rationales.jsonl"
    max_length = sample_rationales(expectation, sampler, rationales, preemption.check)
    print(f"round {index + 1} of {config.em.num_rounds}, M-step", flush=True)
    if code := train(m_step(config, rationales, max_length).lock(), folder / "m", preemption):
      return code
    adapter = folder / "m" / "adapter"
    pair = evaluate_pair(config, sampler, adapter, preemption.check)
    found = measured(json.loads((folder / "e" / "results.json").read_text())) | pair
    results |= found | {f"{k}/round{index}": v for k, v in found.items()}
  if distributed.is_first():
    contract.write_results(workdir / "results.json", config, results, time.time() - started)
    for index in range(config.em.num_rounds):
      (workdir / f"round{index}" / "tests.json").unlink(missing_ok=True)
  print(results_table({k: v for k, v in results.items() if "/round" not in k}))
  print(f"{workdir}: results.json, round0/ to round{config.em.num_rounds - 1}/", flush=True)
  return 0
