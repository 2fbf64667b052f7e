"""Word overlap of sampled texts with a reference text: BLEU-4 and GLEU-4 (paper section 4.2, Table 2).

Both see a corpus of Q * N sentences: each of a story's N samples is a sentence, against that story's one reference.
n-grams and lengths are summed over all sentences before dividing, so this is no mean of scores, and not the best of N.
Words are those of sacrebleu's 13a tokeniser, case kept.
"""

from collections.abc import Sequence


def bleu4(candidates: Sequence[Sequence[str]], references: Sequence[str]) -> float:
  """Corpus BLEU-4 (Papineni et al., 2002) in per cent, with sacrebleu's defaults.

  Signature: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp. Smoothing is for an order of which no n-gram matches.

  Args:
    candidates: N texts for each of Q references. An empty one only shortens the corpus (brevity penalty).
    references: Q texts.

  Returns:
    From 0 to 100. 0 where no candidate has four words or no word matches.

  Raises:
    ValueError: there are no candidates, or not equally many for each reference.
  """
  from sacrebleu.metrics.bleu import BLEU  # here, since sacrebleu and nltk take a second to import

  flat, repeated = _sentence_pairs(candidates, references)
  # force: do not warn of texts that look tokenised, as " The end ." does.
  return float(BLEU(tokenize="13a", smooth_method="exp", force=True).corpus_score(flat, [repeated]).score)


def gleu4(candidates: Sequence[Sequence[str]], references: Sequence[str]) -> float:
  """Corpus Google-BLEU (Wu et al., 2016) in per cent: the share of n-grams of 1 to 4 words that match, with nltk.

  For each sentence the larger number of n-grams, the candidate's or the reference's, enters the denominator.

  Args:
    candidates: N texts for each of Q references. An empty one counts as one without a match.
    references: Q texts.

  Returns:
    From 0 to 100.

  Raises:
    ValueError: there are no candidates, or not equally many for each reference.
  """
  from nltk.translate.gleu_score import corpus_gleu
  from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

  flat, repeated = _sentence_pairs(candidates, references)
  tokenize = Tokenizer13a()
  score = corpus_gleu([[tokenize(r).split()] for r in repeated], [tokenize(c).split() for c in flat], 1, 4)
  return 100.0 * score


def _sentence_pairs(candidates: Sequence[Sequence[str]], references: Sequence[str]) -> tuple[list[str], list[str]]:
  """The Q * N candidates, and the reference of each."""
  if len(candidates) != len(references):
    raise ValueError(f"candidates for {len(candidates)} references, and {len(references)} references: must be equal")
  for texts in (references, *candidates):
    if isinstance(texts, str):
      raise ValueError(f"the text {texts[:60]!r} stands where a list of texts must")
  counts = sorted({len(texts) for texts in candidates})
  if len(counts) != 1 or not counts[0]:
    raise ValueError(f"numbers of candidates of a reference {counts}: must be one number, at least 1")
  return [c for texts in candidates for c in texts], [r for r in references for _ in range(counts[0])]
