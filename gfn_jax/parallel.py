"""Devices, meshes, placement, and how a step is mapped over them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from gfn_jax.models.partition import MODEL_AXIS

DATA_AXIS = "data"


def replicated(devices: Sequence[jax.Device]) -> NamedSharding:
  """One whole copy on each device."""
  return NamedSharding(Mesh(np.array(devices), (DATA_AXIS,)), PartitionSpec())


def place(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Puts one copy of `tree` on each device, once: a mapped function broadcasts what stands elsewhere at each call."""
  return jax.device_put(tree, replicated(devices))


def all_devices() -> list[jax.Device]:
  """Of all processes, each process's own together."""
  return sorted(jax.devices(), key=lambda d: (d.process_index, d.id))


def split(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Leading axis [D * n, ...] -> [d, n, ...], as `jax.pmap` takes it.

  Args:
    devices: the d of this process, whose part is taken of what all D have.
  """
  here = slice(jax.process_index() * len(devices), (jax.process_index() + 1) * len(devices))
  return jax.tree.map(lambda x: x[here], micro_batches(tree, len(devices) * jax.process_count()))


def micro_batches(batch: Any, number: int) -> Any:
  """Leading axis [M * n, ...] -> [M, n, ...] of every array of a batch, as `jax.lax.scan` takes it."""
  return jax.tree.map(lambda x: x.reshape(number, x.shape[0] // number, *x.shape[1:]), batch)


def make_mesh(devices: Sequence[jax.Device], num_model: int) -> Mesh:
  """Devices by (data, model): `num_model` neighbours hold one copy of the model between them.

  Raises:
    ValueError: the devices do not fall into such groups.
  """
  if num_model < 1 or len(devices) % num_model:
    raise ValueError(f"{len(devices)} devices cannot be split into groups of {num_model}, one model a group")
  shape, axes = (len(devices) // num_model, num_model), (DATA_AXIS, MODEL_AXIS)
  # jax.make_mesh's own default is axes that Linen's Embed cannot work with.
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=list(devices))


def map_step(step: Callable, mesh: Mesh, state_shardings: Any) -> Callable:
  """A training step for a base that is split over `model`: mapped over `data`, and partitioned by XLA over `model`.

  Args:
    step: `(params, allowed_tokens, reward_temperature, key, state, batch) -> (state, metrics)`, written for one share
      of the batch, with its own sums over the axis `data`; returns the same on each.
    mesh: as `make_mesh` makes it.
    state_shardings: of each leaf of the state, going in and coming out.

  Returns:
    The same function of the whole batch, jitted. The state is donated; params lie where their shardings say.
  """
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=(PartitionSpec(),) * 5 + (PartitionSpec(DATA_AXIS),), out_specs=PartitionSpec(),
    axis_names={DATA_AXIS}, check_vma=False,  # the step sums its gradients itself; JAX would do it once more
  )  # fmt: skip
  return jax.jit(mapped, donate_argnums=4, out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())))
