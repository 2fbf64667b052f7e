"""A final evaluation that is cut off goes on with the row that it was at."""

import json

import jax
import pytest

from configs import arith
from gfn_jax.evaluators import suite as suites
from gfn_jax.evaluators.evaluator import Evaluator
from gfn_jax.evaluators.kept import KeptRows
from gfn_jax.experiment import build


def test_rows_are_measured_once_and_belong_to_one_thing(tmp_path):
  path, measured = tmp_path / "tests.json", []

  def measure():
    measured.append(None)
    return {"a": 0.1}, [{"X": "é"}]

  assert KeptRows(path, "a run").get("row", measure) == ({"a": 0.1}, [{"X": "é"}])
  again = KeptRows(path, "a run")
  assert tuple(again.get("row", measure)) == ({"a": 0.1}, [{"X": "é"}]) and len(measured) == 1
  other = KeptRows(path, "another")
  other.get("row", measure)
  assert len(measured) == 2 and json.loads(path.read_text())["of"] == "another"
  other.forget()
  assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path):
  (tmp_path / "tests.json").write_text('{"of": "a r')
  with pytest.raises(ValueError, match="tests.json is damaged"):
    KeptRows(tmp_path / "tests.json", "a run")


def test_a_test_that_is_cut_off_goes_on_where_it_was(monkeypatch, tmp_path):
  asked, cut = [], ["second_search"]

  def fake(name):
    class Fake(Evaluator):
      def measured(self, method):
        asked.append(method)
        if method in cut:
          raise KeyboardInterrupt
        self.samples = [{"X": method}]
        yield "score", 0.1 * len(method)

      def __call__(self, lora, problems, key, on_round=None):
        return self.measured(name)

      def baselines(self, problems, key, on_round=None):
        return ((f"{name}_{search}", self.measured(f"{name}_{search}")) for search in ("search", "more"))

    return Fake

  monkeypatch.setattr(suites, "EVALUATORS", {name: fake(name) for name in ("first", "second")})
  config = arith.get_config("smoke")
  config.eval.evaluators, config.eval.test_evaluators, config.eval.shots = ("first",), ("second",), ()
  _, suite = build(config, jax.local_devices()[:1])

  def test(**keep):
    return suite.test(None, 1.0, jax.random.key(0), say=lambda _: None, **keep)

  with pytest.raises(KeyboardInterrupt):
    test(keep=KeptRows(tmp_path / "tests.json", "a run").get)
  rows = ["first", "second", "first_search", "first_more", "second_search"]
  assert asked == rows
  cut.clear()
  results, samples = test(keep=KeptRows(tmp_path / "tests.json", "a run").get)
  assert asked == [*rows, "second_search", "second_more"]
  assert (results, samples) == test()
  assert results["arith/second_search/score"] == 0.1 * len("second_search")
  assert [s["method"] for s in samples] == ["base", "base", *rows[2:], "second_more"]
  assert [s["X"] for s in samples] == [*rows, "second_more"]
