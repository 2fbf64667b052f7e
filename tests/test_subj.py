"""SUBJ: the builder, its sources, and the few labelled sentences of a run."""

import collections
import json
import re

import pytest

from gfn_jax.datasets import subj
from testing import shared_folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def embedded(data_dir):
  return {split: subj.load(subj.make_config(), split, data_dir) for split in ("train", "test")}


@pytest.fixture
def folder(tmp_path):
  """Writes {split: [(text, label)]} as a source."""

  def write(**splits):
    for split, pairs in splits.items():
      lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
      (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path)

  return write


def counts(records):
  return collections.Counter(r["label"] for r in records)


def test_embedded_sentences(embedded):
  assert counts(embedded["train"]) == {"objective": 16, "subjective": 16}
  assert counts(embedded["test"]) == {"objective": 8, "subjective": 8}
  texts = [r["text"] for records in embedded.values() for r in records]
  assert len(set(texts)) == 48
  for text in texts:  # as SUBJ spells
    assert text == text.lower() and text.endswith(" .") and not re.search(r"\w[,.;:]|  |\w'", text)
    assert 5 <= len(text.split()) <= 40


def test_the_real_data_in_its_order(data_dir, tmp_path):
  real = shared_folder() / "data" / "subj"
  raw = {"train": real / "train.50.jsonl", "test": real / "test_first_1000.jsonl"}
  for split, file in raw.items():
    (tmp_path / f"{split}.jsonl").write_bytes(file.read_bytes())
  config = subj.make_config(str(tmp_path))
  loaded = {split: subj.load(config, split, data_dir) for split in raw}
  for split, file in raw.items():
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert loaded[split] == [{"text": r["text"].strip(), "label": r["label_text"]} for r in lines]
  for number in (10, 20, 50):  # the paper's sets are nested
    first = subj.labelled_subset(loaded["train"], number)
    assert first == subj.read_records(real / f"train.{number}.jsonl")
  held_out = subj.held_out(loaded["test"], 900, loaded["train"])
  assert len({r["text"] for r in held_out}) == 900
  assert not {r["text"] for r in held_out} & {r["text"] for r in loaded["train"]}


@pytest.mark.parametrize("number", (10, 20, 5))
def test_balanced_subsets_are_functions_of_their_seed(embedded, number):
  drawn = [subj.labelled_subset(embedded["train"], number, seed) for seed in (0, 0, 1, 2)]
  assert drawn[0] == drawn[1]
  assert len({tuple(r["text"] for r in d) for d in drawn}) == 3
  for records in drawn:
    assert len({r["text"] for r in records}) == number
    assert counts(records) == {"objective": number - number // 2, "subjective": number // 2}
  # In random order: a label does not come before the other.
  assert any([r["label"] for r in d] != sorted(r["label"] for r in d) for d in drawn)


def test_held_out_has_no_labelled_text_and_no_text_twice():
  def records(texts):
    return [{"text": t, "label": "objective"} for t in texts]

  test, labelled = records("abcabd"), records("bx")
  assert [r["text"] for r in subj.held_out(test, 3, labelled)] == ["a", "c", "d"]
  assert [r["text"] for r in subj.held_out(test, 2, labelled)] == ["a", "c"]
  for number in (0, 4):
    with pytest.raises(ValueError, match=rf"{number} held-out records \(.*\): must be from 1 to 3"):
      subj.held_out(test, number, labelled)


def test_more_labels_than_there_are(embedded):
  for number in (0, 33):
    with pytest.raises(ValueError, match=f"{number} labelled records: must be from 1 to 32"):
      subj.labelled_subset(embedded["train"], number)
  with pytest.raises(ValueError, match="50 labelled records, 25 of them objective: the data has 16"):
    subj.labelled_subset(embedded["train"], 50, seed=0)
  with pytest.raises(ValueError, match="-2 labelled records"):
    subj.labelled_subset(embedded["train"], -2, seed=0)


def test_other_contents_get_another_name(folder):
  names = {
    subj.make_config().name,
    subj.make_config(folder(train=[("a", 0), ("b", 1)], test=[("c", 0)])).name,
    subj.make_config(folder(train=[("a", 0)], test=[("b", 1), ("c", 0)])).name,
    subj.make_config(folder(train=[("a", 0)], test=[("b", 1), ("c", 1)])).name,
  }
  assert len(names) == 4


def test_the_hub_is_asked_for_its_two_files(monkeypatch, folder, data_dir, tmp_path):
  folder(train=[("from the hub", 1)], test=[("this too", 0)])
  asked = []

  def download(repository, name, *, repo_type):
    asked.append((repository, name, repo_type))
    return str(tmp_path / name)

  monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
  records = subj.load(subj.make_config("SetFit/subj"), "train", data_dir)
  assert records == [{"text": "from the hub", "label": "subjective"}]
  assert asked == [("SetFit/subj", "train.jsonl", "dataset"), ("SetFit/subj", "test.jsonl", "dataset")]


@pytest.mark.parametrize(
  "line, named",
  (
    ('{"text": "a"}', "label None must be 0 (objective) or 1 (subjective)"),
    ('{"text": "a", "label": 2}', "label 2 must be"),
    ('{"text": "a", "label": "1"}', "label '1' must be"),
    ('{"text": "a", "label": true}', "label True must be"),
    ('{"text": "a", "label": 1.0}', "label 1.0 must be"),
    ('{"label": 1}', "no field 'text'"),
    ('{"text": 3, "label": 1}', "must be text"),
    ('{"text": " ", "label": 1}', "text is empty"),
    ('{"text": "a", "label": 1, "label_text": "objective"}', "label_text 'objective' contradicts label 1"),
    ("nothing", "no JSON"),
  ),
)
def test_bad_records_get_one_line(line, named, folder, data_dir, tmp_path):
  source = folder(train=[("fine", 0)], test=[("fine", 1)])
  (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n' + line)
  with pytest.raises(ValueError) as caught:
    subj.load(subj.make_config(source), "test", data_dir)
  message = str(caught.value)
  assert f"{tmp_path / 'train.jsonl'}, line 2: " in message and named in message and "\n" not in message


def test_sources_that_are_none(folder, data_dir, tmp_path):
  with pytest.raises(ValueError, match="has no test.jsonl: it must hold train.jsonl and test.jsonl"):
    subj.make_config(folder(train=[("a", 0)]))
  for source in ("", "nope", "/nope/nope", "./nope", "a/b/c"):
    with pytest.raises(ValueError) as caught:
      subj.make_config(source)
    assert f"config.data.path {source!r} is no folder" in str(caught.value) and "\n" not in str(caught.value)
  source = folder(train=[("a", 0)], test=[])
  with pytest.raises(ValueError, match="test.jsonl has no records"):
    subj.load(subj.make_config(source), "train", data_dir)
