"""The distinct prefixes of samples as trees, packed into bins of one size: what samples share is computed once.

A tree begins with its query's prompt, a chain, so that trees of several queries can stand in one bin: a sequence of
tokens of which each sees its ancestors alone. A query whose samples do not fit one bin goes on in the next, behind its
prompt once more.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from gfn_jax.types import Trees

# Nodes of a bin: as many as the model is wide, from this up to `Padding.most_nodes`, so that attention stays a small
# part of a layer's work. In smaller bins more prompts stand twice; hence at least so many of the longest, where samples
# take them.
MIN_NODES, PROMPTS_OF_BIN = 192, 4
FEWEST_BINS = 16  # of a loss that goes from bin to bin: usually one size, and one program


@dataclasses.dataclass(frozen=True)
class Padding:
  """How much is computed at once, and so what is padded, and to which sizes: each is a program to compile.

  Attributes:
    most_nodes: of a bin, but for long prompts.
    tokens_of_call: of a pass of the rewards; more bins go into further calls, one at the least.
    bin_by_bin: the loss goes from bin to bin, and the rewards from one block of branches to the next, up to the last
      that anything stands in. Otherwise all are computed at once, and their numbers are padded to some sizes.
  """

  most_nodes: int
  tokens_of_call: int
  bin_by_bin: bool


# What accelerators compile is kept for other runs, and they want large calls. A CPU compiles for minutes in every run,
# and is faster with calls that its caches hold.
PADDING = Padding(most_nodes=512, tokens_of_call=8192, bin_by_bin=False)
PADDING_ON_CPU = Padding(most_nodes=256, tokens_of_call=256, bin_by_bin=True)
FEWEST_BRANCHES, BRANCHES_PER_OCTAVE = 8, 8  # of a bin, where all are computed at once
# Of a block, where they go block by block: about 192 tokens, since XLA's products on CPUs gain little from more rows;
# fewer of short targets, since a bin may have no more branches (those of whole samples alone, say).
BLOCK_TOKENS, BLOCK_BRANCHES = 192, 64


def padding_of(platform: str) -> Padding:
  """How calls of a platform's devices are padded."""
  return PADDING_ON_CPU if platform == "cpu" else PADDING


@dataclasses.dataclass(frozen=True)
class PrefixTree:
  """U nodes, a parent before its children: the P tokens of the prompt, then one for each non-empty prefix of Z.

  Attributes:
    tokens: int [U], the last token of each node's text.
    parents: int [U]; the first node's is itself.
    positions: int [U], tokens of the text before it.
    depths: int [U], tokens of each prefix of Z; 0 in the prompt, whose last node stands for the empty prefix.
    ancestors: bool [U, U], which nodes stand on the way to a node, itself included.
    node_of: int [N, S], the node of every prefix of every sample; past a sample's length its last one.
  """

  tokens: np.ndarray
  parents: np.ndarray
  positions: np.ndarray
  depths: np.ndarray
  ancestors: np.ndarray
  node_of: np.ndarray

  def __len__(self) -> int:
    """U."""
    return len(self.tokens)


