"""Rollouts: KV-cached decoding on the device, the calculator on the host between jitted rounds.

A round decodes until no row is active, or too many rows wait for the tool; the host answers those, queues the results
as forced tokens, and the next round goes on with all. A rollout costs more rounds than its longest chain of calls, and
hardly more trips of the loop than its longest row has tokens.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from gfn_jax import distributed
from gfn_jax.draws import check_behavior, draw_index, filter_tokens
from gfn_jax.flops import forward_flops
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import KeyValues, Segment, hidden_states, output_logits
from gfn_jax.models.lora import Lora
from gfn_jax.models.prefix import Prefix, encode_context, encode_prompts, masked_logits, prompt_width, without_start
from gfn_jax.parallel import Devices, is_split, on_any_share, over_data, platform_of, settled
from gfn_jax.types import Trajectory

FREE = -1  # in `forced`: the policy chooses
# A round is over when more rows wait than this share of those that are active. What a row waits it may add to the
# rollout, and then to the cost of all rows; a further round costs about as much as a token. Devices that go by rows of
# their own wait for the slowest at the end of each round: theirs are to be few.
PATIENCE, PATIENCE_OF_MANY = 1 / 8, 1.0
# On CPUs, which are slower with every row, rows go on with fewer beside them when no more than these shares of all are
# active. Each share is a loop, which takes seconds to compile: a token of a row must cost so many FLOPs.
SHARES, WORTH_COMPILING = (1 / 2, 1 / 8), 1e8
ROWS_PER_CALL = 1280  # of a process in `Sampler.draw`: bounds the memory of caches and logits


@flax.struct.dataclass
class RolloutState:
  """Rows in mid-decoding, [Q, N, ...].

  Attributes:
    tokens: int [Q, N, T]; length: int [Q, N]; action_mask: bool [Q, N, T].
    log_pf: float [Q, N, T]; log_pterm: float [Q, N, S].
    forced: int [Q, N, T], tokens that the tool has queued; `FREE` elsewhere.
    active: bool [Q, N], rows that decode; waiting: bool [Q, N], rows that asked the tool.
    cache: KeyValues [L, Q, N, H, T, Dh] of the tokens so far.
    logits: float [Q, N, V], for the next token.
    keys: one random key per row [Q, N]; token t uses fold_in(key, t), whatever other rows or devices do.
  """

  tokens: Any
  length: Any
  action_mask: Any
  log_pf: Any
  log_pterm: Any
  forced: Any
  active: Any
  waiting: Any
  cache: Any
  logits: Any
  keys: Any

  def take(self, rows: Int[jax.Array, "R"]) -> "RolloutState":
    """Some of all Q * N rows, as R queries of one sample each."""
    return _by_field(lambda axis, x: _in_one(axis, x)[_at(axis, rows)], self)

  def put(self, rows: Int[jax.Array, "R"], some: "RolloutState") -> "RolloutState":
    """All rows, those that were taken as they are in `some`: gathered, since a scatter takes longer to compile."""
    place = jnp.full(self.length.size, len(rows)).at[rows].set(jnp.arange(len(rows)))  # among those

    def put(axis, x, new):
      taken = (place < len(rows)).reshape(-1, *(1,) * (x.ndim - axis - 1))
      return jnp.where(taken, new[_at(axis, jnp.minimum(place, len(rows) - 1))], _in_one(axis, x)).reshape(x.shape)

    return _by_field(put, self, some)


def _by_field(function: Callable, *states: RolloutState) -> RolloutState:
  """`function(axis, *arrays)` of each array of the states, of which `axis` is that of the queries."""

  def of(name):
    return jax.tree.map(functools.partial(function, 1 if name == "cache" else 0), *(getattr(s, name) for s in states))

  return RolloutState(**{field.name: of(field.name) for field in dataclasses.fields(RolloutState)})


def _in_one(axis: int, x: jax.Array) -> jax.Array:
  """[..., Q, N, ...] -> [..., Q * N, 1, ...]"""
  return x.reshape(*x.shape[:axis], -1, 1, *x.shape[axis + 2 :])


def _at(axis: int, rows: jax.Array) -> tuple:
  return (*[slice(None)] * axis, rows)


def shares_of(config: ModelConfig, platform: str) -> tuple[float, ...]:
  """Which of `SHARES` a round's loops go down to."""
  flops = forward_flops(config, None, tokens=1, keys=0, outputs=1)
  return SHARES if platform == "cpu" and flops >= WORTH_COMPILING else ()


def crowds(num_rows: int, shares: Sequence[float]) -> list[int]:
  """How many rows the loops of a round decode, one after another: all of a device, and then fewer."""
  return [num_rows, *(int(share * num_rows) for share in shares if share * num_rows >= 1)]


