"""What differs between families of causal LMs: one table from Hugging Face names and options to one decoder.

A family is a row of `ARCHITECTURES`: how its config.json is read, and under which module names its weights stand. The
decoder never asks for a family; it reads a `ModelConfig`.
"""

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn

from gfn_jax.models.rotary import Llama3Scaling, Rotary


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The decoder's own description of a model. Sizes are counts.

  Attributes:
    norm: "layer", "rms", or "rms_plus_one" (Gemma keeps its scales less 1).
    residual: "sequential" (the MLP reads what attention has written), "parallel" (both read the layer's input, each
      normed by itself), or "parallel_shared" (by one norm).
    rotary: of queries and keys; None for learned positions.
    fused_qkv: how one projection writes q, k and v: "concatenated" (GPT-2), "per_head" (GPT-NeoX), "" for three.
    gated_mlp: down(activation(gate x) * up x) in place of down(activation(up x)).
    qk_norm: an RMS norm on each head's queries and keys.
    biased: the projections that have a bias.
    embedding_scale: what token embeddings are multiplied by.
    sliding_window: how many tokens back a token sees, itself counted; None for all.
  """

  family: str
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_size: int
  max_positions: int
  activation: str
  norm: str
  norm_eps: float
  residual: str
  rotary: Rotary | None
  tied_embeddings: bool
  fused_qkv: str = ""
  gated_mlp: bool = False
  qk_norm: bool = False
  biased: tuple[str, ...] = ()
  head_bias: bool = False
  embedding_scale: float = 1.0
  sliding_window: int | None = None

  def projections(self) -> dict[str, tuple[int, int]]:
    """name -> (inputs, outputs) of every linear map of a layer; the names that LoRA can adapt."""
    d, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
    attention = {"qkv": (d, q + 2 * kv)} if self.fused_qkv else {"q": (d, q), "k": (d, kv), "v": (d, kv)}
    gate = {"gate": (d, self.mlp_size)} if self.gated_mlp else {}
    return {**attention, "o": (q, d), **gate, "up": (d, self.mlp_size), "down": (self.mlp_size, d)}


@dataclasses.dataclass(frozen=True)
class Module:
  """Where a module of ours stands in a checkpoint. `kind` decides leaf names and the orientation of kernels."""

  hf_name: str  # "{}" stands for the layer
  kind: str  # linear (torch keeps [out, in]), conv1d (torch [in, out], Flax [out, in]), norm, rms_norm, embedding


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A family.

  Attributes:
    read_config: config.json -> ModelConfig. What it reads is honoured.
    modules: path in our tree ("layers.q") -> Module; a model has those that its config asks for.
    optional_prefix: what some checkpoints leave out of every name.
    defaults: what config.json may leave out.
    required: options of config.json that the decoder honours at these values only; absent means the first.
    ignored: options of this family that change nothing where the required ones hold.
  """

  read_config: Callable[[Mapping[str, Any]], ModelConfig]
  modules: Mapping[str, Module]
  optional_prefix: str
  defaults: Mapping[str, Any]
  required: Mapping[str, tuple[Any, ...]]
  ignored: tuple[str, ...] = ()


ACTIVATIONS = {
  "gelu_new": lambda x: nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
  "gelu_fast": lambda x: nn.gelu(x, approximate=True),
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "silu": nn.silu,
}

# Options that say nothing about what a trained model computes: training, generation, bookkeeping.
_IGNORED = frozenset((
  "architectures", "model_type", "transformers_version", "transformers.js_config", "torch_dtype", "dtype", "use_cache",
  "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "initializer_range",
  "attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
  "task_specific_params", "pretraining_tp", "n_ctx", "is_llama_config", "id2label", "label2id", "problem_type",
  "tokenizer_class", "prefix", "return_dict", "chunk_size_feed_forward", "max_length", "min_length", "temperature",
  "top_k", "top_p", "repetition_penalty", "num_beams", "do_sample", "cache_implementation", "unsloth_fixed",
  "unsloth_version", "output_attentions", "output_hidden_states", "output_past", "predict_special_tokens", "n_special",
  "gradient_checkpointing",
))  # fmt: skip
_IGNORED_PREFIXES = ("_", "summary_")

_ROPE_FIELDS = {  # rope_type -> the fields that belong to it
  "default": (),
  "linear": ("factor",),
  "llama3": tuple(f.name for f in dataclasses.fields(Llama3Scaling)),
}


