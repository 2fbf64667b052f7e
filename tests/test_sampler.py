"""Rollouts: what is recorded, what is sampled how often, and what the tool writes."""

import collections
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enumeration import (
  ALPHABET,
  CALL,
  LEFT,
  RIGHT,
  STOP,
  FakeTool,
  allowed_tokens,
  behaviour_probabilities,
  every_z,
  scored,
  strings,
  total_variation,
)
from gfn_jax import policy
from gfn_jax.benchmark.stopwatch import CompileLog
from gfn_jax.data import pad_left
from gfn_jax.draws import block_size, draw_index, filter_tokens, nucleus
from gfn_jax.models import logits
from gfn_jax.sampler import PATIENCE, Sampler, _compiled_round, crowds, shares_of
from gfn_jax.tools import Calculator
from gfn_jax.types import terminable_prefixes
from testing import random_lora, run_python, tiny_pretrained

PROMPTS = ([5, 40, 7], [21, 3, 3, 60, 33, 12], [2], [44, 9, 31, 8])
MAX_LENGTH = 8


def make_sampler(pretrained, **options):
  """A sampler over the alphabet of `enumeration`, with its tool."""
  vocab_size = pretrained.config.vocab_size
  defaults = {
    "allowed_tokens": allowed_tokens(vocab_size), "stop_token_id": STOP, "max_length": MAX_LENGTH,
    "tool": FakeTool(vocab_size),
  }  # fmt: skip
  return Sampler(pretrained.config, **{"params": pretrained.params} | defaults | options)


def score(pretrained, lora, prompts, z, max_length=MAX_LENGTH):
  """policy.score of trajectories behind ragged prompts."""
  scorer = functools.partial(
    policy.score, pretrained.config, allowed_tokens=jnp.asarray(allowed_tokens(pretrained.config.vocab_size)),
    stop_token_id=STOP, max_length=max_length,
  )  # fmt: skip
  prompt_tokens, prompt_mask = pad_left(prompts)
  arrays = map(jnp.asarray, (prompt_tokens, prompt_mask, z.tokens, z.length, z.action_mask))
  return [np.asarray(x) for x in jax.jit(scorer)(pretrained.params, lora, *arrays)]


# ---- What is recorded


@pytest.fixture(scope="module", params=("gptj", "gpt2"))
def rollout(request):
  """(model, adapter, trajectories) at several temperatures, with a minimum length, a tool and ragged prompts."""
  pretrained = tiny_pretrained(seed=1, family=request.param)
  lora = random_lora(pretrained)
  sampler = make_sampler(pretrained, min_length=2)
  z = sampler(
    lora, *pad_left(PROMPTS), num_samples=50, temperature=np.array([1.0, 0.5, 2.0, 1.3]), key=jax.random.key(0)
  )
  return pretrained, lora, z


def test_shapes_and_padding(rollout):
  _, _, z = rollout
  rows = len(PROMPTS) * 50
  assert z.tokens.shape == z.action_mask.shape == z.log_pf.shape == (rows, MAX_LENGTH)
  assert z.log_pterm.shape == z.terminable.shape == (rows, MAX_LENGTH + 1) and z.length.shape == (rows,)
  assert z.length.min() >= 2 and z.length.max() == MAX_LENGTH and len(set(z.length)) > 3
  past = np.arange(MAX_LENGTH) >= z.length[:, None]
  assert not z.action_mask[past].any()
  np.testing.assert_array_equal(z.log_pf[~z.action_mask], 0.0)
  np.testing.assert_array_equal(z.log_pterm[:, 1:][past], 0.0)
  np.testing.assert_array_equal(z.log_pterm[z.length == MAX_LENGTH, MAX_LENGTH], 0.0)
  np.testing.assert_allclose(z.log_q, z.log_pf.sum(1) + z.log_pterm[np.arange(rows), z.length], rtol=1e-6)


def test_replayed_rows_score_as_when_sampled(rollout):
  """Neither temperature nor min_length enters log_pf and log_pterm; cached decoding equals one pass."""
  pretrained, lora, z = rollout
  log_pf, log_pterm = score(pretrained, lora, PROMPTS, z)
  np.testing.assert_allclose(log_pf, z.log_pf, rtol=0, atol=1e-4)
  np.testing.assert_allclose(log_pterm[z.terminable], z.log_pterm[z.terminable], rtol=0, atol=1e-4)
  assert (z.log_pterm[:, 0] < 0).all()  # recorded though stopping was forbidden there
  without = score(pretrained, None, PROMPTS, z)
  assert np.abs(without[0] - log_pf).max() > 0.1  # the adapter counts


