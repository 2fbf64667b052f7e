"""Which adapter a run leaves, and when it stops."""

import json

import ml_collections
import numpy as np
import pytest

from gfn_jax.selection import Selection
from testing import random_lora, tiny_pretrained

METRIC = "arith/validation/log_ratio_variance"


def selection(folder, keep="best", patience=0):
  return Selection(ml_collections.ConfigDict({"keep": keep, "patience": patience}), folder, METRIC)


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


@pytest.mark.parametrize("values", ({}, {METRIC: float("nan")}))
def test_a_spread_that_is_not_there_is_named(tmp_path, values):
  pretrained = tiny_pretrained()
  with pytest.raises(ValueError, match=f"go by {METRIC}, which is nan at step 10"):
    selection(tmp_path).consider(10, values, random_lora(pretrained), pretrained)
  selection(tmp_path, keep="last").consider(10, values, random_lora(pretrained), pretrained)  # nobody asks for it
