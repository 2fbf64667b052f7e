"""The command that a run came from."""

from collections.abc import Iterable
import json
import shlex
from typing import Any

from gfn_jax.cli import find_config
from gfn_jax.config import flatten
from gfn_jax.named import load_named
from gfn_jax.report.runs import Run


def commands_of(runs: Iterable[Run]) -> list[str]:
  """A sweep's own command; of a single run the one that makes it again."""
  return list(dict.fromkeys(run.sweep_command or command_of(run) for run in runs))


def command_of(run: Run) -> str:
  """`python -m gfn_jax.main` with the fields in which the run differs from its config file's variant.

  Where that file is not found, a comment says that the fields stand in config.json.
  """
  name, variant = run.config["name"], run.config["variant"]
  argument = f"configs/{name}.py" + (f":{variant}" if variant else "")
  command = f"python -m gfn_jax.main --config={argument} --workdir={shlex.quote(str(run.folder))}"
  try:
    get_config = load_named(find_config(f"configs/{name}.py:get_config"))
    defaults = json.loads(json.dumps(flatten(get_config(variant))))
  except Exception:  # the config file is the user's own code: it may be gone, or raise whatever it likes
    return f"{command}  # and the fields that {run.folder / 'config.json'} holds"
  fields = (f for f in sorted(run.config) if f in defaults and run.config[f] != defaults[f])
  return " ".join([command, *(f"--config.{f}={_argument(run.config[f])}" for f in fields)])


def _argument(value: Any) -> str:
  if isinstance(value, list):  # as a tuple; with double quotes inside, so that the shell's can be single ones
    parts = [json.dumps(v, ensure_ascii=False) if isinstance(v, str) else repr(v) for v in value]
    value = f"({','.join(parts)}{',' if len(parts) == 1 else ''})"
  return shlex.quote(str(value))
