"""The evaluations of a run: held-out problems while training, test problems and baselines at the end."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from gfn_jax.data import num_sampled, query_table
from gfn_jax.evaluators.accuracy import Accuracy
from gfn_jax.evaluators.evaluator import Draws, Evaluator, Parts, Problems
from gfn_jax.evaluators.infills import Infills
from gfn_jax.evaluators.labels import Direct, Reasons
from gfn_jax.evaluators.numbers import Histogram, Numbers
from gfn_jax.evaluators.posterior import posterior_quality
from gfn_jax.evaluators.sentences import Sentences
from gfn_jax.evaluators.texts import Texts
from gfn_jax.models import Lora

EVALUATORS: dict[str, type[Evaluator]] = {
  "accuracy": Accuracy,
  "direct": Direct,
  "histogram": Histogram,
  "infills": Infills,
  "numbers": Numbers,
  "reasons": Reasons,
  "sentences": Sentences,
  "texts": Texts,
}
POSTERIOR_CALLS = 4  # of the sampler, for the posterior's quality

Evaluation = tuple[dict[str, float], list[dict]]  # result key -> value, and samples for samples.jsonl


def _with_cue(problems: Problems, cue: str) -> Problems:
  """The problems as a base reads them that is told, behind each prompt, how to begin; the reward is not."""

  cued = lambda e: dataclasses.replace(e, prompt=e.prompt + cue, reward_prompt=e.rewarded_prompt)  # noqa: E731
  return {kind: [cued(e) for e in examples] for kind, examples in problems.items()}


class Suite:
  """The evaluators that config.eval.evaluators (and, at the end, test_evaluators) name, and the posterior's quality.

  Problems are loaded here: bad files show early.

  Raises:
    ValueError: an evaluator that is unknown or does not fit the task, or problems that do not fit the model.
  """

  def __init__(self, parts: Parts):
    self._parts = parts
    config, task = parts.config, parts.task
    self._names = tuple(config.eval.evaluators), tuple(config.eval.test_evaluators)
    for name in sum(self._names, ()):
      if name not in EVALUATORS:
        raise ValueError(f"evaluator {name!r} of config.eval is unknown: choose from {', '.join(EVALUATORS)}")
      for needed in EVALUATORS[name].needs:
        has = needed.removeprefix("config.") in config if needed.startswith("config.") else hasattr(task, needed)
        if not has:
          raise ValueError(f"evaluator {name!r} of config.eval does not fit the task {task.name!r}, without {needed}")
    self._validation = task.validation_examples(config.eval.num_validation)
    if config.eval.num_validation and not any(self._validation.values()):
      raise ValueError(f"the task {task.name!r} has no validation problems: config.eval.num_validation must be 0")
    if (config.train.keep == "best" or config.train.patience) and not num_sampled(
      config.behavior, config.train.num_queries
    ):
      raise ValueError(
        "config.train.keep and config.train.patience go by held-out queries that are sampled as a step's are, and "
        f"config.behavior.buffer {config.behavior.buffer} of config.train.num_queries {config.train.num_queries} is all"
      )
    held_out = {"test": task.test_examples, "validation": task.validation_examples}
    self._test = held_out[config.eval.split](config.eval.num_test)
    self._shown = {k: task.context_tokens(k, config.seed) for k in config.eval.shots}
    self._cued = _with_cue(self._test, config.eval.zero_shot_cue) if config.eval.zero_shot_cue else {}
    empty = [k for k, context in self._shown.items() if not context]
    if empty:
      raise ValueError(f"config.eval.shots {empty[0]}: the task {task.name!r} has no demonstrations to show")
    in_reward = len(task.context_tokens(config.reward.num_demonstrations))
    shown = max(map(len, self._shown.values()), default=0)
    for problems, before in (((self._validation, self._test), max(in_reward, shown)), ((self._cued,), in_reward)):
      examples = [e for kinds in problems for kind in kinds.values() for e in kind]
      reserved = before + max(config.sampler.max_length, config.eval.max_length)
      if examples:
        query_table(examples, task, parts.pretrained.config.max_positions, reserved)  # refuses what does not fit
    self._draws = Draws()
    self._evaluators, self._test_evaluators = (self._make(names, (), self._draws) for names in self._names)

  def require_test_problems(self) -> None:
    """Raises ValueError where there are none: a run would have nothing to end with."""
    if not any(self._test.values()):
      raise ValueError(f"the task {self._parts.task.name!r} has no {self._parts.config.eval.split} problems")

  def _make(self, names: Sequence[str], context: Sequence[int], draws: Draws) -> list[Evaluator]:
    return [EVALUATORS[name](self._parts, context, draws) for name in names]

  def _posterior(self, lora, reward_temperature, key, on_round) -> Iterator[tuple[str, float]]:
    examples = [e for group in zip(*self._validation.values()) for e in group]
    # As many at a time as a training step samples: the same shapes, so nothing new is compiled.
    config = self._parts.config
    at_once = num_sampled(config.behavior, config.train.num_queries)
    if at_once and examples:
      calls = min(max(1, len(examples) // at_once), POSTERIOR_CALLS)
      taken = itertools.islice(itertools.cycle(examples), calls * at_once)  # fewer than a call's are taken again
      yield from posterior_quality(
        lora, self._parts, list(taken), num_calls=calls, num_samples=config.sampler.num_samples,
        reward_temperature=reward_temperature, key=key, on_round=on_round,
      )  # fmt: skip

  def validate(
    self, lora: Lora, reward_temperature: float, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Evaluation:
    """Held-out metrics and posterior quality while training: "arith/validation/accuracy/3", ..."""
    values, samples = {}, []
    for evaluator in self._evaluators:
      values |= dict(evaluator(lora, self._validation, key, on_round))
      samples += evaluator.samples
    self._draws.forget()
    values |= self._posterior(lora, reward_temperature, key, on_round)
    return {f"{self._parts.task.name}/validation/{k}": v for k, v in values.items()}, samples

  def test(
    self,
    lora: Lora | None,
    reward_temperature: float,
    key: jax.Array,
    on_round: Callable[[], None] | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[str, Callable[[], Evaluation]], Evaluation] = lambda name, measure: measure(),
  ) -> Evaluation:
    """Test metrics of the policy, of the base, and of the base as it is prompted: "arith/gfn/accuracy/3", ...

    Args:
      lora: the policy's adapter; None for the base alone.
      keep: gives what a row measures, by its name: `KeptRows.get`, or by default the measurement itself.
    """
    self.require_test_problems()
    results, samples = {}, []
    for name, measure in self._rows(lora, reward_temperature, key, on_round, say):
      values, shown = keep(name, measure)
      results |= values
      samples += shown
    return {f"{self._parts.task.name}/{k}": v for k, v in results.items()}, samples

  def _rows(self, lora, reward_temperature, key, on_round, say) -> Iterator[tuple[str, Callable[[], Evaluation]]]:
    """What a test consists of, each with a name of its own: policies by evaluators, baselines, the posterior."""
    config = self._parts.config
    method = config.method
    policies = [] if lora is None else [(method, lora, (), self._test)]
    if config.eval.baselines or lora is None:
      off = jax.tree.map(jnp.zeros_like, lora)  # the base bit for bit, in the programs that the adapter has compiled
      policies += [("base", off, (), self._test)]
      policies += [("base_zero_shot", off, (), self._cued)] if self._cued else []
      policies += [(f"base_{k}shot", off, before, self._test) for k, before in self._shown.items()]
    names, own = sum(self._names, ()), self._evaluators + self._test_evaluators
    number = sum(map(len, self._test.values()))

    def measured(evaluator, method, metrics):
      values = {f"{method}/{k}": v for k, v in metrics}  # measured when it is iterated over
      return values, [{"method": method, **s} for s in evaluator.samples]

    for policy, adapter, before, problems in policies:
      say(f"testing {policy} on {number} problems")
      for name, evaluator in zip(names, self._make(names, before, Draws()) if before else own):
        metrics = evaluator(adapter, problems, key, on_round)
        yield f"{policy}/{name}", functools.partial(measured, evaluator, policy, metrics)
      self._draws.forget()
    if config.eval.baselines:
      for name, evaluator in zip(names, own):
        for baseline, metrics in evaluator.baselines(self._test, key, on_round):
          say(f"testing {baseline} on {number} problems")
          yield f"{name}/{baseline}", functools.partial(measured, evaluator, baseline, metrics)
    if lora is not None:
      quality = self._posterior(lora, reward_temperature, key, on_round)
      yield "posterior", lambda: ({f"{method}/{k}": v for k, v in quality}, [])
