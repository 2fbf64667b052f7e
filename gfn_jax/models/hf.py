"""Hugging Face checkpoints in and out: a folder's config.json, weights and tokenizer, or one .gguf file."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int
import numpy as np
import safetensors.numpy

from gfn_jax.files import read_json, replacing, write_text
from gfn_jax.models.architectures import ARCHITECTURES, Architecture, ModelConfig, read_config
from gfn_jax.models.decoder import causal_mask, hidden_states, init_params, output_logits, prompt_positions
from gfn_jax.models.gguf import read_gguf
from gfn_jax.models.hub import find_model
from gfn_jax.models.lora import Lora
from gfn_jax.models.quantization import QUANTIZATIONS, quantize
from gfn_jax.models.weights import Tensors, check_fit, read_tensors

DTYPES = ("float32", "bfloat16", "float16")

Shardings = Callable[[str], jax.sharding.NamedSharding]  # of a parameter, by its path ("layers.q.kernel")


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A base model.

  Attributes:
    config, params: the decoder's own description, and the frozen parameters.
    tokenizer: None where the checkpoint has none.
    source: what it was loaded by.
    licence: as its model card tells it.
    hf_config: config.json's fields; {} for a model that has none.
    revision: of the hub repository; None for its main branch.
  """

  config: ModelConfig
  params: dict
  tokenizer: Any
  source: str
  licence: str = "unknown"
  hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  revision: str | None = None


_LEAVES = {  # kind -> naming -> {leaf in the file: leaf of ours}
  "linear": {"torch": {"weight": "kernel", "bias": "bias"}, "flax": {"kernel": "kernel", "bias": "bias"}},
  "norm": {"torch": {"weight": "scale", "bias": "bias"}, "flax": {"scale": "scale", "bias": "bias"}},
  "embedding": {"torch": {"weight": "embedding"}, "flax": {"embedding": "embedding"}},
}
_LEAVES["conv1d"] = _LEAVES["linear"]
_LEAVES["rms_norm"] = {"torch": {"weight": "scale"}, "flax": {"weight": "scale"}}
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
_IGNORED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq",
            ".attn.embed_positions")  # fmt: skip


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: Any, tensor: Any, layer: Any) -> Any:
  """One layer's tensor into the stack of all layers, in place."""
  return jax.tree.map(lambda s, t: jax.lax.dynamic_update_index_in_dim(s, t, layer, 0), stack, tensor)


def _empty_stack(tensor: Any, num_layers: int, sharding: jax.sharding.NamedSharding | None) -> Any:
  """Room for `num_layers` such tensors."""
  return jax.tree.map(
    lambda t: jnp.zeros((num_layers, *t.shape), t.dtype, device=_fitting(sharding, (num_layers, *t.shape))), tensor
  )


def _fitting(sharding: jax.sharding.NamedSharding | None, shape: tuple[int, ...], layer: bool = False):
  """A parameter's sharding for one of its arrays: a scale's axes of size 1 are whole; `layer` drops the layer axis."""
  if sharding is None:
    return None
  spec = [*sharding.spec, *[None] * 4][layer : len(shape) + layer]
  spec = [None if size == 1 else axis for axis, size in zip(spec, shape)]
  return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def _load_params(
  naming: str,
  tensors: Tensors,
  source: pathlib.Path,
  config: ModelConfig,
  dtype: str,
  quantization: str | None,
  shardings: Shardings | None,
) -> dict:
  """Casts one tensor after another and puts it where it belongs; the host holds no more than that one."""
  architecture = ARCHITECTURES[config.family]
  slots, shapes = _slots(config, architecture, naming), _shapes(config)
  params: dict[str, Any] = {}
  missing, surplus, misshaped = set(slots), [], []
  for name, tensor in tensors:
    full = name if name in slots else architecture.optional_prefix + name
    if full not in slots:
      tied_head = config.tied_embeddings and name.startswith(architecture.modules["head"].hf_name + ".")
      if not (name.endswith(_IGNORED) or tied_head):
        surplus.append(name)
      continue
    missing.discard(full)
    path, layer, transpose = slots[full]
    shape = shapes[path] if layer is None else shapes[path][1:]
    tensor = tensor.T if transpose else tensor
    if tensor.shape != shape:
      misshaped.append(f"{name} {tensor.shape} for {shape}")
      continue
    tensor = np.ascontiguousarray(tensor, jnp.dtype(dtype))
    sharding = None if shardings is None else shardings(path)
    if quantization and layer is not None and path.endswith(".kernel"):
      tensor = quantize(tensor, quantization)
    tensor = jax.tree.map(
      lambda t, s=sharding, stacked=layer is not None: jax.device_put(t, _fitting(s, t.shape, layer=stacked)), tensor
    )
    if layer is None:
      params[path] = tensor
    else:
      stack = params.pop(path) if path in params else _empty_stack(tensor, config.num_layers, sharding)
      params[path] = _write_layer(stack, tensor, layer)
  check_fit(source, missing, surplus, misshaped)
  return flax.traverse_util.unflatten_dict(params, sep=".")


_GENERAL_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # before and since transformers 5


def load_tokenizer(folder: pathlib.Path) -> Any:
  """The tokenizer of a checkpoint folder; None where it has none.

  Raises:
    ValueError: one that is damaged or not supported.
  """
  if not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")):
    return None
  import transformers  # seconds to import, and only tokenizers need it

  options = folder / "tokenizer_config.json"
  named = read_json(options).get("tokenizer_class") if options.is_file() else None
  # Where the folder says that tokenizer.json is all there is, it is: AutoTokenizer would put some families' own class,
  # with its own pre-tokenizer, in its place.
  general = named in _GENERAL_TOKENIZERS and (folder / "tokenizer.json").is_file()
  kind = transformers.PreTrainedTokenizerFast if general else transformers.AutoTokenizer
  try:
    # BPE loses spaces before punctuation to the clean-up that BERT wanted.
    return kind.from_pretrained(folder, clean_up_tokenization_spaces=False, trust_remote_code=False)
  except Exception as e:  # tokenizers raises a plain Exception for a damaged file
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ValueError(f"the tokenizer in {folder} is damaged or not supported: {reason}") from None


