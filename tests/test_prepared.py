"""What the TFDS builders share: names that tell contents apart, and preparing quietly, once, at first use."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gfn_jax.datasets import prepared

RECORDS = [{"text": "naïve — 文", "number": -3, "words": ["b", "a"]}, {"text": "", "number": 7, "words": ["c", ""]}]


@dataclasses.dataclass
class ThingsConfig(tfds.core.BuilderConfig):
  data_dir: str = ""
  fails: str = ""


class Things(prepared.RecordsBuilder, skip_registration=True):
  """Things."""

  FEATURES = {  # noqa: RUF012
    "text": tfds.features.Text(),
    "number": tfds.features.Scalar(np.int64),
    "words": tfds.features.Sequence(tfds.features.Text(), length=2),
  }
  calls = 0
  before = staticmethod(lambda config: None)

  def splits(self):
    type(self).calls += 1
    type(self).before(self.builder_config)
    return {"train": RECORDS, "test": list(reversed(RECORDS))}


@pytest.fixture
def things(monkeypatch):
  monkeypatch.setattr(Things, "calls", 0)
  return Things


def test_records_come_back_as_pythons_own_in_their_order(things, tmp_path, capfd):
  config = ThingsConfig(name="x")
  assert prepared.load(things, config, "train", str(tmp_path)) == RECORDS
  record = prepared.load(things, config, "test", str(tmp_path))[1]
  assert record == RECORDS[0]
  assert [type(record[k]) for k in ("text", "number", "words")] == [str, int, list]
  assert things.calls == 1  # prepared at first use, and then read
  assert list(tmp_path.glob("things/x/1.0.0/*.array_record*"))
  out, err = capfd.readouterr()
  assert not out and not err


def test_a_split_that_is_not_there_is_named(things, tmp_path):
  with pytest.raises(ValueError, match="'validation'.*train.*test"):
    prepared.load(things, ThingsConfig(name="x"), "validation", str(tmp_path))


def test_two_runs_may_prepare_at_once(things, tmp_path, monkeypatch):
  def another_run_is_quicker(config):
    if things.calls == 1:
      assert prepared.load(things, config, "train", str(tmp_path)) == RECORDS

  monkeypatch.setattr(Things, "before", staticmethod(another_run_is_quicker))
  assert prepared.load(things, ThingsConfig(name="x"), "train", str(tmp_path)) == RECORDS
  assert things.calls == 2  # both did; the slower one found its place taken


def test_an_error_of_the_disk_is_not_swallowed(things, tmp_path, monkeypatch):
  def full_disk(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Things, "before", staticmethod(full_disk))
  with pytest.raises(OSError, match="No space left"):
    prepared.load(things, ThingsConfig(name="x"), "train", str(tmp_path))


def test_bad_data_leaves_nothing_and_one_line(things, tmp_path, monkeypatch):
  def bad(_):
    raise ValueError("file.jsonl, line 3: bad")

  monkeypatch.setattr(Things, "before", staticmethod(bad))
  with pytest.raises(ValueError) as caught:
    prepared.load(things, ThingsConfig(name="x"), "train", str(tmp_path))
  assert str(caught.value) == "file.jsonl, line 3: bad"
  monkeypatch.undo()
  assert prepared.load(things, ThingsConfig(name="x"), "train", str(tmp_path)) == RECORDS


def test_digests_tell_contents_apart(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"

  def digest(first, second, *settings):
    a.write_text(first), b.write_text(second)
    return prepared.digest([a, b], *settings)

  assert digest("1\n2\n", "3\n") == digest("1\n2\n", "3\n")
  different = {
    digest("1\n2\n", "3\n"), digest("1\n", "2\n3\n"), digest("3\n", "1\n2\n"), digest("1\n2\n", "3\n", 0),
    digest("1\n2\n", "3\n", 1), digest("1\n2\n", "3\n", "1"),
  }  # fmt: skip
  assert len(different) == 6 and all(len(d) == 12 for d in different)
