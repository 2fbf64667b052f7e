"""What a run tells Weights & Biases; the other writers are tested with the runs that use them."""

import pathlib
import sys
import types

from etils import epath
import pytest

from gfn_jax.metrics import MetricsWriter, read_jsonl


class FakeRun:
  def __init__(self, settings):
    self.settings, self.logged, self.finished = settings, [], False

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    assert pathlib.Path(self.settings["dir"]).exists()  # what it has still to send stands there
    self.finished = True


@pytest.fixture
def runs(monkeypatch):
  """Every run that is begun with a stand-in for the package."""
  begun = []

  def init(**settings):
    begun.append(FakeRun(settings))
    return begun[-1]

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  return begun


def test_wandb_gets_what_the_files_get_and_one_run_over_all_sessions(tmp_path, runs):
  for first_step in (0, 1):
    with MetricsWriter(tmp_path, first_step, 2, wandb_project="mine", config={"seed": 3}) as writer:
      writer.write(first_step + 1, {"loss": 0.5})
  assert [r.logged for r in runs] == [[(1, {"loss": 0.5})], [(2, {"loss": 0.5})]]
  assert [{"step": s, **v} for r in runs for s, v in r.logged] == read_jsonl(tmp_path / "metrics.jsonl")
  first, second = (r.settings for r in runs)
  assert first == second and first["resume"] == "allow" and first["id"]
  assert (first["project"], first["config"], first["name"]) == ("mine", {"seed": 3}, tmp_path.name)
  assert all(r.finished for r in runs)


def test_wandb_finishes_before_its_folder_goes(tmp_path, runs):
  (tmp_path / "tensorboard").mkdir()  # which a bucket does not need
  with MetricsWriter(epath.Path(tmp_path), 0, 1, wandb_project="mine"):
    pass
  assert runs[0].finished and not pathlib.Path(runs[0].settings["dir"]).exists()


def test_without_a_project_nobody_is_told(tmp_path, runs):
  with MetricsWriter(tmp_path, 0, 1) as writer:
    writer.write(1, {"loss": 0.5})
  assert runs == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match=r"config.wandb_project 'mine' needs wandb: pip install 'gfn-jax\[wandb\]'"):
    MetricsWriter(tmp_path, 0, 1, wandb_project="mine")
