"""What a run tells: metrics.jsonl (the truth), TensorBoard, and a progress bar or a line a step."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from typing import Any
import uuid

import tensorboardX
import tqdm

from gfn_jax.files import Path, is_remote, to_path, write_text


def scores_text(record: Mapping[str, Any]) -> str:
  """What a record of samples.jsonl says of its sample, in columns: verdict and nats, as far as it has them."""
  parts = [f"{'right' if record['right'] else 'wrong'}"] if "right" in record else []
  parts += [f"{label} {record[key]:7.1f}" for label, key in (("log R", "log_R"), ("log q", "log_q")) if key in record]
  return "  ".join(parts)


def truncate_jsonl(path: Path, last_step: int) -> None:
  """Drops what a run that goes on after `last_step` will write anew: later steps, an evaluation of that very state, and
  a line that a kill cut short."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if record["step"] < last_step or (record["step"] == last_step and "loss" in record):
      kept.append(line)
  write_text(path, "".join(line + "\n" for line in kept))


def read_jsonl(path: str | os.PathLike) -> list[dict]:
  """The records of a run's metrics.jsonl or samples.jsonl; [] where there is none."""
  path = to_path(path)
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class MetricsWriter:
  """Writes a run's metrics; the first process has one, the others a `SilentWriter`. A context manager.

  Of a workdir at a URL it writes a copy on this machine, which `publish` puts there.
  """

  def __init__(
    self,
    workdir: Path,
    first_step: int,
    num_steps: int,
    *,
    wandb_project: str | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the files.

    Args:
      first_step: steps already made; what the files hold beyond it is dropped.
      wandb_project: of Weights & Biases, where the same numbers go; `config`: what is shown with them there.

    Raises:
      ValueError: wandb is wanted and not installed.
    """
    for name in ("metrics.jsonl", "samples.jsonl"):
      truncate_jsonl(workdir / name, first_step)
    self._workdir, self._folder, self._copy = workdir, workdir, None
    if is_remote(workdir):
      self._copy = tempfile.TemporaryDirectory()
      self._folder = pathlib.Path(self._copy.name)
      for name in filter(lambda name: (workdir / name).exists(), ("metrics.jsonl", "samples.jsonl")):
        (self._folder / name).write_bytes((workdir / name).read_bytes())
    self._metrics = (self._folder / "metrics.jsonl").open("a")
    self._samples = (self._folder / "samples.jsonl").open("a")
    # Files are called by the second alone, and at a URL the later of two would stand in the other's place.
    self._board = tensorboardX.SummaryWriter(
      str(self._folder / "tensorboard"), purge_step=first_step + 1, filename_suffix=f".{first_step}"
    )
    self._bar = tqdm.tqdm(
      total=num_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    self._num_steps = num_steps
    self._wandb = None if wandb_project is None else _start_wandb(workdir, self._folder, wandb_project, config)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exc) -> None:
    self._bar.close()
    self._metrics.close()
    self._samples.close()
    self._board.close()
    try:
      self.publish()
    finally:
      if self._wandb is not None:
        self._wandb.finish()  # sends what stands in the folder
      if self._copy is not None:
        self._copy.cleanup()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One JSON line, its TensorBoard scalars, and what Weights & Biases is told."""
    self._metrics.write(json.dumps({"step": step, **values}) + "\n")
    self._metrics.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(dict(values), step=step)

  def publish(self) -> None:
    """What has been written is where the run stands, and outlives this machine: before a checkpoint, and at the end."""
    if self._copy is not None:
      self._board.flush()
      for file in (*self._folder.glob("*.jsonl"), *self._folder.glob("tensorboard/*")):
        (self._workdir / file.relative_to(self._folder)).write_bytes(file.read_bytes())

  def write_samples(self, step: int, records: list[dict[str, Any]]) -> None:
    """Samples of an evaluation, a JSON line each."""
    for record in records:
      self._samples.write(json.dumps({"step": step, **record}) + "\n")
    self._samples.flush()

  def progress(self, step: int, shown: Mapping[str, str], eta_seconds: float) -> None:
    """Moves the bar; without a terminal, prints one line."""
    if self._bar.disable:
      text = "  ".join(f"{k} {v}" for k, v in shown.items())
      minutes, seconds = divmod(round(eta_seconds), 60)
      print(f"step {step}/{self._num_steps}  {text}  ETA {minutes}:{seconds:02d}", flush=True)
    else:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)

  def say(self, text: str) -> None:
    """Prints above the bar."""
    self._bar.write(text, file=sys.stdout)
    sys.stdout.flush()


