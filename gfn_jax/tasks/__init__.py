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


def make_task(config: Any, tokenizer: Any, vocab_size: int) -> Task:
  """The task that `config.task` names: one of TASKS, or a user's own class as "package.module:Class".

  Raises:
    ValueError: an unknown one.
  """
  if ":" in config.task:
    return load_named(config.task)(config, tokenizer, vocab_size)
  if config.task not in TASKS:
    raise ValueError(f"config.task {config.task!r} is unknown: choose from {', '.join(TASKS)}, or name module:Class")
  return TASKS[config.task](config, tokenizer, vocab_size)
