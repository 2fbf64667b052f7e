"""Runs as jobs of submitit: each in a process of its own, and never two at once in one folder.

A worker (submitit's process for one job) takes a lock on the run's folder and starts the run, which inherits the lock:
it is held until both have ended, whichever of sweep, worker and run is killed first. A later worker of the same run
waits for it, and then runs only what is not finished.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import IO

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, UncompletedJobError
from tqdm import tqdm

from gfn_jax.files import finished_steps, write_text
from gfn_jax.preemption import EXIT_CODE, Preempted

POLL_SECONDS = 0.5
LIVE_STATES = ("COMPLETING", "CONFIGURING", "PENDING", "PREEMPTED", "REQUEUED", "RUNNING", "SUSPENDED")  # of Slurm


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[IO]:
  """Holds the lock of a folder, which is made; waits for it. Processes that inherit the file hold it too."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield file


@contextlib.contextmanager
def handling(handler: Callable | signal.Handlers, *signals: signal.Signals) -> Iterator[None]:
  """Handles signals in this way for a while."""
  previous = {s: signal.signal(s, handler) for s in signals}
  try:
    yield
  finally:
    for s, old in previous.items():
      signal.signal(s, old)


def last_line(text: str) -> str:
  """The last line that is not blank; "" where there is none."""
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


@dataclasses.dataclass
class Job:
  """One run. Called in the worker.

  Attributes:
    folder: its workdir.
    command: what runs it.
    num_steps: of a finished run.
    environment: variables that it gets beside the worker's; None unsets one.
  """

  folder: pathlib.Path
  command: tuple[str, ...]
  num_steps: int
  environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  process: subprocess.Popen | None = dataclasses.field(default=None, init=False)

  @property
  def name(self) -> str:
    return self.folder.name

  @property
  def log(self) -> pathlib.Path:
    return self.folder / "stderr.log"

  def is_finished(self) -> bool:
    return finished_steps(self.folder) >= self.num_steps

  def __call__(self) -> tuple[int, str]:
    """Runs it, unless it is finished; the exit code (negative: a signal's) and the last line of stderr."""

    def leave(*_):
      raise Preempted

    def forward(*_):  # the run saves and exits
      if self.process:
        self.process.terminate()

    try:
      with handling(leave, signal.SIGTERM), locked(self.folder) as lock:
        if self.is_finished():
          return 0, ""
        with handling(forward, signal.SIGTERM):
          return self._run(lock)
    except Preempted:
      return EXIT_CODE, ""

  def _run(self, lock: IO) -> tuple[int, str]:
    environment = {k: v for k, v in (os.environ | self.environment).items() if v is not None}
    with (self.folder / "stdout.log").open("ab") as out, self.log.open("ab+") as err:
      start = err.seek(0, os.SEEK_END)
      self.process = subprocess.Popen(self.command, env=environment, stdout=out, stderr=err, pass_fds=(lock.fileno(),))
      code = self.process.wait()
      err.seek(start)
      return code, last_line(err.read().decode(errors="replace"))

  def checkpoint(self) -> DelayedSubmission:
    """submitit calls this in a handler of Slurm's signal that time is up: the run saves, the job is queued again."""
    if self.process:
      self.process.terminate()
      with contextlib.suppress(ChildProcessError):  # it has ended by itself
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # Popen.wait is interrupted, and holds its lock
    return DelayedSubmission(dataclasses.replace(self))


class Local:
  """Workers on this machine.

  Args:
    folder: for submitit's files; a new one each time, since it names them by process id.
    num_gpus: of a run, from the machine's first on; 0: a run sees what the sweep sees.
  """

  def __init__(self, folder: pathlib.Path, num_gpus: int = 0):
    self._executor = submitit.LocalExecutor(folder)
    self._executor.update_parameters(timeout_min=60 * 24 * 365)
    self._num_gpus = num_gpus

  def submit(self, job: Job, slot: int) -> submitit.Job:
    first, n = slot * self._num_gpus, self._num_gpus
    # submitit itself would hide all of them.
    gpus = ",".join(map(str, range(first, first + n))) if n else os.environ.get("CUDA_VISIBLE_DEVICES")
    with handling(signal.SIG_IGN, signal.SIGINT):  # inherited: Ctrl-C is for the sweep, which asks the runs to save
      return self._executor.submit(dataclasses.replace(job, environment={"CUDA_VISIBLE_DEVICES": gpus}))

  def stop(self, job: submitit.Job) -> bool:
    """Asks a run to save and exit. True: it is to be waited for."""
    os.kill(int(job.job_id), signal.SIGTERM)
    return True


