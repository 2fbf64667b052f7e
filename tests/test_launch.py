"""launch/'s scripts against a gcloud, an sbatch, ... that write down what they were called with."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from testing import REPOSITORY, assert_one_line, run_commands

LAUNCH = REPOSITORY / "launch"
POD = ("--name=gfn", "--zone=us-east5-b")
TYPE = ("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e")
SSH_FLAGS = ("--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oConnectTimeout=30")
WHERE = ("--zone=us-east5-b", "--quiet")
QUEUE = ("compute", "tpus", "queued-resources")
CREATE = ["gcloud", *QUEUE, "create", "gfn", "--node-id=gfn", *TYPE, *WHERE]
DELETE = ["gcloud", *QUEUE, "delete", "gfn", "--force", *WHERE]
LIST = ["gcloud", *QUEUE, "list", '--filter=name ~ "/gfn$"', "--format=value(state.state)", *WHERE]
AWKWARD = ["it's", 'a "b"  c', "$HOME `id` \\", "two\nlines", "", "*", "--x=('q_proj','v_proj')", "λ"]

# A program under any of the names: writes down its call, and answers with the next reply of the plan for its verb:
# an exit code and what it prints. The last reply stays. Without a plan gcloud's ssh and scp reach the workers' folders.
FAKE = """\
import json, os, pathlib, shutil, subprocess, sys
here, argv = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
program = os.path.basename(sys.argv[0])
devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
stdin = sys.stdin.read() if program == "kubectl" else None
with (here / "calls").open("a") as file:
  file.write(json.dumps([[program, *argv], devices if program == "srun" else stdin]) + "\\n")
verb = argv[3] if program == "gcloud" else program
plan = json.loads((here / "plan").read_text())
workers = sorted(here.glob("worker*"))
if plan.get(verb):
  code, out = plan[verb].pop(0) if len(plan[verb]) > 1 else plan[verb][0]
  (here / "plan").write_text(json.dumps(plan))
  print(out)
  sys.exit(code)
elif verb == "scp":
  for worker in workers:
    shutil.copy(argv[4], worker)
elif verb == "ssh":
  command = next(a for a in argv if a.startswith("--command="))[10:]
  worker = next(a for a in argv if a.startswith("--worker="))[9:]
  workers = workers if worker == "all" else [workers[int(worker)]]
  shells = [subprocess.Popen(["bash", "-c", command], cwd=w, env=os.environ | {"HOME": str(w)}) for w in workers]
  sys.exit(max(shell.wait() for shell in shells))
elif program == "uv" and "venv" in argv:
  (pathlib.Path(argv[-1]) / "bin").mkdir(parents=True, exist_ok=True)
  (pathlib.Path(argv[-1]) / "bin" / "activate").touch()
elif program == "python3":
  (pathlib.Path.home() / ".local/bin").mkdir(parents=True)
  (pathlib.Path.home() / ".local/bin/uv").symlink_to(here / "bin/uv")
elif program == "srun":
  os.execvp(argv[0], argv)
