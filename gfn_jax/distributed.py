"""Several processes, one job: how they come together, what each of them does, and what all of them know.

Each process draws and scores its share of the queries on its own devices; `gather` then gives all of them the whole.
Where there is one process, its share is everything.
"""

from collections.abc import Iterator
import contextlib
import os
import sys
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# Seconds after which a process that sends no sign of life is dead, and the others end with a message.
HEARTBEAT_TIMEOUT = 30

# What jax.distributed.initialize does not read by itself, for jobs that nothing else describes.
_VARIABLES = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


def initialize() -> None:
  """Joins the processes of a TPU pod, of a Slurm step, or of whatever else jax.distributed finds by itself.

  Elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say where it stands.
  Called before JAX's backend starts. A process that cannot join must not go on: it would train alone, as one of many
  jobs in one workdir. Only the first process prints to stdout from here on; all of them do to stderr.

  Raises:
    ValueError: it could not join, or the processes have different numbers of devices.
  """
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is `Preemption`'s
  try:
    given = {name: int(os.environ[key]) for name, key in _VARIABLES.items() if key in os.environ}
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, shutdown_timeout_seconds=HEARTBEAT_TIMEOUT
    )
    processes, local, devices = jax.process_count(), jax.local_device_count(), jax.device_count()
  except (RuntimeError, ValueError, OSError) as e:
    raise ValueError(f"--multihost: jax.distributed.initialize failed: {e}") from e
  if local * processes != devices:
    raise ValueError(
      f"--multihost: {devices} devices, of which this one of {processes} processes has {local}: all must have as many"
    )
  _connect()
  if not is_first():
    sys.stdout = open(os.devnull, "w")


def _connect() -> None:
  """Lets every device meet its peers while all processes are here.

  The first collective of a group of devices sets up its connections, and a CPU's gives up after half a minute: later on
  a process that compiles for longer would end the job.
  """
  add = jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all", devices=jax.devices())
  settle(add(np.ones(jax.local_device_count(), np.float32)))
  wait_for_all("the start")


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Ends a process of several at once where its block fails, with exit code 2 for bad input and 1 for anything else.

  The others, which wait for it in a collective, then fail too. Python's own way out would have each wait for the rest.
  """
  try:
    yield
  except BaseException as e:
    if jax.process_count() == 1:
      raise
    bad_input = isinstance(e, ValueError | OSError) and not isinstance(e, ConnectionError | TimeoutError)
    if not bad_input:
      traceback.print_exc()
    who = f"process {jax.process_index()} of {jax.process_count()}"
    hint = "" if bad_input else "; if another process has died, what it said last is the cause"
    print(f"error: {who}: {' '.join(str(e).split()) or type(e).__name__}{hint}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if bad_input else 1)


def is_first() -> bool:
  """Whether this is the process that writes files."""
  return jax.process_index() == 0


def share(number: int) -> slice:
  """Which of `number` queries or rows are this process's: a block of ceil(number / processes), the last ones fewer."""
  size = -(-number // jax.process_count())
  begin = jax.process_index() * size
  return slice(min(begin, number), min(begin + size, number))


def gather(own: Any, number: int, rows: int = 1) -> Any:
  """The shares of all processes, in order, on each of them; called by all.

  Args:
    own: NumPy arrays [n * rows, ...], where n is the length of `share(number)`.
    number: of queries; `rows`: of each.

  Returns:
    The same tree of arrays [number * rows, ...].
  """
  if jax.process_count() == 1:
    return own
  size = -(-number // jax.process_count()) * rows
  padded = jax.tree.map(lambda x: np.pad(x, [(0, size - len(x))] + [(0, 0)] * (np.ndim(x) - 1)), own)
  whole = multihost_utils.process_allgather(padded, tiled=True)
  return jax.tree.map(lambda x: np.array(x)[: number * rows], whole)


def of_first(values: np.ndarray) -> np.ndarray:
  """What the first process passes; called by all, with arrays of one shape."""
  return values if jax.process_count() == 1 else np.array(multihost_utils.broadcast_one_to_all(values))


def settle(results: Any) -> None:
  """Until a computation over several processes is done; before `gather` and the like start the next one.

  Those of two programs at once can wait for each other for ever: CPUs run them in no order.
  """
  if jax.process_count() > 1:
    jax.block_until_ready(results)


def any_of(flag: bool) -> bool:
  """Whether the flag is set on any process; called by all."""
  return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def wait_for_all(where: str) -> None:
  """Until every process has come here, to the same place by name: what the first one wrote before it can be read."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)
