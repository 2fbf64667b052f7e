"""Several processes, one job."""

import jax


def initialize() -> None:
  """Joins the processes of a TPU pod, of a Slurm step, or of whatever else jax.distributed finds by itself.

  Called before JAX's backend starts. A process that cannot join must not go on: it would train alone, as one of many
  jobs in one workdir.

  Raises:
    ValueError: it could not join; or there is more than one process, with which training does not work yet.
  """
  try:
    jax.distributed.initialize()
  except (RuntimeError, ValueError, OSError) as e:
    raise ValueError(f"--multihost: jax.distributed.initialize failed: {e}") from e
  if jax.process_count() > 1:
    raise ValueError(f"--multihost: {jax.process_count()} processes; training with more than one is not supported yet")
