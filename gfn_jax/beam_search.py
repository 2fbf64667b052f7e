"""Beam search and diverse beam search: the likeliest Z that a deterministic decoder finds (paper, section 4.1).

The beams of a query share one cache, which grows by a slot a beam and step. A beam reads the slots that its ancestors
wrote: when it changes parents a row of slot numbers moves, and no key.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from gfn_jax.draws import check_behavior
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import KeyValues, Segment, hidden_states, output_logits
from gfn_jax.models.prefix import encode_prompts, masked_logits
from gfn_jax.parallel import Devices, is_split, on_any_share, over_data
from gfn_jax.types import Trajectory

ROWS_PER_CALL = 640  # beams of one device call, which bound the memory of caches and logits


@flax.struct.dataclass
class Hypotheses:
  """Strings Z, [*lead, ...].

  Attributes:
    score: float [*lead], what ranks them; -inf where there is none.
    length: int [*lead]; tokens: int [*lead, T].
    log_pf: float [*lead, T]; log_pterm: float [*lead, S]. As in `Trajectory`.
  """

  score: Any
  length: Any
  tokens: Any
  log_pf: Any
  log_pterm: Any


@flax.struct.dataclass
class SearchState:
  """G groups of M beams for each of Q queries, in mid-search.

  Attributes:
    step: int scalar, how many tokens each running beam has.
    running, finished: Hypotheses [Q, G, M]; what finished is ranked.
    ancestors: int [Q, G, M, T], which of a query's N = G * M beams wrote the keys of each token.
    cache: KeyValues [L, Q, H, T * N, Dh], without the newest token.
  """

  step: Any
  running: Hypotheses
  finished: Hypotheses
  ancestors: Any
  cache: KeyValues


def take(tree: Any, index: Int[jax.Array, "*lead K"]) -> Any:
  """The entries that `index` picks from the last of the leading axes of every array."""
  axis = index.ndim - 1
  expand = lambda x: index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))  # noqa: E731
  return jax.tree.map(lambda x: jnp.take_along_axis(x, expand(x), axis=axis), tree)


def best(number: int, *parts: Hypotheses) -> Hypotheses:
  """The best `number` of all parts, ranked; of equal ones those that stand first."""
  joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=parts[0].score.ndim - 1), *parts)
  return take(joined, jax.lax.top_k(joined.score, number)[1])


def choose(
  score: Float[jax.Array, "Q G M"], log_probs: Float[jax.Array, "Q G M V"], diversity_penalty: Float[jax.Array, ""]
) -> tuple[Float[jax.Array, "Q G M"], Int[jax.Array, "Q G M"], Int[jax.Array, "Q G M"]]:
  """The M best continuations of each group: the score, the beam and the token of each.

  The groups choose in order. A token costs `diversity_penalty` for each beam of an earlier group that has chosen it in
  this step (Vijayakumar et al., 2016, Hamming diversity), and the score keeps what it cost.
  """
  queries, _, size, vocab_size = log_probs.shape
  rows = jnp.arange(queries)[:, None]

  def choose_group(counts, group):
    score, log_probs = group
    totals = score[..., None] + log_probs - diversity_penalty * counts[:, None]
    score, index = jax.lax.top_k(totals.reshape(queries, -1), size)
    parent, token = index // vocab_size, index % vocab_size
    return counts.at[rows, token].add(score > -jnp.inf), (score, parent, token)

  swap = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
  counts = jnp.zeros((queries, vocab_size), jnp.int32)
  return jax.tree.map(swap, jax.lax.scan(choose_group, counts, (swap(score), swap(log_probs)))[1])


def search(
  config: ModelConfig,
  stop_token_id: int,
  max_length: int,
  min_length: int,
  num_beams: int,
  num_groups: int,
  num_returned: int,
  together: bool,
  params: dict,
  allowed_tokens: Bool[jax.Array, "V"],
  diversity_penalty: Float[jax.Array, ""],
  length_penalty: Float[jax.Array, ""],
  prompt_tokens: Int[jax.Array, "Q P"],
  prompt_mask: Bool[jax.Array, "Q P"],
) -> Hypotheses:
  """`beam_search` on one share of the data. Hypotheses [Q, K], ranked. `together`: as of `parallel.on_any_share`."""
  prefix = encode_prompts(config, params, None, prompt_tokens, prompt_mask)
  queries, size = len(prompt_tokens), num_beams // num_groups
  beams, slots = (queries, num_groups, size), jnp.arange(max_length)
  is_stop = jnp.arange(len(allowed_tokens)) == stop_token_id

  def start() -> SearchState:
    layers, heads, dim = prefix.prompt.keys.shape[0], prefix.prompt.keys.shape[2], prefix.prompt.keys.shape[4]
    empty = jnp.zeros((layers, queries, heads, max_length * num_beams, dim), prefix.prompt.keys.dtype)
    nothing = Hypotheses(
      score=jnp.full(beams, -jnp.inf),
      length=jnp.zeros(beams, jnp.int32),
      tokens=jnp.zeros((*beams, max_length), jnp.int32),
      log_pf=jnp.zeros((*beams, max_length)),
      log_pterm=jnp.zeros((*beams, max_length + 1)),
    )
    one_a_group = nothing.replace(score=nothing.score.at[..., 0].set(0.0))
    ancestors = jnp.zeros((*beams, max_length), jnp.int32)
    return SearchState(jnp.zeros((), jnp.int32), one_a_group, nothing, ancestors, KeyValues(empty, empty))

  def ended(hypotheses: Hypotheses, score, length) -> Hypotheses:
    return hypotheses.replace(score=score / (length + 1.0) ** length_penalty)

  def extend(state: SearchState, logits: Float[jax.Array, "Q N V"]) -> SearchState:
    """Files the beams that stop, and gives the others a token."""
    t, running = state.step, state.running
    log_probs = jnp.subtract(*masked_logits(logits, allowed_tokens)).reshape(*beams, -1)
    log_pterm = log_probs[..., stop_token_id]
    running = running.replace(log_pterm=running.log_pterm.at[..., t].set(log_pterm))

    onward = jnp.where(allowed_tokens & ~is_stop, log_probs, -jnp.inf)
    score, parent, token = choose(running.score, onward, diversity_penalty)
    # To stop is one choice among all: it counts where it is among the best M.
    stop_score = jnp.where(t < min_length, -jnp.inf, running.score + log_pterm)
    rivals = jnp.concatenate([score, stop_score], axis=-1)
    num_better = (rivals[..., None, :] > stop_score[..., None]).sum(-1)
    stopped = ended(running, jnp.where(num_better < size, stop_score, -jnp.inf), t)

    log_pf = jnp.take_along_axis(take(log_probs, parent), token[..., None], axis=-1)[..., 0]
    running, ancestors = take((running, state.ancestors), parent)
    running = running.replace(
      score=score,
      length=running.length + 1,
      tokens=running.tokens.at[..., t].set(token),
      log_pf=running.log_pf.at[..., t].set(log_pf),
    )
    own = jnp.arange(num_beams).reshape(num_groups, size)
    return state.replace(
      step=t + 1,
      running=running,
      finished=best(size, state.finished, stopped),
      ancestors=ancestors.at[..., t].set(own),
    )

  def advance(state: SearchState) -> SearchState:
    """Runs the newest token of each beam, then `extend`."""
    t = state.step - 1
    ancestors = state.ancestors.reshape(queries, num_beams, max_length, 1)
    cached = (ancestors == jnp.arange(num_beams)) & (slots < t)[:, None]
    cached = cached.reshape(queries, num_beams, 1, max_length * num_beams)
    at = prefix.length[:, None, None, None] + jnp.repeat(slots, num_beams)
    token = state.running.tokens[..., t].reshape(queries, num_beams, 1)
    position = jnp.broadcast_to(prefix.length[:, None, None] + t, token.shape)
    hidden, new = hidden_states(
      config, params, None, token, position, jnp.ones((1, 1), bool),
      [*prefix.segments(2), Segment(state.cache, cached, at)],
    )  # fmt: skip

    def write(cache, new):  # new: [L, Q, N, H, 1, Dh]
      new = jnp.swapaxes(new[..., 0, :], 2, 3)
      return jax.lax.dynamic_update_slice_in_dim(cache, new, t * num_beams, axis=3)

    cache = jax.tree.map(write, state.cache, new)
    return extend(state.replace(cache=cache), output_logits(config, params, hidden[..., 0, :]))

  def can_improve(state: SearchState) -> jax.Array:
    """No score is above 0 and none rises, but for the length that divides it: whoever goes on can reach this bound."""
    bound = ended(state.running, state.running.score, max_length).score.max(-1)
    return (state.step < max_length) & on_any_share((bound > state.finished.score[..., -1]).any(), together)

  logits = output_logits(config, params, prefix.last_hidden)
  state = extend(start(), jnp.broadcast_to(logits[:, None], (queries, num_beams, logits.shape[-1])))
  state = jax.lax.while_loop(can_improve, advance, state)
  # Stopping is forced now; where the search ended early, those that ran can displace nothing.
  finished = best(size, state.finished, ended(state.running, state.running.score, max_length))
  return best(num_returned, jax.tree.map(lambda x: x.reshape(queries, num_beams, *x.shape[3:]), finished))


# Compiled once a shape, as the sampler's.
@functools.lru_cache
def _compiled(
  config: ModelConfig,
  stop_token_id: int,
  max_length: int,
  min_length: int,
  num_beams: int,
  num_groups: int,
  num_returned: int,
  devices: tuple,
):
  """`search`."""
  part = functools.partial(
    search, config, stop_token_id, max_length, min_length, num_beams, num_groups, num_returned, is_split(devices)
  )
  return over_data(part, (None,) * 4 + (0,) * 2, devices)


def check_search(
  allowed_tokens: Bool[np.ndarray, "V"],
  stop_token_id: int,
  max_length: int,
  min_length: int,
  num_beams: int,
  num_groups: int,
  diversity_penalty: float,
  length_penalty: float,
  num_returned: int,
) -> None:
  """Raises ValueError, in one line, where these cannot say what to search; before anything compiles."""
  check_behavior(max_length, min_length, np.ones(1), None, None)
  if num_beams < 1:
    raise ValueError(f"num_beams {num_beams}: must be at least 1")
  if num_groups < 1 or num_beams % num_groups:
    raise ValueError(f"num_groups {num_groups}: must be at least 1 and divide num_beams {num_beams}")
  if not 1 <= num_returned <= num_beams:
    raise ValueError(f"num_returned {num_returned}: must be from 1 to num_beams {num_beams}")
  for name, penalty in (("diversity_penalty", diversity_penalty), ("length_penalty", length_penalty)):
    if not 0 <= penalty < float("inf"):  # NaN is not in the range either
      raise ValueError(f"{name} {penalty:g}: must be at least 0, and finite")
  if not allowed_tokens[stop_token_id]:
    raise ValueError(f"stop token {stop_token_id} is not among the allowed tokens")
  num_strings = sum((int(allowed_tokens.sum()) - 1) ** n for n in range(min_length, max_length + 1))
  size = num_beams // num_groups
  if num_returned > num_groups * min(size, num_strings):
    raise ValueError(
      f"num_returned {num_returned}: the allowed tokens make only {num_strings} different Z of {min_length} to "
      f"{max_length} tokens, for {num_groups} groups of {size} beams"
    )


def beam_search(
  config: ModelConfig,
  params: dict,
  prompt_tokens: Int[np.ndarray, "Q P"],
  prompt_mask: Bool[np.ndarray, "Q P"],
  *,
  allowed_tokens: Bool[np.ndarray, "V"],
  stop_token_id: int,
  max_length: int,
  min_length: int = 0,
  num_beams: int,
  num_groups: int = 1,
  diversity_penalty: float = 0.0,
  length_penalty: float = 0.0,
  num_returned: int,
  devices: Devices | None = None,
) -> Trajectory:
  """The K best Z that beam search finds under the base, for each of Q prompts.

  The rules are those of Hugging Face's `generate`. In every step a group of M beams ranks all continuations of its
  beams: those of the best M that stop are finished, of which the group keeps the best M, and the best M of the others
  go on. The search ends when none that goes on could still rank among the finished: ending early changes no result.

  A score is log q(Z stop) less what diversity cost, divided by (length + 1) ** length_penalty: Z and its stop. With one
  group and no length penalty it is log q, and with one beam the search is greedy. Groups do not know what others have
  finished: the same Z can be returned more than once, and without a penalty every group finds the same.

  Args:
    config, params: the base, as placed on `devices`.
    prompt_tokens, prompt_mask: X, left-padded.
    allowed_tokens: bool [V], the vocabulary of Z, stop token included.
    stop_token_id: ends Z and is no part of it; at max_length stopping is forced, and free.
    max_length, min_length: of Z, in tokens.
    num_beams: N = G * M, of all groups together.
    num_groups: G; 1 is beam search, more is diverse beam search (Vijayakumar et al., 2016).
    diversity_penalty: nats off a token, for each beam of an earlier group that chose it in the same step; the stop
      token is never penalised.
    length_penalty: 0 ranks by log-probability; 1, by its mean, favours longer Z.
    num_returned: K, the best by score of all groups.
    devices: over which queries are mapped, without collectives; by default the first.

  Returns:
    Trajectory of B = Q * K rows, grouped by query, the best score first, as NumPy arrays; `log_q` is log q(Z stop) in
    nats, without any penalty.

  Raises:
    ValueError: counts, lengths or penalties out of range, a stop token that is not allowed, or fewer different Z than
      are to be returned.
  """
  allowed_tokens = np.asarray(allowed_tokens, bool)
  check_search(
    allowed_tokens, stop_token_id, max_length, min_length, num_beams, num_groups, diversity_penalty, length_penalty,
    num_returned,
  )  # fmt: skip
  devices = tuple(devices or jax.local_devices()[:1])
  run = functools.partial(
    _compiled(config, stop_token_id, max_length, min_length, num_beams, num_groups, num_returned, devices),
    params, jnp.asarray(allowed_tokens), jnp.float32(diversity_penalty), jnp.float32(length_penalty),
  )  # fmt: skip
  queries, parts = len(prompt_tokens), []
  per_device = min(-(-queries // len(devices)), max(1, ROWS_PER_CALL // num_beams))
  chunk = per_device * len(devices)
  for begin in range(0, queries, chunk):
    ids = np.minimum(np.arange(begin, begin + chunk), queries - 1)  # the last call is padded
    found = run(*(x[ids].reshape(len(devices), per_device, -1) for x in (prompt_tokens, prompt_mask)))  # [D, Q, K]
    parts.append(jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[3:]), found))
  z = jax.tree.map(lambda *x: np.concatenate(x)[: queries * num_returned], *parts)
  action_mask = np.arange(max_length) < z.length[:, None]
  return Trajectory(z.tokens, z.length, action_mask, z.log_pf, z.log_pterm)
