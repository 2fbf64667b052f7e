"""Prefix log-rewards log R(z_1:t) from the frozen LM, for all prefixes of all samples in two passes.

The samples of a query form a tree of distinct prefixes. The *trunk* pass runs the tree's tokens once, each attending to
its ancestors; the *branch* pass runs the target Y once behind every prefix that needs a reward. Context
(demonstrations) and question are encoded once and shared. Exact; each branch token attends to the nodes of its tree,
so large groups of samples are split over trees of bounded size, and cost grows linearly with prefixes times target.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from gfn_jax import distributed
from gfn_jax.models import Lora, Pretrained
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import KeyValues, Segment, causal_mask, hidden_states, output_logits
from gfn_jax.models.prefix import (
  encode_context,
  encode_prompts,
  masked_log_softmax,
  prompt_width,
  tree_states,
  without_start,
)
from gfn_jax.parallel import Devices, over_data, settled
from gfn_jax.prefix_tree import PrefixTree, bucket, build_tree, groups
from gfn_jax.types import Example, Queries

MAX_BRANCH_TOKENS = 6144  # of one device call; more trees go into further calls, one at the least
MAX_LOGITS = 2**26  # floats of one call's branch logits, which bound its memory
MAX_WIDE_QUERIES = 64  # of a call whose prompts are all padded alike; more are an evaluation's
SAMPLES_PER_TREE = 32  # a tree's attention is quadratic in its nodes: larger groups are split


def _score_trees(
  config: ModelConfig,
  stop_token_id: int | None,
  params: dict,
  lora: Lora | None,
  context: KeyValues | None,
  allowed_tokens: jax.Array | None,
  prompt_tokens: jax.Array,  # [G, P]
  prompt_mask: jax.Array,
  tokens: jax.Array,  # [G, U]
  parents: jax.Array,  # [G, U], U for the root
  depths: jax.Array,  # [G, U]
  ancestors: jax.Array,  # [G, U + 1, U]
  branches: jax.Array,  # [G, M], the nodes to score
  target_tokens: jax.Array,  # [G, L, Y]
  target_mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """log p(z_1:t | context, prompt), [G, M], and log p(target | context, prompt, z_1:t), [G, M, L], for G trees.

  Where the first target is empty, the stop token (unless it is None) ends the text: its probability joins that of z.
  """
  prefix = encode_prompts(config, params, lora, prompt_tokens, prompt_mask, context)
  hidden, kv = tree_states(config, params, lora, prefix, tokens, depths, ancestors)
  logits = output_logits(config, params, hidden)
  take = functools.partial(jnp.take_along_axis, axis=1)

  # Trunk: a prefix's log-probability is the sum over its way from the root.
  log_probs = masked_log_softmax(logits, allowed_tokens)
  steps = jnp.take_along_axis(take(log_probs, parents[..., None]), tokens[..., None], axis=2)[..., 0]
  ways = take(ancestors, branches[..., None])  # [G, M, U]
  log_p_prefix = jnp.where(ways, steps[:, None, :], 0.0).sum(-1)
  if stop_token_id is not None:
    log_p_stop = take(log_probs[..., stop_token_id], branches)
    log_p_prefix += jnp.where(target_mask[:, 0, :1], 0.0, log_p_stop)

  # Branches: the trunk predicts a target's first token, the branch the others.
  first = take(jax.nn.log_softmax(logits, axis=-1), branches[..., None])
  log_p_target = jnp.take_along_axis(first, target_tokens[:, None, :, 0], axis=2)
  log_p_target = jnp.where(target_mask[:, None, :, 0], log_p_target, 0.0)
  (num_targets, n), num_branches = (target_tokens.shape[1], target_tokens.shape[2] - 1), branches.shape[1]
  if n > 0:  # every target behind every node: [G, M * L, Y - 1]
    behind = lambda x: jnp.tile(x, (1, num_branches, 1))  # noqa: E731
    each = functools.partial(jnp.repeat, repeats=num_targets, axis=1)
    node_depths = jnp.pad(depths, ((0, 0), (0, 1)))
    start = each(prefix.length[:, None] + take(node_depths, branches))
    positions = prefix.length[:, None] + depths - 1
    segments = [*prefix.segments(2), Segment(kv, each(ways)[:, :, None, :], positions[:, None, None])]
    # Padding may reach beyond the last learned position, whose embedding would be NaN, and 0 * NaN spoils attention.
    target_positions = jnp.where(behind(target_mask[..., :-1]), start[..., None] + jnp.arange(n), 0)
    inputs = behind(target_tokens[..., :-1])
    branch_hidden, _ = hidden_states(config, params, lora, inputs, target_positions, causal_mask(n), segments)
    branch = jax.nn.log_softmax(output_logits(config, params, branch_hidden), axis=-1)
    rest = jnp.take_along_axis(branch, behind(target_tokens[..., 1:])[..., None], axis=-1)[..., 0]
    log_p_target += jnp.where(behind(target_mask[..., 1:]), rest, 0.0).sum(-1).reshape(log_p_target.shape)
  return log_p_prefix, log_p_target


@functools.lru_cache
def _compiled(config: ModelConfig, stop_token_id: int | None, devices: tuple):
  """`encode_context` and `_score_trees`, compiled once a shape however many reward models a process makes."""
  encode = settled(jax.jit(functools.partial(encode_context, config)))
  score = over_data(functools.partial(_score_trees, config, stop_token_id), (None,) * 4 + (0,) * 9, devices)
  return encode, score


@dataclasses.dataclass(frozen=True)
class _Tree:
  """A tree of rows of one query, and the nodes whose rewards are wanted: what a device call takes, before padding.

  `width`: of the prompt, in columns.
  """

  query: int
  width: int
  rows: np.ndarray
  tree: PrefixTree
  branches: np.ndarray

  @property
  def size(self) -> int:
    return max(len(self.tree), len(self.branches))


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
    own = distributed.share(len(prompt_tokens))
    rows = slice(own.start * num_samples, own.stop * num_samples)
    found = self._score_queries(
      num_samples, prompt_tokens[own], prompt_mask[own], tokens[rows], length[rows], terminable[rows],
      target_tokens[own], target_mask[own],
    )  # fmt: skip
    return distributed.gather(found, len(prompt_tokens), num_samples)

  def _score_queries(
    self, num_samples, prompt_tokens, prompt_mask, tokens, length, terminable, target_tokens, target_mask
  ) -> tuple[np.ndarray, np.ndarray]:
    """What a call returns, of this process's queries alone."""
    # The shape of a training step's few queries stays, for which one program is compiled.
    few, trees = len(prompt_tokens) <= MAX_WIDE_QUERIES, []
    for q in range(len(prompt_tokens)):
      width = prompt_tokens.shape[1] if few else prompt_width(prompt_mask[q])
      first = q * num_samples
      for rows in groups(tokens[first : first + num_samples], SAMPLES_PER_TREE):
        rows = first + rows
        tree = build_tree(tokens[rows], length[rows])
        trees.append(_Tree(q, width, rows, tree, np.unique(tree.node_of[terminable[rows]]).astype(np.int32)))
    # The trees of a call are padded to its largest, and their prompts to its widest.
    trees.sort(key=lambda part: (-bucket(part.size, 32), -part.width, -part.size))

    log_p_prefix = np.zeros(terminable.shape, np.float32)
    log_p_target = np.zeros((*terminable.shape, target_tokens.shape[1]), np.float32)
    of_query = (prompt_tokens, prompt_mask, target_tokens, target_mask)
    pending = []
    while trees:
      chunk, arrays = self._next_chunk(trees, *of_query)
      trees = trees[len(chunk) :]
      pending.append((chunk, self.score_trees(*arrays)))
    for chunk, results in pending:
      prefixes, targets = (np.asarray(r).reshape(-1, *r.shape[2:]) for r in results)
      for part, a, b in zip(chunk, prefixes, targets):
        wanted = terminable[part.rows]
        slot = np.zeros(len(part.tree) + 1, np.int64)
        slot[part.branches] = np.arange(len(part.branches))
        log_p_prefix[part.rows] = np.where(wanted, a[slot[part.tree.node_of]], 0.0)
        log_p_target[part.rows] = np.where(wanted[..., None], b[slot[part.tree.node_of]], 0.0)
    return log_p_prefix, log_p_target

  def score_trees(self, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """One call: `_score_trees` of prompts, trees and targets, [devices, trees, ...]."""
    return self._score(self._params, self._lora, self._context, self._allowed, *arrays)

  def _next_chunk(
    self, trees: list[_Tree], prompt_tokens, prompt_mask, target_tokens, target_mask
  ) -> tuple[list[_Tree], list[np.ndarray]]:
    """The largest trees that fit one call, padded to a bucket, [devices, trees, ...]."""
    branch_tokens = max(1, target_tokens.shape[1] * (target_tokens.shape[2] - 1))
    most_nodes = max(part.tree.node_of[:, 1:].size for part in trees)  # where samples share nothing
    nodes = min(bucket(trees[0].size, smallest=32), most_nodes)
    limit = min(MAX_BRANCH_TOKENS, MAX_LOGITS // self._config.vocab_size)
    fitting = max(1, limit // (nodes * branch_tokens))
    needed = -(-len(trees) // len(self._devices))
    # Few numbers, each a program to compile, and little that only fills a call up.
    per_device = min(1 << (fitting.bit_length() - 1), needed if needed < 3 else bucket(needed, smallest=2))
    chunk = trees[: per_device * len(self._devices)]
    # Whole samples alone are few branches; all prefixes are as many as there are nodes.
    most = max(len(part.branches) for part in chunk)
    branches = min(nodes + 1, bucket(most, smallest=8))
    width = max(part.width for part in chunk)

    def arrays(part: _Tree) -> tuple[np.ndarray, ...]:
      q, tree = part.query, part.tree.padded(nodes)
      ends = np.where(part.branches == len(part.tree), nodes, part.branches)
      ends = np.pad(ends, (0, branches - len(ends)), constant_values=nodes)
      return (
        prompt_tokens[q, -width:], prompt_mask[q, -width:], tree.tokens, tree.parents, tree.depths, tree.ancestors,
        ends, target_tokens[q], target_mask[q],
      )  # fmt: skip

    rows = [arrays(part) for part in chunk]
    rows += [rows[-1]] * (per_device * len(self._devices) - len(rows))
    shape = (len(self._devices), per_device)
    return chunk, [np.stack(x).reshape(*shape, *x[0].shape) for x in zip(*rows)]


class Reward:
  """log R(z_1:t) = alpha log p(z | C, X) + log p(Y | C, X, z) + beta log p(z) + log c(z) (paper, section 3.1).

  In nats and untempered: R^(1/T) is taken where the reward enters the loss. p(z | C, X) counts the stop token where a
  query has no Y.

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
      nothing = np.zeros((len(queries), 1, 1), np.int32)
      log_p_alone, _ = self.prior(prior, np.ones(prior.shape, bool), *z, nothing, nothing.astype(bool))
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
