"""A user's own Python objects, by name."""

import importlib
import importlib.util
import pathlib
import traceback
from typing import Any


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
      shipped = where.startswith("configs.") and importlib.util.find_spec("configs") is None
      module = importlib.import_module(f"gfn_jax.{where}" if shipped else where)
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