def _read_rotary(c: Mapping[str, Any], head_dim: int) -> Rotary:
  """transformers 5 keeps everything in `rope_parameters`; before, scaling stood apart from theta and share."""
  options = c.get("rope_parameters") or c.get("rope_scaling") or {}
  if not isinstance(options, Mapping):
    raise ValueError(f"the rope parameters {options!r} must be an object")
  options = dict(options)
  thetas = options.pop("rope_theta", None), c.get("rope_theta"), c.get("rotary_emb_base"), 10_000.0
  shares = options.pop("partial_rotary_factor", None), c.get("partial_rotary_factor"), c.get("rotary_pct"), 1.0
  theta, share = (next(x for x in values if x is not None) for values in (thetas, shares))
  kinds = {options.pop("rope_type", None), options.pop("type", None)} - {None} or {"default"}
  kind = min(kinds)
  if len(kinds) > 1 or kind not in _ROPE_FIELDS:
    choices = ", ".join(_ROPE_FIELDS)
    raise ValueError(f"rope_type {' and '.join(sorted(kinds))!r} is not supported: choose from {choices}")
  values = {name: options.pop(name) for name in _ROPE_FIELDS[kind] if options.get(name) is not None}
  if kind == "llama3":
    values.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
  for name in _ROPE_FIELDS[kind]:
    if name not in values:
      raise ValueError(f"rope_type {kind!r} lacks the field {name!r}")
  for name, value in options.items():
    if value is not None:
      raise ValueError(f"rope_type {kind!r} has the field {name}={value!r}, which is not supported")
  for name, value in {"rope_theta": theta, **values}.items():
    if not isinstance(value, int | float) or not value > 0:
      raise ValueError(f"rope_type {kind!r} has {name}={value!r}: must be a positive number")
  scaling = Llama3Scaling(**values) if kind == "llama3" else values.get("factor")
  return Rotary(int(head_dim * share), float(theta), scaling=scaling)


def _divide(width: int, heads: int) -> int:
  """Channels of a head, where config.json does not tell."""
  if width % heads:
    raise ValueError(f"config.json has {heads} heads for {width} channels: the one must divide the other")
  return width // heads


def _gpt_config(c: Mapping[str, Any], family: str, **fields) -> ModelConfig:
  """What GPT-2 and GPT-J have in common."""
  return ModelConfig(
    family=family,
    vocab_size=c["vocab_size"],
    hidden_size=c["n_embd"],
    num_layers=c["n_layer"],
    num_heads=c["n_head"],
    num_kv_heads=c["n_head"],
    head_dim=_divide(c["n_embd"], c["n_head"]),
    mlp_size=c["n_inner"] or 4 * c["n_embd"],
    max_positions=c["n_positions"],
    activation=c["activation_function"],
    norm="layer",
    norm_eps=c["layer_norm_epsilon"],
    tied_embeddings=c["tie_word_embeddings"],
    **fields,
  )


def _gptj_config(c: Mapping[str, Any]) -> ModelConfig:
  rotary = Rotary(c["rotary_dim"] or _divide(c["n_embd"], c["n_head"]), interleaved=True)
  return _gpt_config(
    c, "gptj", residual="parallel_shared", rotary=rotary, biased=("up", "down"), head_bias=True
  )  # fmt: skip


def _gpt2_config(c: Mapping[str, Any]) -> ModelConfig:
  biased = ("qkv", "o", "up", "down")
  return _gpt_config(c, "gpt2", residual="sequential", rotary=None, fused_qkv="concatenated", biased=biased)


def _modern_config(c: Mapping[str, Any], family: str, **fields) -> ModelConfig:
  """What the later families have in common, as Llama has it; `fields` say what differs."""
  heads = c["num_attention_heads"]
  head_dim = c.get("head_dim") or _divide(c["hidden_size"], heads)
  return ModelConfig(**{
    "family": family,
    "vocab_size": c["vocab_size"],
    "hidden_size": c["hidden_size"],
    "num_layers": c["num_hidden_layers"],
    "num_heads": heads,
    "num_kv_heads": c.get("num_key_value_heads") or heads,
    "head_dim": head_dim,
    "mlp_size": c["intermediate_size"],
    "max_positions": c["max_position_embeddings"],
    "activation": c["hidden_act"],
    "norm": "rms",
    "norm_eps": c.get("rms_norm_eps"),
    "residual": "sequential",
    "rotary": _read_rotary(c, head_dim),
    "tied_embeddings": c["tie_word_embeddings"],
    "gated_mlp": True,
  } | fields)  # fmt: skip


