"""Full supervised fine-tuning of a causal LM on a user's texts.

python -m gfn_jax.finetune --config=configs/finetune.py --config.data.path=texts.txt --output=FOLDER

Every parameter learns by the likelihood of whole texts and of their end. It makes base models: the paper's infilling
rewards come from a GPT-2 Large that was fine-tuned on stories (section 4.2, appendix C). At the end FOLDER is written
whole, an ordinary Hugging Face folder with the model of the last epoch; until then everything is in FOLDER.run, and the
same command goes on from there.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from gfn_jax import cli, texts
from gfn_jax import workdir as contract
from gfn_jax.checkpoint import Checkpoints
from gfn_jax.config import flatten, require_fields
from gfn_jax.files import local_path, read_json, replacing, write_text
from gfn_jax.likelihood import make_optimizer, next_token_terms
from gfn_jax.metrics import MetricsWriter, StepLog, read_jsonl
from gfn_jax.models import Pretrained, load_pretrained, save_pretrained
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.parallel import DATA_AXIS, place, split
from gfn_jax.preemption import EXIT_CODE, Preempted, Preemption
from gfn_jax.types import TrainState
from gfn_jax.version import __version__

RECORD = "finetune.json"  # in the finished folder: config, versions, commit, devices
DTYPES = ("float32", "bfloat16")  # float16's gradients would vanish
KEEP = 2  # checkpoints
MAX_GROUPS = 4  # of like length, that a batch is laid out in

_POSITIVE = (
  "train.num_epochs", "train.batch_size", "train.learning_rate", "train.clip_norm", "train.log_every",
)  # fmt: skip
_NATURAL = ("seed", "train.micro_batch", "train.warmup_steps", "train.weight_decay", "data.validation_share")
_OTHERS = ("model.name", "model.revision", "model.dtype", "data.path", "data.field")

_CARD = """---
license: {licence}
base_model: {base}
---

# {base}, fine-tuned on texts

All parameters, {epochs} epochs of {texts:,} texts, seed {seed}, gfn_jax {version}; `{record}` has every setting.
{measured}.
"""

Total = tuple[Any, Any, Any]  # nats, tokens, and the gradient of nats; sums


def validate(config: Any, num_devices: int) -> None:
  """Checks every field and rule between fields.

  Raises:
    ValueError: one line that names the value, the rule and the choices.
  """
  require_fields(config, _POSITIVE + _NATURAL + _OTHERS)
  flat, t = flatten(config), config.train
  for field in _POSITIVE:
    if not 0 < flat[field] < math.inf:
      raise ValueError(f"config.{field} is {flat[field]}: must be positive")
  for field in _NATURAL:
    if not 0 <= flat[field] < math.inf:
      raise ValueError(f"config.{field} is {flat[field]}: must not be negative")
  if config.data.validation_share >= 1:
    raise ValueError(f"config.data.validation_share is {config.data.validation_share}: must be below 1")
  if config.model.dtype not in DTYPES:
    raise ValueError(f"config.model.dtype {config.model.dtype!r} is unknown here: choose from {', '.join(DTYPES)}")
  if not config.data.path:
    raise ValueError("config.data.path is missing: name a file of texts, as in --config.data.path=texts.txt")
  if t.batch_size % num_devices:
    raise ValueError(f"config.train.batch_size {t.batch_size} is not divisible by the {num_devices} devices")
  if t.micro_batch and (t.batch_size // num_devices) % t.micro_batch:
    raise ValueError(
      f"config.train.batch_size {t.batch_size} on {num_devices} devices is not divisible by config.train.micro_batch "
      f"{t.micro_batch}"
    )


def loss_terms(
  model: ModelConfig, dtype: str, params: dict, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`next_token_terms`, computed in `dtype`: (nats, tokens), both float32."""
  return next_token_terms(model, jax.tree.map(lambda x: x.astype(dtype), params), tokens, mask)


def accumulate(
  model: ModelConfig, dtype: str, micro_batch: int, params: dict, total: Total, tokens: jax.Array, mask: jax.Array
) -> Total:
  """Adds the loss and the gradient of some rows to the totals, `micro_batch` rows at a time.

  Written for one device's share [R, N] of the rows, mapped over the axis `data`; returns the same on every device.
  """
  micro_batches = jax.tree.map(lambda x: x.reshape(-1, micro_batch, x.shape[-1]), (tokens, mask))

  def add(own, micro):
    terms = functools.partial(loss_terms, model, dtype)
    (nats, count), grads = jax.value_and_grad(terms, has_aux=True)(params, *micro)
    return jax.tree.map(jnp.add, own, (nats, count, grads)), None

  own, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, total), micro_batches)
  return jax.tree.map(jnp.add, total, jax.lax.psum(own, DATA_AXIS))


