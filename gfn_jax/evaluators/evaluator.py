"""What every evaluator is given, and what it gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import jax

from gfn_jax.data import query_table
from gfn_jax.evaluators.records import sample_records
from gfn_jax.models import Lora, Pretrained
from gfn_jax.parallel import Devices
from gfn_jax.sampler import Sampler
from gfn_jax.task import Task
from gfn_jax.types import Example


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run is made of, its config's parts connected.

  Attributes:
    config: the run's.
    pretrained: the base; `params`: its parameters as placed on `devices`, of this process.
    sampler: draws Z at the training length.
    reward: log R; called as `rewards.Reward` is.
  """

  config: Any
  pretrained: Pretrained
  params: dict
  task: Task
  sampler: Sampler
  reward: Any
  devices: Devices


Problems = Mapping[str, Sequence[Example]]  # kind -> examples; "" where there is one kind


class Draws:
  """What evaluators of one policy draw: once, where several ask for the same."""

  def __init__(self):
    self._asked, self._drawn = (), None

  def get(self, asked: tuple, draw: Callable[[], Any]) -> Any:
    """`draw()`, or what it gave when it was last called for these very objects."""
    if len(asked) != len(self._asked) or any(a is not b for a, b in zip(asked, self._asked)):
      self._asked, self._drawn = asked, draw()
    return self._drawn

  def forget(self) -> None:
    """Lets go of the last draw: it may be large."""
    self._asked, self._drawn = (), None


class Evaluator:
  """Measures one policy on held-out problems; a file of this folder each, named in config.eval.evaluators.

  Args:
    parts: of the run.
    context: tokens before every prompt (a base with demonstrations).
    draws: shared with the other evaluators behind this context; None for none.

  Attributes:
    needs: what it reads beyond `Task`: attributes of the task, and sections of the config as "config.rng".
    samples: what the last call leaves for samples.jsonl.
  """

  needs: tuple[str, ...] = ()

  def __init__(self, parts: Parts, context: Sequence[int] = (), draws: Draws | None = None):
    self._parts, self._context, self.samples = parts, list(context), []
    self._draws = Draws() if draws is None else draws

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields (metric, value), or (metric/kind, value), of the policy with this adapter (None: the base)."""
    raise NotImplementedError

  def baselines(
    self, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    """Yields (method, what a call would) for what is no policy of its own: other ways of decoding the base.

    `samples` are the method's once it has been iterated over.
    """
    del problems, key, on_round
    return iter(())

  def _sample(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None
  ) -> tuple[list[Example], list[dict]]:
    """The problems in one list, and a record of each of the config.eval.num_votes texts that a problem gets."""
    return self._draws.get((lora, problems, key), lambda: self._draw_records(lora, problems, key, on_round))

  def _draw_records(self, lora, problems, key, on_round):
    p, settings = self._parts, self._parts.config.eval
    examples = [e for kind in problems.values() for e in kind]
    reserved = settings.max_length + len(self._context)
    queries = query_table(examples, p.task, p.pretrained.config.max_positions, reserved)
    z = self._sampler().draw(
      lora, queries.prompt_tokens, queries.prompt_mask, num_samples=settings.num_votes,
      temperature=settings.temperature, key=key, on_round=on_round,
    )  # fmt: skip
    return examples, sample_records(p.task, p.reward, queries, z)

  def _sampler(self, **settings: Any) -> Sampler:
    """A sampler at the evaluation's length, behind the context."""
    p = self._parts
    defaults = {"max_length": p.config.eval.max_length, "min_length": p.config.sampler.min_length}
    return p.task.make_sampler(
      p.pretrained, params=p.params, context=self._context, devices=p.devices, **defaults | settings
    )
