"""Which adapter a run leaves, and when it stops."""

import json

import ml_collections
import numpy as np
import pytest

from configs import arith
from gfn_jax import train
from gfn_jax.selection import Selection
from testing import random_lora, tiny_pretrained

METRIC = "arith/validation/log_ratio_variance"


def selection(folder, keep="best", patience=0, first_step=0):
  return Selection(ml_collections.ConfigDict({"keep": keep, "patience": patience}), folder, METRIC, first_step)


def remember(folder, values):
  """What metrics.jsonl holds after these evaluations, ten steps apart."""
  records = [{"step": 10 * (i + 1), METRIC: v} for i, v in enumerate(values)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"step": 5, "loss": 0.0}, *records]))


def test_the_best_adapter_is_kept_whatever_follows(tmp_path):
  pretrained = tiny_pretrained()
  found = selection(tmp_path)
  adapters = [random_lora(pretrained, seed=i) for i in range(3)]
  for step, value, lora in zip((10, 20, 30), (5.0, 2.0, 3.0), adapters):
    found.consider(step, {METRIC: value}, lora, pretrained)
  assert found.best_step == 20
  kept = found.load(pretrained)
  assert kept.config == adapters[1].config
  for name, leaves in adapters[1].params["layers"].items():
    for leaf, value in leaves.items():
      np.testing.assert_array_equal(kept.params["layers"][name][leaf], value)


@pytest.mark.parametrize(
  "values, patience, over",
  (
    ([5.0], 2, False),
    ([5.0, 6.0], 2, False),
    ([5.0, 6.0, 5.0], 2, True),  # no better is not better
    ([5.0, 6.0, 4.0], 2, False),
    ([5.0, 6.0, 4.0, 4.5, 4.1], 2, True),
    ([5.0, 6.0, 7.0, 8.0], 0, False),
    ([], 2, False),
  ),
)
def test_a_run_stops_after_so_many_evaluations_without_a_better_one(tmp_path, values, patience, over):
  remember(tmp_path, values)
  assert selection(tmp_path, patience=patience).is_over() == over


def test_a_run_that_goes_on_remembers(tmp_path):
  pretrained = tiny_pretrained()
  remember(tmp_path, [3.0, 1.0])
  found = selection(tmp_path)
  assert found.best_step == 20
  found.consider(30, {METRIC: 2.0}, random_lora(pretrained), pretrained)
  assert found.best_step == 20 and not (tmp_path / "best").exists()  # nothing was overwritten by a worse one


def test_evaluations_at_another_reward_temperature_do_not_count(tmp_path):
  """A base is exact at T = 1, so the spread of an adapter that has learned nothing would be the smallest."""
  pretrained = tiny_pretrained()
  remember(tmp_path, [0.1, 0.2, 5.0])
  found = selection(tmp_path, patience=1, first_step=30)
  assert found.best_step == 30 and not found.is_over()
  found = selection(tmp_path / "new", patience=1, first_step=30)
  for step, value in ((10, 0.1), (20, 0.2), (30, 5.0)):
    found.consider(step, {METRIC: value}, random_lora(pretrained), pretrained)
    assert not found.is_over()
  assert found.best_step == 30 and [p.name for p in (tmp_path / "new" / "best").iterdir()] == ["30"]


def test_where_annealing_ends():
  config = arith.get_config()  # 1.1 to 0.9 over 100 steps
  assert train._annealed_step(config) == 100
  assert train.reward_temperature(config, 100) == train.reward_temperature(config, config.train.num_steps)
  config.train.num_steps = 50  # its last temperature is that of its last step
  assert train._annealed_step(config) == 50
  config.reward.temperature_start = config.reward.temperature_end
  assert train._annealed_step(config) == 0


def test_a_better_adapter_that_was_forgotten_takes_no_others_place(tmp_path):
  """Of a step that a killed run had made after its last checkpoint."""
  pretrained = tiny_pretrained()
  adapters = {step: random_lora(pretrained, seed=step) for step in (10, 20)}
  found = selection(tmp_path)
  for step, value in ((10, 2.0), (20, 1.0)):
    found.consider(step, {METRIC: value}, adapters[step], pretrained)
  remember(tmp_path, [2.0])  # it goes on from step 10
  found = selection(tmp_path)
  found.consider(20, {METRIC: 3.0}, random_lora(pretrained, seed=2), pretrained)
  kept = found.load(pretrained).params["layers"]
  assert found.best_step == 10
  for name, leaves in adapters[10].params["layers"].items():
    for leaf, value in leaves.items():
      np.testing.assert_array_equal(kept[name][leaf], value)


@pytest.mark.parametrize("values", ({}, {METRIC: float("nan")}))
def test_a_spread_that_is_not_there_is_named(tmp_path, values):
  pretrained = tiny_pretrained()
  with pytest.raises(ValueError, match=f"go by {METRIC}, which is nan at step 10"):
    selection(tmp_path).consider(10, values, random_lora(pretrained), pretrained)
  selection(tmp_path, keep="last").consider(10, values, random_lora(pretrained), pretrained)  # nobody asks for it
