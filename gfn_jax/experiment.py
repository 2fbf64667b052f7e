"""What training and evaluation are made of: the base model, its task, sampler, rewards and evaluations."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np

from gfn_jax.evaluators.suite import Suite
from gfn_jax.models import Pretrained, load_pretrained
from gfn_jax.parallel import replicated
from gfn_jax.rewards import RewardModel
from gfn_jax.sampler import Sampler
from gfn_jax.tasks import make_task


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The parts that a config names. `params` are those of `pretrained`, on the devices."""

  pretrained: Pretrained
  params: dict
  task: Any
  sampler: Sampler
  reward_model: RewardModel
  suite: Suite


def build(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
  """Loads and connects them; nothing compiles but the reward's context.

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  pretrained = load_pretrained(
    config.model.name, config.model.dtype, revision=config.model.revision, quantization=config.model.quantization,
    shardings=lambda path: replicated(devices),
  )  # fmt: skip
  params = pretrained.params
  task = make_task(config, pretrained.tokenizer, pretrained.config.vocab_size)
  sampler = Sampler(
    pretrained.config, params, allowed_tokens=task.allowed_tokens, stop_token_id=task.stop_token_id, tool=task.tool,
    max_length=config.sampler.max_length, min_length=config.sampler.min_length, devices=devices,
  )  # fmt: skip
  reward_model = RewardModel(
    pretrained, params=params, context=np.array(task.context_tokens(config.reward.num_demonstrations), np.int32),
    num_replaced=len(task.start_tokens), allowed_tokens=task.allowed_tokens if config.reward.renormalize else None,
    devices=devices,
  )  # fmt: skip
  suite = Suite(config, task, pretrained, params, sampler, reward_model, devices)
  return Experiment(pretrained, params, task, sampler, reward_model, suite)
