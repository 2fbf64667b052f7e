"""One size of a config, made larger and larger."""

from collections.abc import Callable, Iterator, Mapping
import copy
import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections

from gfn_jax.benchmark.measure import measure
from gfn_jax.config import validate
from gfn_jax.models import load_pretrained, save_pretrained
from gfn_jax.models.architectures import read_config
from gfn_jax.models.decoder import init_params
from gfn_jax.parallel import num_shares

FACTORS = (1, 2, 4)

# config.json's fields that grow with a model's width, the channels of a head as they are.
_WIDTHS = (
  "n_embd", "n_head", "n_inner", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def wider(hf_config: Mapping[str, Any], factor: int) -> dict[str, Any]:
  """config.json of a model `factor` times as wide, with as many times the heads."""
  return {k: v * factor if k in _WIDTHS and v is not None else v for k, v in hf_config.items()}


def _longer(config: ml_collections.ConfigDict, factor: int) -> int:
  c = config.sampler
  c.max_length *= factor
  c.min_length = c.max_length  # Z as long as that, whatever the policy prefers
  config.eval.max_length = c.max_length
  return c.max_length


def _more_samples(config: ml_collections.ConfigDict, factor: int) -> int:
  config.sampler.num_samples *= factor
  return config.sampler.num_samples


def _more_queries(config: ml_collections.ConfigDict, factor: int) -> int:
  config.train.num_queries *= factor
  return config.train.num_queries


SIZES: dict[str, Callable[[ml_collections.ConfigDict, int], int]] = {
  "length": _longer, "samples": _more_samples, "queries": _more_queries,
}  # fmt: skip
KINDS = (*SIZES, "model_size")  # the last in parameters


def _random_model(config: ml_collections.ConfigDict, factor: int, folder: pathlib.Path) -> None:
  """Puts a random model, `factor` times as wide as the config's, into its place."""
  base = load_pretrained(config.model.name, config.model.dtype, revision=config.model.revision)
  hf_config = wider(base.hf_config, factor)
  model = read_config(hf_config)
  path = folder / f"{factor}x"
  save_pretrained(
    path,
    dataclasses.replace(
      base, config=model, hf_config=hf_config, params=init_params(model, jax.random.key(0), config.model.dtype)
    ),
    config.model.dtype,
  )
  config.model.name, config.model.revision = str(path), None


def sweep(config: ml_collections.ConfigDict, kind: str, repeats: int, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Results of `measure`, each with its `size`: the config's own, and 2 and 4 times that.

  Args:
    kind: one of KINDS.
    folder: for random models.

  Raises:
    ValueError: a size that the config's rules or its model do not allow; before that one is measured.
  """
  variants = []
  for factor in FACTORS:
    variant = copy.deepcopy(config)
    size = SIZES[kind](variant, factor) if kind in SIZES else None
    validate(variant, num_shares(variant.mesh.model))
    variants.append((factor, size, variant))
  for factor, size, variant in variants:
    if kind == "model_size":
      _random_model(variant, factor, folder)
    result = measure(variant, repeats)
    yield {"size": size or result["parameters"], **result}
