"""An adapter and test problems in, results.json's keys out, without training.

python -m gfn_jax.evaluate --config=configs/arith.py --adapter=runs/arith/adapter --output=results.json
"""

import json
import pathlib

from absl import flags
import jax
import ml_collections

from gfn_jax import cli, data, workdir
from gfn_jax.config import validate
from gfn_jax.experiment import build
from gfn_jax.metrics import write_text
from gfn_jax.models import load_adapter
from gfn_jax.parallel import place
from gfn_jax.report import accuracy_table
from gfn_jax.train import reward_temperature


def evaluate(config: ml_collections.ConfigDict, adapter: str | None) -> dict[str, float]:
  """The final evaluation of `train`, for the adapter in a folder (None: the base alone).

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  devices = jax.local_devices()
  validate(config, len(devices))
  experiment = build(config, devices)
  lora = place(load_adapter(adapter, experiment.pretrained), devices) if adapter else None
  # The same key and temperature as `train` uses at its end: the same adapter gives the same numbers.
  key = data.step_key(config.seed, data.EVALUATE, 0)
  return experiment.suite.test(lora, reward_temperature(config, config.train.num_steps), key)[0]


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
