"""One file a task: where X, Z and Y come from, how they are prompted, how an answer is checked."""

from typing import Any

from gfn_jax.task import Task
from gfn_jax.tasks.arith import ArithTask
from gfn_jax.tasks.rng import RngTask

TASKS = {"arith": ArithTask, "rng": RngTask}


def make_task(config: Any, tokenizer: Any, vocab_size: int) -> Task:
  """The task that `config.task` names. Raises ValueError for an unknown one."""
  if config.task not in TASKS:
    raise ValueError(f"config.task {config.task!r} is unknown: choose from {', '.join(TASKS)}")
  return TASKS[config.task](config, tokenizer, vocab_size)
