"""The distinct prefixes of a query's samples, as a tree: what many samples have in common is scored once."""

import dataclasses

from jaxtyping import Int
import numpy as np


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
