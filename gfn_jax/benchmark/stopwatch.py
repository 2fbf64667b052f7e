"""Timed calls: each is waited for, and remembers how many FLOPs its program makes."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from gfn_jax.flops import program_flops

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Call:
  """One call. `begin` and `end`: seconds of the clock. `trips`: of each `while_loop` in it."""

  name: str
  function: Callable
  args: tuple
  begin: float
  end: float
  trips: tuple[float, ...] = ()

  @property
  def seconds(self) -> float:
    return self.end - self.begin


class Stopwatch:
  """Calls, in their order. `calls` can be cleared between steps."""

  def __init__(self):
    self.calls: list[Call] = []
    self._flops: dict[Any, list[float]] = {}

  def __call__(self, name: str, function: Callable, *args: Any) -> Any:
    """`function(*args)`, when it is there."""
    # Shapes alone: an argument may be donated, and should not be kept alive.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, args)
    begin = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    self.calls.append(Call(name, function, shapes, begin, time.perf_counter()))
    return out

  def flops(self, call: Call) -> float:
    """Of the matrix products in the call's program, over all devices; each shape is traced once."""
    leaves, structure = jax.tree.flatten(call.args)
    shapes = tuple((getattr(x, "shape", ()), str(getattr(x, "dtype", type(x)))) for x in leaves)
    key = call.name, structure, shapes
    if key not in self._flops:
      count = functools.partial(program_flops, call.function, *call.args)
      # Of the program without its loops' bodies, and with each of these once.
      bodies = np.eye(len(call.trips) + 1, len(call.trips), -1).tolist()
      self._flops[key] = [count(while_trips=trips) for trips in bodies]
    once, *with_body = self._flops[key]
    return once + sum(trips * (flops - once) for trips, flops in zip(call.trips, with_body))


@contextlib.contextmanager
def in_place_of(owner: Any, name: str, function: Callable) -> Iterator[None]:
  """While it lasts, `function` is called where `owner`'s method of that name would be."""
  setattr(owner, name, function)
  try:
    yield
  finally:
    delattr(owner, name)


class CompileLog:
  """Counts the programs that XLA compiles. A context manager.

  Attributes:
    seconds: of each, in order; those that a compilation cache holds take little.
  """

  def __init__(self):
    self.seconds: list[float] = []

  def _on_event(self, event: str, seconds: float, **_: Any) -> None:
    if event == _COMPILED:
      self.seconds.append(seconds)

  def __enter__(self) -> "CompileLog":
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def __exit__(self, *exc) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_event)
