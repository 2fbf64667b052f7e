"""BERTScore against a double loop over PyTorch's hidden states."""

import numpy as np
import pytest

from encoders import torch_hidden_states, write_tiny_encoder
from gfn_jax.evaluators.bertscore import bert_score, greedy_match
from gfn_jax.models import load_encoder
from gfn_jax.models.bert import FAMILIES

CANDIDATES = [
  "the cat sat on the mat.",
  "a dog ran",
  "",
  "it was blue",
  "the mat",
  "a dogs walked, " * 20,
  "  red hat ",
]
REFERENCES = [
  "a cat sat on a hat.",
  "a dog ran",
  "a cat",
  "",
  "it was red, it was blue, the dog ran.",
  "a mat",
  "red hat",
]


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))


def looped(x, x_counted, y, y_counted):
  """(P, R, F) of one pair, for hidden states [M, D] and [N, D], all of which may be matched."""
  best_x = [max(cosine(a, b) for b in y) for a in x]
  best_y = [max(cosine(a, b) for a in x) for b in y]
  best_x, best_y = (
    [b for b, c in zip(best, counted) if c] for best, counted in ((best_x, x_counted), (best_y, y_counted))
  )
  if not best_x or not best_y:
    return 0.0, 0.0, 0.0
  p, r = np.mean(best_x), np.mean(best_y)
  return p, r, 2 * p * r / (p + r)


def test_matching_against_a_double_loop():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((5, 6, 3)).astype(np.float32), rng.standard_normal((5, 4, 3)).astype(np.float32)
  x_mask, y_mask = (
    np.arange(n) < np.array(lengths)[:, None] for n, lengths in ((6, [6, 3, 2, 5, 4]), (4, [4, 2, 4, 3, 1]))
  )
  x_counted, y_counted = (m & (rng.random(m.shape) < 0.7) for m in (x_mask, y_mask))
  x_counted[2] = False
  expected = [
    looped(x[b][x_mask[b]], x_counted[b][x_mask[b]], y[b][y_mask[b]], y_counted[b][y_mask[b]]) for b in range(5)
  ]
  assert np.abs(np.array(expected)[:, 2]).min() == 0.0 < np.abs(np.array(expected)[[0, 1, 3], 2]).min()
  np.testing.assert_allclose(
    np.asarray(greedy_match(x, x_mask, x_counted, y, y_mask, y_counted)).T, expected, atol=1e-5, rtol=1e-4
  )


def test_matching_by_hand():
  """x = CLS (1, 0), a (0, 1); y = CLS (1, 0), b (3, 4), c (1, 0): a's best is b, at 0.8; b's is a; c's is CLS, at 1."""
  x, y = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32), np.array([[[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]]], np.float32)
  found = greedy_match(x, np.ones((1, 2), bool), np.array([[False, True]]), y, np.ones((1, 3), bool),
                       np.array([[False, True, True]]))  # fmt: skip
  np.testing.assert_allclose(np.asarray(found)[:, 0], [0.8, 0.9, 2 * 0.72 / 1.7], rtol=1e-6)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  model = write_tiny_encoder(folder, request.param)
  return load_encoder(folder), model


@pytest.mark.parametrize("num_layers", (1, None))
def test_against_hidden_states_of_pytorch(pair, num_layers):
  encoder, model = pair
  tokenizer, family = encoder.tokenizer, encoder.config.family

  def encoded(text):
    text = text.strip()
    text = f" {text}" if family == "roberta" and text else text
    tokens = np.array(tokenizer.encode(text, truncation=True, max_length=40))
    hidden = torch_hidden_states(model, tokens[None], np.ones((1, len(tokens))))[
      -1 if num_layers is None else num_layers
    ]
    return hidden[0], ~np.isin(tokens, [tokenizer.cls_token_id, tokenizer.sep_token_id])

  expected = np.array([looped(*encoded(c), *encoded(r)) for c, r in zip(CANDIDATES, REFERENCES)])
  found = bert_score(encoder, CANDIDATES, REFERENCES, num_layers=num_layers, batch_size=3)
  np.testing.assert_allclose(np.array(found).T, expected, atol=1e-5)
  np.testing.assert_allclose([found.f1[1], found.f1[6]], 1.0, atol=1e-5)  # equal texts
  assert found.f1[2] == found.f1[3] == 0.0  # empty ones
  swapped = bert_score(encoder, REFERENCES, CANDIDATES, num_layers=num_layers)
  np.testing.assert_allclose(swapped.precision, found.recall, atol=1e-5)


def test_a_baseline_rescales(pair):
  encoder, _ = pair
  raw = bert_score(encoder, CANDIDATES, REFERENCES)
  found = bert_score(encoder, CANDIDATES, REFERENCES, baseline=(0.5, 0.6, 0.75))
  for ours, score, b in zip(found, raw, (0.5, 0.6, 0.75)):
    np.testing.assert_allclose(ours, (score - b) / (1 - b), atol=1e-6)


def test_what_is_refused(pair):
  encoder, _ = pair
  with pytest.raises(ValueError, match="1 candidates and 2 references"):
    bert_score(encoder, ["a"], ["a", "b"])
  with pytest.raises(ValueError, match="must be lists of texts"):
    bert_score(encoder, "a", "b")
  with pytest.raises(ValueError, match="num_layers=9"):
    bert_score(encoder, ["a"], ["a"], num_layers=9)
