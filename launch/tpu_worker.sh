#!/usr/bin/env bash
# The part of tpu_pod.sh that runs on each worker:
#   tpu_worker.sh run ID COMMAND...   starts COMMAND, shows its output, and exits with its exit code
#   tpu_worker.sh stop                sends it SIGTERM, and waits for it
# A command that ends with 143 without `stop` was told by its machine (maintenance, a reboot): run exits with 75, since
# it goes on when it is started again.
# The command does not end with the connection. Called again, which gcloud does by itself where ssh fails, run follows
# what is going on, and starts no ID twice.
set -euo pipefail

fail() {
  echo "$(hostname): error: $*" >&2
  exit 2
}

mkdir -p ~/gfn_jax-run
cd ~/gfn_jax-run
is_running() { ! flock -n lock true; } # the command's process holds the lock

start() {
  [[ -e ../gfn_jax-venv/bin/activate ]] || fail "nothing is installed here: launch/tpu_pod.sh setup"
  rm -f pid code stopped
  : >log
  # shellcheck disable=SC2016
  setsid flock lock bash -c '
    source ../gfn_jax-venv/bin/activate
    (cd ../gfn_jax && exec "$@") >>log 2>&1 &
    echo $! >pid
    wait $!
    echo $? >code' worker "$@" </dev/null >/dev/null 2>&1 &
  until [[ -s pid ]]; do sleep 0.1; done
}

run() {
  local id=$1 command lines=20
  shift
  printf -v command '%q ' "$@"
  if is_running; then
    [[ $command == "$(<command_line)" ]] || fail "another command is running, stop it first: $(<command_line)"
    echo "$(hostname): following the command that is running"
  elif [[ $id != "$(cat id 2>/dev/null)" ]]; then
    echo "$id" >id
    echo "$command" >command_line
    start "$@"
    lines=+1
  fi
  tail -n "$lines" -f --pid="$(<pid)" log
  for _ in {1..20}; do
    if [[ -s code ]]; then
      [[ $(<code) == 143 ]] || exit "$(<code)"
      # `stop` reaches the workers one after another, and the first one's processes tell all others.
      for _ in {1..100}; do
        [[ ! -e stopped ]] || exit 143
        sleep 0.1
      done
      exit 75
    fi
    sleep 0.1
  done
  echo "$(hostname): the command was killed" >&2
  exit 137
}

stop() {
  touch stopped
  is_running || fail "no command is running"
  for _ in {1..100}; do # what has just been started may have no number yet
    [[ ! -s pid ]] || break
    sleep 0.1
  done
  [[ -s pid ]] || fail "no command is running: something is being installed"
  kill -TERM "$(<pid)"
  flock -w 600 lock true || fail "the command is still running after 10 minutes"
  echo "$(hostname): the command has ended"
}

"$@"
