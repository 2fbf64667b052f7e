"""Every variant of every config is a run that validates, and a wrong variant names those that there are."""

import importlib

import pytest

from gfn_jax.config import require_fields, validate

CONFIGS = ("arith", "infill", "jsonl", "next_sentence", "rng", "six_words", "subj")


def module(name):
  return importlib.import_module(f"configs.{name}")


VARIANTS = [(name, v) for name in CONFIGS for v in getattr(module(name), "VARIANTS", ("", "smoke"))]


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_variant_validates(name, variant):
  config = module(name).get_config(variant)
  require_fields(config)
  validate(config, num_devices=1)
  assert (config.name, config.variant) == (name, variant)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_variant_names_the_others(name):
  with pytest.raises(ValueError, match="'nothing' is unknown: choose from .*smoke"):
    module(name).get_config("nothing")
  assert (name, "smoke") in VARIANTS
  assert (f"{name}.py" in module(name).__doc__) and ":smoke" in module(name).__doc__  # the command stands in it
