"""The distinct prefixes of a query's samples, as trees: what many samples have in common is computed once."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from gfn_jax.types import Trees


@dataclasses.dataclass(frozen=True)
class PrefixTree:
  """U nodes, a parent before its children; node i stands for a non-empty prefix. The root (the empty prefix) is node U.

  Attributes:
    tokens: int [U], the last token of each prefix.
    parents: int [U]; U for children of the root.
    depths: int [U], tokens of each prefix, from 1.
    ancestors: bool [U + 1, U], which nodes stand on the way to a node, itself included; the root's row is empty.
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

  def padded(self, size: int) -> "PrefixTree":
    """The same with `size` nodes: the new ones stand alone, beneath the root, which moves to the new end."""
    old, more = len(self), size - len(self)
    move_root = lambda x: np.where(x == old, size, x)  # noqa: E731
    ancestors = np.zeros((size + 1, size), bool)
    ancestors[:old, :old] = self.ancestors[:-1]
    return PrefixTree(
      tokens=np.pad(self.tokens, (0, more)),
      parents=np.pad(move_root(self.parents), (0, more), constant_values=size),
      depths=np.pad(self.depths, (0, more), constant_values=1),
      ancestors=ancestors,
      node_of=move_root(self.node_of),
    )


def build_tree(tokens: Int[np.ndarray, "N T"], length: Int[np.ndarray, "N"]) -> PrefixTree:
  """The tree of N right-padded samples."""
  children: dict[tuple[int, int], int] = {}
  node_tokens, parents = [], []
  node_of = np.full((tokens.shape[0], tokens.shape[1] + 1), -1)
  for row, (sample, n) in enumerate(zip(tokens.tolist(), length.tolist())):
    node = -1
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
  ancestors = np.zeros((size + 1, size), bool)
  depths = np.zeros(size, np.int32)
  for node, parent in enumerate(parents):
    if parent >= 0:
      ancestors[node] = ancestors[parent]
      depths[node] = depths[parent]
    ancestors[node, node] = True
    depths[node] += 1
  at_root = lambda x: np.where(np.asarray(x, np.int32) < 0, size, np.asarray(x, np.int32))  # noqa: E731
  return PrefixTree(np.array(node_tokens, np.int32), at_root(parents), depths, ancestors, at_root(node_of))


def groups(tokens: Int[np.ndarray, "N T"], largest: int) -> list[Int[np.ndarray, "M"]]:
  """The rows of N samples in as few, even groups as have at most `largest`; samples that share prefixes together."""
  order = np.lexsort(tokens.T[::-1])
  return np.array_split(order, -(-len(tokens) // largest))


def bucket(n: int, smallest: int) -> int:
  """The next of `smallest` (a power of 2), 3/2 of it, twice it, ...: every size is a program to compile."""
  size = smallest
  while size < n:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def build_trees(
  tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"], *, num_queries: int, samples_per_tree: int
) -> Trees:
  """Trees of the N = B / Q samples of each of Q queries, of at most `samples_per_tree` samples each."""
  by_query = tokens.reshape(num_queries, -1, tokens.shape[1])
  built, width = [], tokens.shape[1]
  for q, rows_of_query in enumerate(by_query):
    for rows in groups(rows_of_query, samples_per_tree):
      rows = rows + q * len(rows_of_query)
      built.append((rows, build_tree(tokens[rows], length[rows])))
  most = max(len(rows) for rows, _ in built) * width
  size = min(bucket(max(len(tree) for _, tree in built), smallest=8), most)
  per_query = len(built) // num_queries
  node_of = np.zeros((len(tokens), width + 1), np.int32)
  trees = []
  for i, (rows, tree) in enumerate(built):
    tree = tree.padded(size)
    node_of[rows] = tree.node_of + i % per_query * (size + 1)
    trees.append(tree)
  stacked = (
    np.stack([getattr(tree, field) for tree in trees]) for field in ("tokens", "parents", "depths", "ancestors")
  )
  return Trees(*(x.reshape(num_queries, per_query, *x.shape[1:]) for x in stacked), node_of)


def chains(tokens: Int[jax.Array, "B T"], num_queries: int) -> Trees:
  """Each of B samples as a tree of its own, without a host: for whoever scores a few rows once."""
  rows, width = tokens.shape
  samples = rows // num_queries
  shape = (num_queries, samples)
  of_each = lambda x: jnp.broadcast_to(x, (*shape, *x.shape))  # noqa: E731
  nodes = jnp.arange(width)
  way = jnp.roll(jnp.arange(width + 1), 1)  # the empty prefix is the root, the last node
  return Trees(
    tokens=tokens.reshape(*shape, width),
    parents=of_each(way[:-1]),
    depths=of_each(nodes + 1),
    ancestors=of_each(jnp.pad(jnp.tril(jnp.ones((width, width), bool)), ((0, 1), (0, 0)))),
    node_of=jnp.tile((width + 1) * jnp.arange(samples)[:, None] + way, (num_queries, 1)),
  )
