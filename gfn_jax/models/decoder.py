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
from gfn_jax.models.quantization import matmul
from gfn_jax.models.rotary import frequencies, rotate

# Up to so many layers are written out one after another where a gradient is wanted: a loop stacks what the backward
# pass needs, and CPUs copy that stack at every layer (0.57 s a pretraining step, 0.40 s without).
MAX_UNROLLED = 8

# What the backward pass computes again rather than keeps, a layer at a time.
REMATS = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps the results of projections
  "full": jax.checkpoint_policies.nothing_saveable,  # keeps a layer's input alone
}

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
    positions: int, broadcastable likewise: where each key stands; a sliding window asks.
  """

  kv: KeyValues
  mask: Any
  positions: Any


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
    y = matmul(x, kernel)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
    if self.has_variable("lora", "lora_a"):
      a, b = self.get_variable("lora", "lora_a"), self.get_variable("lora", "lora_b")
      h = nn.Dropout(self.lora.dropout)(x, deterministic=deterministic).astype(a.dtype)
      y = y + (self.lora.scale * ((h @ a) @ b)).astype(y.dtype)
    return y.reshape(*lead, self.features)


class RMSNorm(nn.Module):
  """x over its root mean square, in float32, times `scale` (+ 1 where `plus_one`)."""

  epsilon: float
  plus_one: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = self.param("scale", start, x.shape[-1:], self.dtype).astype(jnp.float32)
    normed = nn.RMSNorm(epsilon=self.epsilon, use_scale=False, dtype=jnp.float32)(x)
    return (normed * (1 + scale if self.plus_one else scale)).astype(self.dtype)


def make_norm(config: ModelConfig, dtype: Any, name: str | None = None) -> nn.Module:
  """The norm that this model has everywhere."""
  if config.norm == "layer":
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, name=name)
  return RMSNorm(config.norm_eps, config.norm == "rms_plus_one", dtype, name=name)


class Layer(nn.Module):
  """Attention and MLP. Scanned over the layers: parameters, adapters and segments carry a leading layer axis."""

  config: ModelConfig
  dtype: Any
  lora: LoraConfig | None

  @nn.compact
  def __call__(self, x, rotary, self_mask, segments, masks, deterministic):
    c = self.config

    def project(name, inputs):
      features = c.projections()[name][1]
      return Projection(features, name in c.biased, self.dtype, self.lora, name=name)(inputs, deterministic)

    def norm(name, inputs):
      return make_norm(c, self.dtype, name)(inputs)

    normed = norm("attention_norm", x)
    lead = x.shape[:-1]
    if c.fused_qkv == "concatenated":
      q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
      q, k, v = jnp.split(project("qkv", normed), [q_size, q_size + kv_size], axis=-1)
    elif c.fused_qkv == "per_head":
      q, k, v = jnp.split(project("qkv", normed).reshape(*lead, c.num_heads, 3 * c.head_dim), 3, axis=-1)
    else:
      q, k, v = (project(name, normed) for name in "qkv")
    q = q.reshape(*lead, c.num_heads, c.head_dim)
    k = k.reshape(*lead, c.num_kv_heads, c.head_dim)
    v = v.reshape(k.shape)
    if c.qk_norm:
      q, k = norm("q_norm", q), norm("k_norm", k)
    if c.rotary:
      q, k = rotate(q, *rotary, c.rotary.interleaved), rotate(k, *rotary, c.rotary.interleaved)
    # Heads before tokens: keys as the matrix product reads them, [*lead, H, N, Dh]; a group's query heads become rows.
    group = c.num_heads // c.num_kv_heads
    k, v = jnp.moveaxis(k, -2, -3), jnp.moveaxis(v, -2, -3)
    q = jnp.moveaxis(q.reshape(*lead, c.num_kv_heads, group, c.head_dim), -4, -3)
    rows = (*k.shape[:-2], -1, c.head_dim)
    read = [(kv.keys, kv.values, jnp.repeat(mask, group, axis=-2) if mask.shape[-2] > 1 else mask) for kv, mask in
            (*zip(segments, masks), (KeyValues(k, v), self_mask))]  # fmt: skip
    attended = jnp.moveaxis(attend(q.reshape(rows), read).reshape(q.shape), -3, -4)
    attended = project("o", attended.reshape(*lead, -1))

    if c.residual == "sequential":
      x = x + attended
      inputs, attended = norm("mlp_norm", x), 0.0
    else:
      inputs = normed if c.residual == "parallel_shared" else norm("mlp_norm", x)
    activation = ACTIVATIONS[c.activation]
    if c.gated_mlp:
      hidden = activation(project("gate", inputs)) * project("up", inputs)
    else:
      hidden = activation(project("up", inputs))
    return x + attended + project("down", hidden), KeyValues(k, v)


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
  remat: str = "none"

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.hidden_size, param_dtype=self.dtype, dtype=self.dtype)
    if not c.rotary:
      self.position_embed = nn.Embed(c.max_positions, c.hidden_size, param_dtype=self.dtype, dtype=self.dtype)
    policy = REMATS[self.remat]
    self.layers = nn.scan(
      # The last argument, `deterministic`, is static.
      Layer if policy is None else nn.remat(Layer, policy=policy, prevent_cse=False, static_argnums=(6,)),
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=c.num_layers if self.unroll and c.num_layers <= MAX_UNROLLED else 1,
    )(c, self.dtype, self.lora)
    self.final_norm = make_norm(c, self.dtype)
    if not c.tied_embeddings:
      self.head_projection = nn.Dense(
        c.vocab_size, use_bias=c.head_bias, dtype=self.dtype, param_dtype=self.dtype,
        kernel_init=nn.initializers.normal(0.02), dot_general=_float32_product, name="head",
      )  # fmt: skip

  def __call__(self, tokens, positions, self_mask, segments=(), deterministic=True):
    c = self.config
    x = self.embed(tokens)
    if c.embedding_scale != 1.0:
      x = x * jnp.asarray(c.embedding_scale, self.dtype)
    rotary = None
    if c.rotary:
      angles = positions[..., None] * frequencies(c.rotary)
      rotary = jnp.cos(angles), jnp.sin(angles)
    else:
      x = x + self.position_embed(positions)
    kvs, masks = tuple(s.kv for s in segments), tuple(s.mask for s in segments)
    if c.sliding_window:
      near = lambda keys: positions[..., None] - keys < c.sliding_window  # noqa: E731
      masks = tuple(s.mask & near(s.positions) for s in segments)
      self_mask = self_mask & near(positions[..., None, :])
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


def _bind(config: ModelConfig, params: dict, lora: Lora | None, unroll: bool, remat: str):
  decoder = Decoder(config, param_dtype(params), lora.config if lora else None, unroll, remat)
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
  remat: str = "none",
) -> tuple[Float[Array, "*lead N D"], KeyValues]:
  """Runs the decoder on new tokens.

  Args:
    config, params: the base, frozen. `lora`: the adapter, or None for the base alone (the reference model).
    tokens, positions: new tokens, and the position each would have in its full sequence.
    self_mask: which new token sees which, broadcastable to [*lead, N, N].
    segments: earlier tokens.
    dropout_key: turns the adapter's dropout on; for the loss only.
    unroll: writes out the layers of a small model; for what is differentiated.
    remat: one of `REMATS`; for what is differentiated.

  Returns:
    Normed hidden states, and the new tokens' keys and values [L, *lead, H, N, Dh].
  """
  decoder, variables = _bind(config, params, lora, unroll, remat)
  rngs = None if dropout_key is None else {"dropout": dropout_key}
  return decoder.apply(variables, tokens, positions, self_mask, segments, dropout_key is None, rngs=rngs)


def output_logits(config: ModelConfig, params: dict, hidden: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
  """Float32 logits of the next token."""
  return Decoder(config, param_dtype(params)).apply({"params": params}, hidden, method="head")