def test_equals_full_forward_passes(rollout):
  pretrained, lora, z = rollout
  allowed = allowed_tokens(pretrained.config.vocab_size)
  for row in range(0, len(z.length), 23):
    prompt, n = PROMPTS[row // 50], int(z.length[row])
    text = np.array([prompt + z.tokens[row].tolist()])  # padded to max_length: what follows is not looked at
    scores = np.asarray(logits(pretrained, text, lora=lora))[0, len(prompt) - 1 :]
    log_probs = np.asarray(jax.nn.log_softmax(np.where(allowed, scores, -np.inf), axis=-1))
    for t in range(n):
      expected = log_probs[t, z.tokens[row, t]] if z.action_mask[row, t] else 0.0
      assert abs(z.log_pf[row, t] - expected) < 1e-4
    for t in np.flatnonzero(z.terminable[row]):
      expected = 0.0 if t == MAX_LENGTH else log_probs[t, STOP]
      assert abs(z.log_pterm[row, t] - expected) < 1e-4


def test_context_stands_before_every_prompt():
  pretrained = tiny_pretrained(seed=2)
  lora, context = random_lora(pretrained), [9, 50, 14, 22, 61]
  options = {"num_samples": 20, "temperature": np.array([1.0, 2.0, 1.0, 0.7]), "key": jax.random.key(1)}
  apart = make_sampler(pretrained, context=context)(lora, *pad_left(PROMPTS), **options)
  joined = make_sampler(pretrained)(lora, *pad_left([context + p for p in PROMPTS]), **options)
  np.testing.assert_array_equal(apart.tokens, joined.tokens)
  np.testing.assert_array_equal(apart.length, joined.length)
  np.testing.assert_array_equal(apart.action_mask, joined.action_mask)
  np.testing.assert_allclose(apart.log_pf, joined.log_pf, rtol=0, atol=1e-4)
  np.testing.assert_allclose(apart.log_pterm, joined.log_pterm, rtol=0, atol=1e-4)


# ---- What is sampled how often


@pytest.mark.parametrize(
  "min_length, with_tool, max_length, top_k, top_p, temperatures",
  (
    (0, False, 3, None, None, (1.0, 0.5)),
    (2, False, 3, None, None, (1.0, 0.5)),
    (1, True, 4, None, None, (1.0, 0.5)),
    (1, True, 3, 3, 0.8, (2.0, 3.0)),  # so flat that each filter makes a difference
  ),
  ids=("plain", "min_length", "tool", "filters"),
)
def test_frequencies_are_those_of_the_policy(min_length, with_tool, max_length, top_k, top_p, temperatures):
  """The frequencies of n rows differ from K exact probabilities by a total variation below the bound.

  E[TV] <= sqrt(K / n) / 2, and one row moves it by at most 1 / n, so P(TV > E[TV] + e) <= exp(-2 n e^2) (McDiarmid);
  e is set to make that 1e-6. The same bound must tell the frequencies from what wrong behaviours would give.
  """
  pretrained = tiny_pretrained(seed=3)
  lora, prompt, n = random_lora(pretrained), [5, 40, 7], 20_000
  tool = FakeTool(pretrained.config.vocab_size) if with_tool else None
  tree = scored(pretrained, lora, prompt, every_z(max_length, tool))
  exact = np.exp(tree.log_q)
  assert abs(exact.sum() - 1) < 1e-5  # no dead ends: what can stop holds all probability
  np.testing.assert_allclose(behaviour_probabilities(tree), exact, rtol=1e-4)

  options = {"min_length": min_length, "top_k": top_k, "top_p": top_p}
  z = make_sampler(pretrained, max_length=max_length, tool=tool, **options)(
    lora, *pad_left([prompt] * 2), num_samples=n, temperature=np.array(temperatures), key=jax.random.key(2)
  )
  assert z.length.min() == min_length
  index = {string: i for i, string in enumerate(strings(tree))}
  drawn = np.array([index[string] for string in strings(z)]).reshape(2, n)  # KeyError: a string that cannot be
  np.testing.assert_allclose(z.log_q, tree.log_q[drawn.reshape(-1)], rtol=0, atol=1e-4)
  bound = 0.5 * np.sqrt(len(exact) / n) + np.sqrt(np.log(1e6) / (2 * n))
  for temperature, rows in zip(temperatures, drawn):
    frequencies = np.bincount(rows, minlength=len(exact)) / n
    expected = behaviour_probabilities(tree, temperature, **options)
    assert abs(expected.sum() - 1) < 1e-5
    assert total_variation(frequencies, expected) < bound
    if temperature != 1:
      assert total_variation(frequencies, behaviour_probabilities(tree, 1.0, **options)) > bound
    for option in ("min_length", "top_k", "top_p"):
      if options[option]:
        other = behaviour_probabilities(tree, temperature, **options | {option: 0 if option == "min_length" else None})
        assert total_variation(frequencies, other) > bound


@pytest.mark.parametrize("size", (1, 2, 3, 15, 16, 17, 1000))
def test_indices_are_drawn_in_proportion(size):
  """Bounded as above."""
  rng, n = np.random.default_rng(size), 100_000
  scores = rng.normal(0, 3, size).astype(np.float32)
  scores[rng.random(size) < 0.4] = -np.inf
  scores[rng.integers(size)] = 1.0
  expected = np.exp(scores) / np.exp(scores).sum()
  drawn = np.asarray(jax.jit(jax.vmap(draw_index, (0, None)))(jax.random.split(jax.random.key(0), n), scores))
  frequencies = np.bincount(drawn, minlength=size) / n
  assert len(frequencies) == size and not frequencies[expected == 0].any()
  bound = 0.5 * np.sqrt((expected > 0).sum() / n) + np.sqrt(np.log(1e6) / (2 * n))
  assert total_variation(frequencies, expected) < bound


def test_what_is_forbidden_is_never_drawn():
  """Among 50,000 tokens that have next to no probability together, whatever the rounding."""
  scores = np.full(50_000, -np.inf, np.float32)
  scores[::7] = np.random.default_rng(0).normal(-2, 1, len(scores[::7]))
  keys = jax.random.split(jax.random.key(1), 4_000)
  drawn = np.asarray(jax.lax.map(lambda key: draw_index(key, jnp.asarray(scores)), keys, batch_size=500))
  assert (drawn % 7 == 0).all() and drawn.max() < len(scores) and len(set(drawn.tolist())) > 500

  # The ends of [0, 1): the first and the last index that can be, and no other.
  for scores in ((-np.inf, 0, -np.inf, 1, -np.inf), (0, -np.inf, -np.inf, -np.inf, -40)):
    scores = jnp.array(scores, jnp.float32)
    possible = np.flatnonzero(np.isfinite(scores))
    for share, index in ((0.0, possible[0]), (1 - 2**-23, possible[-1 if scores[0] < 0 else 0])):
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "uniform", lambda key, shape, share=share: jnp.full(shape, share, jnp.float32))
        assert draw_index(jax.random.key(0), scores) == index


