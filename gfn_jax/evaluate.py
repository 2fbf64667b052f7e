"""An adapter and test problems in, results.json's keys out, without training.

python -m gfn_jax.evaluate --config=configs/arith.py --adapter=runs/arith/adapter --output=results.json
"""

import json
import pathlib

from absl import flags
import jax
import ml_collections
import numpy as np

from gfn_jax import cli, data, workdir
from gfn_jax.config import validate
from gfn_jax.evaluators.suite import Suite
from gfn_jax.metrics import write_text
from gfn_jax.models import load_adapter, load_pretrained
from gfn_jax.parallel import place
from gfn_jax.report import accuracy_table
from gfn_jax.rewards import RewardModel
from gfn_jax.sampler import Sampler
from gfn_jax.tasks import make_task
from gfn_jax.train import reward_temperature


def evaluate(config: ml_collections.ConfigDict, adapter: str | None) -> dict[str, float]:
  """The final evaluation of `train`, for the adapter in a folder (None: the base alone).

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  devices = jax.local_devices()
  validate(config, len(devices))
  pretrained = load_pretrained(config.model.name, config.model.dtype)
  params = place(pretrained.params, devices)
  task = make_task(config, pretrained.tokenizer, pretrained.config.vocab_size)
  lora = place(load_adapter(adapter, pretrained), devices) if adapter else None
  sampler = Sampler(
    pretrained.config, params, allowed_tokens=task.allowed_tokens, stop_token_id=task.stop_token_id, tool=task.tool,
    max_length=config.sampler.max_length, min_length=config.sampler.min_length, devices=devices,
  )  # fmt: skip
  reward_model = RewardModel(
    pretrained, params=params, context=np.array(task.context_tokens(config.reward.num_demonstrations), np.int32),
    allowed_tokens=task.allowed_tokens if config.reward.renormalize else None, devices=devices,
  )  # fmt: skip
  suite = Suite(config, task, pretrained, params, sampler, reward_model, devices)
  # The same key and temperature as `train` uses at its end: the same adapter gives the same numbers.
  key = data.step_key(config.seed, data.EVALUATE, 0)
  return suite.test(lora, reward_temperature(config, config.train.num_steps), key)[0]


def main() -> int:
  config = _CONFIG.value
  cli.prepare_jax(config)
  output = pathlib.Path(_OUTPUT.value)
  if not output.parent.is_dir():
    raise ValueError(f"--output={output}: the folder {output.parent} does not exist")
  if output.is_dir():
    raise ValueError(f"--output={output} is a folder: name the file to write")
  results = evaluate(config.lock(), _ADAPTER.value)
  record = results | {
    "meta/seed": config.seed,
    "meta/commit": workdir.git_commit(),
    "meta/config_hash": workdir.config_hash(config),
  }
  write_text(output, json.dumps(record, indent=2, sort_keys=True) + "\n")
  print(accuracy_table(results, config.task))
  return 0


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _ADAPTER = flags.DEFINE_string("adapter", None, "A folder with a PEFT adapter; without it the base is evaluated.")
  _OUTPUT = flags.DEFINE_string("output", "results.json", "The file to write.")
  cli.launch(main)