def _gpt_neox_config(c: Mapping[str, Any]) -> ModelConfig:
  return _modern_config(
    c, "gpt_neox", norm="layer", norm_eps=c["layer_norm_eps"], gated_mlp=False, fused_qkv="per_head",
    residual="parallel" if c["use_parallel_residual"] else "sequential",
    biased=(("qkv", "o") if c["attention_bias"] else ()) + ("up", "down"),
  )  # fmt: skip


def _attention_bias(c: Mapping[str, Any]) -> tuple[str, ...]:
  return ("q", "k", "v", "o") if c["attention_bias"] else ()


def _llama_config(c: Mapping[str, Any]) -> ModelConfig:
  return _modern_config(c, "llama", biased=_attention_bias(c) + (("gate", "up", "down") if c["mlp_bias"] else ()))


def _mistral_config(c: Mapping[str, Any]) -> ModelConfig:
  return _modern_config(c, "mistral", sliding_window=c["sliding_window"])


def _qwen2_config(c: Mapping[str, Any]) -> ModelConfig:
  return _modern_config(c, "qwen2", biased=("q", "k", "v"))


def _qwen3_config(c: Mapping[str, Any]) -> ModelConfig:
  return _modern_config(c, "qwen3", biased=_attention_bias(c), qk_norm=True)


def _gemma_config(c: Mapping[str, Any]) -> ModelConfig:
  return _modern_config(
    c, "gemma", activation="gelu_pytorch_tanh", norm="rms_plus_one", biased=_attention_bias(c),
    embedding_scale=c["hidden_size"] ** 0.5,
  )  # fmt: skip


_GPT_DEFAULTS = {
  "n_inner": None,
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5,
}
_MODERN_DEFAULTS = {
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_bias": False,
}
_LLAMA_MODULES = {
  "embed": Module("model.embed_tokens", "embedding"),
  "layers.attention_norm": Module("model.layers.{}.input_layernorm", "rms_norm"),
  "layers.q": Module("model.layers.{}.self_attn.q_proj", "linear"),
  "layers.k": Module("model.layers.{}.self_attn.k_proj", "linear"),
  "layers.v": Module("model.layers.{}.self_attn.v_proj", "linear"),
  "layers.q_norm": Module("model.layers.{}.self_attn.q_norm", "rms_norm"),
  "layers.k_norm": Module("model.layers.{}.self_attn.k_norm", "rms_norm"),
  "layers.o": Module("model.layers.{}.self_attn.o_proj", "linear"),
  "layers.mlp_norm": Module("model.layers.{}.post_attention_layernorm", "rms_norm"),
  "layers.gate": Module("model.layers.{}.mlp.gate_proj", "linear"),
  "layers.up": Module("model.layers.{}.mlp.up_proj", "linear"),
  "layers.down": Module("model.layers.{}.mlp.down_proj", "linear"),
  "final_norm": Module("model.norm", "rms_norm"),
  "head": Module("lm_head", "linear"),
}


def _like_llama(read, defaults=(), required=(), ignored=()) -> Architecture:
  return Architecture(
    read_config=read,
    modules=_LLAMA_MODULES,
    optional_prefix="model.",
    defaults=_MODERN_DEFAULTS | dict(defaults),
    required={"hidden_act": tuple(ACTIVATIONS)} | dict(required),
    ignored=ignored,
  )


# Windows of some layers alone: transformers turns them off unless `use_sliding_window` is set.
_NO_WINDOW = {"use_sliding_window": (False,)}
_WINDOW_FIELDS = ("sliding_window", "max_window_layers", "layer_types")

