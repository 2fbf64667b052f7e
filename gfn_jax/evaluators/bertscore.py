"""BERTScore: how much of a text's meaning another has, token by token (Zhang et al., 2020)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from gfn_jax.models.bert import Encoder, batches, hidden_states, pad, tokenize


class BertScore(NamedTuple):
  """Precision, recall and F1 [B]; 1 for equal texts."""

  precision: np.ndarray
  recall: np.ndarray
  f1: np.ndarray


def bert_score(
  encoder: Encoder,
  candidates: Sequence[str],
  references: Sequence[str],
  *,
  num_layers: int | None = None,
  baseline: tuple[float, float, float] | None = None,
  batch_size: int = 64,
) -> BertScore:
  """Compares each candidate with its reference, without idf weights.

  Tokens are counted and matched as the authors' package bert-score does: CLS and SEP have weight 0, and so are never
  counted, but a token may find its best match in one of them. A text without tokens scores 0.

  Args:
    candidates, references: B texts each.
    num_layers: the layer whose hidden states are compared; None for the last. The authors take 9 of bert-base-uncased
      and 17 of roberta-large.
    baseline: what unrelated texts score in precision, recall and F1; each score s becomes (s - b) / (1 - b). None for
      raw scores.
    batch_size: pairs at a time.

  Returns:
    float32 [B] each.

  Raises:
    ValueError: single texts, numbers of texts that differ, or layers that the encoder lacks.
  """
  if isinstance(candidates, str) or isinstance(references, str):
    raise ValueError("candidates and references must be lists of texts, not one text")
  if len(candidates) != len(references):
    raise ValueError(f"{len(candidates)} candidates and {len(references)} references: there must be one for each")
  # RoBERTa's tokenizer reads a word otherwise where no space stands before it; the authors put one there.
  space = " " if encoder.config.family == "roberta" else ""
  spaced = [[space + text.strip() if text.strip() else "" for text in side] for side in (candidates, references)]
  sides = [tokenize(encoder, texts, encoder.max_length) for texts in spaced]
  tokenizer = encoder.tokenizer
  scores = np.zeros((3, len(candidates)), np.float32)
  lengths = [max(map(len, pair)) for pair in zip(*sides)]
  for ids, width in batches(lengths, batch_size, encoder.max_length):
    matched = []
    for rows in sides:
      tokens, mask = pad([rows[i] for i in ids], width)
      counted = mask & (tokens != tokenizer.cls_token_id) & (tokens != tokenizer.sep_token_id)
      matched += [hidden_states(encoder, tokens, mask, num_layers), mask, counted]
    scores[:, ids] = greedy_match(*matched)
  if baseline is not None:
    floor = np.asarray(baseline, np.float32)[:, None]
    scores = (scores - floor) / (1 - floor)
  return BertScore(*scores)


@jax.jit
@jax.default_matmul_precision("float32")
def greedy_match(
  candidate: Float[Array, "B M D"],
  candidate_mask: Bool[Array, "B M"],
  candidate_counted: Bool[Array, "B M"],
  reference: Float[Array, "B N D"],
  reference_mask: Bool[Array, "B N"],
  reference_counted: Bool[Array, "B N"],
) -> Float[Array, "3 B"]:
  """Precision, recall and F1 of greedy matching (Zhang et al., 2020, section 3):

    P = mean over counted i of max_j cos(x_i, y_j)
    R = mean over counted j of max_i cos(x_i, y_j)
    F = 2 P R / (P + R)

  Args:
    candidate, reference: hidden states x [B, M, D] and y [B, N, D].
    candidate_mask, reference_mask: the tokens that may be matched.
    candidate_counted, reference_counted: those whose best match counts; a row that lacks them on either side scores 0.
  """
  x, y = (h / jnp.linalg.norm(h, axis=-1, keepdims=True) for h in (candidate, reference))
  cosine = jnp.einsum("bmd,bnd->bmn", x, y)
  cosine = jnp.where(candidate_mask[:, :, None] & reference_mask[:, None, :], cosine, -jnp.inf)

  def mean(best, counted):
    return jnp.where(counted, best, 0.0).sum(-1) / jnp.maximum(counted.sum(-1), 1)

  filled = candidate_counted.any(-1) & reference_counted.any(-1)
  precision = jnp.where(filled, mean(cosine.max(2), candidate_counted), 0.0)
  recall = jnp.where(filled, mean(cosine.max(1), reference_counted), 0.0)
  total = precision + recall
  f1 = jnp.where(total == 0, 0.0, 2 * precision * recall / jnp.where(total == 0, 1.0, total))
  return jnp.stack([precision, recall, f1])
