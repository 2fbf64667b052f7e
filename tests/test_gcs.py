"""Workdirs at gs:// URLs, against a bucket on the loopback."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from gfn_jax import files
from gfn_jax.checkpoint import Checkpoints
from gfn_jax.evaluators.kept import KeptRows
from gfn_jax.files import to_path, write_text
from gfn_jax.metrics import MetricsWriter, read_jsonl
from gfn_jax.models import load_adapter, save_adapter
import test_multiprocess
from test_train import run, runs, start, training_records  # noqa: F401  runs is a fixture
from testing import random_lora, tiny_pretrained

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def bucket():
  """gs://runs, for this process and those that it starts."""
  server = subprocess.Popen(
    [sys.executable, pathlib.Path(__file__).with_name("bucket.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL, text=True,
  )  # fmt: skip
  url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    yield to_path("gs://runs")
  server.kill()
  server.wait()


def test_urls_that_are_no_bucket_and_a_missing_library_are_named(monkeypatch):
  assert to_path("a/b") == pathlib.Path("a/b")
  with pytest.raises(ValueError, match="'s3://runs/a' is no folder and no gs:// URL"):
    to_path("s3://runs/a")
  monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"'gs://runs/a': gs:// needs gcsfs: pip install 'gfn-jax\[gcs\]'"):
    to_path("gs://runs/a")


def test_files_and_adapters(bucket):
  write_text(bucket / "a" / "text", "één\n")
  assert (bucket / "a" / "text").read_text() == "één\n"
  write_text(bucket / "a" / "text", "two\n")
  assert (bucket / "a" / "text").read_text() == "two\n"
  pretrained = tiny_pretrained()
  lora = random_lora(pretrained)
  save_adapter(bucket / "adapter", lora, pretrained)
  jax.tree.map(np.testing.assert_array_equal, load_adapter("gs://runs/adapter", pretrained), lora)
  with pytest.raises(ValueError, match="gs://runs/nothing is no adapter: adapter_config.json is missing"):
    load_adapter("gs://runs/nothing", pretrained)
  KeptRows(bucket / "tests.json", "a run", bucket / "adapter").get("row", lambda: [1])
  rows = KeptRows(bucket / "tests.json", "a run", to_path("gs://runs/adapter"))
  assert rows.get("row", lambda: [2]) == [1]
  rows.forget()
  assert not (bucket / "tests.json").exists()


def test_checkpoints(bucket):
  state, replay = {"a": np.arange(6.0).reshape(2, 3)}, {"tokens": np.arange(4)}
  checkpoints = Checkpoints(bucket / "checkpoints", keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, {"a": state["a"] + step}, replay)
  checkpoints.wait()
  checkpoints.close()
  again = Checkpoints("gs://runs/checkpoints", keep=2)
  step, found, arrays = again.restore(state)
  assert step == 3 and again.steps() == [2, 3]
  np.testing.assert_array_equal(found["a"], state["a"] + 3)
  np.testing.assert_array_equal(arrays["tokens"], replay["tokens"])
  again.close()


def test_metrics_are_published_and_gone_on_with(bucket):
  workdir = bucket / "metrics"
  with MetricsWriter(workdir, 0, 9) as writer:
    writer.write(1, {"loss": 2.0})
    assert read_jsonl(workdir / "metrics.jsonl") == []
    writer.publish()
    assert read_jsonl("gs://runs/metrics/metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    writer.write(2, {"loss": 1.0})
    writer.write_samples(2, [{"X": "a"}])
  with MetricsWriter(workdir, 1, 9) as writer:  # step 2 will be made again
    writer.write(2, {"loss": 1.5})
  assert read_jsonl(workdir / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
  assert read_jsonl(workdir / "samples.jsonl") == []
  assert len(list((workdir / "tensorboard").iterdir())) == 2


@pytest.mark.slow
def test_a_run_at_a_url_goes_on_after_sigterm_to_what_a_folder_holds(bucket, runs):  # noqa: F811
  folder = runs / "folder"
  whole = run(runs, f"--workdir={folder}")
  assert whole.returncode == 0, whole.stderr
  first = start(runs, "--workdir=gs://runs/smoke")
  try:
    for line in first.stdout:
      if line.startswith("step 1/"):
        first.send_signal(signal.SIGTERM)
        break
    out, err = first.communicate(timeout=900)
  finally:
    first.kill()
  assert first.returncode == 143 and "run the same command to go on" in out, out + err
  second = run(runs, "--workdir=gs://runs/smoke")
  assert second.returncode == 0, second.stderr
  assert "steps     0 of 4" not in second.stdout

  workdir = bucket / "smoke"
  ours, theirs = (json.loads((w / "results.json").read_text()) for w in (workdir, folder))
  untimed = lambda results: {k: v for k, v in results.items() if not k.startswith("time/")}  # noqa: E731
  assert untimed(ours) == untimed(theirs)
  assert training_records(workdir) == training_records(folder)
  adapter = "adapter/adapter_model.safetensors"
  assert (workdir / adapter).read_bytes() == (folder / adapter).read_bytes()
  names = lambda w: {os.path.basename(p) for p in w.iterdir()}  # noqa: E731
  assert names(workdir) == names(folder)
  assert names(workdir / "plots") == names(folder / "plots")
  other = run(runs, "--workdir=gs://runs/smoke", "--config.seed=1")
  assert other.returncode == 2 and "'gs://runs/smoke' holds another run: config.seed is 1 here" in other.stderr


@pytest.mark.slow
def test_two_processes_save_at_one_url_and_go_on_from_it(bucket, runs):  # noqa: F811
  """SIGTERM to one of two: both save at gs://, and the job that goes on ends as one that was left alone."""
  few = "--config.train.num_steps=4"
  test_multiprocess.complete(runs, "alone", 2, 2, few)
  at_url = (runs, "", 2, 2, few, "--workdir=gs://runs/two")
  job = test_multiprocess.train(*at_url)
  for line in job[0].stdout:
    if line.startswith("step 1/"):
      job[1].send_signal(signal.SIGTERM)
      break
  done = test_multiprocess.finish(job)
  assert [code for code, *_ in done] == [143, 143], done
  assert "steps     0 of 4" not in test_multiprocess.complete(*at_url)
  ours, theirs = bucket / "two", runs / "alone"
  assert test_multiprocess.records(ours) == test_multiprocess.records(theirs)
  assert test_multiprocess.accuracies(ours) == test_multiprocess.accuracies(theirs)
  adapter = "adapter/adapter_model.safetensors"
  assert (ours / adapter).read_bytes() == (theirs / adapter).read_bytes()
