"""Prefix log-rewards log R(z_1:t) from the frozen LM, for all prefixes of all samples in two passes.

The samples of a query form a tree of distinct prefixes behind its question, and trees are packed into bins. The *trunk*
pass runs the bins' tokens once, each attending to its ancestors; the *branch* pass runs the target Y once behind every
prefix that needs a reward. The context (demonstrations) is encoded once and shared. Exact; each branch token attends
to the nodes of its bin, whose size is bounded, so that cost grows linearly with prefixes times target.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from gfn_jax import distributed
from gfn_jax.models import Lora, Pretrained
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import KeyValues, Segment, causal_mask, hidden_states, output_logits
from gfn_jax.models.prefix import context_segment, encode_context, masked_logits, without_start
from gfn_jax.parallel import Devices, over_data, platform_of, settled
from gfn_jax.prefix_tree import (
  Padding,
  bin_size,
  branches_of_bin,
  branches_of_block,
  bucket,
  fill_bins,
  padding_of,
  stack_bins,
)
from gfn_jax.types import Example, Queries

MAX_LOGITS = 2**26  # floats of one pass's logits, which bound its memory


def bins_of_call(num_bins: int, num_devices: int, tokens: int, vocab_size: int, padding: Padding) -> int:
  """How many bins a device scores in each of even calls, where a pass has so many `tokens` of a bin."""
  most = max(1, min(padding.tokens_of_call, MAX_LOGITS // vocab_size) // tokens)
  of_device = -(-num_bins // num_devices)
  return min(most, bucket(-(-of_device // -(-of_device // most))))


def _score_trees(
  config: ModelConfig,
  stop_token_id: int | None,
  params: dict,
  lora: Lora | None,
  context: KeyValues | None,
  allowed_tokens: jax.Array | None,
  tokens: jax.Array,  # [G, U]
  parents: jax.Array,  # [G, U]
  positions: jax.Array,  # [G, U], behind the context
  ancestors: jax.Array,  # [G, U, U]
  written: jax.Array,  # [G, U], the nodes of Z; the others are prompts'
  branches: jax.Array,  # [G, K, M], the nodes to score, in K blocks
  target_tokens: jax.Array,  # [G, K, M, Y], of each
  target_mask: jax.Array,
  num_blocks: jax.Array,  # how many of K are computed, from the first; a single one always is
) -> tuple[jax.Array, jax.Array]:
  """log p(z_1:t | context, prompt) and log p(target | context, prompt, z_1:t), [G, K, M], for G bins of trees.

  Where the target is empty, the stop token (unless it is None) ends the text: its probability joins that of z.
  """
  before = 0 if context is None else context.keys.shape[-2]
  segments = [] if context is None else [context_segment(context)]
  positions = before + positions
  hidden, kv = hidden_states(config, params, lora, tokens, positions, ancestors, segments)
  trunk_logits = output_logits(config, params, hidden)
  bins = jnp.arange(len(tokens))[:, None]
  allowed_logits, log_z = masked_logits(trunk_logits, allowed_tokens)
  steps = jnp.where(written, allowed_logits[bins, parents, tokens] - log_z[bins, parents, 0], 0.0)
  log_p_stop = None if stop_token_id is None else allowed_logits[..., stop_token_id] - log_z[..., 0]
  first_logits, first_log_z = masked_logits(trunk_logits, None)

  def score_block(branches: jax.Array, target_tokens: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Trunk: a prefix's log-probability is the sum over its way from the root.
    ways = ancestors[bins, branches]  # [G, M, U]
    log_p_prefix = jnp.where(ways, steps[:, None, :], 0.0).sum(-1)
    if log_p_stop is not None:
      log_p_prefix += jnp.where(target_mask[..., 0], 0.0, log_p_stop[bins, branches])

    # Branches: the trunk predicts a target's first token, the branch the others.
    first = first_logits[bins, branches, target_tokens[..., 0]] - first_log_z[bins, branches, 0]
    log_p_target = jnp.where(target_mask[..., 0], first, 0.0)
    n = target_tokens.shape[-1] - 1
    if n > 0:
      start = positions[bins, branches] + 1
      behind = [*segments, Segment(kv, ways[:, :, None, :], positions[:, None, None])]
      # Padding may reach beyond the last learned position, whose embedding would be NaN, and 0 * NaN spoils attention.
      target_positions = jnp.where(target_mask[..., :-1], start[..., None] + jnp.arange(n), 0)
      inputs = target_tokens[..., :-1]
      branch_hidden, _ = hidden_states(config, params, lora, inputs, target_positions, causal_mask(n), behind)
      rest_logits, rest_log_z = masked_logits(output_logits(config, params, branch_hidden), None)
      rest = (jnp.take_along_axis(rest_logits, target_tokens[..., 1:, None], axis=-1) - rest_log_z)[..., 0]
      log_p_target += jnp.where(target_mask[..., 1:], rest, 0.0).sum(-1)
    return log_p_prefix, log_p_target

  def write_block(k: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    block = score_block(branches[:, k], target_tokens[:, k], target_mask[:, k])
    return jax.tree.map(lambda of_all, of_block: of_all.at[:, k].set(of_block), found, block)

  zeros = jnp.zeros(branches.shape, jnp.float32)
  if branches.shape[1] == 1:
    return write_block(0, (zeros, zeros))
  return jax.lax.fori_loop(0, num_blocks, write_block, (zeros, zeros))


@functools.lru_cache
def _compiled(config: ModelConfig, stop_token_id: int | None, devices: tuple):
  """`encode_context` and `_score_trees`, compiled once a shape however many reward models a process makes."""
  encode = settled(jax.jit(functools.partial(encode_context, config)))
  score = over_data(functools.partial(_score_trees, config, stop_token_id), (None,) * 4 + (0,) * 8 + (None,), devices)
  return encode, score


class RewardModel:
  """The frozen LM as a source of prefix log-rewards.

  Args:
    pretrained: the base; the policy's adapter never enters here.
    lora: an adapter of the LM itself (the M-step of expectation-maximisation); None for the base as it is.
    params: the base's parameters as placed on `devices` (default: `pretrained.params`).
    context: int [C], tokens before every prompt (demonstrations); their keys and values are computed once.
    num_replaced: how many tokens at the start of a prompt the context stands for (a beginning of sequence).
    allowed_tokens: bool [V], renormalises the tokens of Z, never those of the target; None for the whole vocabulary.
    stop_token_id: where a query has no target, it is the end of the text and counted with Z; None leaves it out.
    devices: this process's, over which the trees of its queries are mapped, without collectives.
  """

  def __init__(
    self,
    pretrained: Pretrained,
    *,
    context: Int[np.ndarray, "C"],
    lora: Lora | None = None,
    num_replaced: int = 0,
    allowed_tokens: Bool[np.ndarray, "V"] | None = None,
    stop_token_id: int | None = None,
    params: dict | None = None,
    devices: Devices | None = None,
  ):
    self._config, self._lora = pretrained.config, lora
    self._params = pretrained.params if params is None else params
    self._devices = list(devices or jax.local_devices()[:1])
    self._padding = padding_of(platform_of(self._devices))
    self._num_replaced = num_replaced if len(context) else 0
    self._allowed = None if allowed_tokens is None else jnp.asarray(allowed_tokens)
    encode, self._score = _compiled(self._config, stop_token_id, tuple(self._devices))
    self._context = encode(self._params, lora, jnp.asarray(context, jnp.int32)) if len(context) else None

  def __call__(
    self,
    prompt_tokens: Int[np.ndarray, "Q P"],
    prompt_mask: Bool[np.ndarray, "Q P"],
    tokens: Int[np.ndarray, "B T"],
    length: Int[np.ndarray, "B"],
    terminable: Bool[np.ndarray, "B S"],
    target_tokens: Int[np.ndarray, "Q L Y"],
    target_mask: Bool[np.ndarray, "Q L Y"],
  ) -> tuple[Float[np.ndarray, "B S"], Float[np.ndarray, "B S L"]]:
    """log p(z_1:t | context, X) and log p(Y | context, X, z_1:t) of each target Y, nats; 0 where not terminable.

    For a query whose first target is empty they are log p(z_1:t stop | context, X), and 0. Untempered.

    Args:
      tokens, length: B = Q * N samples, grouped by query.
      terminable: the prefixes to score.
      target_tokens, target_mask: right-padded; an empty target's log-probability is 0.
    """
    prompt_mask = without_start(prompt_mask, self._num_replaced)
    num_samples = len(tokens) // len(prompt_tokens)
    own = np.arange(len(prompt_tokens))[distributed.share(len(prompt_tokens))]
    # By how long their targets are, since a call is as wide as its longest.
    own = own[np.argsort(target_mask[own].sum(-1).max(-1), kind="stable")]
    rows = (own[:, None] * num_samples + np.arange(num_samples)).reshape(-1)
    found = self._score_queries(
      num_samples, prompt_tokens[own], prompt_mask[own], tokens[rows], length[rows], terminable[rows],
      target_tokens[own], target_mask[own],
    )  # fmt: skip
    return distributed.gather(tuple(x[np.argsort(rows)] for x in found), len(prompt_tokens), num_samples)

  def _score_queries(
    self, num_samples, prompt_tokens, prompt_mask, tokens, length, terminable, target_tokens, target_mask
  ) -> tuple[np.ndarray, np.ndarray]:
    """What a call returns, of this process's queries alone."""
    # A prompt that the context stands for altogether keeps its last token, which predicts Z.
    prompts = [row[mask] if mask.any() else row[-1:] for row, mask in zip(prompt_tokens, prompt_mask)]
    of_query = prompt_tokens.shape[1], num_samples, tokens.shape[1]
    size = bin_size(*of_query, self._config.hidden_size, self._padding)
    num_targets, lengths = target_tokens.shape[1], target_mask.sum(-1).max(-1)
    width_of = lambda longest: min(bucket(int(longest)), target_tokens.shape[-1])  # noqa: E731
    behind = width_of(lengths.max(initial=0)) - 1
    bins, size = fill_bins(prompts, tokens, length, size, terminable, num_targets * behind, self._padding)
    # Each target behind every node that is wanted: [bins][parts][nodes].
    ends = [[np.unique(part.tree.node_of[terminable[part.rows]]) for part in parts] for parts in bins]
    log_p_prefix = np.zeros(terminable.shape, np.float32)
    log_p_target = np.zeros((*terminable.shape, num_targets), np.float32)
    if not bins:
      return log_p_prefix, log_p_target

    def blocks_of(ends: list, behind: int) -> tuple[tuple[int, int], int]:
      """(K, M), blocks of branches that each bin is given, and how many of them hold all that there are."""
      most = max(sum(map(len, of_bin)) for of_bin in ends)
      if not self._padding.bin_by_bin:
        return (1, num_targets * branches_of_bin(most)), 1
      of_block = min(branches_of_block(behind), num_targets * size)
      return (-(-num_targets * size // of_block), of_block), -(-num_targets * most // of_block)

    (_, of_block), _ = blocks_of(ends, behind)
    devices, longest = len(self._devices), max(size, of_block * behind)
    per_device = bins_of_call(len(bins), devices, longest, self._config.vocab_size, self._padding)
    pending = []
    for i in range(0, len(bins), devices * per_device):
      chunk = slice(i, i + devices * per_device)
      width = width_of(max(lengths[part.query] for parts in bins[chunk] for part in parts))
      blocks, num_blocks = blocks_of(ends[chunk], width - 1)
      targets = target_tokens[..., :width], target_mask[..., :width]
      arrays = self._arrays(bins[chunk], ends[chunk], size, blocks, *targets)
      arrays = [np.pad(x, ((0, devices * per_device - len(x)), *[(0, 0)] * (x.ndim - 1)), mode="edge") for x in arrays]
      arrays = [x.reshape(devices, per_device, *x.shape[1:]) for x in arrays]
      results = self.score_trees(*arrays, np.int32(num_blocks))
      pending.append((bins[chunk], ends[chunk], results))
    for *chunk, results in pending:
      results = [np.asarray(r).reshape(devices * per_device, -1) for r in results]
      for parts, of_bin, prefixes, targets in zip(*chunk, *results):
        first = 0
        for part, nodes in zip(parts, of_bin):
          if not len(nodes):
            continue
          last = first + len(nodes) * num_targets
          wanted, slot = terminable[part.rows], np.zeros(len(part.tree), np.int64)
          slot[nodes] = np.arange(len(nodes))
          a, b = (x[first:last].reshape(len(nodes), num_targets)[slot[part.tree.node_of]] for x in (prefixes, targets))
          log_p_prefix[part.rows] = np.where(wanted, a[..., 0], 0.0)
          log_p_target[part.rows] = np.where(wanted[..., None], b, 0.0)
          first = last
    return log_p_prefix, log_p_target

  def _arrays(self, bins, ends, size: int, blocks: tuple[int, int], target_tokens, target_mask) -> list[np.ndarray]:
    """What `_score_trees` takes of some bins: their nodes, and the targets behind the nodes `ends` of their parts."""
    num_targets, width = target_tokens.shape[1:]
    written = np.zeros((len(bins), size), bool)
    at = np.zeros((len(bins), math.prod(blocks)), np.int32)
    behind_tokens = np.zeros((*at.shape, width), np.int32)
    behind_mask = np.zeros(behind_tokens.shape, bool)
    for g, (parts, of_bin) in enumerate(zip(bins, ends)):
      first = 0
      for part, nodes in zip(parts, of_bin):
        written[g, part.start : part.end] = part.tree.depths > 0
        own = slice(first, first + len(nodes) * num_targets)
        at[g, own] = np.repeat(part.start + nodes, num_targets)
        behind_tokens[g, own] = np.tile(target_tokens[part.query], (len(nodes), 1))
        behind_mask[g, own] = np.tile(target_mask[part.query], (len(nodes), 1))
        first = own.stop
    behind = (x.reshape(len(bins), *blocks, *x.shape[2:]) for x in (at, behind_tokens, behind_mask))
    return [*stack_bins(bins, size), written, *behind]

  def score_trees(self, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """One call: `_score_trees` of bins of trees and targets, [devices, bins, ...], and how many blocks, on all."""
    return self._score(self._params, self._lora, self._context, self._allowed, *arrays)


class Reward:
  """log R(z_1:t) = alpha log p(z | C, X) + log p(Y | C, X, z) + beta log p(z) + log c(z) (paper, section 3.1).

  In nats and untempered: R^(1/T) is taken where the reward enters the loss. p(z | C, X) and p(z) count the stop token
  where a query has no Y.

  Args:
    model: scores Z behind context and prompt; an attribute too.
    alpha, beta: see above. Tempered sampling is alpha = 1 / T; beta < 0 is contrastive sampling.
    prior: scores Z by itself, for beta; an attribute too. `prior_tokens`: what then stands before it, a beginning of
      sequence.
    rival_penalty: nats off where the LM thinks that a rival target is likelier than Y.
    log_constraint: (example, tokens of z_1:t) -> log c, nats, finite; None for no constraint.

  Raises:
    ValueError: beta without a prior.
  """

  def __init__(
    self,
    model: RewardModel,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    prior: RewardModel | None = None,
    prior_tokens: Sequence[int] = (),
    rival_penalty: float = 0.0,
    log_constraint: Callable[[Example, list[int]], float] | None = None,
  ):
    if beta and (prior is None or not prior_tokens):
      raise ValueError(f"beta {beta:g}: log p(z) needs a model without context, and a token before Z")
    self.model, self._alpha, self._beta, self.prior = model, alpha, beta, prior
    self._prior_tokens, self._rival_penalty, self._log_constraint = list(prior_tokens), rival_penalty, log_constraint

  def __call__(
    self,
    queries: Queries,
    tokens: Int[np.ndarray, "B T"],
    length: Int[np.ndarray, "B"],
    wanted: Bool[np.ndarray, "B S"],
  ) -> Float[np.ndarray, "B S"]:
    """log R of the prefixes that are `wanted`, 0 elsewhere, for B = Q * N samples grouped by query."""
    z, n = (tokens, length, wanted), len(tokens) // len(queries)
    prompt = queries.reward_prompt_tokens, queries.reward_prompt_mask
    log_p_prefix, log_p_target = self.model(*prompt, *z, *self.targets(queries))
    log_reward = self._alpha * log_p_prefix + log_p_target[..., 0]
    if self._beta:
      prior = np.tile(np.array(self._prior_tokens, np.int32), (len(queries), 1))
      first_of_y = [x[:, :1, :1] for x in self.targets(queries)]  # so that it knows where there is one
      log_p_alone, _ = self.prior(prior, np.ones(prior.shape, bool), *z, *first_of_y)
      log_reward += self._beta * log_p_alone
    if self._rival_penalty:
      exists = np.repeat(queries.target_mask[:, 1:].any(-1), n, axis=0)[:, None]
      beaten = (exists & (log_p_target[..., 1:] > log_p_target[..., :1])).any(-1)
      log_reward -= np.where(wanted & beaten, self._rival_penalty, 0.0)
    if self._log_constraint is not None:
      for row, t in zip(*np.nonzero(wanted)):
        log_reward[row, t] += self._log_constraint(queries.examples[row // n], tokens[row, :t].tolist())
    return log_reward

  def targets(self, queries: Queries) -> tuple[Int[np.ndarray, "Q L Y"], Bool[np.ndarray, "Q L Y"]]:
    """Tokens and mask of the targets that it scores: Y, and its rivals where they cost something."""
    number = None if self._rival_penalty else 1
    return queries.target_tokens[:, :number], queries.target_mask[:, :number]


def whole_log_rewards(
  reward: Callable, queries: Queries, tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"]
) -> Float[np.ndarray, "B"]:
  """log R of whole samples alone, nats, untempered. `reward` is a `Reward` or what is called like one."""
  whole = np.arange(tokens.shape[1] + 1) == np.asarray(length)[:, None]
  return np.where(whole, reward(queries, tokens, length, whole), 0.0).sum(-1)


def prefix_log_rewards(
  pretrained: Pretrained,
  *,
  context: Sequence[int],
  prompt: Sequence[int],
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
  target: Sequence[int],
  allowed_tokens: Bool[np.ndarray, "V"] | None = None,
) -> Float[np.ndarray, "B S"]:
  """log p(z_1:t, target | context, prompt) of every prefix: nats, untempered.

  Args:
    context, prompt, target: token ids [C], [P], [Y]; each may be empty, but not context and prompt both.
    tokens: right-padded samples; lengths: their tokens.
    allowed_tokens: renormalises the tokens of Z, never those of the target.

  Returns:
    float32 [B, S]; entries past a row's length are 0.

  Raises:
    ValueError: context and prompt are both empty.
  """
  if len(prompt) == 0:  # then the context's last token predicts the first of Z
    if len(context) == 0:
      raise ValueError("context and prompt are both empty: at least one token must stand before Z")
    context, prompt = context[:-1], context[-1:]
  tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
  model = RewardModel(pretrained, context=np.asarray(context, np.int32), allowed_tokens=allowed_tokens)
  terminable = np.arange(tokens.shape[1] + 1) <= lengths[:, None]
  has_target = len(target) > 0
  target_tokens = np.asarray([[target if has_target else [0]]], np.int32)
  log_p_prefix, log_p_target = model(
    np.asarray([prompt], np.int32), np.ones((1, len(prompt)), bool), tokens, lengths, terminable, target_tokens,
    np.full(target_tokens.shape, has_target),
  )  # fmt: skip
  return log_p_prefix + log_p_target[..., 0]
