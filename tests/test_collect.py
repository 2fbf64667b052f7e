"""Which prefixes of a step's samples are scored; which demonstrations a supervised step learns from, and how they share
their prompts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gfn_jax.collect import Collector, DemonstrationCollector, better_prefixes, scored_prefixes
from gfn_jax.config import base_config
from gfn_jax.data import query_table
from gfn_jax.models import Lora, LoraConfig
from gfn_jax.sampler import Rollout
from gfn_jax.types import Example, Trajectory

MAX_LENGTH, KEY = 4, jax.random.key(0)


def make_collector(prompts, rows, config=None, kind=DemonstrationCollector):
  """Demonstration i is the single token i, behind prompts[i]."""
  config = config or base_config()
  config.method = "sft" if kind is DemonstrationCollector else "gfn"
  config.train.num_queries, config.sampler.num_samples = rows, 1
  config.sampler.max_length = MAX_LENGTH
  examples = [Example(p, str(i), "", "") for i, p in enumerate(prompts)]
  task = SimpleNamespace(
    examples=examples, num_seeded=len(examples), encode_prompt=lambda text: list(text.encode()),
    encode_after=lambda text: [], rationale_tokens=lambda e, n: ([int(e.rationale)], [True]),
  )  # fmt: skip
  pretrained = SimpleNamespace(config=SimpleNamespace(max_positions=64, hidden_size=32))
  sampler = SimpleNamespace(devices=jax.local_devices()[:1])
  parts = SimpleNamespace(config=config, task=task, params={}, sampler=sampler, reward=None, pretrained=pretrained)
  collector = kind(parts, query_table(examples, task, 64, MAX_LENGTH))
  collector.seed_replay()
  return collector


def rows_of(batch, collector):
  """(prompt, demonstration) of each row."""
  queries = collector.table[batch.query_ids]
  texts = [bytes(t[m].tolist()).decode() for t, m in zip(queries.prompt_tokens, queries.prompt_mask)]
  together = len(batch.tokens) // len(texts)
  return [(texts[row // together], int(z[0])) for row, z in enumerate(batch.tokens)]


@pytest.mark.parametrize(
  "prompts, rows, num_prompts",
  (
    ("abcdefgh", 4, 4),  # a demonstration each
    ("aaaabbbbcccc", 32, 8),  # four together
    ("aaaabbbbccc", 24, 8),  # as many as every prompt has
    ("aaaabbbbccc", 32, 16),  # three do not divide the rows
    ("aaaabbbbcccc", 8, 8),  # of at least eight prompts
    ("aaaaabcc", 16, 16),  # one prompt has a single one
  ),
)
def test_demonstrations_of_a_prompt_are_drawn_together(prompts, rows, num_prompts):
  collector = make_collector(prompts, rows)
  for step in range(5):
    batch, _ = collector({}, step, KEY)
    assert len(batch.query_ids) == num_prompts and len(batch.tokens) == rows
    found = rows_of(batch, collector)
    assert all(prompts[z] == prompt for prompt, z in found)
    together = rows // num_prompts
    for begin in range(0, rows, together):
      assert len(set(found[begin : begin + together])) == together  # none twice behind one prompt
    again, _ = collector({}, step, KEY)
    np.testing.assert_array_equal(again.tokens, batch.tokens)


def test_weights_of_queries_are_nothing_to_demonstrations():
  config = base_config()
  config.method, config.data.seeded_weight, config.data.unseeded_weight = "sft", 0.0, 0.0
  collector = make_collector("abcdefgh", 4, config)
  assert len(collector({}, 0, KEY)[0].tokens) == 4


def test_demonstrations_stay_out_of_the_buffer_unless_they_seed_it():
  config = base_config()
  config.replay.seed_from = "nothing"
  collector = make_collector("abcd", 4, config, Collector)
  assert collector.seed_replay() == "" and not len(collector.replay)
  assert (collector.weights == config.data.unseeded_weight).all()


def test_rows_that_are_drawn_alone_are_as_likely_as_one_another():
  """As an M-step's samples are, however often one reason comes back."""
  collector = make_collector("aaaaaaab", 8)
  drawn = [z for step in range(50) for _, z in rows_of(collector({}, step, KEY)[0], collector)]
  counts = np.bincount(drawn, minlength=8)
  assert (counts == 50).all()  # without replacement


