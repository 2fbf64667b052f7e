"""Prompts for sentence continuation: cut from documents, ready ones, and their splits."""

import json

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from gfn_jax.datasets import openwebtext_prompts as prompts
from gfn_jax.datasets import sentences
from testing import shared_folder, tiny_tokenizer

GOOD = [f"Sentence number {word} has enough words in it." for word in "one two three four".split()]
SHORT, LONG = "Too short.", "This one is " + "very " * 30 + "long."


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


def texts(config, data_dir):
  return {split: [r["prompt"] for r in prompts.load(config, split, data_dir)] for split in prompts.SPLITS}


def cuts(document, count_tokens=prompts.count_words, tries=200):
  """All that different seeds cut."""
  return {prompts.cut(document, np.random.default_rng(i), count_tokens) for i in range(tries)}


def test_count_words():
  assert prompts.count_words("Don't stop, it's 5 o’clock!") == 7  # "Don't" "stop" "," "it's" "5" "o’clock" "!"
  assert prompts.count_words("") == 0


def test_a_cut_is_one_to_three_good_sentences_in_a_row():
  a, b, c, d = GOOD
  assert cuts(" ".join(GOOD)) == {a, b, c, d, f"{a} {b}", f"{b} {c}", f"{c} {d}", f"{a} {b} {c}", f"{b} {c} {d}"}
  assert cuts(f"{a} {SHORT} {b} {c} {LONG} {d}") == {a, b, c, f"{b} {c}", d}
  assert cuts(f"{a}\n{b}\n\nA Heading Of More Than Five Words\n{c}") == {a, b, c}


def test_lengths_are_drawn_evenly():
  drawn = [prompts.cut(" ".join(GOOD), np.random.default_rng(i)) for i in range(600)]
  numbers = [len(sentences.split(p)) for p in drawn]
  assert all(abs(numbers.count(n) - 200) < 50 for n in (1, 2, 3))


@pytest.mark.parametrize(
  "sentence",
  (
    "The words of this one do not end",
    "this one does not begin with a capital.",
    'This "one leaves a quotation open, which it should not.',
    "This “one does so too, in another way.",
    "This one (leaves a bracket open, which it should not.",
    SHORT,
    LONG,
    "",
  ),
)
def test_what_is_no_good_sentence(sentence):
  assert cuts(sentence, tries=3) == {None}


def test_the_bounds_are_those_of_the_callers_tokens():
  sentence = GOOD[0]
  for tokens, good in ((4, False), (5, True), (30, True), (31, False)):
    assert cuts(sentence, lambda text, n=tokens: n, tries=1) == ({sentence} if good else {None})
  tokenizer = tiny_tokenizer()
  text = "Is the answer 6 - 0 = 6? The answer is 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2 + 2."
  assert cuts(text, lambda s: len(tokenizer.encode(s))) == {"Is the answer 6 - 0 = 6?"}


def test_embedded_prompts(data_dir):
  found = texts(prompts.make_config(), data_dir)
  assert {s: len(p) for s, p in found.items()} == {"train": 32, "validation": 8, "test": 8}
  every = [p for ps in found.values() for p in ps]
  assert len(set(every)) == 48
  for prompt in every:
    assert prompt in cuts(prompt)  # they are such as would be cut


def test_the_real_prompts(data_dir):
  file = shared_folder() / "data" / "openwebtext" / "prompts_2000.txt"
  lines = list(dict.fromkeys(line.strip() for line in file.read_text().splitlines()))
  found = texts(prompts.make_config(str(file)), data_dir)
  assert {s: len(p) for s, p in found.items()} == {"train": 950, "validation": 50, "test": 200}  # two are the paper's
  assert sorted(p for ps in found.values() for p in ps) == sorted(lines[:1200])
  assert found["train"] != [line for line in lines if line in set(found["train"])]  # in an order of the seed's
  other = texts(prompts.make_config(str(file), seed=1, num_test=900), data_dir)
  assert {s: len(p) for s, p in other.items()} == {"train": 950, "validation": 50, "test": 900}
  assert len({p for ps in other.values() for p in ps}) == 1900


def test_the_real_text_is_cut(data_dir):
  file = shared_folder() / "data" / "openwebtext" / "prompts_2000.txt"
  config = prompts.make_config(str(file), "documents", num_train=900, num_validation=50, num_test=50)
  found = texts(config, data_dir)
  assert {s: len(p) for s, p in found.items()} == {"train": 900, "validation": 50, "test": 50}
  documents = [" ".join(line.split()) for line in file.read_text().splitlines()]
  for prompt in found["test"]:
    assert any(prompt in document for document in documents)
    parts = sentences.split(prompt)
    assert 1 <= len(parts) <= 3 and all(5 <= prompts.count_words(s) <= 30 for s in parts)


def write(tmp_path, kind):
  """The same three documents in a format; returns the file."""
  documents = [" ".join(GOOD[:2]), f"{GOOD[2]}\n{SHORT}", "Nothing to cut"]
  if kind == "jsonl":
    content = "\n".join(json.dumps({"text": d, "id": 1}) for d in documents)
  elif kind == "documents":
    content = "\n\n".join(d.replace("\n", " ") for d in documents)
  elif kind == "blocks":  # a line break is only a space
    content = "\n \n\n".join(d.replace(" has", "\n has") for d in documents)
  else:
    table = pyarrow.table({"id": [0, 1, 2], "text": documents})
    parquet.write_table(table, tmp_path / "documents.parquet", row_group_size=2)
    return tmp_path / "documents.parquet"
  suffix = "jsonl" if kind == "jsonl" else "txt"
  (tmp_path / f"documents.{suffix}").write_text(content)
  return tmp_path / f"documents.{suffix}"


