"""Text encoders of the BERT family (MiniLM, BERT, RoBERTa): hidden states, and embeddings of sentences.

They measure texts and are never trained. Parameters keep the names and the layout of the checkpoint, layers stacked.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int
import numpy as np

from gfn_jax.files import read_json
from gfn_jax.models.architectures import ACTIVATIONS, read_options
from gfn_jax.models.hf import load_tokenizer
from gfn_jax.models.hub import find_model
from gfn_jax.models.weights import Tensors, check_fit, read_tensors

FAMILIES = ("bert", "roberta")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """What config.json says. Sizes are counts.

  Attributes:
    num_positions: rows of the position table. position_offset: the row of the first token.
  """

  family: str
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_size: int
  num_positions: int
  position_offset: int
  num_token_types: int
  activation: str
  norm_eps: float

  @property
  def max_positions(self) -> int:
    """The longest text, in tokens."""
    return self.num_positions - self.position_offset


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A pretrained text encoder.

  Attributes:
    config, params: its description, and its float32 parameters.
    tokenizer: puts its special tokens (CLS, SEP) around a text.
    source: what it was loaded by.
    max_length: the longest text that model and tokenizer take, in tokens, special ones included.
    sentence_length: where `sentence_embeddings` cuts a text, likewise.
  """

  config: EncoderConfig
  params: dict
  tokenizer: Any
  source: str
  max_length: int
  sentence_length: int


def load_encoder(path_or_repo: str | os.PathLike, revision: str | None = None) -> Encoder:
  """Loads an encoder from a hub id or a local folder: config.json, safetensors and a tokenizer.

  Args:
    path_or_repo: a name as `hub.find_model` takes it.
    revision: of a hub repository.

  Raises:
    ValueError: one line that names what is missing, damaged or unsupported; also a sentence encoder that pools
      otherwise than `sentence_embeddings`.
  """
  folder = find_model(path_or_repo, revision)
  if folder.is_file():
    raise ValueError(f"{folder} is a file: an encoder is a folder with config.json, safetensors and a tokenizer")
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder} has no config.json")
  config = read_encoder_config(read_json(folder / "config.json"))
  tokenizer = load_tokenizer(folder)
  if tokenizer is None:
    raise ValueError(f"{folder} has no tokenizer: tokenizer.json, or the vocabulary that it is made from, is needed")
  if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
    raise ValueError(f"the tokenizer in {folder} has no cls_token or no sep_token: an encoder's has both")
  if len(tokenizer) > config.vocab_size:
    raise ValueError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, its model {config.vocab_size}")
  max_length = min(config.max_positions, tokenizer.model_max_length)
  sentence_length = _sentence_length(folder, config.family, max_length)
  naming, tensors = read_tensors(folder)
  if naming != "torch":
    raise ValueError(f"{folder} has Flax weights alone: an encoder's must be safetensors")
  params = _load_params(tensors, folder, config)
  return Encoder(config, params, tokenizer, os.fspath(path_or_repo), max_length, sentence_length)


def read_encoder_config(hf_config: Mapping[str, Any]) -> EncoderConfig:
  """config.json -> EncoderConfig.

  Raises:
    ValueError: a family or an option that is not honoured, or a missing field; named, with the choices.
  """
  family = hf_config.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type {family!r} is no encoder that is supported: choose one of {', '.join(FAMILIES)}")
  config = read_options(
    hf_config,
    lambda c: EncoderConfig(
      family=family, vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], num_layers=c["num_hidden_layers"],
      num_heads=c["num_attention_heads"], mlp_size=c["intermediate_size"], num_positions=c["max_position_embeddings"],
      # RoBERTa's positions follow that of padding, which is the number of its token.
      position_offset=c["pad_token_id"] + 1 if family == "roberta" else 0,
      num_token_types=c["type_vocab_size"], activation=c["hidden_act"], norm_eps=float(c["layer_norm_eps"]),
    ),
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 1},
    required={
      "hidden_act": tuple(ACTIVATIONS),
      "position_embedding_type": ("absolute",),
      "is_decoder": (False,),
      "add_cross_attention": (False,),
      "directionality": ("bidi",),
    },
    ignored=(
      "attention_probs_dropout_prob", "hidden_dropout_prob", "tie_word_embeddings", "pooler_type", "pooler_fc_size",
      "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    ),
  )  # fmt: skip
  for field in dataclasses.fields(config):
    value, least = getattr(config, field.name), 0 if field.name == "position_offset" else 1
    if field.type is int and not (isinstance(value, int) and value >= least):
      raise ValueError(f"config.json of a {family} model: {field.name}={value!r} must be a whole number from {least}")
  if config.hidden_size % config.num_heads:
    raise ValueError(
      f"config.json of a {family} model: num_attention_heads={config.num_heads} must divide "
      f"hidden_size={config.hidden_size}"
    )
  return config


