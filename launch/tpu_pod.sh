#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU pod, and goes on with it after preemptions.
set -euo pipefail

usage() {
  cat <<'END'
launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [OPTION...] [-- COMMAND...]

  run      -- COMMAND: create unless it exists, setup, run COMMAND on all workers and show its output. A pod that was
           preempted is deleted and created again, and COMMAND runs again: its --workdir must outlive the pod. Where
           this script was interrupted, the same command line follows the run that is going on.
  create   request the pod, a queued resource with one node of the same name
  setup    copy the checkout's commit to all workers and install it there
  stop     SIGTERM to the command: it saves and exits
  logs     follow the command's output on one worker
  status   the queued resource's state
  delete   delete the pod and its request

  --accelerator-type=TYPE --runtime-version=VERSION   of create and run: v6e-8, v2-alpha-tpuv6e
  --spot              of create and run: cheaper, and can be preempted
  --prepare=SHELL     of run and setup: run on each worker after the installation, as what mounts the workdir's file
                      system. A new pod knows nothing of the old one; on an old one it runs again.
  --project=PROJECT   gcloud's default unless given
  --max-restarts=N    of run: how often it recreates or reconnects before it gives up [20]
  --poll-seconds=S    between two looks at the state [30]
  --worker=W          of logs [0]
  --dry-run           print the gcloud command lines, run none
END
}

say() { echo "tpu_pod.sh: $*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

call() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

create() {
  local tier=()
  ((!spot)) || tier=(--spot)
  call gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" "${tier[@]}" "${where[@]}"
}

delete() { call gcloud compute tpus queued-resources delete "$name" --force "${where[@]}"; }

list() {
  call gcloud compute tpus queued-resources list --filter="name ~ \"/$name\$\"" --format="value(state.state)" \
    "${where[@]}"
}

# ACTIVE, SUSPENDED, ... or MISSING. One look in five must succeed: a run of days outlives a network that is gone for
# a minute.
status() {
  local state try
  for try in 1 2 3 4 5; do
    if state=$(list); then
      echo "${state:-MISSING}"
      return
    fi
    ((try == 5)) || sleep "$poll_seconds"
  done
  fail "the state of $name cannot be read"
}

# on_workers WORKER COMMAND. The flags of ssh are for machines that vanish: it would wait for them for hours.
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oConnectTimeout=30 "${where[@]}"
}

# A bundle rather than a tar file: the workers know the commit, and a run writes it down.
setup() {
  local repository scratch code=0
  repository=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel) || return
  [[ -z $(git -C "$repository" status --porcelain) ]] || say "uncommitted changes stay here"
  scratch=$(mktemp -d) || return
  {
    call git -C "$repository" bundle create -q "$scratch/gfn_jax.bundle" HEAD &&
      call gcloud compute tpus tpu-vm scp "$scratch/gfn_jax.bundle" "$name:" --worker=all "${where[@]}" &&
      on_workers all "$install${prepare:+$'\n'(cd; $prepare) 9>&-}" # what it leaves running must not hold the lock
  } || code=$?
  rm -r "$scratch"
  return "$code"
}

# shellcheck disable=SC2016
install='
set -e; mkdir -p gfn_jax-run; exec 9>gfn_jax-run/lock
flock -n 9 || { echo "a command is running: nothing is installed"; exit 0; }
test -d gfn_jax || git init -q gfn_jax; cd gfn_jax
git fetch -q ../gfn_jax.bundle HEAD; git checkout -qf --detach FETCH_HEAD
test -x ~/.local/bin/uv || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
~/.local/bin/uv venv -q --allow-existing --python ">=3.11,<3.13" ../gfn_jax-venv
~/.local/bin/uv pip install -q --python ../gfn_jax-venv -e ".[tpu]"'

count_restart() {
  ((restarts++ < max_restarts)) || {
    say "$1; $max_restarts restarts were made: giving up"
    exit 1
  }
  say "$1: restart $restarts of at most $max_restarts"
}

# Returns when the pod can be used.
await_active() {
  local state last=
  while true; do
    state=$(status)
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    case $state in
      ACTIVE)
        known=1
        return
        ;;
      MISSING)
        ((!known)) || {
          say "someone deleted it: giving up"
          exit 1
        }
        create
        ;;
      SUSPENDED | FAILED)
        count_restart "$name is lost"
        delete
        create
        ;;
    esac
    known=1
    sleep "$poll_seconds"
  done
}

