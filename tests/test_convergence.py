"""Learning, where the answer is known: on a tree that can be enumerated the policy becomes R / Z.

Everything but the reward is what a run uses: sampler, policy scores, objective, `train_step`. The reward is an arbitrary
number for each Z, kept in a dict.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from enumeration import (
  STOP,
  FakeTool,
  allowed_tokens,
  every_z,
  scored,
  strings,
  total_variation,
)
from gfn_jax.models import LoraConfig, init_lora
from gfn_jax.parallel import DATA_AXIS, split
from gfn_jax.sampler import Sampler
from gfn_jax.train import StepSettings, train_step
from gfn_jax.types import Batch, TrainState
from testing import tiny_pretrained

MAX_LENGTH = 4
PROMPT = (5, 40, 7)
TEMPERATURES = np.array([1.0, 3.0])  # of two queries with the same prompt: the policy, and nearly uniform
NUM_SAMPLES = 64


def learn(loss_name="subtb", *, num_steps=700, min_length=0, with_tool=False, learning_rate=1e-2, subtb_lambda=1.0):
  """Trains an adapter on random rewards.

  Returns:
    (the tree scored by the policy that was learned, R / Z of its strings, log Z, metrics of the last step, the state).
  """
  pretrained = tiny_pretrained(seed=1, n_layer=3)
  model, params = pretrained.config, pretrained.params
  tool = FakeTool(model.vocab_size) if with_tool else None
  tree = every_z(MAX_LENGTH, tool)
  log_reward = 1.5 * np.random.default_rng(0).standard_normal(len(tree.length)) - 40.0
  reward_of = dict(zip(strings(tree), log_reward))

  sampler = Sampler(
    model, params, allowed_tokens=allowed_tokens(model.vocab_size), stop_token_id=STOP, max_length=MAX_LENGTH,
    min_length=min_length, tool=tool,
  )  # fmt: skip
  lora = init_lora(model, LoraConfig(rank=16, alpha=16.0, targets=tuple(model.projections())), jax.random.key(0))
  trained = {"lora": lora}
  if loss_name == "tb":
    trained["log_partition"] = jnp.full(1, -30.0)  # not at its value, but within reach
  rate = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.01)
  optimizer = optax.multi_transform(
    {"lora": optax.adam(rate, b2=0.99), "log_partition": optax.adam(0.1)}, lambda tree: {k: k for k in tree}
  )
  state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
  settings = StepSettings(
    model=model, loss_name=loss_name, subtb_lambda=subtb_lambda, num_samples=NUM_SAMPLES, num_micro_batches=1,
    max_length=MAX_LENGTH, stop_token_id=STOP, dropout=False,
  )  # fmt: skip
  devices = jax.local_devices()[:1]
  update = jax.pmap(
    functools.partial(train_step, settings, optimizer), axis_name=DATA_AXIS, in_axes=(None,) * 5 + (0,), out_axes=None,
    devices=devices,
  )  # fmt: skip
  prompt_tokens = np.array([PROMPT] * 2, np.int32)
  prompt_mask = np.ones(prompt_tokens.shape, bool)
  allowed, key = jnp.asarray(allowed_tokens(model.vocab_size)), jax.random.key(1)
  metrics = {}
  for step in range(num_steps):
    z = sampler(
      state.trained["lora"], prompt_tokens, prompt_mask, num_samples=NUM_SAMPLES, temperature=TEMPERATURES,
      key=jax.random.fold_in(key, step),
    )  # fmt: skip
    assert z.length.min() >= min_length
    terminable, zs = z.terminable, strings(z)
    log_reward_untempered = np.full(terminable.shape, np.nan, np.float32)  # unspecified where Z cannot stop
    for row, t in np.argwhere(terminable):
      log_reward_untempered[row, t] = reward_of[zs[row][:t]]  # KeyError: not a string of the tree
    batch = Batch(
      prompt_tokens, prompt_mask, np.zeros(2, np.int32), z.tokens, z.length, z.action_mask, terminable,
      log_reward_untempered,
    )  # fmt: skip
    state, metrics = update(params, allowed, jnp.float32(1.0), key, state, split(batch, devices))
  log_partition = np.logaddexp.reduce(log_reward)
  learned = scored(pretrained, state.trained["lora"], PROMPT, tree)
  return learned, np.exp(log_reward - log_partition), log_partition, metrics, state


@pytest.mark.parametrize(
  "variant",
  (
    {},
    {"min_length": 2},
    {"with_tool": True},
    {"min_length": 2, "with_tool": True},
    {"subtb_lambda": 0.9},
  ),
  ids=("plain", "min_length", "tool", "min_length_and_tool", "lambda"),
)
def test_subtb_learns_the_posterior(variant):
  """Short strings are never sampled under min_length, yet q gives them their share: every prefix is in the loss.

  With the tool the target is R restricted to the strings that agree with it.
  """
  tree, target, _, metrics, _ = learn(**variant)
  exact = np.exp(tree.log_q)
  assert abs(exact.sum() - 1) < 1e-5
  print(variant, total_variation(exact, target), metrics["loss"])
  assert total_variation(exact, target) < 0.01