def _sentence_length(folder: pathlib.Path, family: str, max_length: int) -> int:
  """Where sentence-transformers cuts a text; its files are absent from a model that is no sentence encoder.

  Raises:
    ValueError: they ask for something else than the mean over the tokens.
  """
  modules = folder / "modules.json"
  if modules.is_file():
    try:
      kinds = [module["type"].rpartition(".")[2] for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError):
      raise ValueError(f"{modules} is damaged: it must be a list of modules, each with its type") from None
    for kind in kinds:
      if kind not in ("Transformer", "Pooling", "Normalize"):
        raise ValueError(f"{modules}: module {kind!r} is not supported: must be Transformer, Pooling or Normalize")
  pooling = folder / "1_Pooling" / "config.json"
  if pooling.is_file():
    fields = read_json(pooling)
    modes = [name for name, on in fields.items() if name.startswith("pooling_mode_") and on is True]
    mode = fields.get("pooling_mode", modes or ["pooling_mode_mean_tokens"])  # one name since sentence-transformers 5
    if mode not in ("mean", ["mean"], ["pooling_mode_mean_tokens"]):
      raise ValueError(f"{pooling}: pooling by {mode} is not supported: must be the mean over the tokens")
  settings = folder / f"sentence_{family}_config.json"
  fields = read_json(settings) if settings.is_file() else {}
  if fields.get("do_lower_case"):
    raise ValueError(f"{settings}: do_lower_case=true is not supported: lower case is the tokenizer's part")
  length = fields.get("max_seq_length") or max_length
  if not (isinstance(length, int) and length > 2):
    raise ValueError(f"{settings}: max_seq_length={length!r} must be a whole number above 2")
  return min(length, max_length)