# ---- Greedy, top-k and top-p


@pytest.mark.parametrize("temperature", (1.0, 0.3, 2.0))
@pytest.mark.parametrize(
  "top_k, top_p", ((1, None), (7, None), (500, None), (None, 0.01), (None, 0.6), (None, 1.0), (12, 0.8))
)
def test_filters_keep_what_those_of_transformers_keep(temperature, top_k, top_p):
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process

  rng = np.random.default_rng(0)
  scores = rng.normal(0, 3, (40, 69)).astype(np.float32)
  scores[:20, rng.permutation(69)[:30]] = -1e30  # not allowed
  scores[10:30, 0] = -np.inf  # no stop yet
  expected = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
  if top_k is not None:
    expected = logits_process.TopKLogitsWarper(top_k)(None, expected)
  if top_p is not None:
    expected = logits_process.TopPLogitsWarper(top_p)(None, expected)
  expected = torch.softmax(expected, -1).numpy()

  kept, tokens = filter_tokens(jnp.asarray(scores) / temperature, top_k, top_p)
  found = np.zeros(scores.shape, np.float32)
  np.put_along_axis(found, np.asarray(tokens), np.asarray(jax.nn.softmax(kept, axis=-1)), axis=-1)
  np.testing.assert_array_equal(found > 0, expected > 0)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  if top_k != 500 and top_p != 1.0:
    assert ((found > 0).sum(-1) < (np.exp(scores / temperature) > 0).sum(-1)).all()  # the filters filter


