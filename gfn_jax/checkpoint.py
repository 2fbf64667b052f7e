"""Orbax checkpoints of everything that decides the next step: train state and replay buffer. Orbax stays in here."""

import os
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from gfn_jax import distributed
from gfn_jax.files import absolute, reason, to_path


class Checkpoints:
  """Asynchronous saves into a folder; restores the newest whole one."""

  def __init__(self, folder: str | os.PathLike, keep: int | None):
    """`keep`: how many of the newest to keep; None for all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._folder = absolute(to_path(folder))
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(self, step: int, state: Any, replay: dict[str, np.ndarray]) -> None:
    """Starts to save; returns once the values have been copied. A step that stands already is left alone."""
    if step in self._manager.all_steps():
      return
    state = jax.tree.map(np.array, state)  # a host copy of our own: the device buffers will be donated
    # Orbax cannot write arrays without elements: an empty buffer's are left out.
    replay = {k: np.array(v) for k, v in replay.items() if v.size}
    items = {"state": ocp.args.StandardSave(state), "has_replay": ocp.args.JsonSave(bool(replay))}
    if replay:
      items["replay"] = ocp.args.StandardSave(replay)
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, like: Any) -> tuple[int, Any, dict[str, np.ndarray]] | None:
    """(step, state, replay arrays) of the newest checkpoint that restores, as NumPy arrays; None if there is none.

    Args:
      like: a state with the structure, shapes and dtypes to expect.

    Damaged ones that are newer are skipped with a warning, and deleted once an older one has been read: the run will
    write those steps again.

    Raises:
      ValueError: there are checkpoints and none restores; they are left as they are.
    """
    abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    damaged = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      found = self._read(step, abstract)
      if distributed.any_of(found is None):  # all take the same one
        damaged.append(step)
        continue
      for newer in damaged:
        self._manager.delete(newer)
      return step, *found
    if damaged:
      raise ValueError(f"{self._folder}: none of the checkpoints {sorted(damaged)} can be read: choose another folder")
    return None

  def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, np.ndarray]] | None:
    """State and replay arrays of one checkpoint; None, with a warning, where it cannot be read."""
    try:
      whole = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), has_replay=ocp.args.JsonRestore())
      )
      replay = {}
      if whole["has_replay"]:
        replay = self._manager.restore(step, args=ocp.args.Composite(replay=ocp.args.StandardRestore()))["replay"]
      return whole["state"], {k: np.asarray(v) for k, v in replay.items()}
    except jax.errors.JaxRuntimeError:  # another process has died: that says nothing about the checkpoint
      raise
    except Exception as e:  # whatever a half-written file makes Orbax raise
      logging.warning("checkpoint %d is damaged and skipped: %s", step, reason(e))
      return None

  def restore_adapter(self, step: int | None = None) -> tuple[int, dict] | None:
    """(step, the adapter's {projection: {"lora_a", "lora_b"}}) of one checkpoint, or of the newest that restores.

    Whatever model it belongs to; nothing is deleted. None if there is no such checkpoint, or it cannot be read.
    """
    for candidate in reversed(self.steps()):
      if step not in (None, candidate):
        continue
      try:
        whole = self._manager.restore(candidate, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
        return candidate, whole["state"]["trained"]["lora"]["params"]["layers"]
      except Exception as e:  # as in `restore`
        logging.warning("checkpoint %d cannot be read: %s", candidate, reason(e)[:200])
    return None

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def wait(self) -> None:
    """Until what was saved stands whole on disk. Raises what the save raised."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()
