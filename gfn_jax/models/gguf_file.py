"""The GGUF container: its metadata, and its tensors one at a time.

Read by hand and not through gguf.GGUFReader: that keeps an object for every token and merge of a vocabulary (and the
mapped file with them), which for a small model weighs as much as the weights.
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(jnp.bfloat16)}
_CHUNK = 1 << 20  # weights dequantised at once: what their intermediate results hold is then a few MB


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in the file. `shape` is torch's (GGUF counts dimensions from the last); `kind` is ggml's type number."""

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int

  def _block(self) -> tuple[int, int]:
    """(weights, bytes) of a block."""
    if self.kind in _FLOATS:
      return 1, _FLOATS[self.kind].itemsize
    gguf = _import_gguf(self.path)
    try:
      kind = gguf.GGMLQuantizationType(self.kind)
      weights, size = gguf.GGML_QUANT_SIZES[kind]
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)  # the package lists types that it cannot read
    except (ValueError, NotImplementedError):
      known = {k.value: k.name for k in gguf.GGMLQuantizationType}
      raise ValueError(
        f"{self.path}: tensor {self.name} is of type {known.get(self.kind, self.kind)}, which is not supported: "
        "requantise the model, say to F16 or Q8_0"
      ) from None
    return weights, size

  def num_bytes(self) -> int:
    """Bytes in the file.

    Raises:
      ValueError: a type that cannot be dequantised, or rows that its blocks do not divide.
    """
    weights, size = self._block()
    if self.shape[-1] % weights:
      raise ValueError(
        f"{self.path} is damaged: tensor {self.name} {self.shape} does not divide into blocks of {weights}"
      )
    return math.prod(self.shape) // weights * size

  def read(self) -> np.ndarray:
    """The tensor: floating-point types as they stand, quantised ones dequantised to float32."""
    if self.kind in _FLOATS:
      count = math.prod(self.shape)
      return np.fromfile(self.path, _FLOATS[self.kind], count, offset=self.offset).reshape(self.shape)
    gguf = _import_gguf(self.path)
    kind, row_bytes = gguf.GGMLQuantizationType(self.kind), self.num_bytes() // math.prod(self.shape[:-1])
    out = np.empty((math.prod(self.shape[:-1]), self.shape[-1]), np.float32)
    step = max(1, _CHUNK // self.shape[-1])
    with self.path.open("rb") as f:
      f.seek(self.offset)
      for start in range(0, len(out), step):
        rows = out[start : start + step]
        packed = np.fromfile(f, np.uint8, len(rows) * row_bytes).reshape(len(rows), row_bytes)
        rows[...] = gguf.quants.dequantize(packed, kind)
    return out.reshape(self.shape)


def _import_gguf(path: pathlib.Path) -> Any:
  try:
    import gguf  # an extra: only quantised files need it
  except ImportError:
    raise ValueError(f"{path} is quantised, and needs the gguf package: pip install 'gfn-jax[gguf]'") from None
  return gguf


class _Header:
  """Reads the header's values in turn; never more than the file holds, whatever a damaged length says."""

  def __init__(self, file: BinaryIO, size: int):
    self._file, self._left = file, size

  def take(self, count: int) -> bytes:
    if count > self._left:
      raise EOFError
    self._left -= count
    return self._file.read(count)

  def scalar(self, code: str) -> Any:
    (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
    # The shortest decimal that means the same float32, as config.json has it: 1e-05, not 9.99999974e-06.
    return float(str(np.float32(value))) if code == "f" else value

  def string(self) -> str:
    return self.take(self.scalar("Q")).decode()

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.scalar(_SCALARS[kind])
    kind, count = self.scalar("I"), self.scalar("Q")
    if kind == _STRING:
      return [self.string() for _ in range(count)]
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
  """(metadata, tensors by name); arrays of numbers are NumPy's, arrays of strings are lists.

  Raises:
    ValueError: no GGUF file, a damaged one, or a tensor type that cannot be read; named.
  """
  size = path.stat().st_size
  with path.open("rb") as f:
    header = _Header(f, size)
    try:
      if header.take(4) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
      version = header.scalar("I")
      if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}, which is not supported: must be 2 or 3 (little-endian)")
      num_tensors, num_fields = header.scalar("Q"), header.scalar("Q")
      metadata = {header.string(): header.value(header.scalar("I")) for _ in range(num_fields)}
      infos = []
      for _ in range(num_tensors):
        name, rank = header.string(), header.scalar("I")
        infos.append((name, [header.scalar("Q") for _ in range(rank)], header.scalar("I"), header.scalar("Q")))
    except EOFError:
      raise ValueError(f"{path} is damaged: it ends within its header") from None
    except (KeyError, UnicodeDecodeError) as e:  # a type that is none, a text that is none
      raise ValueError(f"{path} is damaged: its header holds {type(e).__name__} {e}") from None
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
      raise ValueError(f"{path} is damaged: general.alignment={alignment!r}")
    start = -(-f.tell() // alignment) * alignment
  tensors = {n: StoredTensor(path, n, tuple(dims[::-1]), kind, start + at) for n, dims, kind, at in infos}
  for tensor in tensors.values():
    if 0 in tensor.shape or not tensor.shape:
      raise ValueError(f"{path} is damaged: tensor {tensor.name} has shape {tensor.shape}")
    if tensor.offset + tensor.num_bytes() > size:
      raise ValueError(f"{path} is damaged: it ends within or before tensor {tensor.name}")
  return metadata, tensors