@pytest.mark.parametrize(
  "top_k, top_p, expected",
  (
    (2, None, [3, 0]),
    (3, None, [3, 0, 2]),  # of the two equals, the lower id
    (None, 0.5, [3]),  # the probability is reached
    (None, 0.55, [0, 3]),
    (None, 0.8, [0, 2, 3]),
    (None, 1.0, [0, 2, 3, 4]),
    (None, 1e-9, [3]),  # never none
    (2, 0.66, [3]),  # 2/3 where top-k has left two
    (2, 0.67, [3, 0]),
  ),
)
def test_filters_by_hand(top_k, top_p, expected):
  scores, tokens = filter_tokens(jnp.log(jnp.array([0.25, 0.0, 0.125, 0.5, 0.125])) + 3.0, top_k, top_p)
  assert np.asarray(tokens)[np.isfinite(np.asarray(scores))].tolist() == expected


def test_the_nucleus_is_what_sorting_gives():
  """A vocabulary of 5,000 with many equals, in which a dozen to all are kept."""
  rng = np.random.default_rng(4)
  scores = np.round(rng.normal(0, 4, (30, 5000)), 1).astype(np.float32)
  for top_p in (1e-9, 0.3, 0.9, 0.999, 1.0):
    found = np.asarray(nucleus(jnp.asarray(scores), top_p))
    p = np.exp(scores.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-scores, axis=-1, kind="stable")
    before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
    expected = np.zeros_like(found)
    np.put_along_axis(expected, order, before < top_p, -1)
    expected[np.arange(30), scores.argmax(-1)] = True
    assert np.abs(found.sum(-1) - expected.sum(-1)).max() <= (1 if top_p > 0.99 else 0)  # a rounding of float32
    assert ((found != expected) * p).sum() < 1e-5


def test_greedy_is_the_argmax_of_the_logits():
  """Rows at temperature 0 beside others, which stay what they are without them."""
  pretrained = tiny_pretrained(seed=8)
  allowed = np.arange(pretrained.config.vocab_size) % 3 != 1
  sampler = make_sampler(pretrained, tool=None, allowed_tokens=allowed, min_length=3)
  options = {"num_samples": 4, "key": jax.random.key(9)}
  z = sampler(None, *pad_left(PROMPTS), temperature=np.array([0.0, 1.0, 0.0, 0.0]), **options)
  free = sampler(None, *pad_left(PROMPTS), temperature=np.ones(4), **options)
  np.testing.assert_array_equal(z.tokens[4:8], free.tokens[4:8])
  assert len({tuple(row) for row in z.tokens[4:8].tolist()}) > 1
  for i, prompt in enumerate(PROMPTS):
    if i == 1:
      continue
    expected = []
    while len(expected) < MAX_LENGTH:
      text = np.zeros((1, 16), np.int32)
      text[0, : len(prompt) + len(expected)] = prompt + expected
      scores = np.asarray(logits(pretrained, text))[0, len(prompt) + len(expected) - 1]
      scores = np.where(allowed, scores, -np.inf)
      scores[STOP] = -np.inf if len(expected) < 3 else scores[STOP]
      if scores.argmax() == STOP:
        break
      expected.append(int(scores.argmax()))
    assert strings(z)[4 * i : 4 * i + 4] == [tuple(expected)] * 4
  assert (z.log_q < 0).all()  # of the policy at temperature 1


def test_a_minimum_length_leaves_something_to_write():
  """Stopping is forbidden before the filters, which would otherwise keep it alone."""
  pretrained = tiny_pretrained(seed=3)
  allowed = np.isin(np.arange(pretrained.config.vocab_size), (STOP, LEFT))
  z = make_sampler(pretrained, tool=None, allowed_tokens=allowed, min_length=3, max_length=3, top_k=1, top_p=1e-6)(
    None, *pad_left(PROMPTS), num_samples=5, temperature=np.ones(4), key=jax.random.key(10)
  )
  assert strings(z) == [(LEFT,) * 3] * 20
  assert np.isfinite(z.log_pf).all() and (z.log_pterm[:, :3] < 0).all()
  with pytest.raises(ValueError, match=f"min_length 1: no token but the stop token {STOP} is allowed"):
    make_sampler(pretrained, tool=None, allowed_tokens=np.arange(69) == STOP, min_length=1)


