"""One file a task: where X, Z and Y come from, how they are prompted, how an answer is checked."""

from typing import Any

from gfn_jax.named import load_named
from gfn_jax.task import Task
from gfn_jax.tasks.arith import ArithTask
from gfn_jax.tasks.infill import InfillTask
from gfn_jax.tasks.jsonl import JsonlTask
from gfn_jax.tasks.next_sentence import NextSentenceTask
from gfn_jax.tasks.rng import RngTask
from gfn_jax.tasks.subj import SubjTask

TASKS: dict[str, type[Task]] = {
  "arith": ArithTask,
  "infill": InfillTask,
  "jsonl": JsonlTask,
  "next_sentence": NextSentenceTask,
  "rng": RngTask,
  "subj": SubjTask,
}


def task_class(config: Any) -> type[Task]:
  """What `config.task` names: one of TASKS, or a user's own class as "package.module:Class".

  Raises:
    ValueError: an unknown one.
  """
  if ":" in config.task:
    found = load_named(config.task)
    if not (isinstance(found, type) and issubclass(found, Task)):
      raise ValueError(f"config.task {config.task!r} is no class derived from gfn_jax.task.Task")
    return found
  if config.task not in TASKS:
    raise ValueError(f"config.task {config.task!r} is unknown: choose from {', '.join(TASKS)}, or name module:Class")
  return TASKS[config.task]


def require_abilities(config: Any) -> None:
  """Raises ValueError where a config asks for what its task cannot do."""
  task = task_class(config)
  if config.data.test_path is not None and not task.reads_test_path:
    raise ValueError(f"config.data.test_path {config.data.test_path!r}: {task.__name__} has no reads_test_path")
  if config.em.num_rounds and not task.has_m_step:
    raise ValueError(f"config.em.num_rounds {config.em.num_rounds}: {task.__name__} has no has_m_step")


def make_task(config: Any, tokenizer: Any, vocab_size: int) -> Task:
  """The task of a config; as `task_class`, and as the task's constructor raises."""
  return task_class(config)(config, tokenizer, vocab_size)