def update(
  optimizer: optax.GradientTransformation, state: TrainState, total: Total
) -> tuple[TrainState, Total, dict[str, jax.Array]]:
  """A step by the mean over all tokens that went into `total`: the new state, totals of 0 for the next one, metrics."""
  nats, count, grads = total
  grads = jax.tree.map(lambda g: g / count, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  state = TrainState(state.step + 1, optax.apply_updates(state.trained, updates), opt_state)
  metrics = {"loss": nats / count, "grad_norm": optax.tree.norm(grads)}
  return state, jax.tree.map(jnp.zeros_like, total), metrics


def held_out_terms(
  model: ModelConfig, dtype: str, params: dict, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(nats, tokens) of some rows, of which this is one device's share; the sums over all of them."""
  return jax.lax.psum(loss_terms(model, dtype, params, tokens, mask), DATA_AXIS)


def finetune(config: ml_collections.ConfigDict, output: str | pathlib.Path) -> int:
  """Runs, or goes on with, a fine-tuning; the exit code: 0 when `output` stands, 143 after SIGTERM.

  The order of the texts is a function of (seed, epoch) and there is no dropout, so a run that was interrupted ends with
  the same bits.

  Raises:
    ValueError: a slip of the user's, in one line.
    FloatingPointError: a loss that is not finite, naming the step.
  """
  # 1. Check everything that can be checked before a model is loaded.
  devices, output = jax.local_devices(), local_path(output)
  validate(config, len(devices))
  lines = texts.read_texts(config.data.path, config.data.field)
  config = config.copy_and_resolve_references()
  with config.unlocked(), open(config.data.path, "rb") as file:  # a run does not go on with other texts
    config.data.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  work = output.with_name(output.name + ".run")
  if (output / RECORD).is_file():
    contract.require_same_config(config, output / RECORD)
    shutil.rmtree(work, ignore_errors=True)
    print(f"{output}: finished already")
    return 0
  if output.exists() and not (output.is_dir() and not any(output.iterdir())):
    raise ValueError(f"--output={output} exists, and nothing is written over: name another folder")
  contract.prepare(config, work)

  # 2. The rows and the model.
  t = config.train
  pretrained = load_pretrained(config.model.name, revision=config.model.revision)
  model, longest = pretrained.config, pretrained.config.max_positions
  rows, num_cut = texts.tokenize(lines, pretrained, config.data.path)
  training, held_out = ([rows[i] for i in ids] for ids in texts.split(len(rows), config.data.validation_share))
  epoch_steps = math.ceil(len(training) / t.batch_size)
  num_steps = t.num_epochs * epoch_steps
  if t.warmup_steps >= num_steps:
    raise ValueError(
      f"config.train.warmup_steps {t.warmup_steps} must be below the run's {num_steps} steps ({t.num_epochs} epochs of "
      f"{len(training)} texts, {t.batch_size} a step)"
    )

  # 3. State, and what runs on the devices.
  optimizer = make_optimizer(t.learning_rate, t.warmup_steps, num_steps, t.weight_decay, t.clip_norm)
  params = pretrained.params
  state = place(TrainState(jnp.int32(0), params, optimizer.init(params)), devices)
  total = place((jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), devices)
  micro_batch = t.micro_batch or t.batch_size // len(devices)
  num_micro_batches = t.batch_size // (len(devices) * micro_batch)
  over_devices = functools.partial(jax.pmap, axis_name=DATA_AXIS, out_axes=None, devices=devices)
  add = over_devices(
    functools.partial(accumulate, model, config.model.dtype, micro_batch), in_axes=(None, None, 0, 0), donate_argnums=1
  )
  measure = over_devices(functools.partial(held_out_terms, model, config.model.dtype), in_axes=(None, 0, 0))
  step_once = jax.jit(functools.partial(update, optimizer), donate_argnums=(0, 1))

  # 4. Go on from the newest whole checkpoint.
  checkpoints = Checkpoints(work / "checkpoints", KEEP)
  restored = checkpoints.restore(state)
  first_step = 0
  if restored is not None:
    first_step, state = restored[0], place(restored[1], devices)
  contract.write_config(work, config, devices)
  count = sum(x.size for x in jax.tree.leaves(params))
  cut = f"; {num_cut} cut at the model's {longest} positions, without their end" if num_cut else ""
  print(
    f"model     {pretrained.source} ({model.family}, {count:,} parameters, computed in {config.model.dtype})\n"
    f"texts     {len(training):,} to train on ({sum(map(len, training)):,} tokens), {len(held_out):,} held out{cut}\n"
    f"devices   {len(devices)} x {devices[0].device_kind}\n"
    f"batch     {t.batch_size} texts, {micro_batch} in each of {num_micro_batches} backward passes a device\n"
    f"steps     {first_step} of {num_steps} made, {epoch_steps} an epoch; losses in nats a token\n"
    f"output    {output} at the end, until then {work}",
    flush=True,
  )
  del params, lines, restored
  pretrained = dataclasses.replace(pretrained, params={})  # they would stand in memory twice

  with Preemption() as preemption, MetricsWriter(work, first_step, num_steps) as writer:
    log = StepLog(writer, first_step, num_steps, t.log_every, t.batch_size, "texts")

    @log.paused()
    def evaluate(epoch: int) -> None:
      """Measures the texts held out, after `epoch` epochs."""
      if not held_out:
        return
      share = len(devices) * micro_batch
      groups, sums = math.ceil(len(held_out) / share), []
      for group in texts.lay_out(held_out, groups * share, groups, longest):
        preemption.check()
        sums.append(measure(state.trained, *split(group, devices)))
      nats, tokens = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
      loss = float(nats / tokens)
      values = {"epoch": epoch, "validation_loss": loss, "validation_perplexity": float(np.exp(loss))}
      log.evaluation(epoch * epoch_steps, {f"finetune/{k}": v for k, v in values.items()}, [])

    try:
      # 5. The epochs. A step's loss is read while the next one runs.
      for epoch in range(first_step // epoch_steps, t.num_epochs):
        order = texts.epoch_order(config.seed, epoch, len(training))
        if first_step <= epoch * epoch_steps:
          evaluate(epoch)
        for step in range(max(first_step, epoch * epoch_steps), (epoch + 1) * epoch_steps):
          preemption.check()
          begin = (step - epoch * epoch_steps) * t.batch_size
          batch = [training[i] for i in order[begin : begin + t.batch_size]]
          for group in texts.lay_out(batch, t.batch_size, math.gcd(MAX_GROUPS, num_micro_batches), longest):
            total = add(state.trained, total, *split(group, devices))
          state, total, metrics = step_once(state, total)
          log.step(step + 1, metrics, {})
        log.flush()
        checkpoints.save((epoch + 1) * epoch_steps, state, {})
      evaluate(t.num_epochs)
      checkpoints.wait()
    except Preempted:
      log.flush()
      checkpoints.wait()
      checkpoints.save(int(state.step), state, {})
      checkpoints.wait()
      print(f"SIGTERM: saved after step {int(state.step)}; run the same command to go on", flush=True)
      return EXIT_CODE
    finally:
      checkpoints.close()

  # 6. The model, whole or not at all.
  tuned = dataclasses.replace(pretrained, params=jax.device_get(state.trained))
  write_model(output, work, config, tuned, len(training))
  shutil.rmtree(work)
  return 0


def write_model(
  output: pathlib.Path, work: pathlib.Path, config: ml_collections.ConfigDict, tuned: Pretrained, num_texts: int
) -> None:
  """The folder: model and tokenizer, a model card, the run's settings (`RECORD`) and its metrics.jsonl."""
  losses = [r for r in read_jsonl(work / "metrics.jsonl") if "finetune/validation_loss" in r]
  measured = "no texts were held out"
  if losses:
    before, after = (f"{r['finetune/validation_loss']:.4g}" for r in (losses[0], losses[-1]))
    perplexity = losses[-1]["finetune/validation_perplexity"]
    measured = f"held-out texts: {before} nats a token before, {after} after, perplexity {perplexity:.4g}"
  with replacing(output) as temporary:
    shutil.rmtree(temporary, ignore_errors=True)  # of a session that was killed while it wrote
    save_pretrained(temporary, tuned)
    shutil.copy(work / "metrics.jsonl", temporary)
    write_text(temporary / RECORD, json.dumps(read_json(work / "config.json"), indent=2) + "\n")
    write_text(
      temporary / "README.md",
      _CARD.format(
        licence=tuned.licence, base=tuned.source, epochs=config.train.num_epochs, texts=num_texts, seed=config.seed,
        version=__version__, record=RECORD, measured=measured[0].upper() + measured[1:],
      ),
    )  # fmt: skip
  print(f"{output}: written; {measured}", flush=True)


def main() -> int:
  if not _OUTPUT.value:
    raise ValueError("--output is missing: name the folder to write, as in --output=runs/finetuned")
  return finetune(_CONFIG.value, _OUTPUT.value)


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _OUTPUT = flags.DEFINE_string("output", None, "The folder to write.")
  cli.launch(main)
