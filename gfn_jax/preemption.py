"""SIGTERM: note it, finish what must not be cut, save, and exit 143."""

import signal

from gfn_jax import distributed

EXIT_CODE = 128 + signal.SIGTERM


class Preempted(Exception):
  """Raised between device rounds once SIGTERM has come to any process of the job."""


class Preemption:
  """Catches SIGTERM while in use as a context. `check` raises `Preempted` where the caller can stop cleanly.

  All processes of a job call `check` at the same places, and all of them stop at the same one.
  """

  def __init__(self):
    self.requested = False

  def __enter__(self) -> "Preemption":
    self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *exc) -> None:
    signal.signal(signal.SIGTERM, self._previous)

  def _note(self, signum, frame) -> None:
    del signum, frame
    self.requested = True

  def check(self) -> None:
    if distributed.any_of(self.requested):
      raise Preempted
