"""Prefix trees: each distinct prefix once, every prefix of every sample found again, the same scores as row by row."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import policy, prefix_tree
from gfn_jax.parallel import platform_of
from gfn_jax.prefix_tree import (
  PADDING,
  PADDING_ON_CPU,
  bin_size,
  branches_of_bin,
  branches_of_block,
  bucket,
  build_tree,
  build_trees,
  fill_bins,
  padding_of,
  stack_bins,
)
from testing import random_lora, tiny_pretrained


@st.composite
def samples(draw):
  """(tokens [N, T], length [N]) over few tokens, so that samples share prefixes and coincide."""
  num_tokens = draw(st.integers(0, 5))
  row = st.lists(st.integers(0, 2), min_size=num_tokens, max_size=num_tokens)
  tokens = draw(st.lists(row, min_size=1, max_size=8))
  length = draw(st.lists(st.integers(0, num_tokens), min_size=len(tokens), max_size=len(tokens)))
  return np.array(tokens, np.int32).reshape(len(tokens), num_tokens), np.array(length, np.int32)


PROMPT = np.array([2, 1, 7], np.int32)


@settings(max_examples=300, deadline=None)
@given(samples())
def test_tree_holds_each_distinct_prefix_once(case):
  tokens, length = case
  tree = build_tree(PROMPT, tokens, length)
  size, num_tokens, root = len(tree), tokens.shape[1], len(PROMPT) - 1
  paths = []
  for node in range(size):
    parent = tree.parents[node]
    assert parent < node or node == parent == 0
    paths.append((paths[parent] if node else ()) + (int(tree.tokens[node]),))
  texts = {tuple(row[:t]) for row, n in zip(tokens.tolist(), length) for t in range(1, n + 1)}
  prompt = tuple(PROMPT.tolist())
  assert paths[: root + 1] == [prompt[:i] for i in (1, 2, 3)]
  assert len(paths) == root + 1 + len(texts) and set(paths[root + 1 :]) == {prompt + text for text in texts}
  assert tree.depths.tolist() == [max(0, len(path) - len(prompt)) for path in paths]
  assert tree.positions.tolist() == [len(path) - 1 for path in paths]

  assert tree.ancestors.shape == (size, size)
  for node, path in enumerate(paths):
    above = [other for other in range(size) if paths[other] == path[: len(paths[other])]]
    assert np.flatnonzero(tree.ancestors[node]).tolist() == above
  assert tree.node_of.shape == (len(tokens), num_tokens + 1)
  for row, n, nodes in zip(tokens.tolist(), length, tree.node_of):
    assert [paths[node] for node in nodes] == [prompt + tuple(row[: min(t, n)]) for t in range(num_tokens + 1)]


def text_at(trees, first, node):
  """What a node of a share, whose bins begin with `first`, stands for: by walking up to its prompt's first token."""
  (g, node), found = divmod(int(node), trees.tokens.shape[1]), []
  g += first
  while True:
    found.insert(0, int(trees.tokens[g, node]))
    assert trees.ancestors[g, node].sum() == trees.positions[g, node] + 1
    if trees.parents[g, node] == node:
      return tuple(found)
    node = trees.parents[g, node]


@settings(max_examples=100, deadline=None)
@given(samples(), st.integers(1, 3), st.integers(1, 2), st.integers(0, 40))
def test_trees_of_a_batch_hold_every_prefix_of_every_row(case, num_queries, num_shares, room):
  queries = num_queries * num_shares
  tokens, length = (np.concatenate([x] * queries) for x in case)
  prompts = [np.full(1 + q % 3, q + 3, np.int32) for q in range(queries)]
  trees = build_trees(prompts, tokens, length, 3 + tokens.shape[1] + room, num_shares)
  assert len(trees.tokens) % num_shares == 0
  bins = len(trees.tokens) // num_shares
  for row, (sample, n, nodes) in enumerate(zip(tokens.tolist(), length, trees.node_of)):
    query = row // len(case[0])
    first = query // num_queries * bins
    prompt = tuple(prompts[query].tolist())
    for t, node in enumerate(nodes):
      assert text_at(trees, first, node) == prompt + tuple(sample[: min(t, n)])


def parts_of(bins):
  return [[(p.query, p.rows.tolist(), p.start, len(p.tree)) for p in parts] for parts in bins]


ALIKE = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4, 4], [1, 2, 3, 4]]


