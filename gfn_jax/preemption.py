"""SIGTERM or a notice of the cloud's: note it, finish what must not be cut, save, and exit 143."""

import http.client
import os
import pathlib
import signal
import threading
import urllib.request

from gfn_jax import distributed

EXIT_CODE = 128 + signal.SIGTERM
# Where a machine of Google's says what it is told of its own end: Compute Engine, TPU VMs and nodes of GKE are such.
_METADATA = "http://{}/computeMetadata/v1/instance/{}"
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_POLL_SECONDS, _TIMEOUT_SECONDS = 5.0, 10.0


class Preempted(Exception):
  """Raised between device rounds once a process of the job has been told to end."""


def _metadata_host() -> str | None:
  """The metadata server's name; None where there is none. GCE_METADATA_HOST names another, as for Google's clients."""
  product = pathlib.Path("/sys/class/dmi/id/product_name")
  on_google = product.is_file() and product.read_text().startswith("Google")
  return os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if on_google else None)


def _notices(host: str) -> dict[str, bool]:
  """Whether each notice stands, of those that can be read."""
  found = {}
  for name, value in _NOTICES.items():
    request = urllib.request.Request(_METADATA.format(host, name), headers={"Metadata-Flavor": "Google"})
    try:
      with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:
        found[name] = reply.read().decode().strip() == value
    except (OSError, http.client.HTTPException, ValueError):
      continue
  return found


class Preemption:
  """Catches SIGTERM, and a preemption or maintenance notice of Google's cloud, while in use as a context.

  `check` raises `Preempted` where the caller can stop cleanly. All processes of a job call it at the same places, and
  all of them stop at the same one. A notice that stood before does not count: a run that was started again on a machine
  that is to end makes what steps it can.
  """

  def __init__(self):
    self.requested = False
    self._over = threading.Event()

  def __enter__(self) -> "Preemption":
    self._previous = signal.signal(signal.SIGTERM, self._note)
    if host := _metadata_host():
      threading.Thread(target=self._watch, args=(host,), daemon=True).start()
    return self

  def __exit__(self, *exc) -> None:
    self._over.set()
    signal.signal(signal.SIGTERM, self._previous)

  def _note(self, signum, frame) -> None:
    del signum, frame
    self.requested = True

  def _watch(self, host: str) -> None:
    before = _notices(host)
    while not self._over.wait(_POLL_SECONDS):
      now = _notices(host)
      if any(stands and before.get(name) is False for name, stands in now.items()):
        self.requested = True
        return
      before |= now

  def check(self) -> None:
    if distributed.any_of(self.requested):
      raise Preempted