# Whether the pod is still there. Its state follows a preemption late: ten looks.
is_active() {
  local state look
  for look in {1..10}; do
    state=$(status) || exit
    [[ $state == ACTIVE ]] || return 1
    ((look == 10)) || sleep "$poll_seconds"
  done
}

# Words for the workers' login shell, whichever it is: printf %q would write for bash alone.
quote() {
  local word
  for word; do
    printf "'%s' " "${word//\'/\'\\\'\'}"
  done
}

run() {
  local command id code part can_be_set_up=0
  command=$(quote "$@")
  id=$(date +%s)-$$
  if ((dry_run)); then
    create
    setup
    on_workers all "bash gfn_jax/launch/tpu_worker.sh run $id-0 $command"
    return
  fi
  while true; do
    await_active
    code=0 part=setup
    if setup; then
      part=command can_be_set_up=1
      on_workers all "bash gfn_jax/launch/tpu_worker.sh run $id-$restarts $command" || code=$?
    else
      code=$?
    fi
    [[ $part-$code == command-[02] ]] || say "exit code $code: is $name preempted?"
    if ((code == 0)); then
      say "finished; the pod costs money until: launch/tpu_pod.sh delete --name=$name --zone=$zone"
      return
    elif [[ $part-$code == command-2 && $(status) == ACTIVE ]]; then # bad input, which no pod changes
      exit 2
    elif is_active; then
      case $part-$code in
        *-255) count_restart "the connection is lost" ;;
        command-75) count_restart "a worker was told to end, and the command has saved" ;;
        command-*)
          say "no: the command itself ended so"
          exit "$code"
          ;;
        setup-*)
          ((can_be_set_up)) || {
            say "no: setup ended so, and the command was not run"
            exit "$code"
          }
          count_restart "setup failed, which has worked before" # as where a package index is gone for a minute
          ;;
      esac
    fi
  done
}

name='' zone='' project='' prepare='' accelerator_type='' runtime_version=''
spot=0 dry_run=0 max_restarts=20 poll_seconds=30 worker=0 restarts=0 known=0

(($#)) || {
  usage >&2
  exit 2
}
action=$1
shift
case $action in
  run | create | setup | stop | logs | status | delete) ;;
  -h | --help | help)
    usage
    exit
    ;;
  *) fail "action '$action' is none of run, create, setup, stop, logs, status, delete" ;;
esac
while (($#)); do
  case $1 in
    --) break ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --name=* | --zone=* | --project=* | --prepare=* | --accelerator-type=* | --runtime-version=* | --max-restarts=* | \
      --poll-seconds=* | --worker=*)
      option=${1%%=*}
      option=${option#--}
      printf -v "${option//-/_}" %s "${1#*=}"
      ;;
    *) fail "argument '$1' is no option, as --name=gfn is; a command stands behind --" ;;
  esac
  shift
done
[[ -n $name ]] || fail "--name is missing: what the pod is called, as --name=gfn"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name='$name' may have lower case letters, digits and - alone"
[[ -n $zone ]] || fail "--zone is missing, as --zone=us-east5-b"
if [[ $action == run || $action == create ]]; then
  [[ -n $accelerator_type ]] || fail "--accelerator-type is missing, as --accelerator-type=v6e-8"
  [[ -n $runtime_version ]] || fail "--runtime-version is missing, as --runtime-version=v2-alpha-tpuv6e"
fi
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts='$max_restarts' is no whole number"
[[ $poll_seconds =~ ^[0-9]+$ ]] || fail "--poll-seconds='$poll_seconds' is no whole number"
if [[ $action == run ]]; then
  (($# > 1)) || fail "the command is missing, as: -- python -m gfn_jax.main --config=configs/arith.py --workdir=DIR"
  shift
else
  (($# == 0)) || fail "a command is for run alone"
fi
((dry_run)) || command -v gcloud >/dev/null || fail "gcloud is not installed"
where=(--zone="$zone" --quiet)
[[ -z $project ]] || where+=(--project="$project")

case $action in
  status) if ((dry_run)); then list; else status; fi ;;
  stop) on_workers all "bash gfn_jax/launch/tpu_worker.sh stop" ;;
  logs) on_workers "$worker" "tail -n 100 -F gfn_jax-run/log" ;;
  *) "$action" "$@" ;;
esac