# ---- Random keys


def test_calls_of_one_shape_draw_what_one_call_does(monkeypatch):
  pretrained = tiny_pretrained(seed=4)
  sampler, options = make_sampler(pretrained, tool=None), {"num_samples": 5, "key": jax.random.key(11)}
  expected = sampler(None, *pad_left(PROMPTS[:3]), temperature=np.full(3, 1.5), **options)
  whole = sampler.draw(None, *pad_left(PROMPTS[:3]), temperature=1.5, **options)
  monkeypatch.setattr("gfn_jax.sampler.ROWS_PER_CALL", 11)  # two prompts a call, and one is padding
  parts = sampler.draw(None, *pad_left(PROMPTS[:3]), temperature=1.5, **options)
  monkeypatch.setattr("gfn_jax.sampler.ROWS_PER_CALL", 3)  # two calls a prompt, and one sample too many
  blocks = sampler.draw(None, *pad_left(PROMPTS[:3]), temperature=1.5, **options)
  for z in (whole, parts, blocks):
    assert strings(z) == strings(expected)
    np.testing.assert_allclose(z.log_pf, expected.log_pf, rtol=0, atol=1e-5)


def test_calls_are_as_wide_as_their_longest_prompt(monkeypatch):
  """A prompt a call: each row is what one call of all of them draws, in the order of the prompts."""
  pretrained = tiny_pretrained(seed=4)
  sampler, options = make_sampler(pretrained, tool=None), {"num_samples": 3, "key": jax.random.key(11)}
  long = np.random.default_rng(7).integers(1, 69, (2, 60)).tolist()
  prompts = pad_left([PROMPTS[0], long[0], PROMPTS[1], long[1][:40]])
  expected = sampler(None, *prompts, temperature=np.full(4, 1.5), **options)
  monkeypatch.setattr("gfn_jax.sampler.ROWS_PER_CALL", 3)
  prefill, widths = sampler.prefill, []
  monkeypatch.setattr(sampler, "prefill", lambda *args: widths.append(args[1].shape[-1]) or prefill(*args))
  z = sampler.draw(None, *prompts, temperature=1.5, **options)
  assert widths == [64, 64, 32, 32] and strings(z) == strings(expected)
  np.testing.assert_allclose(z.log_pf, expected.log_pf, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_company():
  pretrained = tiny_pretrained(seed=4)
  lora, sampler = random_lora(pretrained), make_sampler(pretrained, min_length=1)
  prompt_tokens, prompt_mask = pad_left(PROMPTS)
  temperature, row_ids = np.array([1.0, 0.5, 2.0, 1.3]), np.arange(4 * 10).reshape(4, 10)

  def draw(queries, ids):
    z = sampler(
      lora, prompt_tokens[queries], prompt_mask[queries], num_samples=ids.shape[1], temperature=temperature[queries],
      key=jax.random.key(3), row_ids=ids,
    )  # fmt: skip
    return z.tokens.reshape(*ids.shape, -1), z.length.reshape(ids.shape)

  tokens, length = draw([0, 1, 2, 3], row_ids)
  assert len(np.unique(tokens.reshape(-1, MAX_LENGTH), axis=0)) > 20
  for queries, columns in (([2, 0, 3, 1], slice(None, None, -1)), ([3, 1, 1, 3], slice(None))):
    again_tokens, again_length = draw(queries, row_ids[queries][:, columns])
    np.testing.assert_array_equal(again_tokens, tokens[queries][:, columns])
    np.testing.assert_array_equal(again_length, length[queries][:, columns])
  usual = sampler(lora, prompt_tokens, prompt_mask, num_samples=10, temperature=temperature, key=jax.random.key(3))
  np.testing.assert_array_equal(usual.tokens.reshape(tokens.shape), tokens)  # rows are numbered in order
  other = sampler(lora, prompt_tokens, prompt_mask, num_samples=10, temperature=temperature, key=jax.random.key(4))
  assert (other.tokens != usual.tokens).any()


def draw_on(devices, prompts=PROMPTS):
  """Rows of one call as lists, on the given devices."""
  pretrained = tiny_pretrained(seed=5)
  z = make_sampler(pretrained, devices=devices)(
    random_lora(pretrained), *pad_left(prompts), num_samples=12, temperature=np.ones(len(prompts)),
    key=jax.random.key(5),
  )  # fmt: skip
  return {"tokens": z.tokens.tolist(), "length": z.length.tolist(), "action_mask": z.action_mask.tolist()}


ON_GROUPS = """
import jax
import numpy as np
from gfn_jax import sampler
from gfn_jax.models.partition import tree_shardings
from gfn_jax.parallel import grouped, mesh_of
from test_sampler import PROMPTS, make_sampler, pad_left, random_lora, tiny_pretrained

sampler.WORTH_COMPILING = 0.0
pretrained = tiny_pretrained(family="gpt2", seed=5)
groups = grouped(jax.local_devices(), 2)
split = jax.device_put(pretrained.params, tree_shardings(pretrained.config, mesh_of(groups), pretrained.params))
for seed in range(4):
  draw = lambda sampler: sampler(
    random_lora(pretrained), *pad_left(PROMPTS), num_samples=2, temperature=np.ones(len(PROMPTS)),
    key=jax.random.key(seed),
  )
  one = draw(make_sampler(pretrained, devices=jax.local_devices()[:1]))
  two = draw(make_sampler(pretrained, devices=groups, params=split))
  longest = one.length.reshape(2, -1).max(-1)
  print(longest)
  np.testing.assert_array_equal(one.tokens, two.tokens)
  np.testing.assert_allclose(one.log_pf, two.log_pf, atol=1e-5)
"""


@pytest.mark.slow
def test_two_groups_of_devices_draw_the_rows_of_one():
  """GPT-2's fused projection is cut across heads: what mends that is a collective of all devices, in every trip."""
  longest = run_python(ON_GROUPS, devices=4).split("\n")[:4]
  assert any(len(set(line.strip("[]").split())) == 2 for line in longest)  # some groups decode longer than the other


ON_FOUR_DEVICES = """
import json
import jax
from test_sampler import PROMPTS, draw_on

assert jax.local_device_count() == 4
print(json.dumps([draw_on(jax.local_devices(), prompts) for prompts in (PROMPTS, PROMPTS[:3])]))
"""


def test_four_devices_draw_the_rows_of_one():
  found = json.loads(run_python(ON_FOUR_DEVICES, devices=4).splitlines()[-1])
  one = jax.local_devices()[:1]
  assert found == [draw_on(one), draw_on(one, PROMPTS[:3])]  # three queries leave a device over


# ---- The tool


def check_tool_rows(z, tool, max_length):
  """Holds each row against the rules of DESIGN 4, read token by token; returns how often each of them came up."""
  seen = collections.Counter()
  for row, (string, chosen) in enumerate(zip(strings(z), z.action_mask)):
    n, t, can_stop = len(string), 0, {0}
    while t < n:
      assert chosen[t]  # the policy goes on
      t += 1
      result = tool.respond(string[:t]) if tool.is_call[string[t - 1]] else None
      if result is None:
        seen["no call"] += 1
      elif t == max_length:
        seen["call at max_length"] += 1
      elif not result:
        seen["no result"] += 1
        seen["went on without a result"] += t < n
      elif t + len(result) > max_length:
        seen["does not fit"] += 1
        seen["stopped where it does not fit"] += t == n
        seen["went on where it does not fit"] += t < n
      else:
        assert string[t : t + len(result)] == tuple(result)  # it cannot have stopped before
        assert not chosen[t : t + len(result)].any()
        t += len(result)
        seen["answered"] += 1
        seen["answered up to max_length"] += t == max_length
        seen["went on after an answer"] += t < n
        seen["stopped after an answer"] += t == n < max_length
      can_stop.add(t)
    assert t == n
    assert not chosen[n:].any()
    assert set(np.flatnonzero(z.terminable[row])) == can_stop
    free = sorted(can_stop - {max_length})
    assert (z.log_pterm[row, free] < 0).all()
    assert z.log_pterm[row, max_length] == 0
    seen["stopped"] += n < max_length
  return seen


def test_rules_of_the_tool():
  pretrained, max_length = tiny_pretrained(seed=6), 7
  tool, rounds = FakeTool(pretrained.config.vocab_size), []
  z = make_sampler(pretrained, max_length=max_length)(
    random_lora(pretrained), *pad_left(PROMPTS), num_samples=200, temperature=np.full(4, 3.0), key=jax.random.key(6),
    on_round=lambda: rounds.append(1),
  )  # fmt: skip
  seen = check_tool_rows(z, tool, max_length)
  every_rule = {
    "no call", "call at max_length", "no result", "went on without a result", "does not fit",
    "stopped where it does not fit", "went on where it does not fit", "answered", "answered up to max_length",
    "went on after an answer", "stopped after an answer", "stopped",
  }  # fmt: skip
  assert every_rule == {rule for rule, count in seen.items() if count}
  assert len(rounds) > 1


def test_blocks_of_a_vocabulary_fall_to_whole_shards():
  sizes = {352: 22, 500: 25, 512: 16, 32_000: 200, 49_152: 192, 50_400: 225, 128_256: 334}
  assert {n: block_size(n) for n in sizes} == sizes
  for n, shares in ((352, 16), (500, 4), (512, 16), (32_000, 16), (49_152, 16), (50_400, 16), (128_256, 16)):
    assert n % (shares * sizes[n]) == 0, n
  assert [block_size(n) for n in (1, 3, 7, 50_257)] == [1, 1, 2, 224]  # none that more than one could share


def test_a_round_ends_when_too_many_rows_wait():
  """Those that wait are answered while others are still in mid-decoding, and both end up by the rules."""
  pretrained, max_length = tiny_pretrained(seed=6), 7
  tool = FakeTool(pretrained.config.vocab_size)
  rollout = make_sampler(pretrained, max_length=max_length).begin(
    random_lora(pretrained), *pad_left(PROMPTS), num_samples=201, temperature=np.full(4, 3.0), key=jax.random.key(6)
  )  # as many as nothing before has compiled for
  waiting, active = (int(np.asarray(x).sum()) for x in (rollout.state.waiting, rollout.state.active))
  assert active > waiting > PATIENCE * active
  with CompileLog() as log:
    z = make_sampler(pretrained, max_length=max_length).finish(rollout)
  assert not log.seconds  # all rounds are one program
  assert check_tool_rows(z, tool, max_length)["answered"]


def test_rows_left_among_themselves_draw_what_they_would_among_all(monkeypatch):
  """Of 60 rows loops decode 60, 30 and 7; a model of more than these few parameters would have them."""
  pretrained, max_length = tiny_pretrained(seed=6), 7
  tool, context = FakeTool(pretrained.config.vocab_size), [3, 1, 4, 1, 5]

  def rows():
    _compiled_round.cache_clear()
    z = make_sampler(pretrained, max_length=max_length, tool=tool, context=context)(
      random_lora(pretrained), *pad_left(PROMPTS), num_samples=15, temperature=np.array([0.0, 1.0, 2.0, 3.0]),
      key=jax.random.key(3),
    )  # fmt: skip
    _compiled_round.cache_clear()
    return z

  assert not shares_of(pretrained.config, "cpu")
  among_all = rows()
  monkeypatch.setattr("gfn_jax.sampler.WORTH_COMPILING", 0.0)
  assert not shares_of(pretrained.config, "tpu")
  shares = shares_of(pretrained.config, "cpu")
  assert crowds(60, shares) == [60, 30, 7] and crowds(3, shares) == [3, 1]
  left = rows()
  assert len(set(among_all.length.tolist())) > 4  # rows end at all times
  for name in ("tokens", "length", "action_mask"):
    np.testing.assert_array_equal(getattr(left, name), getattr(among_all, name))
  for name in ("log_pf", "log_pterm"):
    np.testing.assert_allclose(getattr(left, name), getattr(among_all, name), atol=1e-5)


def test_calculator_writes_results():
  pretrained = tiny_pretrained(seed=7)
  tokenizer, vocab_size = pretrained.tokenizer, pretrained.config.vocab_size
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
  tool = Calculator(encode, tokenizer.decode, vocab_size)
  words = [encode(word)[0] for word in (" 6", " -", " =")]
  allowed = np.isin(np.arange(vocab_size), [STOP, *words])
  z = make_sampler(pretrained, tool=tool, allowed_tokens=allowed, max_length=6)(
    None, *pad_left(PROMPTS), num_samples=500, temperature=np.full(4, 30.0), key=jax.random.key(7)
  )
  seen = check_tool_rows(z, tool, 6)
  assert seen["answered"] and seen["no result"]  # "6 - 6 =" and "6 =", at least
  texts = [tokenizer.decode(string) for string in strings(z)]
  assert any(text.startswith(" 6 - 6 = 0") for text in texts)


def test_without_a_tool_calls_are_tokens_like_others():
  pretrained = tiny_pretrained(seed=6)
  z = make_sampler(pretrained, tool=None)(
    None, *pad_left(PROMPTS), num_samples=50, temperature=np.full(4, 3.0), key=jax.random.key(8)
  )
  inside = np.arange(MAX_LENGTH) < z.length[:, None]
  np.testing.assert_array_equal(z.action_mask, inside)
  assert set(z.tokens[inside]) == set(ALPHABET)


def test_terminable_prefixes_by_hand():
  chosen = np.array([
    [1, 1, 1, 0],  # padded after three tokens
    [0, 0, 0, 0],  # the empty Z
    [1, 1, 0, 0],  # the tool wrote the last two
    [1, 0, 0, 1],  # the tool wrote in the middle
    [1, 0, 1, 0],  # twice one token
  ]).astype(bool)  # fmt: skip
  length = np.array([3, 0, 4, 4, 4])
  expected = np.array([
    [1, 1, 1, 1, 0],
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 1],
    [1, 0, 0, 1, 1],
    [1, 0, 1, 0, 1],
  ]).astype(bool)  # fmt: skip
  np.testing.assert_array_equal(terminable_prefixes(length, chosen), expected)


