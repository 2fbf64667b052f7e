"""The replay buffer: what it keeps, what it draws, and that a restored one goes on exactly."""

import math

import numpy as np
import pytest

from gfn_jax.replay import ReplayBuffer
from gfn_jax.types import terminable_prefixes

MAX_LENGTH = 6


def rows(*rationales, width=MAX_LENGTH):
  """Arrays for `add` from (tokens, log-reward) pairs; entries past a length are junk that must not be kept."""
  count = len(rationales)
  tokens, action_mask = np.full((count, width), 77, np.int32), np.ones((count, width), bool)
  length, log_reward = np.zeros(count, np.int32), np.full((count, width + 1), np.nan, np.float32)
  for row, (chosen, score) in enumerate(rationales):
    length[row] = len(chosen)
    tokens[row, : len(chosen)] = chosen
    log_reward[row, len(chosen)] = score
  return tokens, length, action_mask, log_reward


def contents(buffer, query_id):
  """(tokens, score) pairs of a query, best first."""
  arrays = buffer.to_arrays()
  out = []
  for row in np.flatnonzero(arrays["query_ids"] == query_id):
    length = arrays["length"][row]
    out.append((tuple(arrays["tokens"][row, :length].tolist()), float(arrays["log_reward"][row, length])))
  return out


def edit_distance(a, b):
  """Levenshtein's table, by the book."""
  table = np.zeros((len(a) + 1, len(b) + 1), int)
  table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
  for i, x in enumerate(a, 1):
    for j, y in enumerate(b, 1):
      table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
  return table[-1, -1]


def kept_by_rule(offered, capacity, similarity):
  """The rule, word for word, on one query's (tokens, score) pairs."""
  held = []
  for tokens, score in offered:
    near = [h for h in held if h[0] == tokens or edit_distance(h[0], tokens) < similarity * len(h[0] + tokens)]
    if all(score > h[1] for h in near):
      held = sorted([h for h in held if h not in near] + [(tokens, score)], key=lambda h: -h[1])[:capacity]
  return held


def test_keeps_the_best_of_each_query_best_first():
  buffer = ReplayBuffer(capacity=2, similarity=0.0, max_length=MAX_LENGTH)
  buffer.add(3, *rows(([1, 2], -5.0), ([3], -1.0), ([4, 4, 4], -3.0), ([], -4.0)))
  buffer.add(np.int64(9), *rows(([1, 2], -7.0)))
  assert contents(buffer, 3) == [((3,), -1.0), ((4, 4, 4), -3.0)]
  assert contents(buffer, 9) == [((1, 2), -7.0)]
  assert 3 in buffer and np.int32(9) in buffer and 4 not in buffer and len(buffer) == 3


def test_of_near_duplicates_the_better_one_stays():
  buffer = ReplayBuffer(capacity=5, similarity=0.25, max_length=MAX_LENGTH)
  buffer.add(0, *rows(([1, 2, 3, 4], -4.0)))
  buffer.add(0, *rows(([1, 2, 3, 5], -5.0)))  # distance 1 < 0.25 * 8, and worse
  assert contents(buffer, 0) == [((1, 2, 3, 4), -4.0)]
  buffer.add(0, *rows(([1, 2, 3, 5], -3.0)))  # better
  assert contents(buffer, 0) == [((1, 2, 3, 5), -3.0)]
  buffer.add(0, *rows(([1, 2, 6, 7], -9.0)))  # distance 2 is not below 2
  assert contents(buffer, 0) == [((1, 2, 3, 5), -3.0), ((1, 2, 6, 7), -9.0)]
  between = [1, 2, 6, 5]  # distance 1 from both
  buffer.add(0, *rows((between, -6.0)))  # better than one, worse than the other
  assert contents(buffer, 0) == [((1, 2, 3, 5), -3.0), ((1, 2, 6, 7), -9.0)]
  buffer.add(0, *rows((between, -1.0)))
  assert contents(buffer, 0) == [((1, 2, 6, 5), -1.0)]


