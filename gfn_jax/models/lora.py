"""Low-rank adapters: a tree of their own beside the frozen base, and PEFT's files in and out."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
import safetensors.numpy

from gfn_jax.files import read_json, replacing, to_path, write_text
from gfn_jax.models.architectures import ARCHITECTURES, ModelConfig, lora_targets, peft_names

if TYPE_CHECKING:
  from gfn_jax.models.hf import Pretrained


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Hyperparameters of an adapter (Hu et al., 2021). `targets` are our projection names (`lora_targets`)."""

  rank: int
  alpha: float
  targets: tuple[str, ...]
  dropout: float = 0.0
  rslora: bool = False  # scale by sqrt(rank) instead of rank

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@flax.struct.dataclass
class Lora:
  """An adapter. `params`: {"layers": {projection: {"lora_a": [L, in, r], "lora_b": [L, r, out]}}}, float32."""

  params: Any
  config: LoraConfig = flax.struct.field(pytree_node=False)


def init_lora(model: ModelConfig, config: LoraConfig, key: jax.Array) -> Lora:
  """A normal with variance 1/inputs, B zero: the adapted model starts as the base, bit for bit."""
  layers = {}
  for name, subkey in zip(config.targets, jax.random.split(key, len(config.targets))):
    inputs, outputs = model.projections()[name]
    a = jax.random.normal(subkey, (model.num_layers, inputs, config.rank)) * inputs**-0.5
    layers[name] = {"lora_a": a, "lora_b": jnp.zeros((model.num_layers, config.rank, outputs))}
  return Lora({"layers": layers}, config)


def merge_lora(pretrained: "Pretrained", lora: Lora) -> "Pretrained":
  """The base with the adapter added into its kernels, in float32 before they are rounded to the base's dtype.

  Raises:
    ValueError: the base is quantised.
  """
  layers = dict(pretrained.params["layers"])
  for name, leaves in lora.params["layers"].items():
    kernel = layers[name]["kernel"]
    if hasattr(kernel, "qvalue"):
      raise ValueError(f"{pretrained.source} was loaded quantised: load it without quantization to merge an adapter")
    update = jnp.einsum("lir,lro->lio", leaves["lora_a"], leaves["lora_b"], precision="highest")
    merged = (kernel.astype(jnp.float32) + lora.config.scale * update).astype(kernel.dtype)
    layers[name] = {**layers[name], "kernel": merged}
  return dataclasses.replace(pretrained, params={**pretrained.params, "layers": layers})


def _peft_name(model: ModelConfig, projection: str, layer: int, leaf: str) -> str:
  module = ARCHITECTURES[model.family].modules[f"layers.{projection}"].hf_name.format(layer)
  return f"base_model.model.{module}.lora_{leaf}.weight"


def save_adapter(path: str | os.PathLike, lora: Lora, pretrained: "Pretrained") -> None:
  """Writes adapter_config.json and adapter_model.safetensors as `peft.PeftModel.from_pretrained` reads them.

  Both files are written to a temporary name and renamed.
  """
  path = to_path(path)
  path.mkdir(parents=True, exist_ok=True)
  model, modules = pretrained.config, ARCHITECTURES[pretrained.config.family].modules
  tensors = {}
  for name, leaves in lora.params["layers"].items():
    for layer in range(model.num_layers):
      for leaf, key in (("A", "lora_a"), ("B", "lora_b")):
        tensors[_peft_name(model, name, layer, leaf)] = np.ascontiguousarray(np.asarray(leaves[key][layer]).T)
  names = peft_names(model)
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": pretrained.source,
    "revision": pretrained.revision,
    "r": lora.config.rank,
    "lora_alpha": lora.config.alpha,
    "lora_dropout": lora.config.dropout,
    "use_rslora": lora.config.rslora,
    "target_modules": [names[n] for n in lora.config.targets],
    "fan_in_fan_out": any(modules[f"layers.{n}"].kind == "conv1d" for n in lora.config.targets),
    "bias": "none",
    "inference_mode": True,
  }
  with replacing(path / "adapter_model.safetensors") as temporary:
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
  write_text(path / "adapter_config.json", json.dumps(config, indent=2) + "\n")