def test_every_z_by_hand():
  """The enumeration itself, where the tool's short answer fits and its long one does not."""
  tool = FakeTool(69)
  assert strings(every_z(1, tool)) == [(), (LEFT,), (RIGHT,), (CALL,)]
  found = set(strings(every_z(3, tool)))
  assert (LEFT, CALL) not in found and (LEFT, CALL, RIGHT) in found and (LEFT, CALL, LEFT) not in found
  assert {(CALL,), (CALL, CALL), (RIGHT, CALL), (RIGHT, CALL, LEFT), (LEFT, LEFT, CALL)} <= found
  assert len(strings(every_z(3))) == 1 + 3 + 9 + 27 and len(found) == 40 - 3  # (LEFT, CALL) and two of its children


# ---- Bad input


@pytest.mark.parametrize("min_length, max_length", ((5, 4), (-1, 4), (0, 0)))
def test_lengths_that_contradict(min_length, max_length):
  with pytest.raises(ValueError, match=f"min_length {min_length} and max_length {max_length}") as error:
    make_sampler(tiny_pretrained(), min_length=min_length, max_length=max_length)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "options, message",
  (
    ({"top_k": 0}, "top_k 0: must be at least 1"),
    ({"top_p": 0.0}, "top_p 0: must be above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p 1.5: must be above 0 and at most 1"),
    ({"top_p": float("nan")}, "top_p nan: must be above 0 and at most 1"),
  ),
)
def test_filters_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    make_sampler(tiny_pretrained(), **options)


@pytest.mark.parametrize("temperature", (-1.0, 1e-9, float("inf"), float("nan")))
def test_temperatures_out_of_range(temperature):
  sampler, temperatures = make_sampler(tiny_pretrained()), np.array([1, 0, temperature, 1])
  with pytest.raises(ValueError, match=re.escape(f"temperature {temperature:g}: must be 0 (greedy) or between")):
    sampler(None, *pad_left(PROMPTS), num_samples=1, temperature=temperatures, key=jax.random.key(0))


def test_stop_token_must_be_allowed():
  allowed = allowed_tokens(69)
  allowed[STOP] = False
  with pytest.raises(ValueError, match=f"stop token {STOP} is not among the allowed tokens"):
    make_sampler(tiny_pretrained(), allowed_tokens=allowed)
