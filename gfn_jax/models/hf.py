"""Hugging Face checkpoints in and out: config.json, model.safetensors or flax_model.msgpack, tokenizer.json."""

from collections.abc import Iterator
import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
import re
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int
import numpy as np
from safetensors import SafetensorError, safe_open
import safetensors.numpy

from gfn_jax.files import read_json, replacing, write_text
from gfn_jax.models.architectures import ARCHITECTURES, Architecture, ModelConfig, read_config
from gfn_jax.models.decoder import causal_mask, hidden_states, init_params, output_logits, prompt_positions
from gfn_jax.models.lora import Lora

EMBEDDED_PREFIX = "embedded/"  # models that ship with the package
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A base model: its `config`, its `params` (frozen), its `tokenizer` (None where a folder has none), its `source`
  (what it was loaded by) and its `licence`, as its model card tells it."""

  config: ModelConfig
  params: dict
  tokenizer: Any
  source: str
  licence: str = "unknown"


def _resolve(name: str | os.PathLike) -> pathlib.Path:
  """A folder with the model's files: an embedded model, a local folder, or a snapshot of a hub repository."""
  name = os.fspath(name)
  if name.startswith(EMBEDDED_PREFIX):
    root = pathlib.Path(str(importlib.resources.files("gfn_jax"))) / "embedded"
    shipped = {EMBEDDED_PREFIX + p.name: p for p in root.glob("*/")}  # looked up, never joined: "../x" is no model
    if name not in shipped:
      have = ", ".join(sorted(shipped)) or "none"
      raise ValueError(f"model {name!r} does not ship with this package: choose from {have}")
    return shipped[name]
  if pathlib.Path(name).is_dir():
    return pathlib.Path(name)
  if name.count("/") != 1 or name.startswith((".", "/", "~")):
    raise ValueError(f"model {name!r} is no folder, and no hub id (owner/name) either")
  import huggingface_hub  # only here: everything else works without a network

  try:
    patterns = ["README.md", "*.json", "*.safetensors", "flax_model*.msgpack", "*.txt", "*.model"]
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
    reason = str(e).strip().splitlines()[0]
    raise ValueError(f"model {name!r} is no folder, and could not be fetched from the hub: {reason}") from None


def _read_tensors(folder: pathlib.Path) -> tuple[str, Iterator[tuple[str, np.ndarray]]]:
  """("torch" or "flax" naming, the tensors one at a time)."""
  safetensors_file, msgpack_file = folder / "model.safetensors", folder / "flax_model.msgpack"
  if safetensors_file.is_file():

    def read():
      try:
        with safe_open(safetensors_file, framework="numpy") as f:
          for key in f.keys():  # not a dict
            yield key, f.get_tensor(key)
      except SafetensorError as e:
        raise ValueError(f"{safetensors_file} is damaged: {e}") from None

    return "torch", read()
  if msgpack_file.is_file():
    try:
      tree = flax.serialization.msgpack_restore(msgpack_file.read_bytes())
      return "flax", iter(flax.traverse_util.flatten_dict(tree, sep=".").items())
    except Exception as e:  # msgpack raises whatever the bytes happen to spell
      raise ValueError(f"{msgpack_file} is damaged: {type(e).__name__}: {e}") from None
  raise ValueError(f"{folder} has no weights: model.safetensors or flax_model.msgpack is needed")


_LEAVES = {  # kind -> naming -> {leaf in the file: leaf of ours}
  "linear": {"torch": {"weight": "kernel", "bias": "bias"}, "flax": {"kernel": "kernel", "bias": "bias"}},
  "norm": {"torch": {"weight": "scale", "bias": "bias"}, "flax": {"scale": "scale", "bias": "bias"}},
  "embedding": {"torch": {"weight": "embedding"}, "flax": {"embedding": "embedding"}},
}
_LEAVES["conv1d"] = _LEAVES["linear"]
_TRANSPOSED = {("linear", "torch"), ("conv1d", "flax")}  # files that keep a kernel as [out, in]