def test_a_near_duplicate_is_dropped_even_where_there_is_room_and_a_tie_keeps_the_older():
  buffer = ReplayBuffer(capacity=5, similarity=0.5, max_length=MAX_LENGTH)
  buffer.add(0, *rows(([1, 2, 3], -1.0), ([1, 2, 4], -1.0)))
  assert contents(buffer, 0) == [((1, 2, 3), -1.0)]
  tied = ReplayBuffer(capacity=2, similarity=0.0, max_length=MAX_LENGTH)
  tied.add(0, *rows(([1], -1.0), ([2], -1.0), ([3], -1.0)))
  assert contents(tied, 0) == [((1,), -1.0), ((2,), -1.0)]


@pytest.mark.parametrize("similarity", [0.0, 0.25, 1.0])
def test_exact_duplicates_collapse(similarity):
  buffer = ReplayBuffer(capacity=5, similarity=similarity, max_length=MAX_LENGTH)
  buffer.add(0, *rows(([], -8.0), ([1, 2], -2.0), ([1, 2], -1.5), ([], -9.0), ([1, 2], -3.0)))
  assert contents(buffer, 0) == [((1, 2), -1.5), ((), -8.0)]


@pytest.mark.parametrize("capacity,similarity", [(1, 0.3), (3, 0.0), (5, 0.1), (8, 0.25), (20, 0.5), (20, 1.0)])
def test_random_streams_follow_the_rule(capacity, similarity):
  rng = np.random.default_rng(capacity)
  buffer = ReplayBuffer(capacity, similarity, MAX_LENGTH)
  offered, sizes = [], set()
  for _ in range(40):
    batch = [
      (tuple(rng.integers(0, 3, rng.integers(0, MAX_LENGTH + 1)).tolist()), float(np.float32(rng.normal(-9.0, 3.0))))
      for _ in range(5)
    ]
    offered += batch
    buffer.add(0, *rows(*batch))
    want = kept_by_rule(offered, capacity, similarity)
    assert contents(buffer, 0) == want
    sizes.add(len(want))
  assert max(sizes) > 1 or capacity == 1 or similarity == 1.0


def test_rows_come_back_as_they_went_in():
  buffer = ReplayBuffer(capacity=4, similarity=0.0, max_length=MAX_LENGTH)
  tokens = np.array([[5, 6, 7, 8], [1, 70_000, 9, 9]])
  length = np.array([4, 2])
  action_mask = np.array([[True, True, False, True], [True, True, False, False]])
  log_reward = np.array([[-1.5, -2.5, np.nan, -3.5, -2.0], [-1.0, -np.inf, -30.0, 8.0, np.nan]], np.float32)
  buffer.add(0, tokens, length, action_mask, log_reward)  # T = 4 where max_length is 6
  got = buffer.sample(0, 50, np.random.default_rng(0), prioritized=False)
  assert [x.shape for x in got] == [(50, 6), (50,), (50, 6), (50, 7)]
  assert [x.dtype for x in got] == [np.int32, np.int32, bool, np.float32]
  assert set(got[1].tolist()) == {4, 2}
  for got_tokens, got_length, got_mask, got_reward in zip(*got):
    row = [4, 2].index(got_length)
    np.testing.assert_array_equal(got_tokens, np.pad(tokens[row, :got_length], (0, 6 - got_length)))
    np.testing.assert_array_equal(got_mask, np.pad(action_mask[row, :got_length], (0, 6 - got_length)))
    np.testing.assert_array_equal(got_reward, np.pad(log_reward[row, : got_length + 1], (0, 6 - got_length)))
  np.testing.assert_array_equal(
    terminable_prefixes(got[1], got[2]).sum(1), np.where(got[1] == 4, 4, 3)
  )  # the tool's token takes one prefix away


def test_what_is_kept_does_not_alias_the_callers_arrays():
  buffer = ReplayBuffer(capacity=4, similarity=0.0, max_length=MAX_LENGTH)
  arrays = rows(([1, 2], -1.0))
  buffer.add(0, *arrays)
  for array in arrays:
    array[:] = 0
  for array in buffer.sample(0, 1, np.random.default_rng(0), prioritized=True):
    array[:] = 0
  assert contents(buffer, 0) == [((1, 2), -1.0)]


