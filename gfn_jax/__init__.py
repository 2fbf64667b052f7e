"""GFlowNet fine-tuning of language models in JAX.

After `import gfn_jax` alone, `gfn_jax.sample` and the modules below are there. They are imported when they are first
asked for: a config, `--version` and the package's own programs should not wait for what they do not use.
"""

import importlib
from typing import Any

from gfn_jax.version import __version__

__all__ = ["__version__", "losses", "models", "policy", "replay", "rewards", "sample", "sampler", "tools"]


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module 'gfn_jax' has no attribute {name!r}: its parts are {', '.join(__all__)}")
  if name == "sample":
    return importlib.import_module("gfn_jax.completions").sample
  return importlib.import_module(f"gfn_jax.{name}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
