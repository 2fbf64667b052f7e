"""One causal decoder in Linen for every family, with attention over shared segments of keys and values.

A call sees new tokens `[*lead, N]` and a list of earlier `Segment`s. A segment that many sequences have in common (the
demonstrations, a question) has fewer leading axes than the tokens: its keys are never copied per sample. A layer
*returns* the keys and values of its new tokens and never writes a cache; whoever decodes writes once after the scan.
"""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gfn_jax.models.architectures import ACTIVATIONS, ModelConfig
from gfn_jax.models.lora import Lora, LoraConfig

# Up to so many layers are written out one after another where a gradient is wanted: a loop stacks what the backward
# pass needs, and CPUs copy that stack at every layer (0.57 s a pretraining step, 0.40 s without).
MAX_UNROLLED = 8

_MASKED = -1e30  # finite, so that a fully masked row (padding) gives no NaN


@flax.struct.dataclass
class KeyValues:
  """Keys and values [L, *lead, num_kv_heads, N, head_dim] of every layer."""

  keys: Any
  values: Any


@flax.struct.dataclass
class Segment:
  """Earlier tokens to attend to.

  Attributes:
    kv: KeyValues [L, *shared, H, M, Dh], where `shared` is a leading part of the new tokens' `lead`.
    mask: bool, broadcastable to [*lead, N, M]: which key each new token sees.
  """

  kv: KeyValues
  mask: Any


def attend(
  query: Float[Array, "*lead H R Dh"], segments: Sequence[tuple[Array, Array, Array]]
) -> Float[Array, "*lead H R Dh"]:
  """One softmax over the keys of all segments.

  Neither keys nor scores are concatenated: each segment is scored in its own layout, and the weighted values are added
  up under the maximum and the normaliser that the segments have in common.

  Args:
    query: R rows of queries per key-value head (new tokens x query heads of a group).
    segments: (keys [*shared, H, M, Dh], values, mask [*lead or ones, R or 1, M]); `shared` is a leading part of `lead`,
      and the axes that a segment lacks are folded into the query rows.
  """
  *lead, heads, rows, dim = query.shape
  query = query * dim**-0.5

  def fold(x, shared):  # [*lead, H, R, K] -> [*shared, H, extra * R, K]
    if shared == len(lead):
      return x
    return jnp.moveaxis(x, -3, shared).reshape(*lead[:shared], x.shape[-3], -1, x.shape[-1])

  def unfold(x, shared):
    if shared == len(lead):
      return x
    return jnp.moveaxis(x.reshape(*lead[:shared], heads, *lead[shared:], rows, x.shape[-1]), shared, -3)

  scores, maxima = [], []
  for keys, _, mask in segments:
    shared = keys.ndim - 3
    s = jnp.einsum("...rd,...md->...rm", fold(query, shared), keys, preferred_element_type=jnp.float32)
    mask = jnp.broadcast_to(mask[..., None, :, :], (*lead, 1, rows, keys.shape[-2]))
    s = jnp.where(fold(mask, shared), s, _MASKED)
    scores.append(s)
    maxima.append(unfold(jax.lax.stop_gradient(s.max(-1, keepdims=True)), shared))
  top = functools.reduce(jnp.maximum, maxima)
  out, total = 0.0, 0.0
  for s, (keys, values, _) in zip(scores, segments):
    shared = keys.ndim - 3
    weights = jnp.exp(s - fold(top, shared))
    total = total + unfold(weights.sum(-1, keepdims=True), shared)
    weights = weights.astype(values.dtype)
    product = jnp.einsum("...rm,...md->...rd", weights, values, preferred_element_type=jnp.float32)
    out = out + unfold(product, shared)
  return (out / total).astype(query.dtype)


def rotate(x: Float[Array, "*lead N H Dh"], cos: Array, sin: Array) -> Float[Array, "*lead N H Dh"]:
  """Rotary embedding of the first 2 * cos.shape[-1] channels, neighbours paired (GPT-J)."""
  rotary, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
  even, odd = rotary[..., 0::2], rotary[..., 1::2]
  cos, sin = cos[..., None, :], sin[..., None, :]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(rotary.shape)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