class Slurm:
  """Workers on a Slurm cluster; they go on when the sweep ends, and the next sweep finds them.

  Args:
    folder: for submitit's files, on a file system that all nodes see.
    partition: None for the cluster's default.
    num_gpus: of a run.
    hours: after which a run saves and is queued again.

  Raises:
    ValueError: there is no Slurm here.
  """

  def __init__(self, folder: pathlib.Path, partition: str | None, num_gpus: int, hours: float):
    try:
      self._executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=1000)
    except RuntimeError as e:
      raise ValueError(f"--cluster=slurm: {e}") from None
    self._executor.update_parameters(
      name="gfn_jax", timeout_min=max(1, round(60 * hours)), gpus_per_node=num_gpus or None, slurm_partition=partition
    )

  def submit(self, job: Job, slot: int) -> submitit.Job:
    del slot
    record = job.folder / "slurm_job"
    if record.exists():
      earlier = submitit.SlurmJob(self._executor.folder, record.read_text())
      if earlier.get_info().get("State", "").split(" ")[0] in LIVE_STATES:
        return earlier
    submitted = self._executor.submit(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(record, submitted.job_id)
    return submitted

  def stop(self, job: submitit.Job) -> bool:
    del job
    return False


def outcome(job: Job, handle: submitit.Job, stopped: bool) -> tuple[str, str]:
  """What became of a job that is done: "finished", "interrupted" or "failed", and why.

  Args:
    job: the run.
    handle: what its submission gave.
    stopped: it was asked to stop, perhaps before it could understand that.
  """
  try:
    code, line = handle.result()
  except (FailedJobError, UncompletedJobError):
    code, line = None, last_line(handle.stderr() or "")
  if job.is_finished():
    return "finished", ""
  if code in (EXIT_CODE, -signal.SIGTERM) or (code is None and stopped):
    return "interrupted", "the same command goes on with it"
  if code is None:
    why = "its worker ended without a result"
  elif code < 0:
    why = f"killed by {signal.Signals(-code).name}"
  else:
    why = f"exit code {code}" if code else "it left no results.json"
  return "failed", ": ".join(filter(None, [why, line])) + f" ({job.log})"


def execute(jobs: Sequence[Job], cluster: Local | Slurm, num_workers: int) -> int:
  """Runs what is not finished yet, at most `num_workers` at a time and in this order, and shows progress.

  Returns:
    The exit code: 0 where all are finished; 1 where one failed; 143 where all that is missing was interrupted.
  """
  waiting = deque(job for job in jobs if not job.is_finished())
  running: dict[int, tuple[Job, submitit.Job, float]] = {}
  num_finished, outcomes, stopping = len(jobs) - len(waiting), [], []

  def stop(*_):
    stopping.append(True)
    os.write(2, b"stopping: running runs are saved\n")  # print may have been interrupted

  with (
    handling(stop, signal.SIGTERM, signal.SIGINT),
    tqdm(total=len(jobs), initial=num_finished, unit="run", disable=not sys.stderr.isatty()) as bar,
  ):
    while running or (waiting and not stopping):
      for slot in range(num_workers):
        if waiting and not stopping and slot not in running:
          job = waiting.popleft()
          running[slot] = job, cluster.submit(job, slot), time.time()
      for slot, (job, handle, started) in list(running.items()):
        if not handle.done():
          continue
        del running[slot]
        what, why = outcome(job, handle, bool(stopping))
        outcomes.append(what)
        num_finished += what == "finished"
        bar.update(what == "finished")
        if what != "finished" or bar.disable:
          seconds = f" after {time.time() - started:.0f} s"
          bar.write(f"{num_finished}/{len(jobs)} {job.name}: {what}{seconds}" + (f": {why}" if why else ""))
          sys.stdout.flush()
      if stopping and not all([cluster.stop(handle) for _, handle, _ in running.values()]):
        break
      if running:
        time.sleep(POLL_SECONDS)
  if "failed" in outcomes:
    return 1
  return 0 if num_finished == len(jobs) else EXIT_CODE
