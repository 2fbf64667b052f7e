"""A final evaluation kept as it comes: of an hour of tests, a kill loses the one under way."""

from collections.abc import Callable
import hashlib
import json
from typing import Any

from gfn_jax import distributed
from gfn_jax.files import Path, read_json, write_text


class KeptRows:
  """What `Suite.test` has measured so far, in a file that the first process writes whole after each row.

  Args:
    path: the file; read by all processes where it is there.
    config_hash: of the run, with whatever else tells its tests from others. adapters: the folders of what is tested.
      Rows of others are dropped.

  Raises:
    ValueError: the file is damaged.
  """

  def __init__(self, path: Path, config_hash: str, *adapters: Path):
    digest = hashlib.sha256(config_hash.encode())
    for adapter in adapters:
      digest.update((adapter / "adapter_model.safetensors").read_bytes())
    self._path, self._of = path, digest.hexdigest()
    there = read_json(path) if path.exists() else {}
    self._rows: dict[str, Any] = there.get("rows", {}) if there.get("of") == self._of else {}
    distributed.wait_for_all("the tests that were made")  # before the first process adds to them

  def get(self, name: str, measure: Callable[[], Any]) -> Any:
    """`measure()`, or what it gave when this name was first asked for; anything that JSON can hold."""
    if name not in self._rows:
      self._rows[name] = measure()
      if distributed.is_first():
        write_text(self._path, json.dumps({"of": self._of, "rows": self._rows}) + "\n")
    return self._rows[name]

  def forget(self) -> None:
    """Removes the file, once the results stand elsewhere; by the first process."""
    self._path.unlink(missing_ok=True)
