"""BLEU-4 and GLEU-4 against plain counting."""

from collections import Counter
import math

import pytest

from gfn_jax.evaluators.overlap import bleu4, gleu4

CANDIDATES = [["the cat sat on the mat today .", "a cat sat on a mat ."], ["they went home in the dark ."]]
REFERENCES = ["the cat sat on the mat .", "they went back home in the dark ."]


def grams(tokens, n):
  return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def pairs():
  return [(c.split(), r.split()) for cs, r in zip(CANDIDATES, REFERENCES) for c in cs]


def test_bleu_against_counting():
  log_precision = 0.0
  for n in range(1, 5):
    matched = sum((grams(c, n) & grams(r, n)).total() for c, r in pairs())
    log_precision += math.log(matched / sum(grams(c, n).total() for c, _ in pairs())) / 4
  ours, theirs = sum(len(c) for c, _ in pairs()), sum(len(r) for _, r in pairs())
  brevity = min(0.0, 1 - theirs / ours)
  assert bleu4(CANDIDATES, REFERENCES) == pytest.approx(100 * math.exp(log_precision + brevity))


def test_gleu_against_counting():
  """Matches over the larger of both counts of n-grams, n from 1 to 4, summed over the corpus."""
  matched = total = 0
  for c, r in pairs():
    ours, theirs = (sum((grams(x, n) for n in range(1, 5)), Counter()) for x in (c, r))
    matched += (ours & theirs).total()
    total += max(ours.total(), theirs.total())
  assert gleu4(CANDIDATES, REFERENCES) == pytest.approx(100 * matched / total)


@pytest.mark.parametrize("metric", (bleu4, gleu4))
def test_what_is_the_same_is_100_and_what_shares_nothing_0(metric):
  assert metric([[r] for r in REFERENCES], REFERENCES) == pytest.approx(100)
  assert metric([["x y z v w"], ["x"]], REFERENCES) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("metric", (bleu4, gleu4))
@pytest.mark.parametrize("candidates", ([["a"]], [[], []]))
def test_nothing_to_compare_is_named(metric, candidates):
  with pytest.raises(ValueError, match="2 references, "):
    metric(candidates, REFERENCES)