def _read_licence(folder: pathlib.Path) -> str:
  card = folder / "README.md"
  found = re.search(r"^license: *(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
  return found.group(1) if found else "unknown"


def load_pretrained(
  path_or_repo: str | os.PathLike,
  dtype: str = "float32",
  *,
  revision: str | None = None,
  quantization: str | None = None,
  shardings: Shardings | None = None,
) -> Pretrained:
  """Loads a base model from a hub id, a local folder, a .gguf file, or a package ("embedded/arith-2m").

  Args:
    path_or_repo: a name as `hub.find_model` takes it; a folder holds config.json and safetensors or Flax msgpack.
    dtype: of the parameters in memory, and of the computation.
    revision: of a hub repository.
    quantization: "int8" keeps the layers' kernels in 8 bits with a scale for each output; None for none.
    shardings: where each parameter goes, by its path; None for the default device.

  Raises:
    ValueError: one line that names what is missing, damaged or unsupported.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
  if quantization is not None and quantization not in QUANTIZATIONS:
    raise ValueError(f"quantization {quantization!r} is unknown: choose from {', '.join(QUANTIZATIONS)}")
  source = find_model(path_or_repo, revision)
  if source.is_file():
    checkpoint = read_gguf(source)
    hf_config, tokenizer, licence = checkpoint.hf_config, checkpoint.tokenizer(), "unknown"
    naming, tensors = "torch", checkpoint.tensors()
  else:
    if not (source / "config.json").is_file():
      raise ValueError(f"{source} has no config.json")
    hf_config, tokenizer, licence = read_json(source / "config.json"), load_tokenizer(source), _read_licence(source)
    naming, tensors = read_tensors(source)
  config = read_config(hf_config)
  params = _load_params(naming, tensors, source, config, dtype, quantization, shardings)
  return Pretrained(config, params, tokenizer, os.fspath(path_or_repo), licence, hf_config, revision)


def load_config(path_or_repo: str | os.PathLike, revision: str | None = None) -> ModelConfig:
  """The decoder's description of a model as `load_pretrained` takes it, without its weights.

  Raises:
    ValueError: one line that names what is missing, damaged or unsupported.
  """
  source = find_model(path_or_repo, revision, weights=False)
  if source.is_file():
    return read_config(read_gguf(source).hf_config)
  if not (source / "config.json").is_file():
    raise ValueError(f"{source} has no config.json")
  return read_config(read_json(source / "config.json"))


def save_pretrained(path: str | os.PathLike, pretrained: Pretrained, dtype: str = "float32") -> None:
  """Writes a folder that `load_pretrained` and transformers load: config.json, model.safetensors, the tokenizer.

  Args:
    dtype: on disk.

  Raises:
    ValueError: the parameters are quantised.
  """
  path = pathlib.Path(path)
  flat = flax.traverse_util.flatten_dict(pretrained.params, sep=".")
  if not all(isinstance(x, jax.Array | np.ndarray) for x in flat.values()):
    raise ValueError(f"{pretrained.source} was loaded quantised: load it without quantization to save it")
  path.mkdir(parents=True, exist_ok=True)
  tensors = {}
  slots = _slots(pretrained.config, ARCHITECTURES[pretrained.config.family], "torch")
  for name, (ours, layer, transpose) in slots.items():
    tensor = np.asarray(flat[ours] if layer is None else flat[ours][layer])
    tensors[name] = np.ascontiguousarray(tensor.T if transpose else tensor).astype(jnp.dtype(dtype))
  with replacing(path / "model.safetensors") as temporary:
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
  hf_config = dict(pretrained.hf_config) | {"dtype": dtype}
  write_text(path / "config.json", json.dumps(hf_config, indent=2, sort_keys=True) + "\n")
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

  Raises:
    ValueError: a token id that the model does not have, or more tokens in a row than it has positions.
  """
  tokens = jnp.asarray(tokens)
  mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
  if not isinstance(tokens, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
    _check_fits(pretrained, np.asarray(tokens), np.asarray(mask))
  return _logits(pretrained.config, pretrained.params, lora, tokens, mask)


def _check_fits(pretrained: Pretrained, tokens: np.ndarray, mask: np.ndarray) -> None:
  """Raises ValueError for a token, of the padding too, or a position that the model does not have: JAX would make NaN
  or another one's numbers of it."""
  config = pretrained.config
  wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
  if wrong.size:
    raise ValueError(f"token {wrong[0]}: must be a token id of {pretrained.source}, from 0 to {config.vocab_size - 1}")
  longest = mask.sum(axis=1).max(initial=0)
  if longest > config.max_positions:
    raise ValueError(f"a row of {longest} tokens: {pretrained.source} has {config.max_positions} positions")


@functools.partial(jax.jit, static_argnums=0)  # without it every call would compile the scan over layers anew
def _logits(config: ModelConfig, params: dict, lora: Lora | None, tokens, mask):
  self_mask = causal_mask(tokens.shape[1]) & mask[:, None, :]
  hidden, _ = hidden_states(config, params, lora, tokens, prompt_positions(mask), self_mask)
  return output_logits(config, params, hidden)