# Options of adapter_config.json that we honour; those that must have one value; those that say nothing about what a
# trained adapter computes. Any other that is on is refused.
_PEFT_READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
_PEFT_REQUIRED = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  # PiSSA, OLoRA, CorDA and LoftQ change the base's own kernels: such an adapter does not fit the base as published.
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_PEFT_IGNORED = (
  "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
  "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
  "revision", "runtime_config", "task_type",
)  # fmt: skip


def load_adapter(path: str | os.PathLike, pretrained: "Pretrained") -> Lora:
  """Reads a PEFT LoRA adapter for `pretrained`.

  Raises:
    ValueError: missing or damaged files, unsupported options, or an adapter of another model; named in one line.
  """
  path, model = to_path(path), pretrained.config
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    if not (path / name).is_file():
      raise ValueError(f"{path} is no adapter: {name} is missing")
  options = read_json(path / "adapter_config.json")
  try:
    tensors = safetensors.numpy.load((path / "adapter_model.safetensors").read_bytes())
  except (SafetensorError, AttributeError) as e:  # the latter for types that NumPy lacks
    raise ValueError(f"{path / 'adapter_model.safetensors'} is damaged: {e}") from None
  for option, value in options.items():
    if option in _PEFT_REQUIRED and value not in _PEFT_REQUIRED[option]:
      choice = f"must be {' or '.join(map(repr, _PEFT_REQUIRED[option]))}"
      raise ValueError(f"{path}: adapter option {option}={value!r} is not supported: {choice}")
    if value and option not in (*_PEFT_READ, *_PEFT_REQUIRED, *_PEFT_IGNORED):
      raise ValueError(f"{path}: adapter option {option}={value!r} is not supported")
  for option in ("r", "lora_alpha", "target_modules"):
    if option not in options:
      raise ValueError(f"{path}: adapter_config.json lacks the field {option!r}")
  rank, alpha, dropout = options["r"], options["lora_alpha"], options.get("lora_dropout") or 0.0
  sound = isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0
  if not (sound and isinstance(dropout, int | float) and 0 <= dropout < 1):
    raise ValueError(f"{path}: r={rank!r}, lora_alpha={alpha!r} and lora_dropout={dropout!r} are no adapter's")
  if not (isinstance(options["target_modules"], list) and all(isinstance(t, str) for t in options["target_modules"])):
    wanted = "a list of module names, as peft writes it"
    raise ValueError(f"{path}: target_modules={options['target_modules']!r} is not supported: must be {wanted}")
  try:
    targets = lora_targets(model, tuple(options["target_modules"]))
  except ValueError as e:
    raise ValueError(f"{path} does not fit {pretrained.source}: {e}") from None
  config = LoraConfig(
    rank=rank,
    alpha=alpha,
    targets=targets,
    dropout=dropout,
    rslora=options.get("use_rslora", False),
  )
  layers = {}
  for name in config.targets:
    inputs, outputs = model.projections()[name]
    leaves = {}
    for leaf, key, shape in (("A", "lora_a", (config.rank, inputs)), ("B", "lora_b", (outputs, config.rank))):
      stacked = []
      for layer in range(model.num_layers):
        tensor = tensors.pop(_peft_name(model, name, layer, leaf), None)
        if tensor is None or tensor.shape != shape:
          found = "is missing" if tensor is None else f"has shape {tensor.shape}, not {shape}"
          tensor_name = _peft_name(model, name, layer, leaf)
          raise ValueError(f"{path} does not fit {pretrained.source}: {tensor_name} {found}")
        stacked.append(tensor.T)
      leaves[key] = jnp.asarray(np.stack(stacked), jnp.float32)
    layers[name] = leaves
  if tensors:
    raise ValueError(f"{path} does not fit {pretrained.source}: surplus tensor {sorted(tensors)[0]}")
  return Lora({"layers": layers}, config)