class SilentWriter(MetricsWriter):
  """Writes and shows nothing."""

  def __init__(self):
    """Opens no file."""

  def __exit__(self, *exc) -> None:
    """There is nothing to close."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Nothing."""

  def write_samples(self, step: int, records: list[dict[str, Any]]) -> None:
    """Nothing."""

  def publish(self) -> None:
    """Nothing."""

  def progress(self, step: int, shown: Mapping[str, str], eta_seconds: float) -> None:
    """Nothing."""

  def say(self, text: str) -> None:
    """Nothing."""


def _start_wandb(workdir: Path, folder: pathlib.Path, project: str, config: Mapping[str, Any] | None) -> Any:
  """A run of Weights & Biases: the same one whenever this workdir goes on."""
  try:
    import wandb
  except ImportError:
    raise ValueError(f"config.wandb_project {project!r} needs wandb: pip install 'gfn-jax[wandb]'") from None
  file = workdir / "wandb_id"
  if not file.exists():
    write_text(file, uuid.uuid4().hex[:8])
  return wandb.init(
    project=project, id=file.read_text(), resume="allow", name=workdir.name, config=dict(config or {}), dir=str(folder)
  )  # fmt: skip


class StepLog:
  """Metrics of steps and evaluations on their way to the writer; those of a step are read while the next one runs."""

  def __init__(
    self, writer: MetricsWriter, first_step: int, num_steps: int, log_every: int, rows_per_step: int,
    rows: str = "trajectories",
  ):  # fmt: skip
    """`rows_per_step`: how many `rows` one step learns from."""
    self._writer, self._num_steps, self._log_every, self._rows = writer, num_steps, log_every, rows_per_step
    self._rate, self._rate_shown = f"{rows}_per_second", f"{rows[:4]}/s"
    self._pending: tuple[int, Mapping, Mapping, float] | None = None
    self._first_step, self._spent, self._since = first_step, 0.0, time.monotonic()

  def step(self, step: int, device_values: Mapping[str, Any], host_values: Mapping[str, float]) -> None:
    """Takes a step's metrics, and writes those of the step before."""
    self.flush()
    # From call to call: when a step's values are read says nothing about when it ran.
    now = time.monotonic()
    seconds, self._since = now - self._since, now
    self._pending = step, device_values, host_values, seconds

  def flush(self) -> None:
    """Writes what is pending.

    Raises:
      FloatingPointError: a loss that is not finite, naming the step.
    """
    if self._pending is None:
      return
    (step, device_values, host_values, seconds), self._pending = self._pending, None
    values = {k: float(v) for k, v in device_values.items()} | dict(host_values)
    if not math.isfinite(values["loss"]):
      raise FloatingPointError(f"the loss is {values['loss']} at step {step}")
    self._spent += seconds
    if step % self._log_every and step != self._num_steps:
      return
    self._writer.write(step, values | {self._rate: self._rows / seconds, "step_seconds": seconds})
    shown = {"loss": f"{values['loss']:.3g}"}
    if "log_reward_mean" in values:
      shown["logR"] = f"{values['log_reward_mean']:.1f}"
    if "accuracy" in values:
      shown["acc"] = f"{100 * values['accuracy']:.0f}%"
    shown[self._rate_shown] = f"{self._rows / seconds:.0f}"
    remaining = max(0, self._num_steps - step) * self._spent / (step - self._first_step)  # a benchmark may go on
    self._writer.progress(step, shown, remaining)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around an evaluation: its time is not the steps', but what the last step still has to do before it is."""
    self.flush()
    begin = time.monotonic()
    yield
    self._since += time.monotonic() - begin

  def evaluation(self, step: int, values: Mapping[str, float], samples: list[dict[str, Any]]) -> None:
    """Writes an evaluation, and shows some of its samples beside their rewards."""
    self.flush()
    self._writer.write(step, values)
    self._writer.write_samples(step, samples)
    scores = "  ".join(f"{k.split('/', 1)[1]} {v:.3g}" for k, v in values.items() if not k.startswith("time/"))
    lines = [f"evaluation after step {step}: {scores}"]
    scored = [s for s in samples if "log_q" in s]
    lines += [f"  {scores_text(s)}  {s['X']}|{s['Z']}" for s in scored[:: max(1, len(scored) // 3)][:3]]
    self._writer.say("\n".join(lines))