@dataclasses.dataclass
class Rollout:
  """Samples on their way: the devices have been given the first round.

  Attributes:
    num_queries: Q, of all processes.
    lora, prefix, temperature, state: what rounds take; q of the queries on each of D devices. prefix and state, which
      hold the caches, are None once the rollout is finished.
  """

  num_queries: int
  lora: Lora | None
  prefix: Prefix | None
  temperature: np.ndarray
  state: RolloutState | None


def start(
  config: ModelConfig,
  max_length: int,
  params: dict,
  lora: Lora | None,
  context: KeyValues | None,
  key: jax.Array,
  prompt_tokens: Int[jax.Array, "Q P"],
  prompt_mask: Bool[jax.Array, "Q P"],
  row_ids: Int[jax.Array, "Q N"],
) -> tuple[Prefix, RolloutState]:
  """Prefills each prompt once and sets up N empty rows for it. `row_ids` name the rows for their random keys."""
  prefix = encode_prompts(config, params, lora, prompt_tokens, prompt_mask, context)
  queries, samples = row_ids.shape
  logits = output_logits(config, params, prefix.last_hidden)
  layers, heads, dim = prefix.prompt.keys.shape[0], prefix.prompt.keys.shape[2], prefix.prompt.keys.shape[4]
  empty = jnp.zeros((layers, queries, samples, heads, max_length, dim), prefix.prompt.keys.dtype)
  rows = (queries, samples)
  return prefix, RolloutState(
    tokens=jnp.zeros((*rows, max_length), jnp.int32),
    length=jnp.zeros(rows, jnp.int32),
    action_mask=jnp.zeros((*rows, max_length), bool),
    log_pf=jnp.zeros((*rows, max_length), jnp.float32),
    log_pterm=jnp.zeros((*rows, max_length + 1), jnp.float32),
    forced=jnp.full((*rows, max_length), FREE, jnp.int32),
    active=jnp.ones(rows, bool),
    waiting=jnp.zeros(rows, bool),
    cache=KeyValues(empty, empty),
    logits=jnp.broadcast_to(logits[:, None], (*rows, logits.shape[-1])),
    keys=jax.vmap(jax.vmap(functools.partial(jax.random.fold_in, key)))(row_ids),
  )