def test_samples_that_share_much_stay_together():
  """Of two queries, in bins of 11 nodes."""
  tokens = np.array(ALIKE + [[1, 1, 1, 1]] * 4, np.int32)
  bins, size = fill_bins([np.array([2])] * 2, tokens, np.full(8, 4, np.int32), 11)
  assert size == 11
  # In the order of a dictionary, behind the prompt: 1234 and 5644 are 8 nodes, 5678 is 2 more, 5679 begins a bin.
  assert parts_of(bins) == [[(0, [3, 2, 0], 0, 11)], [(0, [1], 0, 5), (1, [4, 5, 6, 7], 5, 5)]]
  tokens, parents, positions, ancestors = stack_bins(bins, 12)
  assert tokens[:2].tolist() == [[2, 1, 2, 3, 4, 5, 6, 4, 4, 7, 8, 0], [2, 5, 6, 7, 9, 2, 1, 1, 1, 1, 0, 0]]
  assert parents[:2].tolist() == [[0, 0, 1, 2, 3, 0, 5, 6, 7, 6, 9, 0], [0, 0, 1, 2, 3, 5, 5, 6, 7, 8, 0, 0]]
  assert positions[:2].tolist() == [[0, 1, 2, 3, 4, 1, 2, 3, 4, 3, 4, 0], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]]
  assert [np.flatnonzero(ancestors[0, node]).tolist() for node in (10, 11)] == [[0, 5, 6, 9, 10], [11]]
  assert [np.flatnonzero(ancestors[1, node]).tolist() for node in (3, 7)] == [[0, 1, 2, 3], [5, 6, 7]]


def test_bins_hold_as_many_wanted_prefixes_as_cost_least():
  """Of 15 unlike samples of four tokens behind a prompt of one, 60 prefixes: 40 nodes are nine samples."""
  tokens = np.arange(60, dtype=np.int32).reshape(15, 4)
  every, whole = (np.tile(np.arange(5) >= least, (15, 1)) for least in (1, 4))
  fill = functools.partial(fill_bins, [np.array([2])], tokens, np.full(15, 4), 40)
  samples = lambda found: [len(part.rows) for parts in found[0] for part in parts]  # noqa: E731
  assert [branches_of_bin(n) for n in (0, 8, 9, 17, 33, 129, 177, 193)] == [8, 8, 9, 18, 36, 144, 192, 208]
  assert samples(fill()) == [9, 6]
  # Where all bins are given as many branches, nine samples and six have 36 each, and three times five have 20: so
  # 2 * 40 nodes and 72 branches, or 3 * 40 and 60. The second is less where ten tokens are behind each.
  assert samples(fill(every, 3, PADDING)) == [9, 6]
  assert samples(fill(every, 10, PADDING)) == [5, 5, 5]
  assert samples(fill(whole, 10, PADDING)) == [8, 7]  # 16 branches, and not 18
  # Where they go block by block, a bin has as many as it needs.
  assert samples(fill(every, 10, PADDING_ON_CPU)) == [9, 6]
  # A sample of more prefixes than any limit is in a bin all the same.
  long, every = tokens.reshape(1, 60)[:, :30], np.ones((1, 31), bool)
  assert samples(fill_bins([np.array([2])], long, np.array([30]), 40, every, 100, PADDING)) == [1]


def test_how_many_branches_go_together():
  assert [branches_of_block(behind) for behind in (0, 1, 3, 6, 100, 192, 1000)] == [64, 64, 64, 32, 1, 1, 1]


def test_wanted_prefixes_are_counted_once():
  """Of samples that begin alike, each of which wants others."""
  tokens = np.array([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 9], [5, 6, 4, 4], [1, 2, 3, 4]], np.int32)
  wanted = np.array([[0, 1, 0, 0, 1], [0, 1, 1, 0, 1], [1, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 1]], bool)
  length = np.full(5, 4)
  rows = prefix_tree._Rows(1, tokens, length, wanted)
  for start in range(5):
    for n in range(start + 1, 6):
      known = rows.order[start:n]
      tree = build_tree(np.array([2]), tokens[known], length[known])
      assert rows.nodes_from(start)[n - start - 1] == len(tree)
      assert rows.ends_from(start)[n - start - 1] == len(np.unique(tree.node_of[wanted[known]]))


def test_padding_is_that_of_the_platform():
  cpu = jax.local_devices()[0]
  assert [platform_of(devices) for devices in ([cpu], [(cpu, cpu)])] == ["cpu", "cpu"]
  assert [padding_of(platform) for platform in ("cpu", "gpu", "tpu")] == [PADDING_ON_CPU, PADDING, PADDING]


def test_how_many_bins_a_loss_is_given():
  tokens, length = np.arange(36, dtype=np.int32).reshape(9, 4), np.full(9, 4)  # a sample a bin
  trees = [build_trees([np.array([2])] * 9, tokens, length, 6, padding=p) for p in (PADDING, PADDING_ON_CPU)]
  assert [len(t.tokens) for t in trees] == [10, 16]
  assert [t.num_bins.tolist() for t in trees] == [[9], [9]]
  # Of two queries, a share each, the first takes two bins of 9 nodes, and the other, whose samples are alike, one.
  tokens[4:8] = tokens[4]
  trees = build_trees([np.array([2])] * 2, tokens[:8], length[:8], 9, 2)
  assert trees.num_bins.tolist() == [2, 2] and not trees.node_of[4:].max() >= 9