def _shapes(c: EncoderConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
  """Name -> shape of the embeddings' parameters, and of a layer's; names stand behind "embeddings." and the layer."""

  def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

  def norm(name):
    return {f"{name}.weight": (c.hidden_size,), f"{name}.bias": (c.hidden_size,)}

  d = c.hidden_size
  embeddings = {
    "word_embeddings.weight": (c.vocab_size, d),
    "position_embeddings.weight": (c.num_positions, d),
    "token_type_embeddings.weight": (c.num_token_types, d),
    **norm("LayerNorm"),
  }
  layer = {
    **linear("attention.self.query", d, d),
    **linear("attention.self.key", d, d),
    **linear("attention.self.value", d, d),
    **linear("attention.output.dense", d, d),
    **norm("attention.output.LayerNorm"),
    **linear("intermediate.dense", d, c.mlp_size),
    **linear("output.dense", c.mlp_size, d),
    **norm("output.LayerNorm"),
  }
  return embeddings, layer


def _load_params(tensors: Tensors, source: pathlib.Path, config: EncoderConfig) -> dict:
  """{"embeddings": name -> array, "layers": name -> array with a leading layer axis}; heads are left out."""
  embeddings, layer = _shapes(config)
  numbers = range(config.num_layers)
  shapes = {f"embeddings.{name}": shape for name, shape in embeddings.items()}
  shapes |= {f"encoder.layer.{i}.{name}": shape for i in numbers for name, shape in layer.items()}
  found, surplus, misshaped = {}, [], []
  for full, tensor in tensors:
    name = full.removeprefix(f"{config.family}.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):  # the first BERT's
      name = name.replace(old, new)
    if name not in shapes:
      if name.startswith(("embeddings.", "encoder.")) and not name.endswith("_ids"):  # buffers
        surplus.append(full)
    elif tensor.shape != shapes[name]:
      misshaped.append(f"{full} {tensor.shape} for {shapes[name]}")
    else:
      found[name] = tensor.astype(np.float32)
  check_fit(source, shapes.keys() - found.keys() if not misshaped else (), surplus, misshaped)
  return {
    "embeddings": {name: jnp.asarray(found[f"embeddings.{name}"]) for name in embeddings},
    "layers": {name: jnp.stack([found.pop(f"encoder.layer.{i}.{name}") for i in numbers]) for name in layer},
  }


def hidden_states(
  encoder: Encoder,
  tokens: Int[ArrayLike, "B N"],
  mask: Bool[ArrayLike, "B N"] | Int[ArrayLike, "B N"],
  num_layers: int | None = None,
) -> Float[Array, "B N D"]:
  """Hidden states of every token behind a layer (Devlin et al., 2019).

  Args:
    tokens: int [B, N], right-padded, special tokens included.
    mask: bool [B, N] or the tokenizer's 0 and 1, True keeps.
    num_layers: how many layers to run: 0 gives the embeddings, None runs all.

  Returns:
    float32 [B, N, D], on any device in float32 throughout; unspecified where `mask` is False.

  Raises:
    ValueError: more tokens than the model has positions, or layers that it lacks.
  """
  config, tokens = encoder.config, jnp.asarray(tokens)
  if tokens.shape[1] > config.max_positions:
    raise ValueError(f"texts of {tokens.shape[1]} tokens: {encoder.source} has {config.max_positions} positions")
  num_layers = config.num_layers if num_layers is None else num_layers
  if not 0 <= num_layers <= config.num_layers:
    raise ValueError(f"num_layers={num_layers}: {encoder.source} has {config.num_layers} layers, must be 0 to as many")
  return _run(config, num_layers, encoder.params, tokens, jnp.asarray(mask, bool))


@functools.partial(jax.jit, static_argnums=(0, 1))
@jax.default_matmul_precision("float32")  # a metric must not depend on the device that it is computed on
def _run(config: EncoderConfig, num_layers: int, params: dict, tokens, mask):
  activation = ACTIVATIONS[config.activation]

  def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

  def norm(p, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]

  def layer(x, p):
    heads = (*tokens.shape, config.num_heads, -1)
    q, k, v = (linear(p, f"attention.self.{name}", x).reshape(heads) for name in ("query", "key", "value"))
    attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
    x = norm(p, "attention.output.LayerNorm", x + linear(p, "attention.output.dense", attended))
    hidden = linear(p, "output.dense", activation(linear(p, "intermediate.dense", x)))
    return norm(p, "output.LayerNorm", x + hidden), None

  p = params["embeddings"]
  positions = config.position_offset + jnp.arange(tokens.shape[1])
  x = p["word_embeddings.weight"][tokens] + p["position_embeddings.weight"][positions]
  x = norm(p, "LayerNorm", x + p["token_type_embeddings.weight"][0])  # one segment: all tokens are of the first type
  return jax.lax.scan(layer, x, jax.tree.map(lambda stack: stack[:num_layers], params["layers"]))[0]


@jax.jit
def _mean(hidden, mask):
  """The mean over the tokens that `mask` keeps, of Euclidean length 1."""
  mask = mask[..., None]
  mean = jnp.where(mask, hidden, 0.0).sum(1) / mask.sum(1)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def sentence_embeddings(encoder: Encoder, texts: Sequence[str], batch_size: int = 64) -> Float[np.ndarray, "B D"]:
  """Embeddings of texts: the mean over their tokens, special ones included, of length 1 (Reimers & Gurevych, 2019).

  They are those that sentence-transformers gives for such a model (all-MiniLM-L6-v2).

  Args:
    texts: B of them; white space around one is left out, tokens behind `encoder.sentence_length` are cut off.
    batch_size: texts at a time.

  Returns:
    float32 [B, D].

  Raises:
    ValueError: a single text in place of several.
  """
  if isinstance(texts, str):
    raise ValueError(f"texts is the one text {texts[:60]!r}: must be a list of texts")
  rows = tokenize(encoder, [text.strip() for text in texts], encoder.sentence_length)
  out = np.zeros((len(rows), encoder.config.hidden_size), np.float32)
  for ids, width in batches([len(row) for row in rows], batch_size, encoder.sentence_length):
    tokens, mask = pad([rows[i] for i in ids], width)
    out[ids] = _mean(hidden_states(encoder, tokens, mask), mask)
  return out


def tokenize(encoder: Encoder, texts: list[str], max_length: int) -> list[list[int]]:
  """The tokens of each text, special ones included, at most `max_length`."""
  # Some tokenizer.json files ask for a length and for padding of their own: both are overruled.
  return [] if not texts else encoder.tokenizer(texts, truncation=True, max_length=max_length, padding=False).input_ids


def batches(lengths: Sequence[int], batch_size: int, longest: int) -> Iterator[tuple[Int[np.ndarray, "B"], int]]:
  """Rows of like lengths together, in few shapes, so that few programs are compiled.

  Args:
    lengths: of all rows, at most `longest`.
    batch_size: B; a power of two where that holds all rows and is smaller.
    longest: the widest that a batch may be.

  Yields:
    (ids of B rows, the width that they are to have: a power of two or `longest`). The last id is repeated to make B.
  """
  order = np.argsort(lengths, kind="stable")
  batch_size = min(batch_size, _power_of_two(len(order)))
  for begin in range(0, len(order), batch_size):
    ids = order[np.minimum(np.arange(begin, begin + batch_size), len(order) - 1)]
    yield ids, min(max(16, _power_of_two(int(lengths[ids[-1]]))), longest)


def _power_of_two(n: int) -> int:
  """The first that is not below n."""
  return 1 << max(n - 1, 0).bit_length()


def pad(rows: Sequence[Sequence[int]], width: int) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
  """Token ids [B, N = width], right-padded, and their mask."""
  mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
  tokens = np.zeros(mask.shape, np.int32)
  tokens[mask] = np.concatenate(rows)
  return tokens, mask
