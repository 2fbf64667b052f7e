"""BLEU-4 and GLEU-4 against counts by hand."""

from collections import Counter
import math

import pytest

from gfn_jax.evaluators.overlap import bleu4, gleu4
from testing import run_python

# Words as the 13a tokeniser leaves them, apart at every blank; two samples for each of three stories.
REFERENCES = ["He sat on the mat , and slept .", "Ann won the big race .", "They ate , drank and went home ."]
CANDIDATES = [
  ["He sat on the mat .", "the the the the mat , and slept on the mat , and slept ."],
  ["Ann won the big prize .", "She lost ."],
  ["They ate , drank and went home .", ""],
]


def ngrams(text, n):
  words = text.split()
  return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def pairs(candidates, references):
  return [(c, r) for texts, r in zip(candidates, references) for c in texts]


def counted_bleu(candidates, references):
  """The formula of Papineni et al., where every order has a match."""
  of_candidates, of_references = (
    sum(len(text.split()) for text in side) for side in zip(*pairs(candidates, references))
  )
  log_precision = 0.0
  for n in range(1, 5):
    matches = sum((ngrams(c, n) & ngrams(r, n)).total() for c, r in pairs(candidates, references))
    log_precision += math.log(matches / sum(ngrams(c, n).total() for c, _ in pairs(candidates, references))) / 4
  return 100 * math.exp(log_precision + min(0, 1 - of_references / of_candidates))


def counted_gleu(candidates, references):
  matches = larger = 0
  for c, r in pairs(candidates, references):
    matches += sum((ngrams(c, n) & ngrams(r, n)).total() for n in range(1, 5))
    larger += max(sum(ngrams(text, n).total() for n in range(1, 5)) for text in (c, r))
  return 100 * matches / larger


def test_one_sentence_by_hand():
  # Of "a b c d x" 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 quadruples match: their product is 1/5.
  assert bleu4([["a b c d x"]], ["a b c d e"]) == pytest.approx(100 * 0.2**0.25, rel=1e-9)
  assert gleu4([["a b c d x"]], ["a b c d e"]) == pytest.approx(100 * (4 + 3 + 2 + 1) / (5 + 4 + 3 + 2), rel=1e-9)
  # A short text: all of its n-grams match, and it pays for its length.
  assert bleu4([["a b c d"]], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 4), rel=1e-9)
  assert gleu4([["a b c d"]], ["a b c d e f"]) == pytest.approx(100 * 10 / 18, rel=1e-9)
  # No triple and no quadruple matches: they count as 1/2 and 1/4 of a match.
  smoothed = (4 / 5 * 2 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** 0.25
  assert bleu4([["a b x c d"]], ["a b y c d"]) == pytest.approx(100 * smoothed, rel=1e-9)


def test_a_corpus_by_counting():
  bleu, gleu = bleu4(CANDIDATES, REFERENCES), gleu4(CANDIDATES, REFERENCES)
  assert bleu == pytest.approx(counted_bleu(CANDIDATES, REFERENCES), rel=1e-9)
  assert gleu == pytest.approx(counted_gleu(CANDIDATES, REFERENCES), rel=1e-9)
  # Summed over the corpus, no mean of its sentences; and each sample has its own story's reference.
  alone = [bleu4([[c]], [r]) for c, r in pairs(CANDIDATES, REFERENCES)]
  assert abs(bleu - sum(alone) / len(alone)) > 1
  assert bleu4(CANDIDATES, REFERENCES[::-1]) < bleu / 2 and gleu4(CANDIDATES, REFERENCES[::-1]) < gleu / 2


def test_raw_text_is_cut_into_words():
  raw = [[" " + c.replace(" .", ".").replace(" ,", ",") for c in texts] for texts in CANDIDATES]
  references = [r.replace(" .", ".").replace(" ,", ",") for r in REFERENCES]
  assert bleu4(raw, references) == bleu4(CANDIDATES, REFERENCES)
  assert gleu4(raw, references) == gleu4(CANDIDATES, REFERENCES)
  assert bleu4([["HE SAT ON THE MAT."]], ["He sat on the mat."]) < 50  # case counts


def test_identity_and_nothing():
  same = [[r, r] for r in REFERENCES]
  assert bleu4(same, REFERENCES) == pytest.approx(100, rel=1e-9)
  assert gleu4(same, REFERENCES) == 100
  for texts in ([["", ""]], [["x y z w v", "p q r s t"]]):
    assert bleu4(texts, REFERENCES[:1]) == gleu4(texts, REFERENCES[:1]) == 0
  assert gleu4([[REFERENCES[0], ""]], REFERENCES[:1]) == 50  # an empty text is not left out


@pytest.mark.parametrize("score", (bleu4, gleu4))
@pytest.mark.parametrize(
  "candidates, references, message",
  (
    ([["a"]], ["a", "b"], "candidates for 1 references, and 2 references"),
    (["abc"], ["abc"], "the text 'abc' stands where a list of texts must"),
    ([["a"]], "a", "the text 'a' stands where a list of texts must"),
    ([["a"], ["b", "c"]], ["a", "b"], r"numbers of candidates of a reference \[1, 2\]"),
    ([[], []], ["a", "b"], r"numbers of candidates of a reference \[0\]"),
    ([], [], r"numbers of candidates of a reference \[\]"),
  ),
)
def test_bad_input(score, candidates, references, message):
  with pytest.raises(ValueError, match=message):
    score(candidates, references)


def test_the_libraries_are_imported_where_they_are_used():
  code = "import sys, gfn_jax.evaluators.overlap; print({'nltk', 'sacrebleu'} & set(sys.modules))"
  assert run_python(code) == "set()\n"
