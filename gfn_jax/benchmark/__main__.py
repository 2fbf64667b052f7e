"""What a training step costs, phase by phase, beside the matmul and copy peaks of the machine.

python -m gfn_jax.benchmark --config=configs/arith.py [--repeats=5] [--output=FILE]
python -m gfn_jax.benchmark --config=configs/arith.py --sweep=samples
"""

import json
import pathlib
import tempfile

from absl import flags
import jax

from gfn_jax import cli
from gfn_jax.benchmark import tables
from gfn_jax.benchmark.measure import check_method, measure
from gfn_jax.benchmark.sweep import KINDS, sweep
from gfn_jax.config import validate
from gfn_jax.files import check_output, write_text
from gfn_jax.parallel import num_shares


def main() -> int:
  f, config = flags.FLAGS, _CONFIG.value
  cli.prepare_jax(config)
  jax.config.update("jax_enable_compilation_cache", False)  # what it compiles takes as long as at the first time
  check_method(config)
  validate(config, num_shares(config.mesh.model))
  output = check_output(f.output) if f.output else None
  if f.sweep:
    with tempfile.TemporaryDirectory() as folder:
      results = list(sweep(config, f.sweep, f.repeats, pathlib.Path(folder)))
    print(tables.sweep_table(f.sweep, results))
    record = {"sweep": f.sweep, "exponents": tables.sweep_exponents(results), "results": results}
  else:
    record = measure(config, f.repeats)
    print(f"{tables.phase_table(record)}\n\n{tables.notes(record)}")
  if output is not None:
    write_text(output, json.dumps(record, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  flags.DEFINE_integer("repeats", 5, "Steps of which the medians are taken.", lower_bound=1)
  flags.DEFINE_enum("sweep", None, KINDS, "What grows, from the config's own size to 4 times that.")
  flags.DEFINE_string("output", None, "A file to write the same numbers to, as JSON.")
  cli.launch(main)
