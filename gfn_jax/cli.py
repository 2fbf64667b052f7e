"""What the command lines share: config files, one-line errors, exit codes."""

from collections.abc import Callable, Sequence
import functools
import importlib.resources
import os
import pathlib
import re
import sys
from typing import Any

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from gfn_jax.config import require_fields
from gfn_jax.version import __version__

USAGE_EXIT_CODE = 2


def define_config() -> flags.FlagHolder:
  """--config=FILE[:VARIANT], with --config.field=value for any field of it."""
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file and variant, as configs/arith.py:smoke. Any field can follow: --config.train.num_steps=100.",
  )
  flags.DEFINE_bool("version", False, "Prints the version and exits.")
  return holder


def find_config(argument: str) -> str:
  """The value of --config, with the file that ships with the package where the folder has none of that name."""
  name, colon, variant = argument.partition(":")
  if not pathlib.Path(name).is_file() and name.startswith("configs/"):
    shipped = pathlib.Path(str(importlib.resources.files("gfn_jax"))) / name
    if shipped.is_file():
      name = os.fspath(shipped)
  return name + colon + variant


def fail(message: object) -> None:
  """One line on stderr, and the exit code of bad input."""
  line = " ".join(str(message).split())
  print(f"error: {line}", file=sys.stderr, flush=True)
  sys.exit(USAGE_EXIT_CODE)


def _unknown_field(error: Exception, argv: Sequence[str]) -> str | None:
  """What to say of a --config.field that the config lacks; None where `error` is another slip."""
  while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps its KeyError, or does not
    error = error.args[0]
  # Its key has quotes of its own, which those of a config file's KeyError lack.
  found = re.fullmatch(r"'(.+)'(?:\n(.*))?", str(error.args[0] if error.args else ""), re.DOTALL)
  if found is None or not isinstance(error, KeyError):
    return None
  fields = [a.partition("=")[0] for a in argv if re.match(r"--?config\.", a)]
  flags_of = [f for f in fields if found[1] in f.split(".")]
  return f"{' or '.join(flags_of)}: the config has no {found[1]!r}. {found[2] or ''}" if flags_of else None


def _parse(argv: Sequence[str], needs_config: bool, takes_arguments: bool) -> list[str]:
  """Parses the flags and reads the config, so that every slip in them shows here."""
  if "--version" in argv:
    print(f"gfn_jax {__version__}")
    sys.exit(0)
  argv = list(argv)
  for i in range(len(argv) - 1, 0, -1):  # "--config FILE" is as good as "--config=FILE"
    if argv[i - 1] in ("--config", "-config"):
      argv[i - 1 : i + 1] = [f"--config={argv[i]}"]
  argv = [re.sub(r"^(--?config=)(.*)$", lambda m: m[1] + find_config(m[2]), a) for a in argv]
  config_file = next((re.sub(r"^--?config=", "", a) for a in argv if re.match(r"^--?config=", a)), None)
  if needs_config and config_file is None and not any(a in ("--help", "-h", "--helpfull") for a in argv):
    fail("--config is missing, as in --config=configs/arith.py")
  if config_file is not None and not pathlib.Path(config_file.partition(":")[0]).is_file():
    fail(f"config file {config_file.partition(':')[0]!r} does not exist")
  try:
    rest = flags.FLAGS(list(argv))
    _ = "config" in flags.FLAGS and flags.FLAGS["config"].value  # ml_collections runs the file here
  except Exception as e:  # the config file is the user's own code: it may raise whatever it likes
    text = str(e.args[0] if isinstance(e, KeyError) and e.args else e)
    unknown = _unknown_field(e, argv)
    if unknown:
      text = unknown
    elif not isinstance(e, (flags.Error, ValueError)):
      text = f"{config_file}: {type(e).__name__}: {text}"
    if "Traceback (most recent call last)" in text:  # of get_config, in ml_collections' message
      text = f"{config_file}: {text.strip().splitlines()[-1].removeprefix('ValueError: ')}"
    fail(text)
  if len(rest) > 1 and not takes_arguments:
    fail(f"argument {rest[1]!r} is not a flag")
  return rest


def prepare_jax(config: ml_collections.ConfigDict) -> None:
  """Applies the config's switches of JAX itself; before its backend starts.

  Raises:
    ValueError: `config` is no config of a run.
  """
  require_fields(config)
  if config.deterministic:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
  if config.debug_nans:
    jax.config.update("jax_debug_nans", True)


def launch(main: Callable[..., Any], needs_config: bool = True, takes_arguments: bool = False) -> None:
  """Parses the command line, runs `main`, and exits with its code; a ValueError becomes one line and exit code 2.

  Args:
    needs_config: without --config there is nothing to run.
    takes_arguments: `main` is given the list of what is no flag.
  """

  def guarded(argv):
    try:
      sys.exit(main(argv[1:]) if takes_arguments else main())
    except (ValueError, OSError) as e:
      logging.debug("where it came from:", exc_info=True)  # shown with --verbosity=1
      fail(e)

  logging.set_verbosity(logging.WARNING)
  app.run(guarded, flags_parser=functools.partial(_parse, needs_config=needs_config, takes_arguments=takes_arguments))