def build_tree(
  prompt: Int[np.ndarray, "P"], tokens: Int[np.ndarray, "N T"], length: Int[np.ndarray, "N"]
) -> PrefixTree:
  """The tree of N right-padded samples behind a prompt of at least one token."""
  root = len(prompt) - 1
  children: dict[tuple[int, int], int] = {}
  node_tokens, parents = prompt.tolist(), [0, *range(root)]
  node_of = np.full((tokens.shape[0], tokens.shape[1] + 1), root)
  for row, (sample, n) in enumerate(zip(tokens.tolist(), length.tolist())):
    node = root
    for t in range(n):
      key = (node, sample[t])
      if key not in children:
        children[key] = len(node_tokens)
        node_tokens.append(sample[t])
        parents.append(node)
      node = children[key]
      node_of[row, t + 1] = node
    node_of[row, n + 1 :] = node
  size = len(node_tokens)
  ancestors = np.eye(size, dtype=bool)
  for node, parent in enumerate(parents):
    ancestors[node] |= ancestors[parent]
  positions = ancestors.sum(-1, dtype=np.int32) - 1
  depths = np.maximum(positions - root, 0)
  return PrefixTree(np.array(node_tokens, np.int32), np.array(parents, np.int32), positions, depths, ancestors, node_of)


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows of one query in a bin.

  Attributes:
    query: its number. rows: int [N], of the samples of all queries.
    tree: of these. start: where in the bin its first node stands.
  """

  query: int
  rows: np.ndarray
  tree: PrefixTree
  start: int

  @property
  def end(self) -> int:
    """Behind its last node."""
    return self.start + len(self.tree)


def bucket(n: int, smallest: int = 1, per_octave: int = 4) -> int:
  """The next of the sizes ..., 8, 10, 12, 14, 16, 20, ..., so many from 8 to 16: every size is a program to compile."""
  if n <= smallest:
    return smallest
  step = max(1, (1 << (n - 1).bit_length()) // (2 * per_octave))
  return -(-n // step) * step


def bin_size(prompt: int, num_samples: int, max_length: int, hidden_size: int, padding: Padding) -> int:
  """The most nodes of a bin, into which the longest prompt, of so many tokens, fits with a sample."""
  nodes = max(MIN_NODES, min(hidden_size, padding.most_nodes))
  of_query = prompt + num_samples * max_length
  return bucket(max(nodes, min(PROMPTS_OF_BIN * prompt, of_query), prompt + max_length))


def branches_of_bin(most: int) -> int:
  """How many branches each bin is given where all are computed at once, and none needs more than `most`."""
  return bucket(most, FEWEST_BRANCHES, BRANCHES_PER_OCTAVE)


def branches_of_block(behind: int) -> int:
  """How many branches of `behind` tokens each are computed together where they go block by block."""
  return max(1, min(BLOCK_BRANCHES, BLOCK_TOKENS // max(1, behind)))


class _Rows:
  """N samples of a query, in the order of a dictionary.

  Attributes:
    prompt: its tokens. order: int [N], which sample. length: int [N].
    new: int [N], how many tokens of each the one before it does not begin with.
  """

  def __init__(self, prompt: int, tokens: np.ndarray, length: np.ndarray, wanted: np.ndarray):
    self.prompt, self.order = prompt, np.lexsort((length, *tokens.T[::-1]))
    tokens, self.length, self._wanted = tokens[self.order], length[self.order], wanted[self.order]
    alike = np.cumprod(tokens[1:] == tokens[:-1], axis=1).sum(axis=1)
    self._common = np.append(0, np.minimum(alike, np.minimum(self.length[1:], self.length[:-1])))
    self.new = self.length - self._common
    self._ends: dict[int, np.ndarray] = {}

  def nodes_from(self, start: int) -> np.ndarray:
    """int [N - start], the nodes of a tree of the rows `start` to each; all of the first are new."""
    return self.prompt + self.length[start] + np.cumsum(np.append(0, self.new[start + 1 :]))

  def ends_from(self, start: int) -> np.ndarray:
    """int [N - start], the distinct wanted prefixes of such a tree."""
    if not self._wanted.any():
      return np.zeros(len(self.order) - start, int)
    if start not in self._ends:
      depths = np.arange(self._wanted.shape[1])
      met, new = np.zeros(depths.shape, bool), []  # of what the row before begins with
      for own, common in zip(self._wanted[start:], self._common[start:]):
        met &= depths <= common
        new.append(int((own & ~met).sum()))
        met |= own
      self._ends[start] = np.cumsum(new)
    return self._ends[start]


class _Cut(NamedTuple):
  """One way to fill bins: their tokens, nodes and branches together, and what `_cut` took and returned."""

  num_tokens: int
  size: int
  most_ends: int
  bins: list[list[tuple[int, np.ndarray]]]


def _cut(
  queries: Sequence[_Rows], size: int, most_ends: int, whole: bool
) -> tuple[list[list[tuple[int, np.ndarray]]], list[int]]:
  """Bins of `size` nodes, a query after another: (query, rows) of the parts of each, and how many prefixes are wanted.

  These are at most `most_ends`, but for those of a bin's first row. `whole`: a query's rows stand in one bin. No bins
  where a row, or then a query, has more than `size` nodes.
  """
  bins, ends_of, left, ends_left = [], [], 0, 0
  for q, rows in enumerate(queries):
    start, n = 0, len(rows.order)
    while start < n:
      nodes, ends = rows.nodes_from(start), rows.ends_from(start)
      least = nodes[-1] if whole else nodes[0]
      if least > size:
        return [], []
      if least > left or ends[0] > ends_left:
        bins.append([])
        ends_of.append(0)
        left, ends_left = size, max(most_ends, ends[0])
      fit = int(min(np.searchsorted(nodes, left, side="right"), np.searchsorted(ends, ends_left, side="right")))
      bins[-1].append((q, q * n + rows.order[start : start + fit]))
      left, ends_left = left - int(nodes[fit - 1]), ends_left - int(ends[fit - 1])
      ends_of[-1] += int(ends[fit - 1])
      start += fit
  return bins, ends_of


def fill_bins(
  prompts: Sequence[Int[np.ndarray, "_"]],
  tokens: Int[np.ndarray, "B T"],
  length: Int[np.ndarray, "B"],
  size: int,
  wanted: Bool[np.ndarray, "B S"] | None = None,
  behind: int = 0,
  padding: Padding = PADDING,
  whole: bool = False,
) -> tuple[list[list[Part]], int]:
  """The trees of the N = B / Q samples of each of Q prompts, packed into bins, and the nodes U of a bin.

  That is `size`, or less where up to three bins then hold as much. No prompts, no bins.

  Args:
    prompts: at least one token each. size: as `bin_size` says.
    wanted, behind: the prefixes behind each of which so many tokens will follow. Of up to eight limits of how many of
      them a bin may hold, that is taken with which the bins have the fewest tokens, of nodes and of branches.
    padding: of the branches; where these go block by block, there is no limit.
    whole: all samples of a query stand in one bin, of more than `size` nodes if need be; nothing is wanted then.
  """
  if not prompts:
    return [], size
  n = len(tokens) // len(prompts)
  if wanted is None:
    wanted = np.zeros((len(tokens), 1), bool)
  rows = [slice(i, i + n) for i in range(0, len(tokens), n)]
  queries = [_Rows(len(p), tokens[r], length[r], wanted[r]) for p, r in zip(prompts, rows)]

  def cut(size: int, most_ends: int) -> _Cut:
    bins, ends = _cut(queries, size, most_ends, whole)
    branches = sum(ends) if padding.bin_by_bin else len(ends) * branches_of_bin(max(ends, default=0))
    return _Cut(len(bins) * size + behind * branches, size, most_ends, bins)

  if whole:
    size = max(size, bucket(max(int(q.nodes_from(0)[-1]) for q in queries)))
  limits = {size} if padding.bin_by_bin or not behind else {branches_of_bin(size * k // 8) for k in range(1, 9)}
  best = min((cut(size, most) for most in sorted(limits, reverse=True)), key=lambda found: found.num_tokens)
  for eighths in {1: range(1, 8), 2: (5, 6, 7), 3: (6, 7)}.get(len(best.bins), ()):  # few sizes, which are programs
    again = cut(min(size, bucket(size * eighths // 8, smallest=32)), best.most_ends)
    if len(again.bins) == len(best.bins) and again.num_tokens < best.num_tokens:
      best = again
  bins = []
  for parts in best.bins:
    bins.append([])
    start = 0
    for q, own in parts:
      tree = build_tree(prompts[q], tokens[own], length[own])
      bins[-1].append(Part(q, own, tree, start))
      start += len(tree)
  return bins, best.size


def stack_bins(
  bins: Sequence[Sequence[Part]], size: int
) -> tuple[Int[np.ndarray, "G U"], Int[np.ndarray, "G U"], Int[np.ndarray, "G U"], Bool[np.ndarray, "G U U"]]:
  """tokens, parents, positions and ancestors of G bins, padded to U = `size` nodes, which see themselves alone."""
  tokens, parents, positions = (np.zeros((len(bins), size), np.int32) for _ in range(3))
  ancestors = np.tile(np.eye(size, dtype=bool), (len(bins), 1, 1))
  for g, parts in enumerate(bins):
    for part in parts:
      at = slice(part.start, part.end)
      tokens[g, at], positions[g, at] = part.tree.tokens, part.tree.positions
      parents[g, at], ancestors[g, at, at] = part.start + part.tree.parents, part.tree.ancestors
  return tokens, parents, positions, ancestors


def build_trees(
  prompts: Sequence[Int[np.ndarray, "_"]],
  tokens: Int[np.ndarray, "B T"],
  length: Int[np.ndarray, "B"],
  size: int,
  num_shares: int = 1,
  padding: Padding = PADDING,
  whole: bool = False,
) -> Trees:
  """Trees of a batch whose queries fall into `num_shares`, one after another: as many bins for each.

  Args:
    prompts, size, whole: as of `fill_bins`. padding: of the number of bins, too.
  """
  num_queries, num_rows = len(prompts) // num_shares, len(tokens) // num_shares

  def share(i: int, size: int) -> tuple[list[list[Part]], int]:
    own = slice(i * num_rows, (i + 1) * num_rows)
    of_share = prompts[i * num_queries : (i + 1) * num_queries], tokens[own], length[own]
    return fill_bins(*of_share, size, padding=padding, whole=whole)

  shares, sizes = zip(*(share(i, size) for i in range(num_shares)))
  size, num_bins = max(sizes), max(map(len, shares))
  most = bucket(num_bins, FEWEST_BINS, per_octave=1) if padding.bin_by_bin else bucket(num_bins)
  node_of = np.zeros((len(tokens), tokens.shape[1] + 1), np.int32)
  for i, bins in enumerate(shares):
    for g, parts in enumerate(bins):
      for part in parts:
        node_of[i * num_rows + part.rows] = g * size + part.start + part.tree.node_of
  padded = [parts for bins in shares for parts in [*bins, *[[]] * (most - len(bins))]]
  return Trees(*stack_bins(padded, size), node_of, np.full(num_shares, num_bins, np.int32))


def unlike_samples(num_queries: int, num_samples: int, prompt: int, max_length: int) -> tuple[list, Any, Any]:
  """Prompts, tokens [B, T] and length [B] of samples that have nothing in common: what takes the most nodes."""
  rows = num_queries * num_samples
  tokens = np.arange(rows * max_length, dtype=np.int32).reshape(rows, max_length)
  return [np.zeros(prompt, np.int32)] * num_queries, tokens, np.full(rows, max_length, np.int32)
