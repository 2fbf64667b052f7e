"""The distinct prefixes of samples as trees, packed into bins of one size: what samples share is computed once.

A tree begins with its query's prompt, a chain, so that trees of several queries can stand in one bin: a sequence of
tokens of which each sees its ancestors alone. A query whose samples do not fit one bin goes on in the next, behind its
prompt once more.
"""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Bool, Int
import numpy as np

from gfn_jax.types import Trees

# Nodes of a bin: as many as the model is wide, within these bounds, so that attention stays a sixth of a layer's work.
# In smaller bins more prompts stand twice.
MIN_NODES, MAX_NODES = 192, 512
MIN_PROMPTS = 4  # and at least so many times the longest prompt


@dataclasses.dataclass(frozen=True)
class PrefixTree:
  """U nodes, a parent before its children: the P tokens of the prompt, then one for each non-empty prefix of Z.

  Attributes:
    tokens: int [U], the last token of each node's text.
    parents: int [U]; the first node's is itself.
    depths: int [U], tokens of each prefix of Z; 0 in the prompt, whose last node stands for the empty prefix.
    ancestors: bool [U, U], which nodes stand on the way to a node, itself included.
    node_of: int [N, S], the node of every prefix of every sample; past a sample's length its last one.
  """

  tokens: np.ndarray
  parents: np.ndarray
  depths: np.ndarray
  ancestors: np.ndarray
  node_of: np.ndarray

  def __len__(self) -> int:
    """U."""
    return len(self.tokens)

  @property
  def positions(self) -> Int[np.ndarray, "U"]:
    """Tokens of the text before each node's last."""
    return self.ancestors.sum(-1) - 1


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
  depths = np.maximum(ancestors.sum(-1, dtype=np.int32) - len(prompt), 0)
  return PrefixTree(np.array(node_tokens, np.int32), np.array(parents, np.int32), depths, ancestors, node_of)


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


def bucket(n: int, smallest: int = 1) -> int:
  """The next of the sizes ..., 16, 18, 20, 22, ..., 32, 36, ...: every size is a program to compile."""
  if n <= smallest:
    return smallest
  step = 1 << max(0, (n - 1).bit_length() - 4)
  return -(-n // step) * step


def bin_size(longest_prompt: int, max_length: int, hidden_size: int) -> int:
  """Nodes of a bin, where there are several: the longest prompt and sample fit one."""
  nodes = max(MIN_NODES, min(hidden_size, MAX_NODES))
  return bucket(max(nodes, MIN_PROMPTS * longest_prompt, longest_prompt + max_length))


def _sorted_rows(tokens: Int[np.ndarray, "N T"], length: Int[np.ndarray, "N"]) -> tuple[np.ndarray, np.ndarray]:
  """Rows in the order of a dictionary, and how many tokens of each the one before it does not begin with."""
  order = np.lexsort((length, *tokens.T[::-1]))
  tokens, length = tokens[order], length[order]
  alike = np.cumprod(tokens[1:] == tokens[:-1], axis=1).sum(axis=1)
  common = np.minimum(alike, np.minimum(length[1:], length[:-1]))
  return order, length - np.concatenate([[0], common])


def fill_bins(
  prompts: Sequence[Int[np.ndarray, "_"]], tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"], size: int
) -> list[list[Part]]:
  """The trees of the N = B / Q samples of each of Q prompts, in bins of at most `size` nodes, a query after another.

  Args:
    prompts: at least one token each. size: as `bin_size` says.
  """
  n, bins, left = len(tokens) // len(prompts), [], 0
  for q, prompt in enumerate(prompts):
    rows, new = _sorted_rows(tokens[q * n : (q + 1) * n], length[q * n : (q + 1) * n])
    rows, p = rows + q * n, len(prompt)
    while len(rows):
      new[0] = length[rows[0]]  # all of the first: what it shares stands in another bin
      nodes = p + np.cumsum(new)
      fit = np.searchsorted(nodes, left, side="right")
      # A prompt stands twice only for at least as many tokens of samples.
      if not fit or (fit < len(rows) and nodes[fit - 1] < 2 * p):
        bins.append([])
        left = size
        fit = np.searchsorted(nodes, left, side="right")
      tree = build_tree(prompt, tokens[rows[:fit]], length[rows[:fit]])
      bins[-1].append(Part(q, rows[:fit], tree, size - left))
      left -= len(tree)
      rows, new = rows[fit:], new[fit:]
  return bins


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


def nodes_of(bins: Sequence[Sequence[Part]], size: int) -> int:
  """U of these bins: `size`, or for a single one that is far from full a smaller size."""
  return min(size, bucket(max(parts[-1].end for parts in bins), smallest=32))


def build_trees(
  prompt_tokens: Int[np.ndarray, "Q P"],
  prompt_mask: Bool[np.ndarray, "Q P"],
  tokens: Int[np.ndarray, "B T"],
  length: Int[np.ndarray, "B"],
  *,
  hidden_size: int,
  num_shares: int = 1,
) -> Trees:
  """Trees of a batch whose queries fall into `num_shares`, one after another: as many bins for each.

  Args:
    hidden_size: of the model that computes them.
  """
  size = bin_size(int(prompt_mask.sum(-1).max()), tokens.shape[1], hidden_size)
  prompts = [row[mask] for row, mask in zip(prompt_tokens, prompt_mask)]
  num_queries, rows = len(prompts) // num_shares, len(tokens) // num_shares
  shares = [
    fill_bins(
      prompts[i * num_queries : (i + 1) * num_queries], tokens[i * rows : (i + 1) * rows],
      length[i * rows : (i + 1) * rows], size,
    )
    for i in range(num_shares)
  ]  # fmt: skip
  size = max(nodes_of(bins, size) for bins in shares)
  most = bucket(max(map(len, shares)))
  node_of = np.zeros((len(tokens), tokens.shape[1] + 1), np.int32)
  for i, bins in enumerate(shares):
    for g, parts in enumerate(bins):
      for part in parts:
        node_of[i * rows + part.rows] = g * size + part.start + part.tree.node_of
  padded = [parts for bins in shares for parts in [*bins, *[[]] * (most - len(bins))]]
  return Trees(*stack_bins(padded, size), node_of)


def unlike_samples(num_queries: int, num_samples: int, prompt: int, max_length: int) -> tuple[np.ndarray, ...]:
  """Prompts [Q, P] with their mask, tokens [B, T] and length [B] of samples that have nothing in common: what takes
  the most nodes."""
  rows, mask = num_queries * num_samples, np.ones((num_queries, prompt), bool)
  tokens = np.arange(rows * max_length, dtype=np.int32).reshape(rows, max_length)
  return np.zeros(mask.shape, np.int32), mask, tokens, np.full(rows, max_length, np.int32)
