"""The tensors of a checkpoint folder, one at a time: safetensors or Flax's msgpack, single or sharded."""

from collections.abc import Iterable, Iterator
import mmap
import pathlib
from typing import Any

import flax.serialization
import jax.numpy as jnp  # noqa: F401  registers bfloat16 with NumPy
import msgpack
import numpy as np
from safetensors import SafetensorError, safe_open

from gfn_jax.files import read_json

Tensors = Iterator[tuple[str, np.ndarray]]


def read_tensors(folder: pathlib.Path) -> tuple[str, Tensors]:
  """("torch" or "flax" naming, the tensors one at a time), from the first format that the folder holds.

  Raises:
    ValueError: no weights, damaged ones, or a format that is refused; also while the tensors are read.
  """
  for stem, suffix, naming, read in (
    ("model", ".safetensors", "torch", _read_safetensors),
    ("flax_model", ".msgpack", "flax", _read_msgpack),
  ):
    single, index = folder / (stem + suffix), folder / f"{stem}{suffix}.index.json"
    files = [single] if single.is_file() else _shards(index) if index.is_file() else []
    if files:
      return naming, (pair for file in files for pair in read(file))
  needed = "model.safetensors or flax_model.msgpack, or the index of their shards, is needed"
  if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
    raise ValueError(
      f"{folder} has pickled weights alone, which are refused because reading a pickle runs code: {needed}; "
      "transformers' save_pretrained writes safetensors"
    )
  raise ValueError(f"{folder} has no weights: {needed}")


def check_fit(source: pathlib.Path, missing: Iterable[str], surplus: Iterable[str], misshaped: Iterable[str]) -> None:
  """Raises ValueError where tensors are missing, surplus or mis-shaped; a few of each kind are named."""
  problems = [
    f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
    for what, names in (("missing", sorted(missing)), ("surplus", sorted(surplus)), ("mis-shaped", sorted(misshaped)))
    if names
  ]
  if problems:
    raise ValueError(f"the weights in {source} do not fit its config.json: {'; '.join(problems)}")


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index names, each in the index's own folder."""
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index} is damaged: it has no weight_map")
  names = sorted(set(map(str, weight_map.values())))
  for name in names:
    if pathlib.PurePosixPath(name).name != name or pathlib.PureWindowsPath(name).name != name:
      raise ValueError(f"{index} names {name!r}: a shard must stand in the folder of its index")
    if not (index.parent / name).is_file():
      raise ValueError(f"{index} names {name!r}, which is missing")
  return [index.parent / name for name in names]


def _read_safetensors(file: pathlib.Path) -> Tensors:
  try:
    with safe_open(file, framework="numpy") as f:
      names = list(f.keys())
    for name in names:
      # Opened for each anew: what has been read stays mapped, and counts as resident memory, until the file is closed.
      with safe_open(file, framework="numpy") as f:
        tensor = f.get_tensor(name)
      yield name, tensor
  except (SafetensorError, AttributeError) as e:  # the latter for types that NumPy lacks
    raise ValueError(f"{file} is damaged: {e}") from None


def _read_msgpack(file: pathlib.Path) -> Tensors:
  """Flax's tree without ever holding more than one leaf of it."""
  try:
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as peek:
      unpacker = msgpack.Unpacker(
        f, ext_hook=flax.serialization._msgpack_ext_unpack, raw=False, strict_map_key=False, max_buffer_size=0
      )
      yield from _walk(unpacker, peek, ())
  except Exception as e:  # msgpack raises whatever the bytes happen to spell
    raise ValueError(f"{file} is damaged: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None


def _walk(unpacker: msgpack.Unpacker, peek: mmap.mmap, path: tuple[str, ...]) -> Tensors:
  if not _is_map(peek[unpacker.tell()]):
    leaf = unpacker.unpack()
    if not (path and isinstance(leaf, np.ndarray)):
      raise TypeError(f"a {type(leaf).__name__} where {'an array' if path else 'a tree'} should stand")
    yield ".".join(path), leaf
    return
  size = unpacker.read_map_header()
  for i in range(size):
    key = unpacker.unpack()
    if i == 0 and key == "__msgpack_chunked_array__":  # a leaf of over a gigabyte, in pieces
      rest: dict[str, Any] = {key: unpacker.unpack()} | {unpacker.unpack(): unpacker.unpack() for _ in range(size - 1)}
      yield ".".join(path), flax.serialization._unchunk(rest)
      return
    if not isinstance(key, str):
      raise TypeError(f"a {type(key).__name__} where a name should stand")
    yield from _walk(unpacker, peek, (*path, key))


def _is_map(byte: int) -> bool:
  return 0x80 <= byte <= 0x8F or byte in (0xDE, 0xDF)
