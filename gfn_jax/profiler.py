"""A jax.profiler trace of a few steps."""

import os

import jax

FIRST, LAST = 2, 5  # from and to, in steps that this process makes: past the compilations


class StepProfiler:
  """Traces steps FIRST to LAST of a loop into `folder`. A context manager; does nothing where not `enabled`."""

  def __init__(self, enabled: bool, folder: str | os.PathLike):
    self._enabled, self._folder, self._made, self._tracing = enabled, folder, 0, False

  def __enter__(self) -> "StepProfiler":
    return self

  def __exit__(self, *exc) -> None:
    self.stop()

  def before_step(self) -> None:
    """Starts or stops the trace where it is time to."""
    if self._enabled and self._made == FIRST:
      jax.profiler.start_trace(os.fspath(self._folder))
      self._tracing = True
    if self._made == LAST:
      self.stop()
    self._made += 1

  def stop(self) -> None:
    """Ends the trace, if it runs."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
