"""An adapter and test problems in, results.json's keys out, without training.

python -m gfn_jax.evaluate --config=configs/arith.py --adapter=runs/arith/adapter --output=results.json

What is killed goes on with the method or decoder that it was at, which stand in results.json.part until the end.
"""

import functools
import pathlib
import time

from absl import flags
import jax
import ml_collections

from gfn_jax import cli, data
from gfn_jax.config import validate
from gfn_jax.evaluators.kept import KeptRows
from gfn_jax.experiment import build
from gfn_jax.files import check_output, to_path
from gfn_jax.models import load_adapter
from gfn_jax.parallel import place
from gfn_jax.results import results_table
from gfn_jax.train import reward_temperature
from gfn_jax.workdir import config_hash, git_commit, write_results


def evaluate(config: ml_collections.ConfigDict, adapter: str | None, part: pathlib.Path) -> dict[str, float]:
  """The final evaluation of `train`, for the adapter in a folder (None: the base alone).

  Args:
    part: the file that keeps what has been measured so far.

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  validate(config, num_devices=1)  # of a training step, which there is none of
  parts, suite = build(config, jax.local_devices())
  lora = place(load_adapter(adapter, parts.pretrained), parts.devices) if adapter else None
  # The same key and temperature as `train` uses at its end: the same adapter gives the same numbers.
  key = data.step_key(config.seed, data.EVALUATE, 0)
  problems = to_path(config.data.test_path).read_text() if config.data.test_path else ""
  tests = KeptRows(part, config_hash(config) + git_commit() + problems, *([to_path(adapter)] if adapter else []))
  say = functools.partial(print, flush=True)
  return suite.test(lora, reward_temperature(config, config.train.num_steps), key, say=say, keep=tests.get)[0]


def main() -> int:
  config = _CONFIG.value
  cli.prepare_jax(config)
  output = check_output(_OUTPUT.value)
  if output.name == "results.json" and (output.parent / "config.json").is_file():
    raise ValueError(f"--output={output} stands for the end of the run in {output.parent}: name another file")
  started = time.time()
  part = output.with_name(output.name + ".part")
  results = evaluate(config.lock(), _ADAPTER.value, part)
  write_results(output, config, results, time.time() - started)
  part.unlink(missing_ok=True)
  print(results_table(results))
  return 0


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _ADAPTER = flags.DEFINE_string("adapter", None, "A folder with a PEFT adapter; without it the base is evaluated.")
  _OUTPUT = flags.DEFINE_string("output", "results.json", "The file to write.")
  cli.launch(main)
