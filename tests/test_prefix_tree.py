"""Prefix trees: each distinct prefix once, every prefix of every sample found again, the same scores as row by row."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import policy
from gfn_jax.prefix_tree import bucket, build_tree, build_trees, groups
from testing import random_lora, tiny_pretrained


@st.composite
def samples(draw):
  """(tokens [N, T], length [N]) over few tokens, so that samples share prefixes and coincide."""
  num_tokens = draw(st.integers(0, 5))
  row = st.lists(st.integers(0, 2), min_size=num_tokens, max_size=num_tokens)
  tokens = draw(st.lists(row, min_size=1, max_size=8))
  length = draw(st.lists(st.integers(0, num_tokens), min_size=len(tokens), max_size=len(tokens)))
  return np.array(tokens, np.int32).reshape(len(tokens), num_tokens), np.array(length, np.int32)


@settings(max_examples=300, deadline=None)
@given(samples())
def test_tree_holds_each_distinct_prefix_once(case):
  tokens, length = case
  tree = build_tree(tokens, length)
  size, num_tokens = len(tree.tokens), tokens.shape[1]
  paths = []
  for node in range(size):
    parent = tree.parents[node]
    assert parent == size or parent < node
    paths.append((() if parent == size else paths[parent]) + (int(tree.tokens[node]),))
  prefixes = {tuple(row[:t]) for row, n in zip(tokens.tolist(), length) for t in range(1, n + 1)}
  assert len(paths) == len(prefixes) and set(paths) == prefixes
  assert tree.depths.tolist() == [len(path) for path in paths]

  paths.append(())  # the root
  assert tree.ancestors.shape == (size + 1, size)
  for node, path in enumerate(paths):
    above = [other for other in range(size) if paths[other] == path[: len(paths[other])]]
    assert np.flatnonzero(tree.ancestors[node]).tolist() == above
  assert tree.node_of.shape == (len(tokens), num_tokens + 1)
  for row, n, nodes in zip(tokens.tolist(), length, tree.node_of):
    assert [paths[node] for node in nodes] == [tuple(row[: min(t, n)]) for t in range(num_tokens + 1)]


def prefix_at(tokens, parents, node):
  """The prefix that a node stands for, by walking up to the root."""
  found = []
  while node != len(tokens):
    found.insert(0, int(tokens[node]))
    node = parents[node]
  return tuple(found)


@settings(max_examples=100, deadline=None)
@given(samples(), st.integers(1, 3), st.integers(1, 4))
def test_trees_of_a_batch_hold_every_prefix_of_every_row(case, num_queries, samples_per_tree):
  tokens, length = (np.concatenate([x] * num_queries) for x in case)
  if not tokens.shape[1]:
    return
  trees = build_trees(tokens, length, num_queries=num_queries, samples_per_tree=samples_per_tree)
  queries, per_query, size = trees.tokens.shape
  assert queries == num_queries and per_query == -(-len(case[0]) // samples_per_tree)
  for row, (sample, n, nodes) in enumerate(zip(tokens.tolist(), length, trees.node_of)):
    query = row // len(case[0])
    for t, node in enumerate(nodes):
      tree, node = divmod(int(node), size + 1)
      assert prefix_at(trees.tokens[query, tree], trees.parents[query, tree], node) == tuple(sample[: min(t, n)])


def test_groups_are_even_and_put_like_samples_together():
  tokens = np.array([[1, 2], [3, 4], [1, 3], [3, 3], [1, 2]])
  assert [g.tolist() for g in groups(tokens, 2)] == [[0, 4], [2, 3], [1]]
  assert [g.tolist() for g in groups(tokens, 8)] == [[0, 4, 2, 3, 1]]


def test_buckets():
  assert [bucket(n, smallest=8) for n in (0, 8, 9, 13, 17, 25, 33)] == [8, 8, 12, 16, 24, 32, 48]


@pytest.mark.parametrize("samples_per_tree", (1, 2, 8))
def test_scores_and_gradients_of_trees_are_those_of_rows(samples_per_tree):
  rng = np.random.default_rng(0)
  pretrained = tiny_pretrained()
  config, lora = pretrained.config, random_lora(pretrained)
  q, n, p, t, stop = 2, 6, 5, 7, 3
  length = rng.integers(0, t + 1, q * n).astype(np.int32)
  inside = np.arange(t) < length[:, None]
  tokens = np.where(inside, rng.integers(4, 7, (q * n, t)), 0).astype(np.int32)  # few tokens: common prefixes
  chosen = inside & (rng.random((q * n, t)) < 0.8)
  allowed = np.arange(config.vocab_size) < 20
  prompt, prompt_mask = rng.integers(0, 20, (q, p)).astype(np.int32), np.arange(p) >= np.array([[0], [2]])
  trees = build_trees(tokens, length, num_queries=q, samples_per_tree=samples_per_tree)
  assert trees.tokens[..., 0].size == q * -(-n // samples_per_tree)
  prompt, prompt_mask, tokens, length, chosen = map(jnp.asarray, (prompt, prompt_mask, tokens, length, chosen))
  trees = jax.tree.map(jnp.asarray, trees)
  settings = dict(allowed_tokens=jnp.asarray(allowed), stop_token_id=stop, max_length=t)

  def by_rows(lora):
    return policy.score(config, pretrained.params, lora, prompt, prompt_mask, tokens, length, chosen, **settings)

  def by_trees(lora):
    states = policy.node_states(config, pretrained.params, lora, prompt, prompt_mask, trees)
    return policy.score_states(config, pretrained.params, states, trees, length, chosen, **settings)

  def weighted(score, lora):
    return sum((jnp.sin(jnp.arange(x.size)).reshape(x.shape) * x).sum() for x in score(lora))

  for a, b in zip(jax.jit(by_rows)(lora), jax.jit(by_trees)(lora)):
    np.testing.assert_allclose(a, b, atol=2e-5)
  rows, nodes = (jax.jit(jax.grad(functools.partial(weighted, f)))(lora) for f in (by_rows, by_trees))
  for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(nodes)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max()))