class Projection(nn.Module):
  """x W + b, and the adapter's (alpha / r) (x A) B where the variables hold one for this projection."""

  features: int
  use_bias: bool
  dtype: Any
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), self.dtype)
    x, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]  # one contracted axis: its gradient is one plain matrix product
    y = x @ kernel
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
    if self.has_variable("lora", "lora_a"):
      a, b = self.get_variable("lora", "lora_a"), self.get_variable("lora", "lora_b")
      h = nn.Dropout(self.lora.dropout)(x, deterministic=deterministic).astype(a.dtype)
      y = y + (self.lora.scale * ((h @ a) @ b)).astype(y.dtype)
    return y.reshape(*lead, self.features)


class Layer(nn.Module):
  """Attention and MLP. Scanned over the layers: parameters, adapters and segments carry a leading layer axis."""

  config: ModelConfig
  dtype: Any
  lora: LoraConfig | None

  @nn.compact
  def __call__(self, x, rotary, self_mask, segments, masks, deterministic):
    c = self.config

    def project(name, inputs, use_bias):
      features = c.projections()[name][1]
      return Projection(features, use_bias, self.dtype, self.lora, name=name)(inputs, deterministic)

    def norm(name):
      return nn.LayerNorm(epsilon=c.norm_eps, dtype=self.dtype, param_dtype=self.dtype, name=name)

    normed = norm("attention_norm")(x)
    if c.fused_qkv:
      q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
      q, k, v = jnp.split(project("qkv", normed, c.attention_bias), [q_size, q_size + kv_size], axis=-1)
    else:
      q, k, v = (project(name, normed, c.attention_bias) for name in "qkv")
    q = q.reshape(*x.shape[:-1], c.num_heads, c.head_dim)
    k = k.reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
    v = v.reshape(k.shape)
    if c.rotary_dim:
      q, k = rotate(q, *rotary), rotate(k, *rotary)
    # Heads before tokens: keys as the matrix product reads them, [*lead, H, N, Dh]; a group's query heads become rows.
    group = c.num_heads // c.num_kv_heads
    k, v = jnp.moveaxis(k, -2, -3), jnp.moveaxis(v, -2, -3)
    q = jnp.moveaxis(q.reshape(*x.shape[:-1], c.num_kv_heads, group, c.head_dim), -4, -3)
    rows = (*k.shape[:-2], -1, c.head_dim)
    read = [(kv.keys, kv.values, jnp.repeat(mask, group, axis=-2) if mask.shape[-2] > 1 else mask) for kv, mask in
            (*zip(segments, masks), (KeyValues(k, v), self_mask))]  # fmt: skip
    attended = jnp.moveaxis(attend(q.reshape(rows), read).reshape(q.shape), -3, -4)
    attended = project("o", attended.reshape(*x.shape[:-1], -1), c.attention_bias)

    if c.parallel_residual:
      inputs = normed
    else:
      x = x + attended
      inputs, attended = norm("mlp_norm")(x), 0.0
    hidden = ACTIVATIONS[c.activation](project("up", inputs, True))
    return x + attended + project("down", hidden, True), KeyValues(k, v)