ARCHITECTURES: dict[str, Architecture] = {
  "gptj": Architecture(
    read_config=_gptj_config,
    modules={
      "embed": Module("transformer.wte", "embedding"),
      "layers.attention_norm": Module("transformer.h.{}.ln_1", "norm"),
      "layers.q": Module("transformer.h.{}.attn.q_proj", "linear"),
      "layers.k": Module("transformer.h.{}.attn.k_proj", "linear"),
      "layers.v": Module("transformer.h.{}.attn.v_proj", "linear"),
      "layers.o": Module("transformer.h.{}.attn.out_proj", "linear"),
      "layers.up": Module("transformer.h.{}.mlp.fc_in", "linear"),
      "layers.down": Module("transformer.h.{}.mlp.fc_out", "linear"),
      "final_norm": Module("transformer.ln_f", "norm"),
      "head": Module("lm_head", "linear"),
    },
    optional_prefix="transformer.",
    defaults=_GPT_DEFAULTS | {"rotary_dim": 64, "tie_word_embeddings": False},
    required={
      "scale_attn_weights": (True,),
      "tie_word_embeddings": (False,),
      "activation_function": tuple(ACTIVATIONS),
    },
    ignored=("rotary",),  # of the first GPT-J configs; the model is rotary whatever it says
  ),
  "gpt2": Architecture(
    read_config=_gpt2_config,
    modules={
      "embed": Module("transformer.wte", "embedding"),
      "position_embed": Module("transformer.wpe", "embedding"),
      "layers.attention_norm": Module("transformer.h.{}.ln_1", "norm"),
      "layers.qkv": Module("transformer.h.{}.attn.c_attn", "conv1d"),
      "layers.o": Module("transformer.h.{}.attn.c_proj", "conv1d"),
      "layers.mlp_norm": Module("transformer.h.{}.ln_2", "norm"),
      "layers.up": Module("transformer.h.{}.mlp.c_fc", "conv1d"),
      "layers.down": Module("transformer.h.{}.mlp.c_proj", "conv1d"),
      "final_norm": Module("transformer.ln_f", "norm"),
      "head": Module("lm_head", "linear"),
    },
    optional_prefix="transformer.",
    defaults=_GPT_DEFAULTS | {"tie_word_embeddings": True},
    required={
      "scale_attn_weights": (True,),
      "scale_attn_by_inverse_layer_idx": (False,),
      "add_cross_attention": (False,),
      "activation_function": tuple(ACTIVATIONS),
    },
    ignored=("reorder_and_upcast_attn",),  # scores are float32 here in any case
  ),
  "gpt_neox": Architecture(
    read_config=_gpt_neox_config,
    modules={
      "embed": Module("gpt_neox.embed_in", "embedding"),
      "layers.attention_norm": Module("gpt_neox.layers.{}.input_layernorm", "norm"),
      "layers.qkv": Module("gpt_neox.layers.{}.attention.query_key_value", "linear"),
      "layers.o": Module("gpt_neox.layers.{}.attention.dense", "linear"),
      "layers.mlp_norm": Module("gpt_neox.layers.{}.post_attention_layernorm", "norm"),
      "layers.up": Module("gpt_neox.layers.{}.mlp.dense_h_to_4h", "linear"),
      "layers.down": Module("gpt_neox.layers.{}.mlp.dense_4h_to_h", "linear"),
      "final_norm": Module("gpt_neox.final_layer_norm", "norm"),
      "head": Module("embed_out", "linear"),
    },
    optional_prefix="gpt_neox.",
    defaults=_MODERN_DEFAULTS
    | {
      "hidden_act": "gelu",
      "layer_norm_eps": 1e-5,
      "use_parallel_residual": True,
      "attention_bias": True,
      "rotary_pct": 0.25,
    },
    required={"hidden_act": tuple(ACTIVATIONS)},
  ),
  "llama": _like_llama(_llama_config, defaults={"mlp_bias": False}, required={"rope_interleaved": (False,)}),
  "mistral": _like_llama(_mistral_config, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
  "qwen2": _like_llama(_qwen2_config, required=_NO_WINDOW, ignored=_WINDOW_FIELDS),
  "qwen3": _like_llama(_qwen3_config, defaults={"head_dim": 128}, required=_NO_WINDOW, ignored=_WINDOW_FIELDS),
  "gemma": _like_llama(
    _gemma_config,
    defaults={"head_dim": 256, "tie_word_embeddings": True},
    # The first releases said "gelu" and meant its tanh approximation.
    required={"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh", None)},
  ),
}


