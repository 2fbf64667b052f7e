"""The command that makes the embedded LM, on its `:smoke` variant."""

import numpy as np
import pytest

from gfn_jax.models import load_pretrained, logits
from testing import REPOSITORY, run_python

CODE = """
import sys
sys.argv = ["pretrain", "--config=configs/pretrain_arith.py:smoke", "--output=OUTPUT"]
import runpy
runpy.run_module("gfn_jax.pretrain", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder, what the command said)."""
  folder = tmp_path_factory.mktemp("pretrain") / "lm"
  return folder, run_python(CODE.replace("OUTPUT", str(folder)))


def test_the_command_writes_a_model_that_loads(made):
  folder, said = made
  pretrained = load_pretrained(folder)
  assert pretrained.config.family == "gptj" and pretrained.licence == "mit"
  assert np.isfinite(np.asarray(logits(pretrained, np.array([[1, 2, 3]])))).all()
  assert "step 4/4  loss" in said and str(folder) in said.splitlines()[-1]


def test_numbers_signs_and_operators_are_tokens_of_their_own(made):
  for tokenizer in (load_pretrained(made[0]).tokenizer, load_pretrained("embedded/arith-2m").tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("Question: 6 - 0 = ? Answer: 6 - 0 = -12")]
    at = len(pieces) - 1 - pieces[::-1].index(" 6")
    assert pieces[at : at + 5] == [" 6", " -", " 0", " =", " -"] and "".join(pieces[at + 5 :]) == "12"


def test_the_embedded_model_is_small():
  folder = REPOSITORY / "gfn_jax" / "embedded" / "arith-2m"
  assert sum(p.stat().st_size for p in folder.iterdir()) <= 8e6
