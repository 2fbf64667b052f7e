"""ROCStories: CSVs, the embedded stories, and their splits."""

import csv

import pytest

from gfn_jax.datasets import roc_stories, sentences

HEADER = ["storyid", "storytitle", *roc_stories.COLUMNS]


def story(i):
  return [f'Story {i} has, "as they say", sentence {k}.' for k in range(1, 6)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def write(tmp_path):
  """Writes rows of a CSV; returns its path."""

  def rows_to(name, rows, header=HEADER, encoding="utf-8"):
    with (tmp_path / name).open("w", newline="", encoding=encoding) as file:
      csv.writer(file).writerows([header, *rows] if header else rows)
    return tmp_path / name

  return rows_to


def stories_of(records):
  return [tuple(r["sentences"]) for r in records]


def check_splits(config, data_dir, whole):
  """Sizes and disjointness; returns the splits."""
  train, test, finetune = (stories_of(roc_stories.load(config, s, data_dir)) for s in ("train", "test", "finetune"))
  assert (len(train), len(test), len(finetune)) == (config.num_train, config.num_test, len(whole) - config.num_test)
  assert not set(test) & (set(train) | set(finetune))
  assert set(train) <= set(finetune) and set(finetune) | set(test) == set(whole)
  assert finetune == [s for s in whole if s not in set(test)]
  return train, test


def test_embedded_stories(data_dir):
  config = roc_stories.make_config()
  whole = [tuple(s) for s in roc_stories.read_stories(config.files[0])]
  assert len(set(whole)) == 48 and (config.num_train, config.num_test) == (32, 16)
  check_splits(config, data_dir, whole)
  for sentence in (s for five in whole for s in five):
    assert sentences.split(sentence) == [sentence] and sentence[-1] == "."
    assert 3 <= len(sentence.split()) <= 20


def test_a_csv_is_split_by_its_seed(write, data_dir, tmp_path):
  whole = [story(i) for i in range(1050)]
  file = write("stories.csv", [[f"id{i}", "T", *s] for i, s in enumerate(whole)])
  whole = [tuple(s) for s in whole]
  config = roc_stories.make_config(str(file))
  assert (config.num_train, config.num_test) == (900, 100)  # the paper's
  first = check_splits(config, data_dir, whole)
  again = roc_stories.make_config(str(file))
  assert again.name == config.name
  assert stories_of(roc_stories.load(again, "test", str(tmp_path / "elsewhere"))) == first[1]
  other = check_splits(roc_stories.make_config(str(file), seed=1), data_dir, whole)
  assert set(other[1]) != set(first[1]) and other[0] != first[0]
  names = {roc_stories.make_config(str(file), *a).name for a in ((0,), (1,), (0, 899), (0, 900, 99))}
  assert len(names) == 4


def test_a_folder_of_csvs_and_a_story_that_is_there_twice(write, data_dir, tmp_path):
  write("2.csv", [["x", "T", *story(3)], ["y", "T", *story(0)]], header=["more", "x", *roc_stories.COLUMNS])
  write("1.csv", [[i, "T", *story(i)] for i in range(3)], encoding="utf-8-sig")
  (tmp_path / "notes.txt").write_text("no data")
  config = roc_stories.make_config(str(tmp_path), num_train=2, num_test=1)
  check_splits(config, data_dir, [tuple(story(i)) for i in range(4)])
  with pytest.raises(ValueError) as caught:
    roc_stories.load(roc_stories.make_config(str(tmp_path), num_train=4, num_test=1), "train", data_dir)
  message = str(caught.value)
  assert "4 training and 1 test stories" in message and "has 4 different ones" in message and "1.csv" in message


@pytest.mark.parametrize(
  "rows, header, named",
  (
    ([], HEADER, "has no stories"),
    ([], [], "lacks the column sentence1: it has none"),
    ([["i", "t", *story(0)]], [*HEADER[:-1], "sentence6"], "lacks the column sentence5: it has storyid, storytitle"),
    ([["i", "t", *story(0)], ["j", "t", *story(1)[:4]]], HEADER, "line 3, story 'j': five sentences are needed"),
    ([["i", "t", *story(0)[:3], "  ", "Last."]], HEADER, "line 2, story 'i': five sentences are needed, sentence4 is"),
    ([["i", "t", *story(0), "A sixth."]], HEADER, "line 2, story 'i': more values than the header has columns"),
  ),
)
def test_bad_files_get_one_line(rows, header, named, write, data_dir):
  file = write("bad.csv", rows, header)
  with pytest.raises(ValueError) as caught:
    roc_stories.load(roc_stories.make_config(str(file)), "train", data_dir)
  message = str(caught.value)
  assert str(file) in message and named in message and "\n" not in message


def test_files_that_are_no_csv(tmp_path):
  file = tmp_path / "bad.csv"
  file.write_bytes(b"")
  with pytest.raises(ValueError, match="bad.csv lacks the column sentence1"):
    roc_stories.read_stories(file)
  for content in (",".join(HEADER).encode() + b"\n\xff\xfe", ",".join(HEADER).encode() + b"\n" + b"x" * 200_000):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="bad.csv is no CSV: ") as caught:
      roc_stories.read_stories(file)
    assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match="none.csv cannot be read: No such file"):
    roc_stories.read_stories(tmp_path / "none.csv")


def test_sources_that_are_none_say_where_to_ask(tmp_path):
  for source in ("", str(tmp_path), str(tmp_path / "none.csv"), "owner/name"):
    with pytest.raises(ValueError) as caught:
      roc_stories.make_config(source)
    message = str(caught.value)
    assert f"config.data.path {source!r}" in message and "cs.rochester.edu/nlp/rocstories" in message
    assert "\n" not in message
  assert "cs.rochester.edu" in roc_stories.RocStories.MANUAL_DOWNLOAD_INSTRUCTIONS  # where TFDS looks for it
  for numbers, named in (((0, 5), "0 training stories"), ((5, -1), "-1 test stories")):
    with pytest.raises(ValueError, match=f"{named}: must be at least 1"):
      roc_stories.make_config("embedded", 0, *numbers)
