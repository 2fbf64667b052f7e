"""Beam search against enumeration, a search in plain Python over full forward passes, and transformers' own."""

import collections
import dataclasses

import numpy as np
import pytest

from enumeration import STOP, allowed_tokens, every_z, scored, strings
from gfn_jax import beam_search as module
from gfn_jax.beam_search import beam_search
from gfn_jax.data import pad_left
from gfn_jax.models import load_pretrained, logits
from testing import run_python, tiny_hf_config, tiny_pretrained, torch_model

PROMPTS = ([5, 40, 7], [21, 3, 3, 60, 33, 12], [2], [44, 9, 31, 8])
VOCABULARY = (STOP, 3, 8, 11, 17, 30, 44, 52, 60)


@pytest.fixture(scope="module")
def models():
  return {family: tiny_pretrained(seed=1, family=family) for family in ("gptj", "gpt2", "mistral")}


def search(pretrained, prompts=PROMPTS, **options):
  """beam_search, by default over `VOCABULARY` and up to 6 tokens."""
  allowed = np.isin(np.arange(pretrained.config.vocab_size), VOCABULARY)
  defaults = {"allowed_tokens": allowed, "stop_token_id": STOP, "max_length": 6}
  return beam_search(pretrained.config, pretrained.params, *pad_left(prompts), **defaults | options)


def assert_same(z, other):
  assert strings(z) == strings(other)
  np.testing.assert_allclose(z.log_pf, other.log_pf, rtol=0, atol=1e-5)
  np.testing.assert_allclose(z.log_pterm, other.log_pterm, rtol=0, atol=1e-5)


# ---- Against all there are


@pytest.mark.parametrize("min_length, length_penalty, num_returned", ((0, 0.0, 40), (1, 0.0, 39), (0, 1.0, 40)))
def test_wide_enough_it_finds_all_in_order(models, min_length, length_penalty, num_returned):
  """3 tokens and up to 3 of them: 40 strings, all found and ranked, whatever they score."""
  pretrained, every = models["gptj"], every_z(3)
  z = search(
    pretrained, allowed_tokens=allowed_tokens(pretrained.config.vocab_size), max_length=3, min_length=min_length,
    num_beams=40, length_penalty=length_penalty, num_returned=num_returned,
  )  # fmt: skip
  assert len(z.length) == len(PROMPTS) * num_returned
  for q, prompt in enumerate(PROMPTS):
    expected = scored(pretrained, None, prompt, every)
    score = np.where(every.length < min_length, -np.inf, expected.log_q / (every.length + 1) ** length_penalty)
    expected = expected.rows(np.argsort(-score)[:num_returned])
    rows = z.rows(slice(q * num_returned, (q + 1) * num_returned))
    assert_same(rows, expected)
    np.testing.assert_array_equal(rows.action_mask, expected.action_mask)
    np.testing.assert_allclose(rows.log_q, expected.log_q, rtol=0, atol=1e-5)


# ---- Against a search that can be read


def next_log_probs(pretrained, tokens):
  """{token: log q(token | tokens)} over the vocabulary, by a full forward pass."""
  padded = np.array([tokens + [0] * (16 - len(tokens))])  # one shape to compile; what follows is not looked at
  scores = np.asarray(logits(pretrained, padded), np.float64)[0, len(tokens) - 1, list(VOCABULARY)]
  return dict(zip(VOCABULARY, scores - np.logaddexp.reduce(scores)))


def plain_search(
  pretrained, prompt, *, max_length, min_length, num_beams, num_groups, diversity_penalty, length_penalty
):
  """[(score, Z, log q)] of all that the groups finish, the best first; without caches, masks or an early end."""
  size, known = num_beams // num_groups, {}
  running = [[(0.0, (), 0.0)] for _ in range(num_groups)]
  finished = [[] for _ in range(num_groups)]
  for t in range(max_length):
    chosen = collections.Counter()
    for g in range(num_groups):
      candidates = []
      for score, z, log_q in running[g]:
        if z not in known:
          known[z] = next_log_probs(pretrained, prompt + list(z))
        for token, log_p in known[z].items():
          if token != STOP or t >= min_length:
            candidates.append((score + log_p - diversity_penalty * chosen[token], z, token, log_q + log_p))
      candidates.sort(key=lambda c: -c[0])
      finished[g] += [(s / (t + 1) ** length_penalty, z, q) for s, z, token, q in candidates[:size] if token == STOP]
      running[g] = [(s, (*z, token), q) for s, z, token, q in candidates if token != STOP][:size]
      chosen.update(z[-1] for _, z, _ in running[g])
  for g in range(num_groups):
    finished[g] += [(s / (max_length + 1) ** length_penalty, z, q) for s, z, q in running[g]]
    finished[g] = sorted(finished[g], key=lambda f: -f[0])[:size]
  return sorted((f for group in finished for f in group), key=lambda f: -f[0])


