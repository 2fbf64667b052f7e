"""python -m gfn_jax.main --config=configs/arith.py [--workdir=DIR] [--multihost] [--config.field=value ...]"""

from absl import flags

from gfn_jax import cli, distributed

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go; by default runs/<config>[-<variant>].")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Joins the job's other processes, on pods and on Slurm.")


def main() -> int:
  config = _CONFIG.value
  cli.prepare_jax(config)
  if _MULTIHOST.value:
    distributed.initialize()
  from gfn_jax import em, train  # after the switches above

  default = f"runs/{config.name}" + (f"-{config.variant}" if config.variant else "")
  workdir = _WORKDIR.value or default
  with distributed.failing_together():
    return em.run(config.lock(), workdir) if config.em.num_rounds else train.train(config.lock(), workdir)


if __name__ == "__main__":
  cli.launch(main)