def decode_round(
  config: ModelConfig,
  stop_token_id: int,
  min_length: int,
  top_k: int | None,
  top_p: float | None,
  some_greedy: bool,
  together: bool,
  patience: float,
  shares: Sequence[float],
  params: dict,
  lora: Lora | None,
  allowed_tokens: Bool[jax.Array, "V"],
  call_tokens: Bool[jax.Array, "V"],
  prefix: Prefix,
  temperature: Float[jax.Array, "Q"],
  state: RolloutState,
) -> RolloutState:
  """Decodes until no row is active, or too many wait for the tool: more than `patience` times those.

  All rows together, then those left among themselves, in `crowds` by `shares`: what others write is nothing to a row.
  Each then has its prompt's keys and values to itself.
  Minimum length, temperature and the two filters change what is sampled, never what is recorded. `some_greedy` says
  that a temperature is 0: whoever needs neither argmax nor filter runs a program without them. `together`: as of
  `parallel.on_any_share`.
  """
  max_length = state.tokens.shape[-1]
  is_stop = jnp.arange(allowed_tokens.shape[0]) == stop_token_id

  def step(prefix: Prefix, temperature: jax.Array, state: RolloutState) -> RolloutState:
    t = state.length
    query_index, sample_index = jnp.indices(t.shape, sparse=True)
    logits, log_z = masked_logits(state.logits, allowed_tokens)
    too_short = (t < min_length)[..., None] & is_stop
    divisor = jnp.where(temperature == 0, 1.0, temperature) if some_greedy else temperature
    behaviour = jnp.where(too_short, -jnp.inf, (logits - log_z) / divisor[:, None, None])
    keys = jax.vmap(jax.vmap(jax.random.fold_in))(state.keys, t)
    draw = jax.vmap(jax.vmap(draw_index))
    if top_k is None and top_p is None:
      sampled = draw(keys, behaviour)
    else:
      scores, tokens = filter_tokens(behaviour, top_k, top_p)
      sampled = jnp.take_along_axis(tokens, draw(keys, scores)[..., None], axis=-1)[..., 0]
    if some_greedy:
      sampled = jnp.where(temperature[:, None] == 0, jnp.argmax(behaviour, axis=-1), sampled)
    forced = jnp.take_along_axis(state.forced, jnp.minimum(t, max_length - 1)[..., None], axis=-1)[..., 0]
    chosen = forced == FREE
    token = jnp.where(chosen, sampled, forced)

    writes = state.active & ~(chosen & (token == stop_token_id))
    here = jnp.arange(max_length) == t[..., None]
    write_here = here & writes[..., None]
    log_pf = jnp.take_along_axis(logits, token[..., None], axis=-1) - log_z
    at_prefix = (jnp.arange(max_length + 1) == t[..., None]) & (state.active & chosen)[..., None]
    length = t + writes
    calls = writes & chosen & call_tokens[token] & (length < max_length)

    slots = jnp.arange(max_length)
    cached, at = slots < t[..., None], prefix.length[:, None, None] + slots
    segments = [*prefix.segments(2), Segment(state.cache, cached[..., None, :], at[..., None, :])]
    hidden, new = hidden_states(
      config, params, lora, token[..., None], (prefix.length[:, None] + t)[..., None], jnp.ones((1, 1), bool), segments
    )
    slot = jnp.where(writes, t, max_length)  # out of bounds: dropped

    def write(cache, new):
      # The indexed axes come first in the result: [Q, N, L, H, Dh].
      return cache.at[:, query_index, sample_index, :, slot].set(jnp.moveaxis(new[..., 0, :], 0, 2), mode="drop")

    return state.replace(
      tokens=jnp.where(write_here, token[..., None], state.tokens),
      length=length,
      action_mask=state.action_mask | (write_here & chosen[..., None]),
      log_pf=jnp.where(write_here & chosen[..., None], log_pf, state.log_pf),
      log_pterm=jnp.where(at_prefix, logits[..., stop_token_id, None] - log_z, state.log_pterm),
      active=writes & ~calls & (length < max_length),
      waiting=state.waiting | calls,
      cache=KeyValues(write(state.cache.keys, new.keys), write(state.cache.values, new.values)),
      logits=jnp.where(writes[..., None], output_logits(config, params, hidden[..., 0, :]), state.logits),
    )

  def decode(prefix: Prefix, temperature: jax.Array, waiting_elsewhere: jax.Array | int, sizes: list[int], state):
    def goes_on(state: RolloutState) -> jax.Array:
      active, waiting = state.active.sum(), state.waiting.sum() + waiting_elsewhere
      return on_any_share((active > (sizes[0] if sizes else 0)) & (waiting <= patience * active), together)

    state = jax.lax.while_loop(goes_on, functools.partial(step, prefix, temperature), state)
    if not sizes:
      return state
    rows = jnp.argsort(~state.active.ravel())[: sizes[0]]
    left, query_ids = state.take(rows), rows // state.length.shape[1]
    waiting_elsewhere += state.waiting.sum() - left.waiting.sum()
    return state.put(rows, decode(prefix.take(query_ids), temperature[query_ids], waiting_elsewhere, sizes[1:], left))

  return decode(prefix, temperature, 0, crowds(state.length.size, shares)[1:], state)


# Compiled once a shape, however many samplers a process makes.
@functools.lru_cache
def _compiled_start(config: ModelConfig, max_length: int, devices: tuple):
  """`encode_context` and `start`."""
  encode = settled(jax.jit(functools.partial(encode_context, config)))
  return encode, over_data(functools.partial(start, config, max_length), (None,) * 4 + (0,) * 3, devices)


@functools.lru_cache
def _compiled_round(
  config: ModelConfig,
  stop_token_id: int,
  min_length: int,
  top_k: int | None,
  top_p: float | None,
  some_greedy: bool,
  devices: tuple,
):
  """`decode_round`."""
  together = is_split(devices)
  patience = PATIENCE if together or len(devices) == 1 else PATIENCE_OF_MANY
  part = functools.partial(
    decode_round, config, stop_token_id, min_length, top_k, top_p, some_greedy, together, patience,
    shares_of(config, platform_of(devices)),
  )  # fmt: skip
  return over_data(part, (None,) * 4 + (0,) * 3, devices, donate_argnums=(6,))


