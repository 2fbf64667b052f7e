"""Samples from a base model, or from it and an adapter, beside log q and log R.

python -m gfn_jax.generate --config=configs/arith.py --adapter=runs/arith/adapter
python -m gfn_jax.generate --adapter=DIR --prompt="Once upon a time" --target=" They lived happily ever after."
"""

import json
from typing import Any

from absl import flags
import jax
import ml_collections
import numpy as np

from gfn_jax import cli
from gfn_jax.completions import FreeText
from gfn_jax.config import validate
from gfn_jax.data import query_table
from gfn_jax.draws import check_behavior
from gfn_jax.evaluators.records import sample_records
from gfn_jax.experiment import build
from gfn_jax.files import check_output, read_json, to_path, write_text
from gfn_jax.metrics import scores_text
from gfn_jax.models import Pretrained, load_adapter, load_pretrained
from gfn_jax.parallel import Devices, place
from gfn_jax.rewards import Reward, RewardModel
from gfn_jax.task import Task

MAX_LENGTH = 32  # tokens, where neither --max_length nor a config says


def base_of(adapter: str) -> tuple[str | None, str | None]:
  """The base model that an adapter names, if it does, and its revision. ValueError for a folder without an adapter."""
  file = to_path(adapter) / "adapter_config.json"
  if not file.is_file():
    raise ValueError(f"{adapter} is no adapter: {file.name} is missing")
  options = read_json(file)
  return options.get("base_model_name_or_path"), options.get("revision")


def load_model(
  name: str, revision: str | None, dtype: str, stop: str | None, target: str
) -> tuple[Pretrained, FreeText, Reward | None]:
  """A base for free text; with a target its reward is log p(Z target | X)."""
  pretrained = load_pretrained(name, dtype, revision=revision)
  task = FreeText(pretrained, stop=stop, target=target)
  return pretrained, task, Reward(RewardModel(pretrained, context=np.zeros(0, np.int32))) if target else None


def load_task(config: ml_collections.ConfigDict) -> tuple[Pretrained, Task, Any, Devices]:
  """Base, task and reward of a config, and the device, or the group of them, that holds the base."""
  validate(config, num_devices=1)  # of a training step, which there is none of
  parts, _ = build(config.lock(), jax.local_devices()[: config.mesh.model])
  return parts.pretrained, parts.task, parts.reward, parts.devices


def show(records: list[dict], num_samples: int) -> None:
  """A block a prompt, a row a sample, the likeliest first."""
  for begin in range(0, len(records), num_samples):
    rows = records[begin : begin + num_samples]
    target = f"  ->  {json.dumps(rows[0]['Y'], ensure_ascii=False)}" if rows[0].get("Y") else ""
    print(f"\n{json.dumps(rows[0]['X'], ensure_ascii=False)}{target}")
    for record in sorted(rows, key=lambda r: -r["log_q"]):
      print(f"  {scores_text(record)}  {json.dumps(record['Z'], ensure_ascii=False)}")


def main() -> int:
  f, config = flags.FLAGS, _CONFIG.value
  adapted, revision = base_of(f.adapter) if f.adapter else (None, None)
  model = f.model or adapted
  if config is None:
    if not f.prompt:
      raise ValueError('--prompt is missing, as in --prompt="Once upon a time"')
    if not model:
      raise ValueError("no model is named: --model, --config or the adapter_config.json of --adapter must name one")
  else:
    cli.prepare_jax(config)
    for flag in ("stop", "target"):
      if f[flag].value is not None:
        raise ValueError(f"--{flag}={f[flag].value}: the task of --config decides that")
    config.model.revision = None if f.model else config.model.revision
    config.model.name, config.model.dtype = f.model or config.model.name, f.dtype or config.model.dtype
  # What can be refused before a model is loaded, is.
  defaults = (MAX_LENGTH, 0) if config is None else (config.eval.max_length, config.sampler.min_length)
  max_length, min_length = (d if v is None else v for v, d in zip((f.max_length, f.min_length), defaults))
  check_behavior(max_length, min_length, np.array([f.temperature]), f.top_k, f.top_p)
  output = check_output(f.output) if f.output else None

  if config is None:
    revision = None if f.model else revision
    pretrained, task, reward = load_model(model, revision, f.dtype or "float32", f.stop, f.target or "")
    devices = jax.local_devices()[:1]
  else:
    pretrained, task, reward, devices = load_task(config)
  lora = place(load_adapter(f.adapter, pretrained), devices) if f.adapter else None
  examples = [task.example_of(p) for p in f.prompt or ()]
  examples = examples or [e for kind in task.validation_examples(1).values() for e in kind]
  if not examples:
    raise ValueError(f"--prompt is missing: the task {task.name!r} has no validation problems")
  rewarded = any(e.target or e.reward_prompt is not None for e in task.examples)
  if f.prompt and rewarded and not any(e.target for e in examples):
    reward = None  # of a prompt alone it would be another reward than the task's
  sampler = task.make_sampler(
    pretrained, max_length=max_length, min_length=min_length, top_k=f.top_k, top_p=f.top_p, devices=devices
  )
  demonstrations = 0 if config is None else config.reward.num_demonstrations
  reserved = len(task.context_tokens(demonstrations)) + max_length
  table = query_table(examples, task, pretrained.config.max_positions, reserved)
  z = sampler.draw(
    lora, table.prompt_tokens, table.prompt_mask, num_samples=f.num_samples, temperature=f.temperature,
    key=jax.random.key(f.seed),
  )  # fmt: skip
  records = sample_records(task, reward, table, z)
  policy = pretrained.source + (f" with {f.adapter}" if f.adapter else "")
  print(f"{policy}; in nats, at temperature 1: log q of Z and its stop" + (", log R of Z" if reward else ""))
  show(records, f.num_samples)
  if output is not None:
    write_text(output, "".join(json.dumps(r) + "\n" for r in records))
  return 0


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  flags.DEFINE_string("model", None, "The base: hub id or folder; by default the config's, or what --adapter names.")
  flags.DEFINE_string("adapter", None, "A folder with a PEFT adapter; without it the base samples.")
  flags.DEFINE_multi_string("prompt", None, "X; can be repeated. Without it, problems of the config's task.")
  flags.DEFINE_string("target", None, "Y: log R is then log p(Z Y | X) of the base.")
  flags.DEFINE_integer("num_samples", 4, "Of each prompt.", lower_bound=1)
  flags.DEFINE_float("temperature", 1.0, "Of sampling; 0 is greedy.")
  flags.DEFINE_integer("top_k", None, "Samples from the k most probable tokens.")
  flags.DEFINE_float("top_p", None, "Then from the fewest whose probability reaches p.")
  flags.DEFINE_integer("max_length", None, f"Of Z, in tokens; by default the config's, or {MAX_LENGTH}.")
  flags.DEFINE_integer("min_length", None, "Of Z, in tokens; by default the config's, or 0.")
  flags.DEFINE_string("stop", None, "The token that ends Z; by default the end of text.")
  flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_string("dtype", None, "Of the model in memory; by default the config's, or float32.")
  flags.DEFINE_string("output", None, "A file to write the samples to, a JSON object a line.")
  cli.launch(main, needs_config=False)