def test_draws_in_proportion_to_reward_or_uniformly():
  buffer = ReplayBuffer(capacity=9, similarity=0.0, max_length=MAX_LENGTH)
  shift = -2000.0  # exp of which is 0 in float64
  buffer.add(0, *rows(*(([i], shift + math.log(weight)) for i, weight in enumerate((1, 2, 5)))))
  rng, count = np.random.default_rng(0), 20_000
  for prioritized, want in ((True, [1 / 8, 2 / 8, 5 / 8]), (False, [1 / 3, 1 / 3, 1 / 3])):
    tokens, *_ = buffer.sample(0, count, rng, prioritized)
    frequency = np.bincount(tokens[:, 0], minlength=3) / count
    np.testing.assert_allclose(frequency, want, atol=4 * 0.5 / math.sqrt(count))  # four standard errors


def test_uniform_draws_repeat_nothing_before_everything_has_come():
  buffer = ReplayBuffer(capacity=9, similarity=0.0, max_length=MAX_LENGTH)
  buffer.add(0, *rows(*(([i], -float(i)) for i in range(5))))
  for count, times in ((3, {0, 1}), (5, {1}), (12, {2, 3})):
    tokens, *_ = buffer.sample(0, count, np.random.default_rng(count), prioritized=False)
    assert set(np.bincount(tokens[:, 0], minlength=5)) == times


def test_what_is_held_bounds_log_z():
  buffer = ReplayBuffer(capacity=3, similarity=0.0, max_length=MAX_LENGTH)
  buffer.add(0, *rows(([1], math.log(0.5)), ([2], math.log(0.3)), ([1], math.log(0.5))))  # one of them twice
  buffer.add(4, *rows(([1], math.log(0.1))))
  for temperature, first, last in ((1.0, 0.8, 0.1), (0.5, 0.34, 0.01)):
    first, last = math.log(first), math.log(last)
    mean = (first + last) / 2  # of the queries without any
    found = buffer.log_partition_bounds(6, temperature)
    np.testing.assert_allclose(found, [first, mean, mean, mean, last, mean], rtol=1e-6)


def test_drawing_from_nothing_names_the_query():
  buffer = ReplayBuffer(capacity=4, similarity=0.0, max_length=MAX_LENGTH)
  buffer.add(1, *rows(([1], -1.0)))
  with pytest.raises(ValueError, match="query 2 "):
    buffer.sample(2, 4, np.random.default_rng(0), prioritized=True)
  assert 2 not in buffer


def filled(seed=0):
  rng = np.random.default_rng(seed)
  buffer = ReplayBuffer(capacity=6, similarity=0.25, max_length=MAX_LENGTH)
  for query_id in rng.integers(0, 12, 40):
    length = rng.integers(0, MAX_LENGTH + 1, 8)
    log_reward = rng.normal(-9.0, 2.0, (8, MAX_LENGTH + 1)).round(0).astype(np.float32)  # with ties
    log_reward[:, 2][length != 2] = np.nan
    shape = (8, MAX_LENGTH)
    buffer.add(int(query_id), rng.integers(0, 9, shape), length, rng.random(shape) < 0.8, log_reward)
  return buffer


def test_a_restored_buffer_draws_and_grows_exactly_as_the_first_would_have(tmp_path):
  first = filled()
  assert len(first) > 40
  np.savez(tmp_path / "buffer.npz", **first.to_arrays())
  with np.load(tmp_path / "buffer.npz", allow_pickle=False) as stored:
    second = ReplayBuffer.from_arrays(dict(stored), capacity=6, similarity=0.25, max_length=MAX_LENGTH)
  assert len(second) == len(first)
  generators = np.random.default_rng(1), np.random.default_rng(1)
  for step in range(30):
    drawn = []
    for buffer, rng in zip((first, second), generators):
      query_id = int(rng.integers(0, 12))
      drawn.append([x for q in range(12) if q in buffer for x in buffer.sample(q, 7, rng, prioritized=step % 2 == 0)])
      shape = (4, MAX_LENGTH)
      length = rng.integers(0, MAX_LENGTH + 1, 4)
      log_reward = rng.normal(-6.0, 2.0, (4, MAX_LENGTH + 1)).round(0).astype(np.float32)
      buffer.add(query_id, rng.integers(0, 9, shape), length, np.ones(shape, bool), log_reward)
    for a, b in zip(*drawn, strict=True):
      np.testing.assert_array_equal(a, b)
  for name, array in first.to_arrays().items():
    np.testing.assert_array_equal(second.to_arrays()[name], array)
    assert second.to_arrays()[name].dtype == array.dtype


