"""What training and evaluation are made of: the base model, its task, sampler, rewards and evaluations."""

from collections.abc import Sequence
import os

import jax
import ml_collections

from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.evaluators.suite import Suite
from gfn_jax.models import load_adapter, load_pretrained
from gfn_jax.models.hf import load_config
from gfn_jax.models.partition import shardings
from gfn_jax.parallel import grouped, is_split, mesh_of, place, replicated
from gfn_jax.tasks import make_task, require_abilities


def keep_programs() -> None:
  """Has JAX keep what it compiles for an accelerator, for the runs to come; JAX_COMPILATION_CACHE_DIR says otherwise.

  Not a CPU's: some of them refuse, in a message a program, what they have compiled themselves
  (https://github.com/jax-ml/jax/issues/38445). Before anything compiles.
  """
  if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/gfn_jax"))


def build(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> tuple[Parts, Suite]:
  """Loads and connects what a config names; nothing compiles but the reward's context.

  Args:
    devices: of this process; in groups of config.mesh.model each holds one copy of the base.

  Raises:
    ValueError: a slip of the user's, in one line.
  """
  require_abilities(config)
  keep_programs()
  devices = grouped(devices, config.mesh.model)
  where = lambda path: replicated(devices)  # noqa: E731
  if is_split(devices):
    where = shardings(load_config(config.model.name, config.model.revision), mesh_of(devices))
  pretrained = load_pretrained(
    config.model.name, config.model.dtype, revision=config.model.revision, quantization=config.model.quantization,
    shardings=where,
  )  # fmt: skip
  params = pretrained.params
  task = make_task(config, pretrained.tokenizer, pretrained.config.vocab_size)
  sampler = task.make_sampler(
    pretrained, params=params, max_length=config.sampler.max_length, min_length=config.sampler.min_length,
    devices=devices,
  )  # fmt: skip
  adapter = config.reward.adapter
  lora = None if adapter is None else place(load_adapter(adapter, pretrained), devices)
  reward = task.make_reward(config, pretrained, params, lora, devices)
  parts = Parts(config, pretrained, params, task, sampler, reward, devices)
  return parts, Suite(parts)