def test_every_demonstration_has_its_turn():
  collector = make_collector("aaaabbbb", 4)
  seen = {z for step in range(40) for _, z in rows_of(collector({}, step, KEY)[0], collector)}
  assert seen == set(range(8))


LENGTH, TERMINABLE = np.array([6, 2, 0]), np.zeros((3, 8), bool)
TERMINABLE[0, [0, 1, 3, 4, 6]] = TERMINABLE[1, [0, 1, 2]] = TERMINABLE[2, 0] = True


def test_prefixes_that_an_objective_reads():
  whole = np.zeros((3, 8), bool)
  whole[[0, 1, 2], LENGTH] = True
  rng = np.random.default_rng(0)
  for objective in ("tb", "vargrad", "ppo", "grpo"):
    np.testing.assert_array_equal(scored_prefixes(objective, 3, LENGTH, TERMINABLE, rng), whole)
  for objective in ("subtb", "db"):
    np.testing.assert_array_equal(scored_prefixes(objective, None, LENGTH, TERMINABLE, rng), TERMINABLE)
    counts = np.zeros((3, 8))
    for _ in range(3000):
      drawn = scored_prefixes(objective, 3, LENGTH, TERMINABLE, rng)
      assert (drawn <= TERMINABLE).all() and (drawn | ~whole).all()
      np.testing.assert_array_equal(drawn.sum(1), [3, 3, 1])
      counts += drawn
    np.testing.assert_allclose(counts[0, [0, 1, 3, 4]] / 3000, 2 / 4, atol=0.04)  # uniform, four standard errors


def make_step_collector(fields, log_reward, asked=None):
  """Two queries a step of three samples of four tokens, at most five; `log_reward(tokens)` of each prefix, [B, S]."""
  config = base_config()
  config.train.num_queries, config.sampler.num_samples, config.sampler.max_length = 2, 3, 5
  config.behavior.buffer, config.behavior.tempered, config.replay.similarity = 0.5, 0.0, 0.0
  config.update_from_flattened_dict(fields)
  examples = [Example(p, None, "", "") for p in "ab"]
  task = SimpleNamespace(
    examples=examples, num_seeded=2, encode_prompt=lambda text: list(text.encode()), encode_after=lambda text: [],
    is_right=lambda example, z: None,
  )  # fmt: skip
  rng = np.random.default_rng(0)

  def reward(queries, tokens, length, wanted):
    if asked is not None:
      asked.append(wanted)
    return np.where(wanted, log_reward(tokens), 0).astype(np.float32)

  def begin(lora, prompt_tokens, prompt_mask, **_):
    return Rollout(len(prompt_tokens), lora, None, np.ones(1), None)

  def finish(rollout, on_round):
    return sampled(rollout.num_queries * config.sampler.num_samples)

  def draw(lora, prompt_tokens, prompt_mask, *, num_samples, **_):
    assert lora is None  # the base
    return sampled(len(prompt_tokens) * num_samples)

  def sampled(rows):
    tokens = rng.integers(1, 100, (rows, 5)).astype(np.int32)
    chosen = np.tile(np.arange(5) < 4, (rows, 1))
    return Trajectory(tokens, np.full(rows, 4), chosen, np.zeros((rows, 5)), np.zeros((rows, 6)))

  sampler = SimpleNamespace(devices=jax.local_devices()[:1], begin=begin, finish=finish, draw=draw)
  pretrained = SimpleNamespace(config=SimpleNamespace(max_positions=64, hidden_size=32))
  parts = SimpleNamespace(config=config, task=task, params={}, sampler=sampler, reward=reward, pretrained=pretrained)
  return Collector(parts, query_table(examples, task, 64, 5))


BY_LENGTH = (-9.0, -9.0, 0.0, -3.0, -2.0, -9.0)


