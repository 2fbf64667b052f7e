"""Files that stand whole or not at all, in folders and at gs:// URLs."""

from collections.abc import Iterator
import contextlib
import importlib.util
import json
import os
import pathlib
import tempfile

from etils import epath

Path = pathlib.Path | epath.Path  # of a folder or file on this machine, or at a gs:// URL


def to_path(name: str | os.PathLike) -> Path:
  """The path of that name: Python's own, and etils' for a gs:// URL.

  Raises:
    ValueError: another kind of URL, or gs:// without what reads it.
  """
  name = os.fspath(name)
  if "://" not in name:
    return pathlib.Path(name)
  if not name.startswith("gs://"):
    raise ValueError(f"{name!r} is no folder and no gs:// URL")
  if importlib.util.find_spec("gcsfs") is None and importlib.util.find_spec("tensorflow") is None:
    raise ValueError(f"{name!r}: gs:// needs gcsfs: pip install 'gfn-jax[gcs]'")
  return epath.Path(name)


def local_path(name: str | os.PathLike) -> pathlib.Path:
  """A path on this machine. Raises ValueError for a URL."""
  if "://" in os.fspath(name):
    raise ValueError(f"{os.fspath(name)!r} is a URL: name a folder or file on this machine")
  return pathlib.Path(name)


def reason(error: Exception) -> str:
  """What an error says, in one line."""
  return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


def is_remote(path: Path) -> bool:
  """Whether it is a URL, where nothing can be appended to and what is written is whole."""
  return isinstance(path, epath.Path)


def absolute(path: Path) -> Path:
  """The path that does not depend on the working directory; a URL as it is."""
  return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A temporary file, of this machine, to write to; what was written takes the place of `path` at the end."""
  path = to_path(path)
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder) / path.name
      yield temporary
      path.write_bytes(temporary.read_bytes())
    return
  temporary = path.with_name(path.name + ".tmp")
  yield temporary
  temporary.replace(path)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def check_output(path: str | os.PathLike) -> pathlib.Path:
  """The file that --output names, if it can be written: to be known before the work, not after it.

  Raises:
    ValueError or OSError: it cannot; named.
  """
  path = pathlib.Path(path)
  if not path.parent.is_dir():
    raise ValueError(f"--output={path}: the folder {path.parent} does not exist")
  if path.is_dir():
    raise ValueError(f"--output={path} is a folder: name the file to write")
  write_text(path.with_name(path.name + ".writable"), "")
  path.with_name(path.name + ".writable").unlink()
  return path


def read_json(path: Path) -> dict:
  """The object in a JSON file.

  Raises:
    ValueError: it does not hold one; named.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
    raise ValueError(f"{path} is damaged: {e}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} is damaged: it holds a {type(content).__name__} in place of an object")
  return content


def finished_steps(workdir: Path) -> int:
  """The steps that results.json stands for; 0 where there is none."""
  try:
    return int(json.loads((workdir / "results.json").read_text())["meta/num_steps"])
  except (OSError, ValueError, KeyError, TypeError):
    return 0