def test_what_is_drawn_does_not_depend_on_the_order_in_which_queries_came():
  one, two = (ReplayBuffer(4, 0.0, MAX_LENGTH) for _ in range(2))
  for buffer, order in ((one, (5, 2, 8)), (two, (8, 5, 2))):
    for query_id in order:
      buffer.add(query_id, *rows(([query_id], -1.0), ([query_id, 1], -2.0)))
  for name, array in one.to_arrays().items():
    np.testing.assert_array_equal(two.to_arrays()[name], array)


def test_an_empty_buffer_round_trips():
  buffer = ReplayBuffer(capacity=3, similarity=0.1, max_length=MAX_LENGTH)
  arrays = buffer.to_arrays()
  assert {name: (x.shape, x.dtype.name) for name, x in arrays.items()} == {
    "query_ids": ((0,), "int64"),
    "tokens": ((0, MAX_LENGTH), "int32"),
    "length": ((0,), "int32"),
    "action_mask": ((0, MAX_LENGTH), "bool"),
    "log_reward": ((0, MAX_LENGTH + 1), "float32"),
  }
  restored = ReplayBuffer.from_arrays(arrays, capacity=3, similarity=0.1, max_length=MAX_LENGTH)
  assert len(restored) == 0
  restored.add(0, *rows(([1], -1.0)))
  assert len(restored) == 1


def test_a_restored_buffer_must_fit():
  arrays = filled().to_arrays()
  with pytest.raises(ValueError, match=r"max_length=7 .* 6"):
    ReplayBuffer.from_arrays(arrays, capacity=6, similarity=0.25, max_length=7)
  with pytest.raises(ValueError, match="capacity=2 "):
    ReplayBuffer.from_arrays(arrays, capacity=2, similarity=0.25, max_length=MAX_LENGTH)


@pytest.mark.parametrize(
  "options,match",
  [
    ({"capacity": 0}, "capacity=0"),
    ({"similarity": -0.1}, "similarity=-0.1"),
    ({"similarity": 1.5}, "similarity=1.5"),
    ({"similarity": math.nan}, "similarity=nan"),
    ({"max_length": -1}, "max_length=-1"),
  ],
)
def test_settings_are_checked(options, match):
  with pytest.raises(ValueError, match=match) as error:
    ReplayBuffer(**{"capacity": 4, "similarity": 0.1, "max_length": 5} | options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("score", [math.nan, -math.inf, math.inf])
def test_a_whole_rationale_needs_a_finite_log_reward(score):
  buffer = ReplayBuffer(capacity=4, similarity=0.0, max_length=MAX_LENGTH)
  with pytest.raises(ValueError, match=f"query 5: log-reward {score}"):
    buffer.add(5, *rows(([1], -1.0), ([2, 3], score)))
  assert 5 not in buffer  # all or nothing


def test_rows_that_do_not_fit_are_refused():
  buffer = ReplayBuffer(capacity=4, similarity=0.0, max_length=2)
  with pytest.raises(ValueError, match=r"query 0: length=3 must lie in \[0, 2\]"):
    buffer.add(0, *rows(([1], -1.0), ([1, 2, 3], -1.0)))
  tokens, length, action_mask, log_reward = rows(([1], -1.0))
  with pytest.raises(ValueError, match="length=-1"):
    buffer.add(0, tokens, -length, action_mask, log_reward)
  with pytest.raises(ValueError, match="shapes"):
    buffer.add(0, tokens, length, action_mask, log_reward[:, :-1])
  assert len(buffer) == 0