CASES = {
  # (family, num_beams, num_groups, diversity_penalty, length_penalty, min_length)
  "greedy": ("gptj", 1, 1, 0.0, 0.0, 0),
  "beams": ("gptj", 5, 1, 0.0, 0.0, 0),
  "learned positions": ("gpt2", 4, 1, 0.0, 0.0, 1),
  "sliding window": ("mistral", 4, 1, 0.0, 0.0, 0),
  "length penalty": ("mistral", 5, 1, 0.0, 0.4, 1),
  "groups": ("gptj", 6, 3, 0.7, 0.0, 0),
  "groups of one": ("gpt2", 4, 4, 1.0, 0.0, 0),
  "groups with a length penalty": ("mistral", 6, 2, 2.5, 0.6, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_search(models, case):
  family, num_beams, num_groups, diversity_penalty, length_penalty, min_length = CASES[case]
  options = {
    "max_length": 6, "min_length": min_length, "num_beams": num_beams, "num_groups": num_groups,
    "diversity_penalty": diversity_penalty, "length_penalty": length_penalty,
  }  # fmt: skip
  z = search(models[family], num_returned=num_beams, **options)
  found = iter(zip(strings(z), z.log_q))
  lengths = set()
  for prompt in PROMPTS:
    for _, expected, log_q in plain_search(models[family], prompt, **options):
      string, ours = next(found)
      assert string == expected
      np.testing.assert_allclose(ours, log_q, rtol=0, atol=2e-5)
      lengths.add(len(string))
  assert next(found, None) is None
  assert num_beams == 1 or len(lengths) > 1  # some stopped, and not all at once


@pytest.mark.parametrize("length_penalty", (0.0, 1.0))
def test_ending_early_changes_nothing(models, length_penalty):
  """Where stopping is likely most searches end long before max_length; each prompt alone, so that none waits."""
  pretrained = models["gptj"]
  head = pretrained.params["head"]
  params = pretrained.params | {"head": head | {"bias": head["bias"].at[STOP].add(3.0)}}
  eager = dataclasses.replace(pretrained, params=params)
  options = {
    "max_length": 9, "min_length": 0, "num_beams": 3, "num_groups": 1, "diversity_penalty": 0.0,
    "length_penalty": length_penalty,
  }  # fmt: skip
  for prompt in PROMPTS:
    z = search(eager, [prompt[-1:]], num_returned=3, **options)
    expected = plain_search(eager, prompt[-1:], **options)
    assert strings(z) == [string for _, string, _ in expected]
    np.testing.assert_allclose(z.log_q, [log_q for _, _, log_q in expected], rtol=0, atol=2e-5)


def test_a_penalty_makes_groups_differ(models):
  options = {"num_beams": 6, "num_groups": 3, "num_returned": 6}
  same, other = (search(models["gptj"], diversity_penalty=d, **options) for d in (0.0, 2.0))
  alone = search(models["gptj"], num_beams=2, num_returned=2)
  for q in range(len(PROMPTS)):
    rows = slice(6 * q, 6 * q + 6)
    assert collections.Counter(strings(same)[rows]) == collections.Counter(3 * strings(alone)[2 * q : 2 * q + 2])
    assert len(set(strings(other)[rows])) > 2


# ---- Against transformers


@pytest.mark.parametrize("masked", (True, False))
def test_equals_transformers(tmp_path, masked):
  """Ragged prompts; a vocabulary that is renormalised, or a minimum length, which renormalises nothing."""
  torch = pytest.importorskip("torch")
  theirs = torch_model(tiny_hf_config("gptj"), seed=3)
  with torch.no_grad():
    theirs.lm_head.bias[STOP] += 2.5 if masked else 4.0  # some stop early
  theirs.save_pretrained(tmp_path)
  ours = load_pretrained(str(tmp_path))
  vocab_size, n, max_length, length_penalty = ours.config.vocab_size, 5, 7, 0.0 if masked else 0.3
  allowed = np.isin(np.arange(vocab_size), VOCABULARY) | (not masked)
  tokens, mask = pad_left(PROMPTS)
  if masked:
    only = {"suppress_tokens": np.flatnonzero(~allowed).tolist(), "renormalize_logits": True}
  else:
    only = {"min_new_tokens": 2}
  out = theirs.generate(
    input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long),
    num_beams=n, num_return_sequences=n, do_sample=False, max_new_tokens=max_length + 1, eos_token_id=STOP,
    pad_token_id=STOP, forced_eos_token_id=STOP, length_penalty=length_penalty, early_stopping="never",
    output_scores=True,
    return_dict_in_generate=True, **only,
  )  # fmt: skip
  z = search(
    ours, allowed_tokens=allowed, max_length=max_length, min_length=0 if masked else 2, num_beams=n, num_returned=n,
    length_penalty=length_penalty,
  )  # fmt: skip
  written = [row[: row.index(STOP)] for row in (r + [STOP] for r in out.sequences[:, tokens.shape[1] :].tolist())]
  assert strings(z) == [tuple(row) for row in written]
  score = z.log_q / (z.length + 1) ** length_penalty
  np.testing.assert_allclose(score, out.sequences_scores.numpy(), rtol=0, atol=1e-4)
  assert len(set(z.length)) > 2


# ---- Calls and devices


def test_calls_are_bounded_and_change_nothing(models, monkeypatch):
  options = {"num_beams": 4, "num_groups": 2, "diversity_penalty": 0.5}
  whole = search(models["gptj"], num_returned=4, **options)
  best = whole.rows(np.arange(len(whole.length)) % 4 < 3)
  for limit in (12, 1):  # queries of a call: 3, with the last call padded, and 1
    monkeypatch.setattr(module, "ROWS_PER_CALL", limit)
    assert_same(search(models["gptj"], num_returned=3, **options), best)


def test_devices_share_the_queries(models):
  code = """
import jax, numpy as np
from test_beam_search import search, strings
from testing import tiny_pretrained
assert jax.device_count() == 3
z = search(tiny_pretrained(seed=1), num_beams=4, num_returned=2, devices=jax.devices())
print(strings(z))
"""
  z = search(models["gptj"], num_beams=4, num_returned=2)
  assert run_python(code, devices=3) == f"{strings(z)}\n"


# ---- Bad input


@pytest.mark.parametrize(
  "options, message",
  (
    ({"num_beams": 0}, "num_beams 0: must be at least 1"),
    ({"num_groups": 3}, "num_groups 3: must be at least 1 and divide num_beams 4"),
    ({"num_groups": 0}, "num_groups 0: must be at least 1 and divide num_beams 4"),
    ({"num_returned": 5}, "num_returned 5: must be from 1 to num_beams 4"),
    ({"num_returned": 0}, "num_returned 0: must be from 1 to num_beams 4"),
    ({"diversity_penalty": -0.5}, "diversity_penalty -0.5: must be at least 0, and finite"),
    ({"length_penalty": float("nan")}, "length_penalty nan: must be at least 0, and finite"),
    ({"min_length": 7}, "min_length 7 and max_length 6"),
    ({"stop_token_id": 1}, "stop token 1 is not among the allowed tokens"),
    (
      {"allowed_tokens": np.arange(69) < 3, "max_length": 1, "num_returned": 4},
      "num_returned 4: the allowed tokens make only 3 different Z of 0 to 1 tokens, for 1 groups of 4 beams",
    ),
    (
      {"allowed_tokens": np.arange(69) < 1, "min_length": 1},
      "num_returned 2: the allowed tokens make only 0 different Z of 1 to 6 tokens, for 1 groups of 4 beams",
    ),
  ),
)
def test_bad_input(models, options, message):
  with pytest.raises(ValueError, match=message) as error:
    search(models["gptj"], **{"num_beams": 4, "num_returned": 2} | options)
  assert "\n" not in str(error.value)


def test_more_beams_than_strings(models):
  """Beams without a string stay empty, count for no penalty, and are never returned."""
  allowed = np.arange(69) < 3  # the stop token and two more: 1, 3, 7 strings
  z = search(models["gptj"], allowed_tokens=allowed, max_length=2, num_beams=16, num_returned=7)
  for q in range(len(PROMPTS)):
    assert len(set(strings(z)[7 * q : 7 * q + 7])) == 7
  one = search(models["gptj"], allowed_tokens=np.arange(69) < 2, max_length=3, num_beams=8, num_returned=4)
  assert set(strings(one)) == {(1,) * n for n in range(4)}
