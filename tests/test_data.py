"""What a step draws, and how examples become arrays."""

import ml_collections
import numpy as np
import pytest

from gfn_jax import data
from gfn_jax.models.prefix import without_start
from gfn_jax.task import Task
from gfn_jax.types import Example

BEHAVIOR = ml_collections.ConfigDict({"buffer": 0.25, "tempered": 0.5, "temperature_low": 0.5, "temperature_high": 2.0})


def plans(weights, number, num_queries=8):
  return [data.plan_step(7, step, np.asarray(weights, float), num_queries, BEHAVIOR) for step in range(number)]


def test_every_step_has_the_shares_of_the_mix():
  for plan in plans(np.ones(20), 30):
    assert len(set(plan.query_ids)) == 8
    assert plan.from_buffer.sum() == 2
    tempered = plan.temperature != 1
    assert tempered.sum() == 4 and not (tempered & plan.from_buffer).any()
    assert ((plan.temperature[tempered] >= 0.5) & (plan.temperature[tempered] <= 2)).all()


def test_temperatures_fill_their_range():
  drawn = np.concatenate([p.temperature[p.temperature != 1] for p in plans(np.ones(20), 400)])
  assert abs(drawn.mean() - 1.25) < 0.03 and drawn.min() < 0.52 and drawn.max() > 1.98


def test_queries_are_drawn_by_weight_in_every_role():
  """One of the first ten is five times as likely as one of the others; each role sees the same mix."""
  ids = np.stack([p.query_ids for p in plans([1.0] * 10 + [0.2] * 40, 3000, num_queries=4)])
  for role in ids.T:
    # Without replacement the heavy ones run out a little: between 10/18 and that with none drawn twice.
    assert 0.5 < (role < 10).mean() < 0.58
  assert not (np.stack([p.query_ids for p in plans([1, 1, 0, 1, 1], 50, num_queries=4)]) == 2).any()


def test_few_queries_are_drawn_again():
  assert all(set(p.query_ids) <= {0, 1, 2} for p in plans(np.ones(3), 5))


def test_a_step_is_a_function_of_seed_and_step():
  one, again = (data.plan_step(3, 5, np.ones(50), 8, BEHAVIOR) for _ in range(2))
  for field in ("query_ids", "from_buffer", "temperature"):
    np.testing.assert_array_equal(getattr(one, field), getattr(again, field))
  for seed, step in ((3, 6), (4, 5)):
    assert (data.plan_step(seed, step, np.ones(50), 8, BEHAVIOR).query_ids != one.query_ids).any()


@pytest.mark.parametrize("queries, expected", [(8, 6), (4, 3), (1, 1)])
def test_what_is_not_replayed_is_sampled(queries, expected):
  assert data.num_sampled(BEHAVIOR, queries) == expected


class Letters(Task):
  """A task whose tokens are characters."""

  start_tokens = ()

  def __init__(self):
    pass

  def encode(self, text):
    return list(map(ord, text))

  encode_after = encode


def test_padding():
  tokens, mask = data.pad_left([[1, 2, 3], [4]])
  assert (
    tokens.tolist() == [[0] * 5 + [1, 2, 3], [0] * 7 + [4]] and mask.sum(-1).tolist() == [3, 1] and mask[:, -1].all()
  )
  tokens, mask = data.pad_right([[1, 2, 3], [4], []])
  assert tokens.tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]] and mask.sum(-1).tolist() == [3, 1, 0]


def test_a_prompt_that_does_not_fit_is_named():
  task = Letters()
  examples = [Example("short", None, "yes", ""), Example("a long question", None, "yes", "")]
  data.query_table(examples, task, max_positions=30, reserved=12)
  with pytest.raises(
    ValueError, match="'a long question' has 15 tokens: with 16 more it exceeds the model's 30 positions"
  ):
    data.query_table(examples, task, max_positions=30, reserved=13)
  asked = [Example("short", None, "yes", "", reward_prompt="what the reward reads")]
  with pytest.raises(ValueError, match="'what the reward reads' has 21 tokens"):
    data.query_table(asked, task, max_positions=30, reserved=12)


def test_a_prompt_begins_with_the_start_tokens():
  task = Letters()
  task.start_tokens = [1]
  table = data.query_table([Example("ab", None, "y", ""), Example("c", None, "y", "")], task, 30, 12)
  assert [row[mask].tolist() for row, mask in zip(table.prompt_tokens, table.prompt_mask)] == [[1, 97, 98], [1, 99]]
  kept = without_start(table.prompt_mask, 1)
  assert [row[mask].tolist() for row, mask in zip(table.prompt_tokens, kept)] == [[97, 98], [99]]


def test_shares_that_are_rounded_up_are_no_more_than_all():
  assert data.num_by_behavior(ml_collections.ConfigDict({"buffer": 0.5, "tempered": 0.5}), 3) == (2, 1)
