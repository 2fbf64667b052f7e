"""Where data files are when config.data.path names none of the user's own: in the package, or on the hub."""

import importlib.resources
import pathlib

EMBEDDED = "embedded"  # the small data sets that ship with the package


def embedded(name: str) -> pathlib.Path:
  """A file or folder of the package's own data."""
  return pathlib.Path(str(importlib.resources.files("gfn_jax"))) / "embedded" / "data" / name


def is_hub_id(text: str) -> bool:
  """Whether a text reads as owner/name. A local folder of that name goes before the hub."""
  owner, _, name = text.partition("/")
  return bool(name) and "/" not in name and owner not in ("", ".", "..", "~")


def hub_file(repository: str, name: str) -> pathlib.Path:
  """A file of a data set on the Hugging Face hub, fetched into huggingface_hub's own cache at first use.

  Args:
    repository: owner/name. The cache, offline mode and token are HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
    name: the file's path inside it.

  Raises:
    ValueError: one line that names both and says what to do.
  """
  import huggingface_hub  # only here: everything else works without a network

  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))
  except Exception as e:  # of the network, the hub and the cache, each from a library of its own
    from gfn_jax.models.hub import reason

    raise ValueError(
      f"config.data.path: there is no local {repository}/{name}, and it could not be fetched from the hub: "
      f"{reason(e, name)}"
    ) from None
