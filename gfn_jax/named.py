"""A user's own Python objects, by name."""

import importlib
import importlib.util
import pathlib
import traceback
from typing import Any


def _import(module: str) -> Any:
  """A module; one of `configs` that is not in the working directory is that which ships with the package."""
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    if e.name not in ("configs", module) or not module.startswith("configs."):
      raise
    return importlib.import_module(f"gfn_jax.{module}")


def load_named(name: str) -> Any:
  """What "package.module:name" or "path/to/file.py:name" names.

  Raises:
    ValueError: there is no such thing.
  """
  where, _, attribute = name.rpartition(":")
  if not where or not attribute:
    raise ValueError(f"{name!r} names nothing: it must read as package.module:name or path/to/file.py:name")
  try:
    if where.endswith(".py"):
      path = pathlib.Path(where)
      if not path.is_file():
        raise ValueError(f"{name!r}: there is no file {where}")
      spec = importlib.util.spec_from_file_location(path.stem, path)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
    else:
      module = _import(where)
  except ValueError:
    raise
  except ImportError as e:
    raise ValueError(f"{name!r} cannot be imported: {e}") from None
  except Exception as e:  # the user's own code raises what it likes
    at = traceback.extract_tb(e.__traceback__)[-1]
    raise ValueError(f"{name!r} cannot be imported: {at.filename}, line {at.lineno}: {type(e).__name__}: {e}") from None
  if not hasattr(module, attribute):
    raise ValueError(f"{name!r}: {where} has no {attribute!r}")
  return getattr(module, attribute)
