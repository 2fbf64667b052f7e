"""GGUF files, llama.cpp's format, read as if they were Hugging Face checkpoints."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from gfn_jax.models.gguf_families import FAMILIES, Family, Undo
from gfn_jax.models.gguf_file import StoredTensor, read_file
from gfn_jax.models.gguf_tokenizer import build_tokenizer


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
  """A GGUF file. `hf_config` has config.json's fields as transformers would write them; `path` is the file."""

  path: pathlib.Path
  hf_config: dict[str, Any]
  metadata: Mapping[str, Any]
  stored: Mapping[str, tuple[StoredTensor, Undo]]  # by name in a Hugging Face checkpoint

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, tensor in torch's orientation), one at a time: floating point as in the file, quantised
    tensors as float32. The largest come first, while their receiver holds the least."""
    for name, (stored, undo) in sorted(self.stored.items(), key=lambda item: -math.prod(item[1][0].shape)):
      yield name, undo(stored.read(), self.hf_config)

  def tokenizer(self) -> Any:
    """The tokenizer that the file describes, or None where it describes none.

    Raises:
      ValueError: a tokenizer of a kind that is not supported; named, with the choices.
    """
    return build_tokenizer(self.metadata, self.path)


def read_gguf(path: pathlib.Path) -> GgufCheckpoint:
  """Reads a file's header; its tensors stay in the file until they are asked for.

  Raises:
    ValueError: one line that names the file and what is missing, damaged or unsupported in it.
  """
  metadata, tensors = read_file(path)
  architecture = metadata.get("general.architecture")
  if architecture not in FAMILIES:
    raise ValueError(f"{path}: architecture {architecture!r} is not supported: choose one of {', '.join(FAMILIES)}")
  for key, value in (("general.type", "model"), ("split.count", 1)):
    if metadata.get(key, value) != value:
      raise ValueError(f"{path}: {key}={metadata[key]!r} is not supported: must be {value!r}")
  if "token_embd.weight" not in tensors:
    raise ValueError(f"{path} lacks the tensor token_embd.weight")
  family = FAMILIES[architecture]
  factors = tensors.pop("rope_freqs.weight", None)
  config = _read_config(path, family, metadata, tensors, None if factors is None else factors.read())
  return GgufCheckpoint(path, config, metadata, _match(path, family, config[family.fields["block_count"]], tensors))


def _match(
  path: pathlib.Path, family: Family, num_layers: int, tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, Undo]]:
  """Hugging Face's name -> (tensor in the file, what undoes the converter): all of the family's, and no other."""
  matched, surplus = {}, dict(tensors)
  for template, (hf_template, undo) in family.tensors.items():
    for layer in range(num_layers) if "{}" in template else [None]:
      name = template.format(layer)
      if name == "output.weight" and name not in tensors:  # tied to the embedding
        continue
      if name not in tensors:
        raise ValueError(f"{path} lacks the tensor {name}")
      matched[hf_template.format(layer)] = surplus.pop(name), undo
  if surplus:
    names = ", ".join(sorted(surplus)[:5]) + (" ..." if len(surplus) > 5 else "")
    raise ValueError(f"{path} has tensors that a {family.model_type} model has no place for: {names}")
  return matched


def _read_config(
  path: pathlib.Path,
  family: Family,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, StoredTensor],
  rope_factors: np.ndarray | None,
) -> dict[str, Any]:
  """config.json's fields. What the file says of the model and is neither read nor as it must be is refused."""
  prefix = metadata["general.architecture"] + "."
  left = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
  absent = [key for key in family.fields if key not in left]
  if absent:
    raise ValueError(f"{path} lacks the metadata {prefix}{absent[0]}")
  for key in left.keys() & (family.fields.keys() | family.options.keys()):
    if not isinstance(left[key], int | float):  # llama.cpp knows models whose layers differ
      raise ValueError(f"{path}: option {prefix}{key}={left[key]!r} is not supported: must be one number")
  config = {"model_type": family.model_type, **family.constants}
  config |= {field: left.pop(key) for key, field in family.fields.items()}
  config |= {field: left.pop(key, default(config)) for key, (field, default) in family.options.items()}
  if config.get("sliding_window"):
    config["model_type"] = "mistral"  # which llama.cpp counts among the llamas
  else:
    config.pop("sliding_window", None)
  config["vocab_size"] = tensors["token_embd.weight"].shape[0]
  config["tie_word_embeddings"] = "output.weight" not in tensors
  for token in ("bos", "eos"):
    config[f"{token}_token_id"] = metadata.get(f"tokenizer.ggml.{token}_token_id")

  heads, width = (config[family.fields[key]] for key in ("attention.head_count", "embedding_length"))
  head_dim = config.get("head_dim", width // heads)
  if family.rotary != "none":
    theta, rotated = left.pop("rope.freq_base", 10000.0), left.get("rope.dimension_count", head_dim)
    config["rope_parameters"] = _rope_parameters(path, theta, head_dim, rope_factors)
    if family.rotary == "part":
      left.pop("rope.dimension_count", None)
      config["rope_parameters"]["partial_rotary_factor"] = rotated / head_dim
  must = {
    "vocab_size": config["vocab_size"],
    "attention.head_count_kv": heads,
    "attention.key_length": head_dim,
    "attention.value_length": head_dim,
    "attention.causal": True,
    "rope.dimension_count": head_dim,
    "rope.scaling.type": "none",
    "expert_count": 0,
    "expert_used_count": 0,
  }
  for key, value in left.items():
    if key not in must:
      raise ValueError(f"{path}: option {prefix}{key}={value!r} is not supported: it must be absent")
    if value != must[key]:
      raise ValueError(f"{path}: option {prefix}{key}={value!r} is not supported: must be {must[key]!r}")
  return config


def _rope_parameters(path: pathlib.Path, theta: float, head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
  """rope_parameters of config.json from what llama.cpp divides each frequency by, factors [D / 2].

  Llama 3's rule keeps frequencies f (turns a token) with L f > high, divides those with L f < low by `factor`, and
  between them interpolates. Only low / L and high / L show in the factors; low is 1, as everyone has it.
  """
  if factors is None or np.all(factors == 1):
    return {"rope_type": "default", "rope_theta": theta}
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
  factor = round(float(factors.max()), 4)
  kept = (1 / factors.astype(float) - 1 / factor) / (1 - 1 / factor)
  between = (kept > 1e-5) & (kept < 1 - 1e-5)
  if len(factors) == len(frequencies) and between.sum() > 1:
    slope, intercept = np.polyfit(frequencies[between], kept[between], 1)  # L / (high - 1), -1 / (high - 1)
    high = round(1 - 1 / intercept)
    length = round(slope * (high - 1))
    fitted = np.clip((length * frequencies - 1) / (high - 1), 0, 1)
    if np.allclose(1 / ((1 - fitted) / factor + fitted), factors, rtol=1e-5, atol=0):
      return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": length,
      }
  raise ValueError(f"{path}: the factors in rope_freqs.weight are not supported: must be those of Llama 3's rule")