class _Options(UserDict):
  """config.json's fields; remembers which were read, and so are honoured."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__(fields)
    self.read: set[str] = set()

  def __getitem__(self, name: str) -> Any:
    self.read.add(name)
    return super().__getitem__(name)

  def get(self, name: str, default: Any = None) -> Any:
    return self[name] if name in self else default


_SIZES = (
  "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "max_positions",
)  # fmt: skip


def _check_sizes(config: ModelConfig) -> None:
  """Raises ValueError where no model can be so."""

  def require(holds, rule):
    if not holds:
      raise ValueError(f"config.json of a {config.family} model: {rule}")

  for name in (*_SIZES, *(("sliding_window",) if config.sliding_window is not None else ())):
    value = getattr(config, name)
    require(isinstance(value, int) and value > 0, f"{name}={value!r} must be a positive whole number")
  eps = config.norm_eps
  require(isinstance(eps, float | int) and eps >= 0, f"the norms' epsilon {eps!r} must be a number")
  heads, groups, r = config.num_heads, config.num_kv_heads, config.rotary
  require(heads % groups == 0, f"num_kv_heads={groups} must divide num_heads={heads}")
  if r is not None:
    turned = f"the rotary embedding turns {r.dim} of {config.head_dim} channels of a head"
    require(0 < r.dim <= config.head_dim and r.dim % 2 == 0, f"{turned}: must be an even number, and at least 2")


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
  """config.json -> ModelConfig.

  Raises:
    ValueError: a family or an option that the decoder does not honour, or a missing field; named, with the choices.
  """
  family = hf_config.get("model_type")
  if not isinstance(family, str) or family not in ARCHITECTURES:
    raise ValueError(f"model_type {family!r} is not supported: choose one of {', '.join(ARCHITECTURES)}")
  architecture = ARCHITECTURES[family]
  config = read_options(
    hf_config, architecture.read_config, defaults=architecture.defaults,
    required={**architecture.required, "is_causal": (True, None)}, ignored=architecture.ignored,
  )  # fmt: skip
  _check_sizes(config)
  return config


def read_options(
  hf_config: Mapping[str, Any],
  read: Callable[[Mapping[str, Any]], Any],
  *,
  defaults: Mapping[str, Any],
  required: Mapping[str, tuple[Any, ...]],
  ignored: Iterable[str],
) -> Any:
  """What `read` makes of config.json, if every option in it is honoured.

  Args:
    read, defaults, required, ignored: as in `Architecture`.

  Raises:
    ValueError: an option that is neither read, required nor known to change nothing, or a missing field; named.
  """
  family = hf_config["model_type"]
  if hf_config.get("auto_map"):
    raise ValueError("config.json asks for Python code of its own (auto_map, trust_remote_code), which is never run")
  for option, allowed in required.items():
    if hf_config.get(option, allowed[0]) not in allowed:
      raise ValueError(
        f"{family} option {option}={hf_config[option]!r} is not supported: must be {' or '.join(map(repr, allowed))}"
      )
  options = _Options({**defaults, **hf_config})
  try:
    config = read(options)
  except KeyError as e:
    raise ValueError(f"config.json of a {family} model lacks the field {e.args[0]!r}") from None
  except (TypeError, ZeroDivisionError) as e:
    raise ValueError(f"config.json of a {family} model holds a value of the wrong kind: {e}") from None
  known = options.read | _IGNORED | {*required, *ignored}
  for option, value in hf_config.items():
    if value and option not in known and not option.startswith(_IGNORED_PREFIXES):  # what is off changes nothing
      raise ValueError(f"{family} option {option}={str(value)[:80]} is not supported")
  return config


def peft_names(config: ModelConfig) -> dict[str, str]:
  """Our projection names -> the names of a layer's modules as Hugging Face and PEFT write them ("self_attn.q_proj")."""
  modules = ARCHITECTURES[config.family].modules
  return {name: modules[f"layers.{name}"].hf_name.split("{}.")[1] for name in config.projections()}


def lora_targets(config: ModelConfig, targets: tuple[str, ...]) -> tuple[str, ...]:
  """Hugging Face module names, as users and PEFT write them ("q_proj", "mlp.c_proj"), -> our projection names.

  Raises:
    ValueError: a name that fits no projection of this family.
  """
  names = peft_names(config)
  found = set()
  for target in targets:
    hits = [n for n, hf in names.items() if hf == target or hf.endswith("." + target)]
    if not hits:
      choices = ", ".join(names.values())
      raise ValueError(f"LoRA target {target!r} is no projection of {config.family}: choose from {choices}")
    found.update(hits)
  return tuple(n for n in names if n in found)
