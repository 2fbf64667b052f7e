"""A final evaluation that is cut off goes on with the row that it was at."""

import types

import jax
import pytest

from configs import arith
from gfn_jax import evaluate as evaluation
from gfn_jax.evaluators import suite as suites
from gfn_jax.evaluators.evaluator import Evaluator
from gfn_jax.evaluators.kept import KeptRows
from gfn_jax.experiment import build


@pytest.fixture
def adapter(tmp_path):
  (tmp_path / "adapter").mkdir()
  (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"one")
  return tmp_path / "adapter"


def test_rows_are_measured_once_and_belong_to_one_config_and_adapter(tmp_path, adapter):
  path, measured = tmp_path / "tests.json", []

  def measure():
    measured.append(None)
    return {"a": 0.1}, [{"X": "é"}]

  assert KeptRows(path, "a run", adapter).get("row", measure) == ({"a": 0.1}, [{"X": "é"}])
  again = KeptRows(path, "a run", adapter)
  assert tuple(again.get("row", measure)) == ({"a": 0.1}, [{"X": "é"}]) and len(measured) == 1
  KeptRows(path, "another", adapter).get("row", measure)
  assert len(measured) == 2
  (adapter / "adapter_model.safetensors").write_bytes(b"two")
  other = KeptRows(path, "another", adapter)
  other.get("row", measure)
  assert len(measured) == 3
  other.forget()
  assert not path.exists()


def test_a_damaged_file_is_named(tmp_path, adapter):
  (tmp_path / "tests.json").write_text('{"of": "a r')
  with pytest.raises(ValueError, match="tests.json is damaged"):
    KeptRows(tmp_path / "tests.json", "a run", adapter)


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


def test_evaluate_goes_on_where_it_was(monkeypatch, tmp_path, adapter):
  """And measures anew where the file of problems, or the adapter, is another."""
  measured = []

  class Measured:
    def test(self, lora, temperature, key, say, keep):
      return keep("row", lambda: measured.append(None) or ({"arith/gfn/accuracy/3": len(measured)}, []))

  config, problems = arith.get_config("smoke"), tmp_path / "problems.json"
  config.data.test_path = str(problems)
  monkeypatch.setattr(evaluation, "build", lambda *_: (types.SimpleNamespace(pretrained=None, devices=[]), Measured()))
  monkeypatch.setattr(evaluation, "load_adapter", lambda *_: None)
  monkeypatch.setattr(evaluation, "place", lambda *_: None)

  def evaluate(text):
    problems.write_text(text)
    return evaluation.evaluate(config, str(adapter), tmp_path / "results.json.part")["arith/gfn/accuracy/3"]

  assert [evaluate("[1]"), evaluate("[1]"), evaluate("[2]")] == [1, 1, 2]
  (adapter / "adapter_model.safetensors").write_bytes(b"two")
  assert evaluate("[2]") == 3
