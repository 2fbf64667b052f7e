"""Rollouts: what is recorded, what is sampled how often, and what the tool writes."""

import collections
import functools
import json

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
from gfn_jax.data import pad_left
from gfn_jax.models import logits
from gfn_jax.sampler import Sampler
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
  return Sampler(pretrained.config, pretrained.params, **defaults | options)


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
  "min_length, with_tool, max_length", ((0, False, 3), (2, False, 3), (1, True, 4)), ids=("plain", "min_length", "tool")
)
def test_frequencies_are_those_of_the_policy(min_length, with_tool, max_length):
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

  temperatures = (1.0, 0.5)
  z = make_sampler(pretrained, max_length=max_length, min_length=min_length, tool=tool)(
    lora, *pad_left([prompt] * 2), num_samples=n, temperature=np.array(temperatures), key=jax.random.key(2)
  )
  assert z.length.min() == min_length
  index = {string: i for i, string in enumerate(strings(tree))}
  drawn = np.array([index[string] for string in strings(z)]).reshape(2, n)  # KeyError: a string that cannot be
  np.testing.assert_allclose(z.log_q, tree.log_q[drawn.reshape(-1)], rtol=0, atol=1e-4)
  bound = 0.5 * np.sqrt(len(exact) / n) + np.sqrt(np.log(1e6) / (2 * n))
  for temperature, rows in zip(temperatures, drawn):
    frequencies = np.bincount(rows, minlength=len(exact)) / n
    expected = behaviour_probabilities(tree, temperature, min_length)
    assert abs(expected.sum() - 1) < 1e-5
    assert total_variation(frequencies, expected) < bound
    if temperature != 1:
      assert total_variation(frequencies, behaviour_probabilities(tree, 1.0, min_length)) > bound
    if min_length:
      assert total_variation(frequencies, behaviour_probabilities(tree, temperature, 0)) > bound


# ---- Random keys


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


def draw_on(devices):
  """Rows of one call as lists, on the given devices."""
  pretrained = tiny_pretrained(seed=5)
  z = make_sampler(pretrained, devices=devices)(
    random_lora(pretrained), *pad_left(PROMPTS), num_samples=12, temperature=np.ones(4), key=jax.random.key(5)
  )
  return {"tokens": z.tokens.tolist(), "length": z.length.tolist(), "action_mask": z.action_mask.tolist()}


ON_FOUR_DEVICES = """
import json
import jax
from test_sampler import draw_on

assert jax.local_device_count() == 4
print(json.dumps(draw_on(jax.local_devices())))
"""


def test_four_devices_draw_the_rows_of_one():
  four = json.loads(run_python(ON_FOUR_DEVICES, devices=4).splitlines()[-1])
  assert four == draw_on(jax.local_devices()[:1])


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
  # A row waits at most once a call: at every token but the last.
  assert 1 < len(rounds) <= max_length


def test_calculator_writes_results():
  pretrained = tiny_pretrained(seed=7)
  tokenizer, vocab_size = pretrained.tokenizer, pretrained.config.vocab_size
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
  tool = Calculator(encode, tokenizer.decode, vocab_size)
  words = [encode(word)[0] for word in (" 6", " -", " =")]
  allowed = np.isin(np.arange(vocab_size), [STOP, *words])
  z = make_sampler(pretrained, tool=tool, allowed_tokens=allowed, max_length=6)(
    None, *pad_left(PROMPTS), num_samples=500, temperature=np.full(4, 3.0), key=jax.random.key(7)
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


def test_stop_token_must_be_allowed():
  allowed = allowed_tokens(69)
  allowed[STOP] = False
  with pytest.raises(ValueError, match=f"stop token {STOP} is not among the allowed tokens"):
    make_sampler(tiny_pretrained(), allowed_tokens=allowed)


def test_queries_must_be_divisible_by_devices():
  sampler = make_sampler(tiny_pretrained())
  sampler.devices = sampler.devices * 3  # refused before a device is asked
  with pytest.raises(ValueError, match="4 queries are not divisible by 3 devices"):
    sampler(None, *pad_left(PROMPTS), num_samples=1, temperature=np.ones(4), key=jax.random.key(0))
