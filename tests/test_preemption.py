"""What tells a run to end: SIGTERM, and a notice of the cloud's."""

import http.server
import os
import signal
import threading
import time

import pytest

from configs import arith
from gfn_jax import preemption, train
from gfn_jax.preemption import Preempted, Preemption


@pytest.fixture
def metadata(monkeypatch):
  """A metadata server's answers, path -> text, which a test may change."""
  answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith("/computeMetadata/v1/instance/")
      self.send_response(200 if known else 403)
      self.end_headers()
      self.wfile.write(answers[self.path.rpartition("/")[2]].encode() if known else b"")

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
  monkeypatch.setattr(preemption, "_POLL_SECONDS", 0.05)
  yield answers
  server.shutdown()
  server.server_close()


def wait_for(condition, seconds=60.0):
  deadline = time.time() + seconds
  while not condition() and time.time() < deadline:
    time.sleep(0.02)
  return condition()


def test_sigterm_is_raised_where_the_caller_looks_and_is_pythons_again_afterwards():
  before = signal.getsignal(signal.SIGTERM)
  with Preemption() as noted:
    noted.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
      noted.check()
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("notice", [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")])
def test_a_notice_counts_from_when_it_comes(metadata, notice):
  with Preemption() as noted:
    time.sleep(1.0)  # in which it has asked once, on a busy machine too
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # the machine moves, and the run with it
    time.sleep(0.3)
    noted.check()
    metadata.update([notice])
    assert wait_for(lambda: noted.requested)
    with pytest.raises(Preempted):
      noted.check()
  with Preemption() as again:  # started again on the same machine: it would never make a step
    time.sleep(0.3)
    again.check()


def test_a_server_that_is_gone_tells_nothing(metadata, monkeypatch):
  assert preemption._notices(os.environ["GCE_METADATA_HOST"]) == {"preempted": False, "maintenance-event": False}
  metadata["preempted"] = "TRUE"
  assert preemption._notices(os.environ["GCE_METADATA_HOST"]) == {"preempted": True, "maintenance-event": False}
  assert preemption._notices("127.0.0.1:1") == {}
  monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
  with Preemption() as noted:
    time.sleep(0.3)
    noted.check()


def test_sigterm_while_the_model_is_loaded_ends_before_the_first_step(tmp_path, monkeypatch, capsys):
  config = arith.get_config("smoke")
  config.data.dir = str(tmp_path)

  def told(config):
    os.kill(os.getpid(), signal.SIGTERM)
    return None, None

  monkeypatch.setattr(train, "set_up", told)
  assert train.train(config.lock(), tmp_path / "run") == preemption.EXIT_CODE == 143
  assert "run the same command to go on" in capsys.readouterr().out
