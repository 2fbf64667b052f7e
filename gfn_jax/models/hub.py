"""Where a model's files are: in this package or another, in a folder, in a .gguf file, or on the Hugging Face hub."""

import importlib.resources
import importlib.util
import os
import pathlib

EMBEDDED_PREFIX = "embedded/"  # models that ship with this package
INSTALLED_PREFIX = "installed/"  # models that are in other packages, of which no code is run

_TEXTS = ["README.md", "*.json", "*.txt", "*.model", "*.jinja"]
# In this order; the first that a repository has is taken, so that nothing is fetched twice in two formats.
_WEIGHTS = (["model.safetensors", "model-*.safetensors"], ["flax_model.msgpack", "flax_model-*.msgpack"])
_SUBFOLDERS = ["[!1]*/*"]  # but for 1_Pooling, whose config.json tells how a sentence encoder pools


def find_model(name: str | os.PathLike, revision: str | None = None, *, weights: bool = True) -> pathlib.Path:
  """A folder with the model's files, or its .gguf file.

  Args:
    name: "embedded/NAME", "installed/PACKAGE", a local folder, a local .gguf file, a hub id (owner/name), or a .gguf
      file of a hub repository (owner/name/file.gguf). The hub's cache, offline mode and token are huggingface_hub's
      own: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.
    revision: of a hub repository: a branch, a tag or a commit; None for its main branch.
    weights: False fetches none from the hub, unless a .gguf file is named, which is whole or not there.

  Raises:
    ValueError: there is no such model, or the hub cannot be reached.
  """
  name = os.fspath(name)
  if name.startswith(EMBEDDED_PREFIX):
    root = pathlib.Path(str(importlib.resources.files("gfn_jax"))) / "embedded"
    # Looked up, never joined: "../x" is no model. Nor is embedded/data.
    shipped = {EMBEDDED_PREFIX + p.parent.name: p.parent for p in root.glob("*/config.json")}
    if name not in shipped:
      have = ", ".join(sorted(shipped)) or "none"
      raise ValueError(f"model {name!r} does not ship with this package: choose from {have}")
    return shipped[name]
  if name.startswith(INSTALLED_PREFIX):
    return _installed(name)
  path = pathlib.Path(name)
  if (name and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
    return path
  if path.is_file():
    raise ValueError(f"model {name!r} is a file: name its folder, or a .gguf file")
  owner, _, rest = name.partition("/")
  repository, _, file = rest.partition("/")
  if not repository or owner in ("", ".", "..", "~") or (file and ("/" in file or not file.endswith(".gguf"))):
    raise ValueError(f"model {name!r} is no folder, no .gguf file, and no hub id (owner/name) either")
  return _fetch(f"{owner}/{repository}", file, revision, weights)


def _installed(name: str) -> pathlib.Path:
  package = name.removeprefix(INSTALLED_PREFIX)
  spec = importlib.util.find_spec(package) if package.isidentifier() else None
  folders = (spec.submodule_search_locations if spec else None) or []
  files = [f for folder in folders for f in sorted(pathlib.Path(folder).rglob("*"))]
  found = [f for f in files if f.suffix == ".gguf"] + [f.parent for f in files if f.name == "model.safetensors"]
  if not found:
    raise ValueError(f"model {name!r}: no package {package!r} with a .gguf file or a model.safetensors is installed")
  return found[0]


def _fetch(repository: str, file: str, revision: str | None, weights: bool) -> pathlib.Path:
  import huggingface_hub  # only here: everything else works without a network
  from huggingface_hub import constants

  try:
    if file:
      return pathlib.Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))

    def snapshot(patterns):
      return pathlib.Path(
        huggingface_hub.snapshot_download(
          repository, revision=revision, allow_patterns=patterns, ignore_patterns=_SUBFOLDERS
        )
      )

    folder = snapshot(_TEXTS)
    if not weights:
      return folder
    for patterns in _WEIGHTS:
      folder = snapshot(patterns)
      if any(p.suffix in (".safetensors", ".msgpack") for p in folder.iterdir()):
        return folder
  except Exception as e:  # of the network, the hub and the cache, each from a library of its own
    why = reason(e, file, revision)
    raise ValueError(f"model {repository!r} is no folder, and could not be fetched from the hub: {why}") from None
  if constants.is_offline_mode():
    raise ValueError(
      f"model {repository!r}: no weights are in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: fetch them where "
      "there is a network"
    )
  raise ValueError(
    f"model {repository!r} has neither model.safetensors nor flax_model.msgpack, whole or in shards, on the hub; "
    "pickled weights (.bin) are refused because reading a pickle runs code"
  )


def reason(error: Exception, file: str, revision: str | None = None) -> str:
  """Why it was not fetched, and what to do; huggingface_hub tells it in several lines."""
  from huggingface_hub import constants, errors

  if isinstance(error, errors.GatedRepoError):
    return "its licence must be accepted on its page, and HF_TOKEN set"
  if isinstance(error, errors.RepositoryNotFoundError):
    return "there is no repository of that name, or it is private and needs HF_TOKEN"
  if isinstance(error, errors.RevisionNotFoundError):
    return f"it has no revision {revision!r}"
  if isinstance(error, errors.RemoteEntryNotFoundError):
    return f"it has no file {file!r}"
  if isinstance(error, errors.LocalEntryNotFoundError):
    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
    remedy = "fetch it where there is a network, or name a folder"
    return f"{why}, and no whole copy is in {constants.HF_HUB_CACHE} (HF_HOME moves it): {remedy}"
  return " ".join(str(error).split())[:300] or type(error).__name__
