"""One file a task: where X, Z and Y come from, how they are prompted, how an answer is checked."""

from typing import Any

from gfn_jax.tasks.arith import ArithTask

TASKS = {"arith": ArithTask}


def make_task(config: Any, tokenizer: Any, vocab_size: int) -> ArithTask:
  """The task that `config.task` names. Raises ValueError for an unknown one."""
  if config.task not in TASKS:
    raise ValueError(f"config.task {config.task!r} is unknown: choose from {', '.join(TASKS)}")
  return TASKS[config.task](config, tokenizer, vocab_size)
