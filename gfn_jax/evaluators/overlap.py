"""How many words of a text stand in a reference too: BLEU-4 and GLEU-4, in per cent (paper, Table 2).

Both over sacrebleu's 13a tokens. The N candidates of a reference are N sentences of the corpus, each beside it.
"""

from collections.abc import Sequence


def _pairs(candidates: Sequence[Sequence[str]], references: Sequence[str]) -> list[tuple[str, str]]:
  if len(candidates) != len(references) or not any(map(len, candidates)):
    raise ValueError(f"{len(references)} references, {len(candidates)} lists of candidates: as many, and not all empty")
  return [(c, reference) for cs, reference in zip(candidates, references) for c in cs]


def bleu4(candidates: Sequence[Sequence[str]], references: Sequence[str]) -> float:
  """Corpus BLEU with n-grams up to 4 (Papineni et al., 2002), as sacrebleu computes it: 0 to 100.

  Args:
    candidates: for each of Q references its candidates. references: Q texts.

  Raises:
    ValueError: there is nothing to compare.
  """
  import sacrebleu

  texts, beside = zip(*_pairs(candidates, references))
  return sacrebleu.corpus_bleu(list(texts), [list(beside)], tokenize="13a").score


def gleu4(candidates: Sequence[Sequence[str]], references: Sequence[str]) -> float:
  """Corpus GLEU with n-grams of 1 to 4 (Wu et al., 2016), as nltk computes it: 0 to 100. Arguments as of `bleu4`."""
  from nltk.translate.gleu_score import corpus_gleu
  from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

  tokenize = Tokenizer13a()
  pairs = [(tokenize(c).split(), tokenize(r).split()) for c, r in _pairs(candidates, references)]
  return 100 * corpus_gleu([[r] for _, r in pairs], [c for c, _ in pairs], min_len=1, max_len=4)
