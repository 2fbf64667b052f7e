"""Devices, placement, and host <-> device transfer for data parallelism over the local devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

DATA_AXIS = "data"


def replicated(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
  """One whole copy on each device."""
  mesh = jax.sharding.Mesh(np.array(devices), (DATA_AXIS,))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def place(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Puts one copy of `tree` on each device, once: a mapped function broadcasts what stands elsewhere at each call."""
  return jax.device_put(tree, replicated(devices))


def split(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Leading axis [D * n, ...] -> [D, n, ...], as `jax.pmap` takes it."""
  return jax.tree.map(lambda x: x.reshape(len(devices), x.shape[0] // len(devices), *x.shape[1:]), tree)