"""


class Machines:
  """A checkout with launch/ in it, the fake programs, and two workers.

  Attributes:
    folder: where all of it lies.
    checkout: a repository with one commit.
    env: in which the fakes are found.
  """

  def __init__(self, folder):
    self.folder, self.checkout = folder, folder / "checkout"
    self.env = os.environ | {"FAKE": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    self.plan()
    (folder / "bin").mkdir()
    for name in ("gcloud", "kubectl", "python3", "sbatch", "scontrol", "srun", "uv"):
      (folder / "bin" / name).write_text(f"#!{sys.executable} -I\n{FAKE}")
      (folder / "bin" / name).chmod(0o755)
    for i in range(2):
      (folder / f"worker{i}").mkdir()
    shutil.copytree(LAUNCH, self.checkout / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    self.git("init", "-q")
    self.commit()

  def git(self, *arguments, cwd=None):
    identity = ("-c", "user.name=n", "-c", "user.email=e@x")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=cwd or self.checkout, check=True, capture_output=True, text=True).stdout.strip()

  def commit(self):
    self.git("add", "-A")
    self.git("commit", "-q", "--allow-empty", "-m", "m")

  def plan(self, **replies):
    """list=["ACTIVE"] prints so and succeeds; ssh=[255, 0] exits so."""
    both = lambda r: (r, "") if isinstance(r, int) else (0, r)  # noqa: E731
    plan = {verb: [both(r) for r in rs] for verb, rs in replies.items()}
    (self.folder / "plan").write_text(json.dumps(plan))

  def calls(self):
    """What the fakes were called with since the last time, and what else they saw."""
    file = self.folder / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [tuple(json.loads(line)) for line in lines]

  def gcloud(self, verb=None):
    calls = [call for call, _ in self.calls() if call[0] == "gcloud"]
    return [call for call in calls if verb in (None, call[4])]

  def script(self, name, *arguments, **options):
    command = [self.checkout / "launch" / name, *arguments]
    options = {"env": self.env, "cwd": self.checkout, "capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run(command, **options)

  def pod(self, action, *arguments):
    return self.script("tpu_pod.sh", action, *POD, "--poll-seconds=0", *arguments)

  def run(self, *arguments, command=("true",)):
    return self.pod("run", *TYPE, *arguments, "--", *command)


@pytest.fixture
def machines(tmp_path):
  return Machines(tmp_path)


def ssh(command, worker="all"):
  return [
    "gcloud",
    "compute",
    "tpus",
    "tpu-vm",
    "ssh",
    "gfn",
    f"--worker={worker}",
    f"--command={command}",
    *SSH_FLAGS,
    *WHERE,
  ]


def commands_run(calls):
  """The command lines that were run on the workers, as lists of words; installations left out."""
  lines = [next(a for a in call if a.startswith("--command="))[10:] for call in calls if call[4] == "ssh"]
  lines = [line for line in lines if "tpu_worker.sh run" in line]
  assert all(re.match(r"bash gfn_jax/launch/tpu_worker.sh run \d+-\d+-\d+ ", line) for line in lines), lines
  return [shlex.split(line)[4:] for line in lines]


def wait_for(condition, seconds=30):
  end = time.time() + seconds
  while not condition():
    assert time.time() < end
    time.sleep(0.05)


def test_shellcheck():
  scripts = sorted(str(p) for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
  assert len(scripts) == 3
  subprocess.run([pathlib.Path(sys.executable).with_name("shellcheck"), *scripts], check=True)
  assert all(os.access(script, os.X_OK) for script in scripts if script.endswith(".sh"))


# tpu_pod.sh


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["start"], "'start'"),
    (["logs"], "--name is missing"),
    (["logs", "--name=G_1", POD[1]], "--name='G_1'"),
    (["logs", POD[0]], "--zone is missing"),
    (["create", *POD, TYPE[1]], "--accelerator-type is missing"),
    (["run", *POD, TYPE[0], "--", "true"], "--runtime-version is missing"),
    (["run", *POD, *TYPE], "the command is missing"),
    (["run", *POD, *TYPE, "--"], "the command is missing"),
    (["run", *POD, *TYPE, "true"], "'true'"),
    (["run", *POD, *TYPE, "--max-restarts=many", "--", "true"], "--max-restarts='many'"),
    (["delete", *POD, "--", "true"], "a command is for run alone"),
    (["delete", *POD, "--poll-seconds="], "--poll-seconds=''"),
    (["stop", "--name", "gfn"], "'--name'"),
  ],
)
def test_a_slip_gets_one_line_and_calls_nothing(machines, arguments, named):
  done = machines.script("tpu_pod.sh", *arguments)
  (line,) = done.stderr.splitlines()
  assert done.returncode == 2 and line.startswith("tpu_pod.sh: error: ") and named in line
  assert not machines.calls()


def test_without_gcloud(machines):
  (machines.folder / "bare").mkdir()
  (machines.folder / "bare" / "bash").symlink_to(shutil.which("bash"))
  done = machines.script("tpu_pod.sh", "status", *POD, env={"PATH": str(machines.folder / "bare")})
  assert (done.returncode, done.stderr) == (2, "tpu_pod.sh: error: gcloud is not installed\n")


def test_the_small_actions(machines):
  machines.plan(list=["ACTIVE", ""], ssh=[0])
  assert machines.pod("create", *TYPE, "--spot", "--project=p").returncode == 0
  assert machines.gcloud() == [[*CREATE[:-2], "--spot", *WHERE, "--project=p"]]
  assert machines.pod("delete").returncode == 0
  assert machines.gcloud() == [DELETE]
  assert machines.pod("stop").returncode == 0
  assert machines.gcloud() == [ssh("bash gfn_jax/launch/tpu_worker.sh stop")]
  assert machines.pod("logs", "--worker=3").returncode == 0
  assert machines.gcloud() == [ssh("tail -n 100 -F gfn_jax-run/log", worker=3)]
  assert [machines.pod("status").stdout for _ in range(2)] == ["ACTIVE\n", "MISSING\n"]
  assert machines.gcloud() == [LIST, LIST]


def test_a_dry_run_prints_what_a_run_would_call(machines):
  done = machines.run("--spot", "--dry-run", command=["python", *AWKWARD])
  assert done.returncode == 0 and not machines.calls()
  machines.plan(scp=[0], ssh=[0])
  pasted = f"git() {{ echo git $*; }}\n{done.stdout}"
  out = subprocess.run(["bash", "-ec", pasted], env=machines.env, check=True, capture_output=True, text=True).stdout
  bundle = re.search(rf"^git -C {machines.checkout} bundle create -q (/\S+/gfn_jax.bundle) HEAD$", out, re.M)[1]
  calls = machines.gcloud()
  assert [call[4] for call in calls] == ["create", "scp", "ssh", "ssh"]
  assert calls[0] == [*CREATE[:-2], "--spot", *WHERE]
  assert calls[1] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", bundle, "gfn:", "--worker=all", *WHERE]
  assert commands_run(calls) == [["python", *AWKWARD]]


def test_a_run_from_nothing_reaches_all_workers_word_for_word(machines):
  """Through bash's quoting, ssh's shell and the worker's script."""
  machines.plan(list=["", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
  print_all = "import os, sys; print([os.getcwd(), *sys.argv[1:]])"
  command = [sys.executable, "-c", print_all, *AWKWARD]
  done = machines.run(command=command)
  assert done.returncode == 0, done.stderr
  calls = machines.calls()
  gcloud = [call for call, _ in calls if call[0] == "gcloud"]
  assert [call[4] for call in gcloud] == ["list", "create", *["list"] * 4, "scp", "ssh", "ssh"]
  assert gcloud[1] == CREATE
  assert commands_run(gcloud) == [command]
  for i in range(2):
    folder = machines.folder / f"worker{i}"
    assert (folder / "gfn_jax-run" / "log").read_text() == f"{[str(folder / 'gfn_jax'), *AWKWARD]}\n"
    assert f"{[str(folder / 'gfn_jax'), *AWKWARD]}" in done.stdout  # two workers may write between each other's lines
    assert machines.git("rev-parse", "HEAD", cwd=folder / "gfn_jax") == machines.git("rev-parse", "HEAD")
  installed = sorted(call for call, _ in calls if call[0] in ("python3", "uv"))
  assert installed == 2 * [["python3", "-m", "pip", "install", "-q", "--user", "uv"]] + 2 * [
    ["uv", "pip", "install", "-q", "--python", "../gfn_jax-venv", "-e", ".[tpu]"]
  ] + 2 * [["uv", "venv", "-q", "--allow-existing", "--python", ">=3.11,<3.13", "../gfn_jax-venv"]]
  assert re.findall("is ([A-Z_]+)$", done.stderr, re.M) == [
    "MISSING",
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "ACTIVE",
  ]
  assert "launch/tpu_pod.sh delete --name=gfn --zone=us-east5-b" in done.stderr


def test_setup_again_brings_the_new_commit_and_leaves_what_is_not_committed(machines):
  assert machines.pod("setup").returncode == 0
  (machines.checkout / "new").write_text("x")
  machines.commit()
  (machines.checkout / "newer").write_text("x")
  done = machines.pod("setup")
  assert done.returncode == 0 and "uncommitted changes stay here" in done.stderr
  files = {p.name for p in (machines.folder / "worker1" / "gfn_jax").iterdir()}
  assert "new" in files and "newer" not in files
  assert [call[0] for call, _ in machines.calls()].count("python3") == 2  # uv is there the second time


def test_what_prepares_a_worker_runs_at_home_and_may_leave_a_daemon(machines):
  done = machines.pod(
    "setup", '--prepare=pwd >prepared; echo "it\'s" >>prepared; sleep 60 >sleep.log 2>&1 & echo $! >daemon'
  )
  assert done.returncode == 0, done.stderr
  workers = [machines.folder / f"worker{i}" for i in range(2)]
  try:
    assert [(w / "prepared").read_text() for w in workers] == [f"{w}\nit's\n" for w in workers]
    assert "a command is running" not in machines.pod("setup", "--prepare=exit 5").stdout
    assert machines.pod("setup", "--prepare=exit 5").returncode == 5
  finally:
    for worker in workers:
      os.kill(int((worker / "daemon").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("code", [2, 3])
def test_a_command_that_fails_on_a_pod_that_stands(machines, code):
  machines.plan(list=["ACTIVE"])
  done = machines.run(command=["bash", "-c", f"echo why; exit {code}"])
  assert done.returncode == code and "why" in done.stdout
  calls = machines.gcloud()
  assert len(commands_run(calls)) == 1 and not [c for c in calls if c[4] in ("create", "delete")]
  # Bad input is told after one look; for the rest the state is watched, since it follows a preemption late.
  assert [c[4] for c in calls].count("list") == (2 if code == 2 else 11)


def test_a_preempted_pod_is_made_again_and_the_command_goes_on(machines):
  machines.plan(
    list=["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACCEPTED", "ACTIVE", "FAILED", "FAILED", "ACTIVE"],
    scp=[0],
    ssh=[0, 143, 0, 255, 0, 0],
  )
  done = machines.run("--spot", command=["python", *AWKWARD])
  assert done.returncode == 0, done.stderr
  calls = machines.gcloud()
  assert commands_run(calls) == 3 * [["python", *AWKWARD]]
  changes = [c for c in calls if c[4] in ("create", "delete")]
  assert changes == 2 * [DELETE, [*CREATE[:-2], "--spot", *WHERE]]
  assert "gfn is lost: restart 1 of at most 20" in done.stderr and "restart 2 of" in done.stderr
  assert [c[4] for c in calls].count("scp") == 3  # each new pod is set up


def test_restarts_are_bounded(machines):
  machines.plan(list=["SUSPENDED"])
  done = machines.run("--max-restarts=2")
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == "tpu_pod.sh: gfn is lost; 2 restarts were made: giving up"
  assert len(machines.gcloud("create")) == 2


@pytest.mark.parametrize("states", [["", "ACCEPTED", "DELETING", ""], ["ACTIVE", "DELETING", ""]])
def test_a_pod_that_the_user_deletes_stays_deleted(machines, states):
  machines.plan(list=states, scp=[0], ssh=[0, 255])
  done = machines.run()
  assert done.returncode == 1 and done.stderr.endswith("tpu_pod.sh: someone deleted it: giving up\n")
  assert len(machines.gcloud("create")) == (1 if states[0] == "" else 0)


def test_a_lost_connection_is_made_again(machines):
  machines.plan(list=["ACTIVE"], scp=[0], ssh=[0, 255, 0, 0])
  done = machines.run()
  assert done.returncode == 0 and "the connection is lost: restart 1 of at most 20" in done.stderr
  calls = machines.gcloud()
  assert len(commands_run(calls)) == 2 and not [c for c in calls if c[4] in ("create", "delete")]


def test_a_command_that_was_told_to_end_on_a_pod_that_stands_goes_on(machines):
  """By maintenance of one of its machines: tpu_worker.sh exits with 75."""
  machines.plan(list=["ACTIVE"], scp=[0], ssh=[0, 75, 0, 0])
  done = machines.run()
  assert done.returncode == 0 and "a worker was told to end, and the command has saved: restart 1 of" in done.stderr
  assert len(commands_run(machines.gcloud())) == 2


@pytest.mark.parametrize("code", [1, 2])
def test_a_setup_that_fails(machines, code):
  """The first time it is the user's mistake; what has worked is tried again."""
  machines.plan(list=["ACTIVE"], scp=[0], ssh=[code])
  done = machines.run()
  assert done.returncode == code and done.stderr.endswith(
    f"exit code {code}: is gfn preempted?\ntpu_pod.sh: no: setup ended so, and the command was not run\n"
  )
  assert not commands_run(machines.gcloud())
  machines.plan(list=["ACTIVE"], scp=[0], ssh=[0, 255, code, 0, 0])
  done = machines.run()
  assert done.returncode == 0, done.stderr
  assert "setup failed, which has worked before: restart 2 of at most 20" in done.stderr
  assert len(commands_run(machines.gcloud())) == 2


def test_bad_input_is_believed_of_a_pod_that_stands(machines):
  """A process that meets no others, since the pod is going, ends as one whose input is bad."""
  machines.plan(list=["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "ACTIVE"], scp=[0], ssh=[0, 2, 0, 0])
  done = machines.run()
  assert done.returncode == 0 and "gfn is lost: restart 1 of at most 20" in done.stderr


def test_the_state_may_be_unknown_for_a_while(machines):
  machines.plan(list=[1, 1, 1, 1, "ACTIVE", 1])
  assert machines.run().returncode == 0
  done = machines.pod("status")
  assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "tpu_pod.sh: error: the state of gfn cannot be read")


def test_a_request_that_is_refused_ends_the_run(machines):
  machines.plan(list=[""], create=[1])
  assert machines.run().returncode == 1
  assert len(machines.gcloud("create")) == 1


class Worker:
  """tpu_worker.sh in a home of its own."""

  def __init__(self, machines):
    self.home = machines.folder / "worker0"
    self.state = self.home / "gfn_jax-run"
    self.env = machines.env | {"HOME": str(self.home)}
    (self.home / "gfn_jax").mkdir()
    (self.home / "gfn_jax-venv/bin").mkdir(parents=True)
    (self.home / "gfn_jax-venv/bin/activate").write_text("export ACTIVE=yes\n")

  def start(self, *arguments):
    command = [LAUNCH / "tpu_worker.sh", *arguments]
    return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def run(self, *arguments):
    process = self.start(*arguments)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


# Counts its starts; ends when it finds a file, or by SIGTERM with 143.
LONG = (
  "bash",
  "-c",
  "trap 'echo saved; exit 143' TERM; echo $ACTIVE >>starts; until test -e end; do sleep 0.05; done; echo end; exit 7",
)


def test_a_worker_follows_what_runs_and_starts_no_id_twice(machines):
  worker = Worker(machines)
  first = worker.start("run", "1", *LONG)
  wait_for((worker.home / "gfn_jax/starts").exists)
  first.kill()  # the connection is lost
  first.wait()
  second = worker.start("run", "1", *LONG)  # gcloud tries again
  third = worker.start("run", "2", *LONG)  # the user does
  wait_for(lambda: "following" in second.stdout.readline() and "following" in third.stdout.readline())
  code, output = worker.run("run", "3", "true")
  assert code == 2 and "another command is running, stop it first: bash -c" in output
  (worker.home / "gfn_jax/end").touch()
  assert [process.wait(timeout=60) for process in (second, third)] == [7, 7]
  assert second.stdout.read() == third.stdout.read() == "end\n"
  assert worker.run("run", "1", *LONG) == (7, "end\n")
  assert (worker.home / "gfn_jax/starts").read_text() == "yes\n"
  assert worker.run("run", "3", "bash", "-c", "echo new") == (0, "new\n")
  for process in (first, second, third):
    process.stdout.close()


def test_stop_lets_the_command_save(machines):
  worker = Worker(machines)
  code, output = worker.run("stop")
  assert code == 2 and "no command is running" in output
  process = worker.start("run", "1", *LONG)
  wait_for((worker.home / "gfn_jax/starts").exists)
  code, output = worker.run("stop")
  assert code == 0 and "the command has ended" in output
  assert (process.communicate(timeout=60)[0], process.returncode) == ("saved\n", 143)


def test_a_command_that_its_machine_ends_may_go_on(machines):
  worker = Worker(machines)
  process = worker.start("run", "1", *LONG)
  wait_for((worker.home / "gfn_jax/starts").exists)
  pid = worker.home / "gfn_jax-run/pid"
  wait_for(lambda: pid.exists() and pid.read_text())
  os.kill(int(pid.read_text()), signal.SIGTERM)
  assert (process.communicate(timeout=60)[0], process.returncode) == ("saved\n", 75)


def test_a_killed_command_and_a_worker_without_an_installation(machines):
  worker = Worker(machines)
  process = worker.start("run", "1", *LONG)
  wait_for((worker.home / "gfn_jax/starts").exists)
  os.killpg(os.getpgid(int((worker.state / "pid").read_text())), signal.SIGKILL)
  assert "killed" in process.communicate(timeout=60)[0] and process.returncode == 137
  shutil.rmtree(worker.home / "gfn_jax-venv")
  code, output = worker.run("run", "2", "true")
  assert code == 2 and "launch/tpu_pod.sh setup" in output


# slurm.sbatch

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}


def test_sbatch_options():
  options = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
  assert options == [
    "--job-name=gfn_jax", "--ntasks-per-node=1", "--output=%x-%j.log", "--open-mode=append", "--requeue",
    "--signal=B:USR1@300",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("job", "srun", "devices"),
  [
    ({}, [], "0,1,2,3"),
    ({"SLURM_GPUS_ON_NODE": "1"}, [], "0"),
    ({"SLURM_NTASKS_PER_NODE": "4"}, [], None),
    ({"SLURM_CPUS_PER_TASK": "16"}, ["--cpus-per-task=16"], "0,1,2,3"),
  ],
)
def test_a_slurm_job_starts_its_processes(machines, job, srun, devices):
  command = ["true", *AWKWARD]
  machines.plan(srun=[0])
  assert machines.script("slurm.sbatch", *command, env=machines.env | JOB | job).returncode == 0
  assert machines.calls() == [(["srun", *srun, *command], devices)]


@pytest.mark.parametrize(
  ("job", "command", "named"),
  [
    ({"SLURM_JOB_ID": ""}, ["true"], "not a job of Slurm"),
    ({}, [], "the command is missing"),
    ({}, ["no-such-program"], "'no-such-program'"),
    ({"SLURM_GPUS_ON_NODE": ""}, ["true"], "--gpus-per-node=N is missing"),
    ({"SLURM_NTASKS_PER_NODE": "2"}, ["true"], "--ntasks-per-node=2 with 4 GPUs"),
  ],
)
def test_a_slip_in_a_slurm_job(machines, job, command, named):
  done = machines.script("slurm.sbatch", *command, env=machines.env | JOB | job)
  (line,) = done.stderr.splitlines()
  assert done.returncode == 2 and line.startswith("slurm.sbatch: error: ") and named in line
  assert not machines.calls()


@pytest.mark.parametrize(
  ("sent", "code", "is_queued"),
  [
    (signal.SIGUSR1, 143, True),  # the time is nearly up
    (signal.SIGTERM, 143, False),  # preempted, which Slurm itself queues again; or cancelled
    (signal.SIGUSR1, 0, False),  # it finished just then
    (signal.SIGUSR1, 1, False),
    (None, 143, True),  # the processes were told by their machine's cloud
  ],
)
def test_a_slurm_job_whose_time_is_up_saves_and_queues_again(machines, sent, code, is_queued):
  ready = machines.folder / "ready"
  told = f"touch {ready}; while true; do sleep 0.05; done" if sent else f"touch {ready}; sleep 0.2; exit {code}"
  command = f"trap 'sleep 0.2; exit {code}' TERM; {told}"
  script = machines.checkout / "launch" / "slurm.sbatch"
  with subprocess.Popen(["bash", script, "bash", "-c", command], env=machines.env | JOB) as job:
    wait_for(ready.exists)
    if sent:
      job.send_signal(sent)
    assert job.wait(timeout=60) == code
  calls = [call for call, _ in machines.calls()]
  assert calls[1:] == ([["scontrol", "requeue", "7"]] if is_queued else [])


# gke_jobset.py

GKE = ("--name=gfn", "--image=i:1", "--claim=runs", "--accelerator=tpu-v6e-slice")


def gke(*arguments):
  return subprocess.run(
    [sys.executable, LAUNCH / "gke_jobset.py", *arguments], capture_output=True, text=True, timeout=60
  )


def check_jobset(jobset):
  schema = json.loads((REPOSITORY / "tests/jobset.schema.json").read_text())
  jsonschema.Draft202012Validator.check_schema(schema)
  jsonschema.validate(jobset, schema, jsonschema.Draft202012Validator)


def expanded(word):
  """As Kubernetes reads a word of a command: $(NAME) is a variable, $$ is a dollar."""
  return re.sub(r"\$\$|\$\(([-\w.]+)\)", lambda m: "EXPANDED" if m[1] else "$", word)


def test_the_jobset_is_valid_and_says_what_was_asked_for():
  command = ["python", *AWKWARD, "$(HOME)", "$$(HOME)", "$$$"]
  done = gke(*GKE, "--topology=4x4x8", "--slices=2", "--spot", "--", *command)
  jobset = yaml.safe_load(done.stdout)
  check_jobset(jobset)
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert jobset["metadata"]["name"] == "gfn" and replicated["replicas"] == 2
  assert job["parallelism"] == job["completions"] == 32  # hosts of four chips
  assert [expanded(word) for word in container["command"]] == command
  assert (container["image"], container["resources"]["limits"]) == ("i:1", {"google.com/tpu": 4})
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
  assert pod["volumes"][0]["name"] == container["volumeMounts"][0]["name"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x8",
    "cloud.google.com/gke-spot": "true",
  }


def test_the_schema_refuses_what_the_api_does_not_know():
  jobset = yaml.safe_load(gke(*GKE, "--topology=2x4", "--chips=8", "--", "true").stdout)
  check_jobset(jobset)
  assert "cloud.google.com/gke-spot" not in str(
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelector"]
  )
  assert jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 1
  jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["completion"] = 1
  with pytest.raises(jsonschema.ValidationError, match="'completion' was unexpected"):
    check_jobset(jobset)


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ([*GKE, "--", "true"], "--topology"),
    ([*GKE[:2], GKE[3], "--topology=4x4", "--", "true"], "--claim"),
    ([*GKE, "--topology=4x4"], "command"),
    ([*GKE, "--topology=4by4", "--", "true"], "'4by4'"),
    ([*GKE, "--topology=2x3", "--", "true"], "--chips=4"),
    ([*GKE, "--topology=4x4", "--chips=0", "--", "true"], "--chips=0"),
    ([*GKE, "--topology=4x4", "--slices=0", "--", "true"], "--slices=0"),
  ],
)
def test_a_slip_in_a_jobset(arguments, named):
  done = gke(*arguments)
  line = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and "error: " in line and named in line and not done.stdout


# README


def test_the_commands_of_the_readme(machines):
  """Each is what a user pastes; the fakes see what it means."""
  section = (REPOSITORY / "README.md").read_text().partition("## Pods, Slurm, Kubernetes\n")[2].partition("\n## ")[0]
  blocks = [
    "\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    .*\n)+", section, re.M)
  ]
  machines.plan(list=["ACTIVE"], ssh=[0], sbatch=[0], kubectl=[0])
  env = machines.env | {"PATH": f"{machines.folder}/bin:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
  for block in blocks:
    done = subprocess.run(["bash", "-euc", block], env=env, cwd=machines.checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
  calls = machines.calls()
  main = ["python", "-m", "gfn_jax.main", "--multihost"]
  (pod,) = commands_run([call for call, _ in calls if call[0] == "gcloud"])
  (sbatch,) = [call for call, _ in calls if call[0] == "sbatch"]
  (kubectl,) = [call for call in calls if call[0][0] == "kubectl"]
  assert pod[:4] == main
  assert sbatch[sbatch.index("launch/slurm.sbatch") + 1 :][:4] == main
  assert kubectl[0] == ["kubectl", "apply", "-f", "-"]
  jobset = yaml.safe_load(kubectl[1])
  check_jobset(jobset)
  assert (
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"][:4] == main
  )


# --multihost


def test_multihost_without_other_processes_fails_loudly():
  ((code, _, stderr),) = run_commands([["gfn_jax.main", "--multihost", "--config=configs/arith.py:smoke"]])
  assert_one_line(code, stderr, ["--multihost: jax.distributed.initialize failed: coordinator_address"])


def test_multihost_joins_the_processes_of_a_slurm_step(tmp_path):
  slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
  env = os.environ | slurm | {"PYTHONPATH": str(REPOSITORY)}
  code = "import jax; from gfn_jax import distributed; distributed.initialize(); assert jax.process_count() == 2"
  command = [sys.executable, "-c", code]
  processes = [
    subprocess.Popen(
      command,
      env=env | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
      cwd=tmp_path,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
