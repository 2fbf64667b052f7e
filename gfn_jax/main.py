"""python -m gfn_jax.main --config=configs/arith.py [--workdir=DIR] [--config.field=value ...]"""

from absl import flags

from gfn_jax import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go; by default runs/<config>[-<variant>].")


def main() -> int:
  config = _CONFIG.value
  cli.prepare_jax(config)
  from gfn_jax import em, train  # after the switches above

  default = f"runs/{config.name}" + (f"-{config.variant}" if config.variant else "")
  workdir = _WORKDIR.value or default
  return em.run(config.lock(), workdir) if config.em.num_rounds else train.train(config.lock(), workdir)


if __name__ == "__main__":
  cli.launch(main)