class Sampler:
  """Draws trajectories from a policy.

  Args:
    config: of the base.
    params: the base's parameters, as placed on `devices`.
    allowed_tokens: bool [V], the vocabulary of Z, stop token included.
    stop_token_id: ends Z.
    max_length, min_length: of Z, in tokens.
    top_k, top_p: of the behaviour policy, as in `filter_tokens`; None for no such filter.
    tool: `tools.Calculator` or another object with `is_call` [V] and `respond(tokens) -> tokens`; None for none.
    context: int [C], tokens before every prompt. num_replaced: as in `rewards.RewardModel`.
    devices: this process's, over which its queries are mapped, without collectives.

  Raises:
    ValueError: lengths that contradict each other, a filter out of range, a stop token that is not allowed, or nothing
      but that one before min_length.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: dict,
    *,
    allowed_tokens: Bool[np.ndarray, "V"],
    stop_token_id: int,
    max_length: int,
    min_length: int = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    tool: Any = None,
    context: Sequence[int] = (),
    num_replaced: int = 0,
    devices: Devices | None = None,
  ):
    self._check = functools.partial(check_behavior, max_length, min_length, top_k=top_k, top_p=top_p)
    self._check(np.ones(1))
    if not allowed_tokens[stop_token_id]:
      raise ValueError(f"stop token {stop_token_id} is not among the allowed tokens")
    if min_length and allowed_tokens.sum() == 1:
      raise ValueError(f"min_length {min_length}: no token but the stop token {stop_token_id} is allowed")
    self._params, self._tool, self._max_length, self.min_length = params, tool, max_length, min_length
    self.devices = list(devices or jax.local_devices()[:1])
    is_call = np.zeros(allowed_tokens.shape, bool) if tool is None else tool.is_call
    self._masks = jnp.asarray(allowed_tokens), jnp.asarray(is_call)
    self._num_replaced = num_replaced if len(context) else 0
    self._context_tokens = jnp.asarray(np.asarray(context, np.int32))
    self._encode_context, self._start = _compiled_start(config, max_length, tuple(self.devices))
    self._round = functools.partial(
      _compiled_round, config, stop_token_id, min_length, top_k, top_p, devices=tuple(self.devices)
    )

  def __call__(
    self,
    lora: Lora | None,
    prompt_tokens: Int[np.ndarray, "Q P"],
    prompt_mask: Bool[np.ndarray, "Q P"],
    *,
    num_samples: int,
    temperature: Float[np.ndarray, "Q"],
    key: jax.Array,
    row_ids: Int[np.ndarray, "Q N"] | None = None,
    on_round: Callable[[], None] | None = None,
  ) -> Trajectory:
    """N samples for each of Q prompts, shared by the devices of all processes.

    Args:
      lora: the adapter, or None to sample from the base.
      temperature: of the behaviour policy, a query; 0 takes the most probable token, and the first among equals.
      key, row_ids: row r draws from fold_in(key, row_ids[r]); by default rows are numbered in order.
      on_round: called after each device round, to answer signals; by several processes once, when all have sampled.

    Returns:
      Trajectory of B = Q * N rows, grouped by query, as NumPy arrays.

    Raises:
      ValueError: a temperature out of range.
    """
    rollout = self.begin(
      lora, prompt_tokens, prompt_mask, num_samples=num_samples, temperature=temperature, key=key, row_ids=row_ids
    )
    return self.finish(rollout, on_round)

  def begin(
    self,
    lora: Lora | None,
    prompt_tokens: Int[np.ndarray, "Q P"],
    prompt_mask: Bool[np.ndarray, "Q P"],
    *,
    num_samples: int,
    temperature: Float[np.ndarray, "Q"],
    key: jax.Array,
    row_ids: Int[np.ndarray, "Q N"] | None = None,
  ) -> Rollout:
    """The first half of a call, which waits for nothing but what `parallel.settled` says.

    `lora` must not be donated before `finish`.
    """
    temperature = np.asarray(temperature, np.float32)
    self._check(temperature)
    queries, devices = len(prompt_tokens), len(self.devices)
    own = distributed.share(queries)
    per_device = -(-queries // (jax.process_count() * devices))
    ids = np.minimum(own.start + np.arange(devices * per_device), queries - 1)  # the last devices may draw rows again
    if row_ids is None:
      row_ids = np.arange(queries * num_samples).reshape(queries, num_samples)
    split = lambda x: np.asarray(x)[ids].reshape(devices, per_device, *np.shape(x)[1:])  # noqa: E731
    prefix, state = self.prefill(lora, *map(split, (prompt_tokens, prompt_mask, row_ids)), key)
    temperature = split(temperature)
    return Rollout(queries, lora, prefix, temperature, self.decode(lora, prefix, temperature, state))

  def finish(self, rollout: Rollout, on_round: Callable[[], None] | None = None) -> Trajectory:
    """The second half: the other rounds, and the samples. A rollout can be finished once."""
    prefix, state, alone = rollout.prefix, rollout.state, jax.process_count() == 1
    rollout.prefix = rollout.state = None  # whoever still holds the rollout holds no caches
    while True:
      if on_round is not None and alone:
        on_round()
      waiting = np.asarray(state.waiting)
      if not waiting.any():
        break
      answers = self._answers(waiting, np.asarray(state.tokens), np.asarray(state.length))
      changed = {
        "forced": np.where(waiting[..., None], answers, np.asarray(state.forced)),
        "active": waiting | np.asarray(state.active),
        "waiting": np.zeros_like(waiting),
      }
      # Placed as they were, or the same round would be compiled once more.
      state = state.replace(**{k: jax.device_put(x, getattr(state, k).sharding) for k, x in changed.items()})
      state = self.decode(rollout.lora, prefix, rollout.temperature, state)
    fields = (state.tokens, state.length, state.action_mask, state.log_pf, state.log_pterm)
    rows = (np.asarray(x).reshape(-1, *x.shape[3:]) for x in fields)
    own, num_samples = distributed.share(rollout.num_queries), waiting.shape[-1]
    num_rows = (own.stop - own.start) * num_samples
    z = Trajectory(*distributed.gather([x[:num_rows] for x in rows], rollout.num_queries, num_samples))
    if on_round is not None and not alone:
      on_round()
    return z

  def prefill(
    self,
    lora: Lora | None,
    prompt_tokens: Int[np.ndarray, "D q P"],
    prompt_mask: Bool[np.ndarray, "D q P"],
    row_ids: Int[np.ndarray, "D q N"],
    key: jax.Array,
  ) -> tuple[Prefix, RolloutState]:
    """Each prompt once, and its empty rows; q queries a device."""
    context = self._encode_context(self._params, lora, self._context_tokens) if self._context_tokens.size else None
    prompt_mask = without_start(prompt_mask, self._num_replaced)
    return self._start(self._params, lora, context, key, prompt_tokens, prompt_mask, row_ids)

  def decode(
    self, lora: Lora | None, prefix: Prefix, temperature: Float[np.ndarray, "D q"], state: RolloutState
  ) -> RolloutState:
    """One round: until no row is active, or too many wait for the tool. `state` is donated."""
    decode = self._round(bool((temperature == 0).any()))
    return decode(self._params, lora, *self._masks, prefix, temperature, state)

  def draw(
    self,
    lora: Lora | None,
    prompt_tokens: Int[np.ndarray, "Q P"],
    prompt_mask: Bool[np.ndarray, "Q P"],
    *,
    num_samples: int,
    temperature: float,
    key: jax.Array,
    on_round: Callable[[], None] | None = None,
  ) -> Trajectory:
    """N samples for each of any number of prompts, in calls of like length; row r draws from fold_in(key, r).

    Takes and returns what a call does, but for one temperature for all. Many samples of few prompts are shared by the
    devices, and drawn in several calls.
    """
    queries, devices = len(prompt_tokens), len(self.devices)
    shares = devices * jax.process_count()
    # A query's samples stand in `blocks` of n; the last one's that are too many are dropped.
    blocks = max(-(-num_samples // ROWS_PER_CALL), shares // queries)
    n = -(-num_samples // blocks)
    longest_first = np.argsort(-prompt_mask.sum(-1), kind="stable")  # a call is padded to its longest prompt
    query_of, first = np.repeat(longest_first, blocks), np.tile(np.arange(blocks) * n, queries)
    sample = first[:, None] + np.arange(n)
    rows = query_of[:, None] * num_samples + sample
    chunk = min(-(-len(rows) // shares), max(1, ROWS_PER_CALL // n // devices)) * shares
    temperatures, parts = np.full(chunk, temperature, np.float32), []
    for begin in range(0, len(rows), chunk):
      at = np.minimum(np.arange(begin, begin + chunk), len(rows) - 1)  # the last call repeats a block
      ids = query_of[at]
      width = prompt_width(prompt_mask[ids])
      z = self(
        lora, prompt_tokens[ids, -width:], prompt_mask[ids, -width:], num_samples=n, temperature=temperatures, key=key,
        row_ids=rows[at], on_round=on_round,
      )  # fmt: skip
      parts.append(z.rows(slice((len(rows) - begin) * n)))
    drawn = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    wanted = np.flatnonzero(sample < num_samples)
    return drawn.rows(wanted[np.argsort(rows.reshape(-1)[wanted])])

  def _answers(self, waiting: np.ndarray, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Forced tokens [D, Q, N, T] for the rows that wait. A result that does not fit, or none, leaves the row free."""
    forced = np.full(tokens.shape, FREE, np.int32)
    for row in zip(*np.nonzero(waiting)):
      n = length[row]
      result = self._tool.respond(tokens[row][:n].tolist())
      if n + len(result) <= self._max_length:
        forced[row][n : n + len(result)] = result
    return forced
