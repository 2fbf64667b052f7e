"""The evaluations of a run: held-out problems while training, test problems and baselines at the end."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gfn_jax.data import num_sampled, query_table
from gfn_jax.evaluators.accuracy import Accuracy
from gfn_jax.evaluators.posterior import posterior_quality
from gfn_jax.models import Lora, Pretrained
from gfn_jax.rewards import RewardModel
from gfn_jax.sampler import Sampler

POSTERIOR_CALLS = 4  # of the sampler, for the posterior's quality

Evaluation = tuple[dict[str, float], list[dict]]  # result key -> value, and samples for samples.jsonl


class Suite:
  """`config` is the run's; `sampler` draws at the training length. Problems are loaded here: bad files show early."""

  def __init__(
    self,
    config: Any,
    task: Any,
    pretrained: Pretrained,
    params: dict,
    sampler: Sampler,
    reward_model: RewardModel,
    devices: Sequence[jax.Device],
  ):
    self._config, self._task, self._pretrained, self._params = config, task, pretrained, params
    self._sampler, self._reward_model, self._devices = sampler, reward_model, devices
    self._validation = task.validation_examples(config.eval.num_validation)
    self._test = task.test_examples(config.eval.num_test)
    shown = len(task.context_tokens(config.reward.num_demonstrations))  # to the reward, and to the base
    reserved = shown + max(config.sampler.max_length, config.eval.max_length)
    examples = [e for kinds in (self._validation, self._test) for kind in kinds.values() for e in kind]
    query_table(examples, task, pretrained.config.max_positions, reserved)  # refuses what does not fit
    self._accuracy = self._make_accuracy(())

  def _make_accuracy(self, context: Sequence[int]) -> Accuracy:
    return Accuracy(
      self._task, self._pretrained, self._params, self._config.eval, min_length=self._config.sampler.min_length,
      reward_model=self._reward_model, context=context, devices=self._devices,
    )  # fmt: skip

  def _posterior(self, lora, reward_temperature, key, on_round) -> Iterator[tuple[str, float]]:
    examples = [e for group in zip(*self._validation.values()) for e in group]
    # As many at a time as a training step samples: the same shapes, so nothing new is compiled.
    train, devices = self._config.train, len(self._devices)
    at_once = num_sampled(self._config.behavior, train.num_queries, devices)
    calls = min(len(examples) // max(1, at_once), POSTERIOR_CALLS)
    if at_once and calls:
      yield from posterior_quality(
        lora, self._sampler, self._reward_model, self._task, examples[: calls * at_once],
        self._pretrained.config.max_positions, num_calls=calls, num_samples=self._config.sampler.num_samples,
        reward_temperature=reward_temperature, key=key, on_round=on_round,
      )  # fmt: skip

  def validate(
    self, lora: Lora, reward_temperature: float, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Evaluation:
    """Held-out accuracy and posterior quality while training: "arith/validation/accuracy/3", ..."""
    values = dict(self._accuracy(lora, self._validation, key, on_round))
    values |= self._posterior(lora, reward_temperature, key, on_round)
    return {f"{self._task.name}/validation/{k}": v for k, v in values.items()}, self._accuracy.samples

  def test(
    self,
    lora: Lora | None,
    reward_temperature: float,
    key: jax.Array,
    on_round: Callable[[], None] | None = None,
    say: Callable[[str], None] = print,
  ) -> Evaluation:
    """Test accuracy of the policy, of the base, and of the base with demonstrations: "arith/gfn/accuracy/3", ...

    Args:
      lora: the policy's adapter; None for the base alone.
    """
    task, config = self._task, self._config
    shots = config.reward.num_demonstrations
    rows = [] if lora is None else [(config.method, lora, ())]
    if config.eval.baselines or lora is None:
      off = jax.tree.map(jnp.zeros_like, lora)  # the base bit for bit, in the programs that the adapter has compiled
      rows += [("base", off, ())] + ([(f"base_{shots}shot", off, task.context_tokens(shots))] if shots else [])
    results, samples = {}, []
    for method, adapter, context in rows:
      say(f"testing {method} on {sum(map(len, self._test.values()))} problems, {config.eval.num_votes} samples each")
      accuracy = self._make_accuracy(context) if len(context) else self._accuracy
      values = dict(accuracy(adapter, self._test, key, on_round))
      results |= {f"{task.name}/{method}/{k}": v for k, v in values.items()}
      samples += [{"method": method, **s} for s in accuracy.samples]
    quality = dict(self._posterior(lora, reward_temperature, key, on_round)) if lora is not None else {}
    return results | {f"{task.name}/{config.method}/{k}": v for k, v in quality.items()}, samples