def _slots(config: ModelConfig, architecture: Architecture, naming: str) -> dict[str, tuple[str, int | None, bool]]:
  """name in the file -> (path of ours, layer, whether to transpose), for every tensor the decoder needs."""
  slots = {}
  for path in _shapes(config):
    module_path, leaf = path.rsplit(".", 1)
    module = architecture.modules[module_path]
    file_leaf = {ours: theirs for theirs, ours in _LEAVES[module.kind][naming].items()}[leaf]
    transpose = leaf == "kernel" and (module.kind, naming) in _TRANSPOSED
    layers = range(config.num_layers) if module_path.startswith("layers.") else [None]
    for layer in layers:
      slots[f"{module.hf_name.format(layer)}.{file_leaf}"] = (path, layer, transpose)
  return slots


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter of the decoder."""
  tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep=".").items()}


# Buffers that old checkpoints carry beside the weights.
_IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attn.embed_positions")


def _load_params(folder: pathlib.Path, config: ModelConfig, dtype: str) -> dict:
  architecture = ARCHITECTURES[config.family]
  naming, tensors = _read_tensors(folder)
  slots, shapes = _slots(config, architecture, naming), _shapes(config)
  params = {path: np.empty(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}
  missing, surplus, misshaped = set(slots), [], []
  for name, tensor in tensors:
    full = name if name in slots else architecture.optional_prefix + name
    if full not in slots:
      tied_head = config.tied_embeddings and name.startswith("lm_head.")
      if not (name.endswith(_IGNORED) or tied_head):
        surplus.append(name)
      continue
    path, layer, transpose = slots[full]
    target = params[path] if layer is None else params[path][layer]
    tensor = tensor.T if transpose else tensor
    if tensor.shape != target.shape:
      misshaped.append(f"{name} {tensor.shape} for {target.shape}")
    else:
      target[...] = tensor
    missing.discard(full)
  problems = [
    f"{what}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
    for what, names in (("missing", missing), ("surplus", surplus), ("mis-shaped", misshaped))
    if names
  ]
  if problems:
    raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")
  return flax.traverse_util.unflatten_dict({p: jnp.asarray(v) for p, v in params.items()}, sep=".")


def _load_tokenizer(folder: pathlib.Path) -> Any:
  if not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json", "tokenizer.model")):
    return None
  import transformers  # seconds to import, and only tokenizers need it

  # BPE loses spaces before punctuation to the clean-up that BERT wanted.
  return transformers.AutoTokenizer.from_pretrained(folder, clean_up_tokenization_spaces=False)


def _read_licence(folder: pathlib.Path) -> str:
  card = folder / "README.md"
  found = re.search(r"^license: *(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
  return found.group(1) if found else "unknown"


def load_pretrained(path_or_repo: str | os.PathLike, dtype: str = "float32") -> Pretrained:
  """Loads a base model from a hub id, a local folder, or the package itself ("embedded/arith-2m").

  Args:
    path_or_repo: where config.json and model.safetensors or flax_model.msgpack stand.
    dtype: of the parameters in memory, and of the computation.

  Raises:
    ValueError: one line that names what is missing, damaged or unsupported.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
  folder = _resolve(path_or_repo)
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder} has no config.json")
  config = read_config(read_json(folder / "config.json"))
  params, tokenizer = _load_params(folder, config, dtype), _load_tokenizer(folder)
  return Pretrained(config, params, tokenizer, os.fspath(path_or_repo), _read_licence(folder))


def save_pretrained(path: str | os.PathLike, pretrained: Pretrained, hf_config: dict, dtype: str = "float32") -> None:
  """Writes a folder that `load_pretrained` and transformers load.

  Args:
    hf_config: config.json's fields, from which `pretrained.config` was read.
    dtype: on disk.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  flat = flax.traverse_util.flatten_dict(pretrained.params, sep=".")
  tensors = {}
  slots = _slots(pretrained.config, ARCHITECTURES[pretrained.config.family], "torch")
  for name, (ours, layer, transpose) in slots.items():
    tensor = np.asarray(flat[ours] if layer is None else flat[ours][layer])
    tensors[name] = np.ascontiguousarray(tensor.T if transpose else tensor).astype(jnp.dtype(dtype))
  with replacing(path / "model.safetensors") as temporary:
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
  write_text(path / "config.json", json.dumps(hf_config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
  if pretrained.tokenizer is not None:
    pretrained.tokenizer.save_pretrained(path)


def logits(
  pretrained: Pretrained,
  tokens: Int[ArrayLike, "B N"],
  mask: Bool[ArrayLike, "B N"] | Int[ArrayLike, "B N"] | None = None,
  lora: Lora | None = None,
) -> Float[Array, "B N V"]:
  """Logits of the next token at every position.

  Args:
    tokens: int [B, N].
    mask: bool [B, N] or the tokenizer's 0 and 1, True keeps; positions count the tokens it keeps. None keeps all.
    lora: an adapter, or None for the base.

  Returns:
    float32 [B, N, V]; unspecified where `mask` is False.
  """
  tokens = jnp.asarray(tokens)
  mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
  return _logits(pretrained.config, pretrained.params, lora, tokens, mask)


@functools.partial(jax.jit, static_argnums=0)  # without it every call would compile the scan over layers anew
def _logits(config: ModelConfig, params: dict, lora: Lora | None, tokens, mask):
  self_mask = causal_mask(tokens.shape[1]) & mask[:, None, :]
  hidden, _ = hidden_states(config, params, lora, tokens, prompt_positions(mask), self_mask)
  return output_logits(config, params, hidden)