# bfloat16 logits of 16 to 32 would be 0.125 apart: the products are summed, and stay, in float32.
_float32_product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class Decoder(nn.Module):
  """Tokens to hidden states (`__call__`) and hidden states to logits (`head`).

  The variables are {"params": base} and, with the adapter on, {"lora": adapter}.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  lora: LoraConfig | None = None
  unroll: bool = False

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.hidden_size, param_dtype=self.dtype, dtype=self.dtype)
    if not c.rotary_dim:
      self.position_embed = nn.Embed(c.max_positions, c.hidden_size, param_dtype=self.dtype, dtype=self.dtype)
    self.layers = nn.scan(
      Layer,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=c.num_layers if self.unroll and c.num_layers <= MAX_UNROLLED else 1,
    )(c, self.dtype, self.lora)
    self.final_norm = nn.LayerNorm(epsilon=c.norm_eps, dtype=self.dtype, param_dtype=self.dtype)
    if not c.tied_embeddings:
      self.head_projection = nn.Dense(
        c.vocab_size, use_bias=c.head_bias, dtype=self.dtype, param_dtype=self.dtype,
        kernel_init=nn.initializers.normal(0.02), dot_general=_float32_product, name="head",
      )  # fmt: skip

  def __call__(self, tokens, positions, self_mask, segments=(), deterministic=True):
    c = self.config
    x = self.embed(tokens)
    rotary = None
    if c.rotary_dim:
      frequencies = 10_000.0 ** -(jnp.arange(0, c.rotary_dim, 2) / c.rotary_dim)
      angles = positions[..., None] * frequencies
      rotary = jnp.cos(angles), jnp.sin(angles)
    else:
      x = x + self.position_embed(positions)
    kvs, masks = tuple(s.kv for s in segments), tuple(s.mask for s in segments)
    x, kv = self.layers(x, rotary, self_mask, kvs, masks, deterministic)
    return self.final_norm(x), kv

  def head(self, hidden):
    if self.config.tied_embeddings:
      return jnp.einsum("...d,vd->...v", hidden, self.embed.embedding, preferred_element_type=jnp.float32)
    return self.head_projection(hidden).astype(jnp.float32)

  def initialise(self, tokens):
    """Touches every parameter once; for `init`."""
    hidden, _ = self(tokens, jnp.arange(tokens.shape[-1]), causal_mask(tokens.shape[-1]))
    return self.head(hidden)


def causal_mask(n: int) -> Bool[Array, "N N"]:
  """True where token i may see token j <= i."""
  return jnp.tril(jnp.ones((n, n), bool))


def prompt_positions(mask: Bool[Array, "*lead N"]) -> Int[Array, "*lead N"]:
  """Positions that count the tokens `mask` keeps, from 0."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def init_params(config: ModelConfig, key: jax.Array, dtype: str = "float32") -> dict:
  """Random base parameters, normal(0.02) kernels."""
  tokens = jnp.zeros((2,), jnp.int32)
  return Decoder(config, jnp.dtype(dtype)).init(key, tokens, method="initialise")["params"]


def param_dtype(params: dict) -> jnp.dtype:
  """The base's dtype, in which the decoder computes."""
  return params["embed"]["embedding"].dtype


def _bind(config: ModelConfig, params: dict, lora: Lora | None, unroll: bool):
  decoder = Decoder(config, param_dtype(params), lora.config if lora else None, unroll)
  return decoder, {"params": params} | ({"lora": lora.params} if lora else {})


def hidden_states(
  config: ModelConfig,
  params: dict,
  lora: Lora | None,
  tokens: Int[Array, "*lead N"],
  positions: Int[Array, "*lead N"],
  self_mask: Bool[Array, "..."],
  segments: Sequence[Segment] = (),
  dropout_key: jax.Array | None = None,
  unroll: bool = False,
) -> tuple[Float[Array, "*lead N D"], KeyValues]:
  """Runs the decoder on new tokens.

  Args:
    config, params: the base, frozen. `lora`: the adapter, or None for the base alone (the reference model).
    tokens, positions: new tokens, and the position each would have in its full sequence.
    self_mask: which new token sees which, broadcastable to [*lead, N, N].
    segments: earlier tokens.
    dropout_key: turns the adapter's dropout on; for the loss only.
    unroll: writes out the layers of a small model; for what is differentiated.

  Returns:
    Normed hidden states, and the new tokens' keys and values [L, *lead, H, N, Dh].
  """
  decoder, variables = _bind(config, params, lora, unroll)
  rngs = None if dropout_key is None else {"dropout": dropout_key}
  return decoder.apply(variables, tokens, positions, self_mask, segments, dropout_key is None, rngs=rngs)


def output_logits(config: ModelConfig, params: dict, hidden: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
  """Float32 logits of the next token."""
  return Decoder(config, param_dtype(params)).apply({"params": params}, hidden, method="head")
