"""Devices, meshes, placement, and how a step is mapped over them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from gfn_jax import distributed
from gfn_jax.models.partition import MODEL_AXIS

DATA_AXIS = "data"

# What shares the data: devices, or groups of them of which each holds one copy of the base between them.
Devices = Sequence[jax.Device] | Sequence[tuple[jax.Device, ...]]


def grouped(devices: Sequence[jax.Device], num_model: int) -> Devices:
  """Neighbours, of one process, in groups of `num_model`; as they are where that is 1.

  Raises:
    ValueError: they do not fall into such groups.
  """
  if num_model < 1 or len(devices) % num_model:
    raise ValueError(
      f"config.mesh.model {num_model}: the {len(devices)} devices of a process do not fall into groups of as many"
    )
  if num_model == 1:
    return list(devices)
  return [tuple(devices[i : i + num_model]) for i in range(0, len(devices), num_model)]


def num_shares(num_model: int) -> int:
  """How many devices, or groups of `num_model`, of all processes share the data. Raises ValueError as `grouped`."""
  return len(grouped(jax.local_devices(), num_model)) * jax.process_count()


def is_split(devices: Devices) -> bool:
  """Whether they are groups."""
  return isinstance(devices[0], tuple)


def platform_of(devices: Devices) -> str:
  """"cpu", "gpu" or "tpu"."""
  return np.ravel(devices)[0].platform


def mesh_of(devices: Devices) -> Mesh:
  """The axis `data` over devices, or the axes `data` and `model` over groups."""
  if is_split(devices):
    return make_mesh([d for group in devices for d in group], len(devices[0]))
  return Mesh(np.array(devices), (DATA_AXIS,))


def mesh_of_all(devices: Devices) -> Mesh:
  """The groups of all processes along `data`, a process after another; `mesh_of(devices)` is this one's part of it."""
  everywhere, number = all_devices(), jax.local_device_count()
  of_process = [everywhere[i : i + number] for i in range(0, len(everywhere), number)]
  # Each process's by itself, as it makes them: of all devices at once JAX might put groups across the borders.
  parts = [mesh_of(grouped(own, len(devices[0]))) for own in of_process]
  return Mesh(np.concatenate([part.devices for part in parts]), parts[0].axis_names, axis_types=parts[0].axis_types)


def replicated(devices: Devices) -> NamedSharding:
  """One whole copy on each device."""
  return NamedSharding(mesh_of(devices), PartitionSpec())


def over_data(
  function: Callable, in_axes: tuple[int | None, ...], devices: Devices, donate_argnums: tuple[int, ...] = ()
) -> Callable:
  """`function`, written for one share of the data, mapped over all of them without collectives.

  By `jax.pmap`; over groups the same by `jax.shard_map`, where XLA partitions each share over its group.

  Args:
    in_axes: of each argument 0, arrays [D, ...] of which a share gets its own, or None, the same for all.
    donate_argnums: as of `jax.jit`.
  """
  if not is_split(devices):
    return jax.pmap(function, in_axes=in_axes, devices=devices, donate_argnums=donate_argnums)

  def of_share(*args):
    own = [a if axis is None else jax.tree.map(lambda x: x[0], a) for a, axis in zip(args, in_axes)]
    return jax.tree.map(lambda x: x[None], function(*own))

  specs = tuple(PartitionSpec() if axis is None else PartitionSpec(DATA_AXIS) for axis in in_axes)
  mapped = jax.shard_map(
    of_share, mesh=mesh_of(devices), in_specs=specs, out_specs=PartitionSpec(DATA_AXIS), axis_names={DATA_AXIS},
    check_vma=False,
  )  # fmt: skip
  return settled(jax.jit(mapped, donate_argnums=donate_argnums))


def settled(program: Callable) -> Callable:
  """A compiled program of this process's devices that exchange data, with each call as `distributed.settle` leaves it:
  CPUs of several processes mix up what two programs exchange, and wait for ever."""
  if jax.process_count() == 1:
    return program

  def call(*args, **kwargs):
    results = program(*args, **kwargs)
    distributed.settle(results)
    return results

  return call


def on_any_share(flag: jax.Array, together: bool) -> jax.Array:
  """Whether the flag is set, as the condition of a loop inside `over_data`.

  Args:
    together: on any share of the data: groups must make their trips through a loop together, since XLA may have all
      devices meet in the collectives of its body. Otherwise each device goes by its own flag.
  """
  if not together or jax.lax.axis_size(DATA_AXIS) == 1:
    return flag
  return jax.lax.psum(flag.astype(jnp.int32), DATA_AXIS) > 0


def place(tree: Any, devices: Devices) -> Any:
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


def map_step_everywhere(step: Callable, devices: Devices, state_shardings: Any) -> Callable:
  """`map_step` over the groups of all processes, called by all of them with one whole batch of NumPy arrays.

  Args:
    devices: this process's groups. They hold the params and the state that it passes, and the state that it gets.
    state_shardings: over `mesh_of(devices)`.
  """
  if jax.process_count() == 1:
    return map_step(step, mesh_of(devices), state_shardings)
  own, everywhere = mesh_of(devices), mesh_of_all(devices)
  mapped = map_step(step, everywhere, jax.tree.map(lambda s: NamedSharding(everywhere, s.spec), state_shardings))
  rows = NamedSharding(everywhere, PartitionSpec(DATA_AXIS))
  _connect_groups(everywhere)

  def update(params, allowed_tokens, reward_temperature, key, state, batch):
    batch = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda index: x[index]), batch)
    params, state = _seen_on(everywhere, (params, state))
    return _seen_on(own, mapped(params, allowed_tokens, reward_temperature, key, state, batch))

  return update


def _seen_on(mesh: Mesh, tree: Any) -> Any:
  """The same buffers, of this process, as arrays over a mesh of more devices, or of this process's alone."""

  def seen(x: jax.Array) -> jax.Array:
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), shards)

  return jax.tree.map(seen, tree)


def _connect_groups(mesh: Mesh) -> None:
  """Lets the devices that sum over `data` meet while all processes are here, as `distributed.initialize` does it."""
  distributed.wait_for_all("the groups")
  add = jax.shard_map(
    lambda: jax.lax.psum(jax.lax.axis_index(DATA_AXIS), DATA_AXIS), mesh=mesh, in_specs=(), out_specs=PartitionSpec()
  )
  jax.block_until_ready(jax.jit(add)())