def test_the_prefixes_that_are_worth_more_than_the_sample():
  nan = np.nan
  log_reward = np.array([
    [-3.0, -1.0, nan, -1.5, -2.0, nan], [-2.0, nan, nan, -1.5, nan, nan], [-4.0, *[nan] * 5], [-2.0, -2.0, *[nan] * 4],
    [-1.0, nan, *[nan] * 4],
  ])  # fmt: skip
  length = np.array([4, 3, 0, 1, 1])  # the last one's whole has no reward
  found = np.argwhere(better_prefixes(log_reward, length, 0)).tolist()
  assert found == [[0, 1], [0, 3], [0, 4], [1, 3], [2, 0], [3, 1], [4, 1]]
  found = np.argwhere(better_prefixes(log_reward, length, 2)).tolist()
  assert found == [[0, 3], [0, 4], [1, 3], [2, 0], [3, 1], [4, 1]]


@pytest.mark.parametrize("better", [False, True])
def test_what_of_a_sample_goes_into_the_buffer(better):
  """Two tokens are worth more than four, and nothing else is; the objective asks for whole samples."""
  fields = {"loss.name": "vargrad", "replay.better_prefixes": better}
  collector = make_step_collector(fields, lambda tokens: tokens[:, :1] + np.array(BY_LENGTH))
  batch, _ = collector({"lora": Lora({}, LoraConfig(1, 1.0, ()))}, 0, KEY)
  assert (batch.length == 4).all()  # what has just been sampled is learned whole
  kept = collector.replay.to_arrays()
  assert sorted(kept["length"]) == [2] * 6 * better + [4] * 6
  whole = {tuple(tokens[:2]): tokens for tokens in batch.tokens.tolist()}
  for tokens, length, log_reward in zip(kept["tokens"], kept["length"], kept["log_reward"]):
    row = whole[tuple(tokens[:2])]
    np.testing.assert_array_equal(tokens, [*row[:length], *[0] * (5 - length)])
    assert log_reward[length] == row[0] + BY_LENGTH[length]


@pytest.mark.parametrize("better", [False, True])
def test_the_bases_samples_fill_the_buffer_before_the_first_step(better):
  """Two tokens are worth more than four, and nothing else is."""
  fields = {"loss.name": "tb", "replay.better_prefixes": better, "replay.seed_from": "samples"}
  fields |= {"replay.num_seed_samples": 7}
  collector = make_step_collector(fields, lambda tokens: tokens[:, :1] + np.array(BY_LENGTH))
  assert collector.seed_replay() == f"{28 if better else 14} rationales of 14 by the base"
  kept = collector.replay.to_arrays()
  np.testing.assert_array_equal(kept["query_ids"], np.repeat([0, 1], 14 if better else 7))
  assert sorted(kept["length"]) == [2] * 14 * better + [4] * 14
  scores = kept["tokens"][:, 0] + np.array(BY_LENGTH)[kept["length"]]
  np.testing.assert_array_equal(np.take_along_axis(kept["log_reward"], kept["length"][:, None], 1)[:, 0], scores)


def test_a_step_scores_the_prefixes_that_it_learns_from_and_replays_the_same_ones():
  asked = []
  collector = make_step_collector({"loss.num_prefixes": 2}, lambda tokens: tokens[:, :1] + np.arange(6), asked)
  known = {}
  for step in range(6):
    batch, _ = collector({"lora": Lora({}, LoraConfig(1, 1.0, ()))}, step, KEY)
    np.testing.assert_array_equal(batch.terminable.sum(1), 2)
    assert batch.terminable[:, 4].all() and not batch.terminable[:, 5].any()
    for tokens, terminable, log_reward in zip(batch.tokens, batch.terminable, batch.log_reward_untempered):
      np.testing.assert_array_equal(log_reward[terminable], (tokens[0] + np.arange(6))[terminable])
      np.testing.assert_array_equal(known.setdefault(tuple(tokens[:4]), terminable), terminable)
  assert len(known) == 3 * (2 + 5)  # the first step samples both queries, the others one
  assert len({tuple(row) for wanted in asked for row in wanted}) == 4
