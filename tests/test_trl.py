"""PPO and GRPO against TRL: the methods of its trainers, called with a namespace in place of a trainer.

No version has both: the methods of PPO went with 0.12, which is why the extra `test` holds TRL at the one before, and
those of GRPO came later. They are tested too where a newer TRL is imported:

    pip install --no-deps --target=DIR trl==1.16.0 && PYTHONPATH=DIR pytest tests/test_trl.py
"""

from collections import defaultdict
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import losses
from gfn_jax.advantages import adapt_kl_coefficient, gae, group_advantages, whiten
from gfn_jax.types import Acts

torch = pytest.importorskip("torch")


def trainer_of(module, name):
  trainer = getattr(pytest.importorskip(module, exc_type=ImportError), name, None)
  return trainer or pytest.skip(f"this TRL has no {name}")


@pytest.fixture
def ppo():
  trainer = trainer_of("trl.trainer.ppo_trainer", "PPOTrainer")
  return trainer if hasattr(trainer, "compute_advantages") else pytest.skip("this TRL's PPO is one function")


@pytest.fixture
def grpo():
  return trainer_of("trl.trainer.grpo_trainer", "GRPOTrainer")


class Trainer(types.SimpleNamespace):
  """What a method asks of its trainer; None of all else."""

  def __getattr__(self, name):
    return None


def make_acts(seed):
  """Rows of 1 to 6 acts, padded on the right: the only gaps that TRL knows."""
  rng = np.random.default_rng(seed)
  length = np.array([6, 3, 1, 5])
  mask = np.arange(6) < length[:, None]
  log_prob, log_reference, advantage, value, target = (rng.normal(size=mask.shape) for _ in range(5))
  return Acts(mask, log_prob, log_reference, advantage, value, target), rng.normal(size=(2, *mask.shape))


def on_device(acts):
  return jax.tree.map(jnp.asarray, acts)


def tensors(*arrays):
  return [torch.tensor(np.asarray(x, np.float64)) for x in arrays]


@pytest.mark.parametrize("discount, gae_lambda", ((1.0, 0.95), (0.9, 0.8)))
def test_gae(ppo, discount, gae_lambda):
  acts, (rewards, _) = make_acts(0)
  config = types.SimpleNamespace(gamma=discount, lam=gae_lambda, whiten_rewards=False)
  _, advantages, returns = ppo.compute_advantages(Trainer(config=config), *tensors(acts.value, rewards, acts.mask))
  ours, targets = gae(rewards, acts.value, acts.mask, discount, gae_lambda)
  np.testing.assert_allclose(targets[acts.mask], returns.numpy()[acts.mask])
  number = acts.mask.sum()
  unbiased = np.sqrt((number - 1) / number)  # TRL divides by the sample deviation
  np.testing.assert_allclose(unbiased * whiten(ours, acts.mask)[acts.mask], advantages.numpy()[acts.mask])


def test_the_loss_of_ppo(ppo):
  acts, (log_prob, value) = make_acts(1)
  config = types.SimpleNamespace(cliprange=0.2, cliprange_value=0.3, vf_coef=1.0, ratio_threshold=np.inf)
  logits = np.zeros((*acts.mask.shape, 2))
  policy, values, _ = ppo.loss(
    Trainer(config=config), *tensors(acts.log_prob, acts.value, logits, value, log_prob, acts.mask, acts.advantage,
    acts.value_target),
  )  # fmt: skip
  ours, number = losses.ppo_terms(log_prob, value, on_device(acts), clip=0.2, value_clip=0.3)
  np.testing.assert_allclose(ours / number, policy + values, rtol=1e-5)


def test_the_kl_controller(ppo):
  del ppo
  from trl.trainer.utils import AdaptiveKLController

  theirs, ours = AdaptiveKLController(0.2, 6.0, 10_000), 0.2
  for kl in (0.0, 5.9, 6.0, 6.5, 100.0):
    theirs.update(kl, 256)
    ours = adapt_kl_coefficient(ours, kl, 6.0, 10_000, 256)
    assert ours == pytest.approx(theirs.value, rel=1e-12)


def test_the_loss_of_grpo(grpo):
  acts, (log_prob, _) = make_acts(2)
  advantage = acts.advantage[:, 0]
  acts = acts.replace(advantage=np.where(acts.mask, advantage[:, None], 0.0))
  accelerator = types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
  current, zeros = tensors(log_prob)[0], torch.zeros(acts.mask.shape)
  trainer = Trainer(
    accelerator=accelerator, args=Trainer(), beta=0.04, current_gradient_accumulation_steps=1, epsilon_low=0.2,
    epsilon_high=0.2, importance_sampling_level="token", loss_type="grpo", model=Trainer(training=True),
    top_entropy_quantile=1.0, _get_per_token_logps_and_entropies=lambda *_, **__: (current, zeros, None),
    _metrics={"train": defaultdict(list)},
  )  # fmt: skip
  (mask,) = tensors(acts.mask)
  names = ("completion_mask", "prompt_ids", "prompt_mask", "completion_ids")
  scores = dict(zip(
    ("old_per_token_logps", "ref_per_token_logps", "advantages"),
    tensors(acts.log_prob, acts.log_reference, advantage),
  ))  # fmt: skip
  theirs = grpo._compute_loss(trainer, None, dict.fromkeys(names, mask) | scores)
  ours, number = losses.grpo_terms(log_prob, on_device(acts), clip=0.2, kl_coefficient=0.04)
  np.testing.assert_allclose(ours / number, theirs, rtol=1e-5)


@pytest.mark.parametrize("scale", (False, True))
def test_the_advantages_of_grpo(grpo, scale):
  log_reward = np.random.default_rng(3).normal(-10, 3, size=6)
  one = [[0]] * len(log_reward)
  trainer = Trainer(
    accelerator=types.SimpleNamespace(device="cpu", process_index=0, gather=lambda x: x),
    args=types.SimpleNamespace(
      per_device_train_batch_size=6, steps_per_generation=1, gradient_accumulation_steps=1,
      gradient_checkpointing_kwargs=None,
    ),
    beta=0.0, model=Trainer(training=True), multi_objective_aggregation="sum_then_normalize", num_generations=3,
    num_iterations=1, reward_func_names=["log R"], reward_weights=torch.ones(1),
    scale_rewards="group" if scale else "none", _calculate_rewards=lambda *_: tensors(log_reward[:, None])[0],
    _generate=lambda prompts: (one, one, None, one, None, {}, None, None), _logs=defaultdict(lambda: defaultdict(list)),
    _metrics={"train": defaultdict(list)}, _pending_extra_logs={}, _pending_metrics={},
    _tokenizer=types.SimpleNamespace(pad_token_id=0),
  )  # fmt: skip
  trainer._logs |= {"prompt": [], "completion": [], "advantages": []}
  theirs = grpo._generate_and_score_completions(trainer, [{"prompt": ""}] * 6)["advantages"]
  np.testing.assert_allclose(group_advantages(log_reward, 3, scale), theirs, rtol=1e-6)