@pytest.mark.parametrize("format_", ("jsonl", "parquet", "documents", "blocks"))
def test_documents_of_each_format(format_, tmp_path, data_dir):
  file = write(tmp_path, format_)
  kind = "blocks" if format_ == "blocks" else "documents"
  config = prompts.make_config(str(file), kind, num_train=1, num_validation=1, num_test=0)
  found = texts(config, data_dir)
  every = set(found["train"] + found["validation"])
  assert GOOD[2] in every and len(every) == 2
  assert every - {GOOD[2]} <= {GOOD[0], GOOD[1], f"{GOOD[0]} {GOOD[1]}"}
  assert found["test"] == []


@pytest.mark.parametrize("format_", ("jsonl", "parquet"))
def test_ready_prompts_of_records(format_, tmp_path, data_dir):
  file = write(tmp_path, format_)
  found = texts(prompts.make_config(str(file), num_train=2, num_validation=1, num_test=0), data_dir)
  assert {*found["train"], *found["validation"]} == {f"{GOOD[0]} {GOOD[1]}", f"{GOOD[2]}\n{SHORT}", "Nothing to cut"}


def test_a_file_is_read_no_further_than_needed(tmp_path):
  file = tmp_path / "documents.jsonl"
  file.write_text("\n".join(json.dumps({"text": t}) for t in (GOOD[0], "", GOOD[0], GOOD[1])) + "\nbroken")
  assert prompts.read_prompts(prompts.make_config(str(file), num_train=2, num_validation=0, num_test=0)) == GOOD[:2]
  with pytest.raises(ValueError, match="line 5: no JSON"):
    prompts.read_prompts(prompts.make_config(str(file), num_train=3, num_validation=0, num_test=0))


def test_other_contents_get_another_name(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("\n".join(GOOD))
  count = {"count_tokens": len, "tokenizer_name": "a"}
  options = ({}, {"seed": 1}, {"kind": "documents"}, {"num_test": 1}, {"num_train": 3}, count)
  options += ({"count_tokens": len, "tokenizer_name": "b"},)
  names = {prompts.make_config(str(file), **o).name for o in options}
  file.write_text("\n".join(GOOD[:3]))
  names.add(prompts.make_config(str(file)).name)
  assert len(names) == len(options) + 1


def test_a_file_of_the_hub(monkeypatch, tmp_path, data_dir):
  asked = []

  def download(repository, name, *, repo_type):
    asked.append((repository, name, repo_type))
    return str(write(tmp_path, "parquet"))

  monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
  source = "owner/name/plain_text/train-00000.parquet"
  config = prompts.make_config(source, "documents", num_train=2, num_validation=0, num_test=0)
  assert len(texts(config, data_dir)["train"]) == 2
  assert asked == [("owner/name", "plain_text/train-00000.parquet", "dataset")]


def test_bad_data_gets_one_line(tmp_path):
  def error_of(name, content, **options):
    file = tmp_path / name
    if isinstance(content, dict):
      parquet.write_table(pyarrow.table(content), file)
    else:
      file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
      prompts.read_prompts(prompts.make_config(str(file), **options))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)

  few = error_of("few.txt", b"One.\nTwo.\nOne.\n", num_train=2, num_validation=1)
  assert "has 2 different prompts: 203 are asked for (2 train, 1 validation, 200 test)" in few
  assert "has 0 different prompts" in error_of("empty.txt", b"")
  assert "is no UTF-8 text" in error_of("latin.txt", "é".encode("latin-1"))
  assert "is no parquet file" in error_of("no.parquet", b"PAR?")
  assert "no column 'text': it has content" in error_of("other.parquet", {"content": ["a"]})
  assert "record 1: field 'text' must be text, not NoneType" in error_of("null.parquet", {"text": ["a", None]})
  assert "line 2: no field 'text'" in error_of("other.jsonl", b'{"text": "a"}\n{"content": "b"}')


def test_bad_options_get_one_line(tmp_path):
  def error_of(*arguments, **options):
    with pytest.raises(ValueError) as caught:
      prompts.make_config(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  assert "kind 'lines' of prompts is unknown: choose from prompts, documents, blocks" in error_of(kind="lines")
  assert "0 train prompts: must be at least 1" in error_of(num_train=0)
  assert "-1 test prompts: must be at least 0" in error_of(num_test=-1)
  assert "count_tokens needs the name of its tokenizer" in error_of(count_tokens=len)
  assert "tokenizer_name 'gpt2'" in error_of(tokenizer_name="gpt2")
  (tmp_path / "a.jsonl").write_text("{}")
  assert "blocks are of plain text" in error_of(str(tmp_path / "a.jsonl"), "blocks")
  for source in ("", "nope.txt", "/no/such/file", str(tmp_path), "owner/name"):
    assert f"config.data.path {source!r} is no file" in error_of(source)
