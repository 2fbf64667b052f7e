"""Checkpoints: what is saved comes back; what is damaged costs no more than itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax.checkpoint import Checkpoints
from testing import damage_checkpoint

LIKE = {"weights": np.zeros((3, 2), np.float32), "step": np.int32(0)}


def state(step):
  return {"weights": jnp.full((3, 2), float(step)), "step": jnp.int32(step)}


@pytest.fixture
def checkpoints(tmp_path):
  """Steps 1 to 3, the first with an empty buffer."""
  found = Checkpoints(tmp_path, keep=3)
  for step in (1, 2, 3):
    found.save(step, state(step), {"tokens": np.full((step - 1, 4), step)})
    found.wait()
  yield found
  found.close()


def steps(folder):
  return sorted(int(p.name) for p in folder.iterdir())


def test_the_newest_comes_back(checkpoints):
  step, restored, replay = checkpoints.restore(LIKE)
  assert step == 3 and int(restored["step"]) == 3
  np.testing.assert_array_equal(restored["weights"], np.full((3, 2), 3.0))
  np.testing.assert_array_equal(replay["tokens"], np.full((2, 4), 3))


def test_nothing_saved_is_nothing_restored(tmp_path):
  found = Checkpoints(tmp_path / "new", keep=1)
  assert found.restore(LIKE) is None
  found.close()


def test_damaged_ones_are_skipped_for_the_newest_whole_one_and_give_way(checkpoints, tmp_path):
  for step in (2, 3):
    damage_checkpoint(tmp_path / str(step))
  step, restored, replay = checkpoints.restore(LIKE)
  assert step == 1 and int(restored["step"]) == 1 and replay == {}
  assert steps(tmp_path) == [1]


def test_where_none_is_whole_all_stay_and_the_folder_is_named(checkpoints, tmp_path):
  for step in (1, 2, 3):
    damage_checkpoint(tmp_path / str(step))
  with pytest.raises(ValueError, match=rf"{tmp_path}: none of the checkpoints \[1, 2, 3\] can be read"):
    checkpoints.restore(LIKE)
  assert steps(tmp_path) == [1, 2, 3]