def test_a_query_can_be_kept_in_one_bin():
  """Of three queries with 1 + 2 * 4 nodes each, in bins of 14; and of 8, which must grow."""
  tokens, length, prompts = np.arange(24, dtype=np.int32).reshape(6, 4), np.full(6, 4), [np.array([2])] * 3
  queries = lambda found: [[p.query for p in parts] for parts in found[0]]  # noqa: E731
  assert queries(fill_bins(prompts, tokens, length, 14)) == [[0, 1], [1, 2]]
  assert queries(fill_bins(prompts, tokens, length, 14, whole=True)) == [[0], [1], [2]]
  grown = fill_bins(prompts, tokens, length, 8, whole=True)
  assert queries(grown) == [[0], [1], [2]] and grown[1] == 10


def test_up_to_three_bins_are_no_larger_than_they_must():
  prompts, tokens, length = [np.arange(6)] * 2, np.array([[1, 2], [3, 4], [5, 6]] * 2, np.int32), np.full(6, 2)
  for size, num_bins, used in ((512, 1, 64), (320, 1, 40), (64, 1, 32), (14, 2, 14)):
    bins, found = fill_bins(prompts, tokens, length, size)
    assert (len(bins), found) == (num_bins, used), size
  tokens = np.arange(80, dtype=np.int32).reshape(40, 2)  # 80 nodes in two bins of 6 + 40, with a prompt twice
  bins, found = fill_bins([np.arange(6)], tokens, np.full(40, 2, np.int32), 64)
  assert (len(bins), found) == (2, 48)
  of_two, of_three = {60: (2, 40), 80: (2, 48), 100: (2, 56), 110: (2, 64)}, {120: (3, 48), 140: (3, 56), 160: (3, 64)}
  for n, sizes in {**of_two, **of_three, 180: (4, 64)}.items():
    one_each = np.arange(n, dtype=np.int32).reshape(n, 1)  # behind a prompt of six
    bins, found = fill_bins([np.arange(6)], one_each, np.ones(n, np.int32), 64)
    assert (len(bins), found) == sizes, n
  assert fill_bins([], tokens[:0], length[:0], 64) == ([], 64)


def test_sizes():
  assert [bucket(n) for n in (0, 1, 3, 8, 9, 13, 17, 25, 33)] == [1, 1, 3, 8, 10, 14, 20, 28, 40]
  assert [bucket(n, smallest=8) for n in (0, 8, 9)] == [8, 8, 10]
  for padding, sizes in ((PADDING, [192, 384, 512]), (PADDING_ON_CPU, [192, 256, 256])):
    assert [bin_size(20, 8, 24, width, padding) for width in (64, 384, 4096)] == sizes
  # Four long prompts; a query altogether; a prompt with a sample.
  assert [bin_size(*sizes, 64, PADDING) for sizes in ((60, 16, 24), (100, 8, 24), (1000, 1, 24))] == [256, 320, 1024]


@pytest.mark.parametrize("size", (12, 30, 192))
def test_scores_and_gradients_of_trees_are_those_of_rows(size):
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
  trees = build_trees([row[mask] for row, mask in zip(prompt, prompt_mask)], tokens, length, size)
  assert (len(trees.tokens) == 1) == (size == 192)
  prompt, prompt_mask, tokens, length, chosen = map(jnp.asarray, (prompt, prompt_mask, tokens, length, chosen))
  trees = jax.tree.map(jnp.asarray, trees)
  settings = dict(allowed_tokens=jnp.asarray(allowed), stop_token_id=stop, max_length=t)

  def by_rows(lora):
    return policy.score(config, pretrained.params, lora, prompt, prompt_mask, tokens, length, chosen, **settings)

  def by_trees(lora):
    states = policy.tree_states(config, pretrained.params, lora, trees)
    return policy.score_trees(config, pretrained.params, states, trees, length, chosen, **settings)

  def weighted(score, lora):
    return sum((jnp.sin(jnp.arange(x.size)).reshape(x.shape) * x).sum() for x in score(lora))

  for a, b in zip(jax.jit(by_rows)(lora), jax.jit(by_trees)(lora)):
    np.testing.assert_allclose(a, b, atol=2e-5)
  rows, nodes = (jax.jit(jax.grad(functools.partial(weighted, f)))(lora) for f in (by_rows, by_trees))
  for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(nodes)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max()))
