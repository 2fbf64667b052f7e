"""Learning, where the answer is known: on a tree that can be enumerated the policy becomes R / Z.

Everything but the reward is what a run uses: sampler, policy scores, objective, `train_step`. The reward is an
arbitrary number for each Z, kept in a dict.
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
  behaviour_probabilities,
  every_z,
  scored,
  strings,
  total_variation,
)
from gfn_jax.models import LoraConfig, init_lora
from gfn_jax.parallel import DATA_AXIS, split
from gfn_jax.prefix_tree import build_trees
from gfn_jax.rewards import Reward, RewardModel, whole_log_rewards
from gfn_jax.sampler import Sampler
from gfn_jax.step import StepSettings, train_step
from gfn_jax.types import Batch, Example, Queries, TrainState
from testing import tiny_pretrained

MAX_LENGTH = 4
PROMPT = (5, 40, 7)
TEMPERATURES = np.array([1.0, 3.0])  # of two queries with one prompt: the policy itself, and nearly uniform
NUM_SAMPLES = 64


@functools.cache
def base():
  return tiny_pretrained(seed=1, n_layer=3)


@functools.cache
def compiled_step(loss_name, num_steps):
  """(optimizer, one update mapped over one device), shared by the variants of an objective."""
  rate = optax.cosine_decay_schedule(1e-2, num_steps, alpha=0.01)
  optimizer = optax.multi_transform(
    {"lora": optax.adam(rate, b2=0.99), "log_partition": optax.adam(0.1)}, lambda tree: {k: k for k in tree}
  )
  settings = StepSettings(
    model=base().config, loss_name=loss_name, subtb_lambda=1.0, num_samples=NUM_SAMPLES, num_micro_batches=1,
    max_length=MAX_LENGTH, stop_token_id=STOP, dropout=False,
  )  # fmt: skip
  return optimizer, jax.pmap(
    functools.partial(train_step, settings, optimizer), axis_name=DATA_AXIS, in_axes=(None,) * 5 + (0,), out_axes=None,
    devices=jax.local_devices()[:1], donate_argnums=(4,),
  )  # fmt: skip


def tempered_log_reward(every, temperature):
  """log p_LM(Z stop | X) / T of every Z, as `rewards.Reward` gives it."""
  model = RewardModel(
    base(), context=np.zeros(0, np.int32), allowed_tokens=allowed_tokens(base().config.vocab_size), stop_token_id=STOP
  )
  prompt, nothing = np.array([PROMPT], np.int32), np.zeros((1, 1, 1), np.int32)
  examples = np.array([Example("", None, "", "")], object)
  queries = Queries(
    prompt, np.ones(prompt.shape, bool), prompt, np.ones(prompt.shape, bool), nothing, nothing.astype(bool), examples,
  )  # fmt: skip
  return whole_log_rewards(Reward(model), queries, every.tokens, every.length).astype(np.float64) / temperature


def learn(loss_name, num_steps, *, min_length=0, with_tool=False, temperature=None):
  """Trains an adapter on random rewards; with a temperature T, on p_LM(Z | X)^(1/T).

  Returns:
    (all Z scored by the policy that was learned, R / Z of each, log Z, the loss of the last step, the last state).
  """
  pretrained = base()
  model, params = pretrained.config, pretrained.params
  tool = FakeTool(model.vocab_size) if with_tool else None
  every = every_z(MAX_LENGTH, tool)
  log_reward = 1.5 * np.random.default_rng(0).standard_normal(len(every.length)) - 40.0
  if temperature is not None:
    log_reward = tempered_log_reward(every, temperature)
  reward_of = dict(zip(strings(every), log_reward))
  log_partition = np.logaddexp.reduce(log_reward)

  sampler = Sampler(
    model, params, allowed_tokens=allowed_tokens(model.vocab_size), stop_token_id=STOP, max_length=MAX_LENGTH,
    min_length=min_length, tool=tool,
  )  # fmt: skip
  lora = init_lora(model, LoraConfig(rank=16, alpha=16.0, targets=tuple(model.projections())), jax.random.key(0))
  trained = {"lora": lora}
  if loss_name == "tb":
    trained["log_partition"] = jnp.full(1, -30.0)  # near enough to be reached, far enough to be learned
  optimizer, update = compiled_step(loss_name, num_steps)
  state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
  prompt_tokens = np.array([PROMPT] * 2, np.int32)
  prompt_mask = np.ones(prompt_tokens.shape, bool)
  allowed, key = jnp.asarray(allowed_tokens(model.vocab_size)), jax.random.key(1)
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
      np.zeros(2, np.int32), z.tokens, z.length, z.action_mask, terminable,
      log_reward_untempered, build_trees(list(prompt_tokens), z.tokens, z.length, 192),
    )  # fmt: skip
    state, metrics = update(params, allowed, jnp.float32(1.0), key, state, split(batch, jax.local_devices()[:1]))
  learned = scored(pretrained, state.trained["lora"], PROMPT, every)
  return learned, np.exp(log_reward - log_partition), log_partition, float(metrics["loss"]), state


def distance(tree, target):
  """Total variation between the policy's exact distribution and R / Z."""
  exact = np.exp(tree.log_q)
  assert abs(exact.sum() - 1) < 1e-5
  return total_variation(exact, target)


@pytest.mark.parametrize(
  "num_steps, variant",
  (
    pytest.param(450, {}, id="plain"),
    pytest.param(450, {"min_length": 2}, marks=pytest.mark.slow, id="min_length"),
    pytest.param(700, {"with_tool": True}, marks=pytest.mark.slow, id="tool"),
  ),
)
def test_subtb_learns_the_posterior(num_steps, variant):
  """Under min_length short Z are never sampled, yet q gives them their share: every prefix is in the loss.

  With the tool, whose longer answer seldom fits, the target is R restricted to the Z that agree with it; that takes
  longer: 450 steps leave a distance of 0.012.
  """
  tree, target, *_ = learn("subtb", num_steps, **variant)
  assert distance(scored(base(), None, PROMPT, tree), target) > 0.3  # where it began
  assert distance(tree, target) < 0.01
  if "min_length" in variant:
    short = tree.length < 2
    assert target[short].sum() > 0.03
    np.testing.assert_allclose(np.exp(tree.log_q)[short], target[short], rtol=0.1)


def test_subtb_learns_the_tempered_distribution():
  """p_LM(Z | X)^(1/T) of whole texts, which is not what tempering each token gives."""
  temperature = 0.6
  tree, target, *_ = learn("subtb", 450, temperature=temperature)
  untouched = scored(base(), None, PROMPT, tree)
  assert distance(untouched, target) > 0.05
  assert total_variation(behaviour_probabilities(untouched, temperature), target) > 0.05
  assert distance(tree, target) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("loss_name, num_steps", (("tb", 900), ("vargrad", 500), ("db", 500)))
def test_other_objectives_learn_the_posterior(loss_name, num_steps):
  tree, target, log_partition, _, state = learn(loss_name, num_steps)
  assert distance(tree, target) < 0.05
  if loss_name == "tb":
    np.testing.assert_allclose(state.trained["log_partition"], log_partition, atol=0.1)
