"""`python -m gfn_jax.export`: adapters out of runs, checkpoints and folders; and what a user's slips get."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax.checkpoint import Checkpoints
from gfn_jax.config import base_config, flatten
from gfn_jax.models import load_adapter, load_pretrained, logits, merge_lora, save_adapter, save_pretrained
from gfn_jax.types import TrainState
from testing import assert_one_line, damage_checkpoint, random_lora, run_commands, tiny_pretrained, tokens_and_mask

TARGETS = ("q_proj", "fc_out")
STEPS = {5: 1, 10: 2}  # step -> seed of its adapter

EXPORTS = {
  "newest of a run": ["--checkpoint={}/run", "--output={}/newest"],
  "one checkpoint": ["--checkpoint={}/run/checkpoints/5", "--output={}/deep/one"],
  "merged": ["--checkpoint={}/run", "--format=merged", "--output={}/merged"],
  "merged in bfloat16": ["--checkpoint={}/run", "--format=merged", "--dtype=bfloat16", "--output={}/half"],
  "a folder's adapter": ["--checkpoint={}/adapter", "--format=merged", "--output={}/of_adapter"],
  "a folder's adapter, copied": ["--checkpoint={}/anonymous", "--model={}/tiny", "--output={}/copied"],
  "a run whose newest checkpoint is damaged": ["--checkpoint={}/damaged", "--output={}/of_damaged"],
}
SLIPS = {
  # name: (arguments, what the line must hold)
  "nothing": ([], ["--checkpoint and --output are needed"]),
  "no output": (["--checkpoint={}/run"], ["--checkpoint and --output are needed"]),
  "no run there": (["--checkpoint={}/nothing", "--output={}/x"], ["--checkpoint={}/nothing is no run's workdir"]),
  "a folder that is no run": (["--checkpoint={}/tiny", "--output={}/x"], ["--checkpoint={}/tiny is no run's workdir"]),
  "a run without checkpoints": (["--checkpoint={}/early", "--output={}/x"], ["{}/early/checkpoints", "it has none"]),
  "a step that was not saved": (
    ["--checkpoint={}/run/checkpoints/7", "--output={}/x"],
    ["{}/run/checkpoints", "checkpoint 7", "5, 10"],
  ),
  "an output that is not empty": (["--checkpoint={}/run", "--output={}/tiny"], ["--output={}/tiny exists"]),
  "an output that is a file": (
    ["--checkpoint={}/run", "--output={}/tiny/config.json"],
    ["--output={}/tiny/config.json exists"],
  ),
  "an output below a file": (["--checkpoint={}/run", "--output={}/tiny/config.json/x"], ["{}/tiny/config.json"]),
  "an unknown format": (["--checkpoint={}/run", "--output={}/x", "--format=gguf"], ["format", "peft", "merged"]),
  "an unknown dtype": (["--checkpoint={}/run", "--output={}/x", "--dtype=int8"], ["dtype", "bfloat16"]),
  "an adapter that names no base": (["--checkpoint={}/anonymous", "--output={}/x"], ["{}/anonymous", "add --model"]),
  "an adapter of another model": (
    ["--checkpoint={}/adapter", "--model={}/wide", "--output={}/x"],
    ["{}/adapter does not fit {}/wide"],
  ),
  "a run of another model": (
    ["--checkpoint={}/run", "--model={}/wide", "--format=merged", "--output={}/x"],
    ["{}/run", "does not fit {}/wide"],
  ),
  "no model there": (["--checkpoint={}/run", "--model={}/nothing", "--output={}/x"], ["{}/nothing", "no folder"]),
  "a damaged config": (["--checkpoint={}/old", "--output={}/x"], ["{}/old/config.json", "lora.rank"]),
  "a config that is none": (["--checkpoint={}/listed", "--output={}/x"], ["{}/listed/config.json is damaged"]),
  "an argument too many": (["--checkpoint={}/run", "--output={}/x", "more"], ["'more'"]),
}


def adapter_of(step, pretrained):
  return random_lora(pretrained, TARGETS, seed=STEPS[step])


def write_run(workdir, pretrained, steps=tuple(STEPS), **fields):
  """What a run leaves that export reads."""
  config = base_config()
  config.model.name = pretrained.source
  config.lora.update({"rank": 4, "alpha": 8.0, "targets": TARGETS})
  workdir.mkdir()
  record = {"config": {k: v for k, v in (flatten(config) | fields).items() if v != "absent"}}
  (workdir / "config.json").write_text(json.dumps(record))
  checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
  for step in steps:
    trained = {"lora": adapter_of(step, pretrained)}
    checkpoints.save(step, TrainState(jnp.int32(step), trained, (jnp.zeros(3),)), {"tokens": np.arange(6)})
    checkpoints.wait()
  checkpoints.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Models, runs and adapters."""
  folder = tmp_path_factory.mktemp("export")
  tiny = dataclasses.replace(tiny_pretrained(), source=str(folder / "tiny"))
  save_pretrained(folder / "tiny", tiny)
  save_pretrained(folder / "wide", tiny_pretrained(n_embd=48))
  save_adapter(folder / "adapter", adapter_of(10, tiny), tiny)
  save_adapter(folder / "anonymous", adapter_of(10, tiny), dataclasses.replace(tiny, source=""))
  write_run(folder / "run", tiny)
  write_run(folder / "damaged", tiny)
  damage_checkpoint(folder / "damaged" / "checkpoints" / "10")
  write_run(folder / "early", tiny, steps=())
  write_run(folder / "old", tiny, steps=(), **{"lora.rank": "absent"})
  write_run(folder / "listed", tiny, steps=())
  (folder / "listed" / "config.json").write_text("[]")
  return folder


@pytest.fixture(scope="module")
def results(folder):
  """Name of an export or a slip -> (exit code, stdout, stderr)."""
  commands = EXPORTS | {name: arguments for name, (arguments, _) in SLIPS.items()}
  there = [["gfn_jax.export", *(a.replace("{}", str(folder)) for a in arguments)] for arguments in commands.values()]
  return dict(zip(commands, run_commands(there)))


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_gets_one_line_and_exit_code_2(case, results, folder):
  code, _, stderr = results[case]
  assert_one_line(code, stderr, [part.replace("{}", str(folder)) for part in SLIPS[case][1]])
  assert not (folder / "x").exists()


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_says_what_it_wrote(case, results):
  code, stdout, stderr = results[case]
  assert code == 0, stderr
  path = EXPORTS[case][-1].removeprefix("--output={}/")
  name = "model.safetensors" if "--format=merged" in EXPORTS[case] else "adapter_model.safetensors"
  assert f"{path}: " in stdout.splitlines()[-1] and name in stdout and "MB)" in stdout
  if "damaged" not in case:
    assert stderr == ""


@pytest.mark.parametrize(("output", "step"), (("newest", 10), ("deep/one", 5), ("of_damaged", 5), ("copied", 10)))
def test_adapters(results, folder, output, step):
  assert all(results[name][0] == 0 for name in EXPORTS)
  base = load_pretrained(folder / "tiny")
  ours, expected = load_adapter(folder / output, base), adapter_of(step, base)
  assert ours.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, ours.params, expected.params)
  named = json.loads((folder / output / "adapter_config.json").read_text())["base_model_name_or_path"]
  assert named == str(folder / "tiny")
  said = [line for line in results["newest of a run"][1].splitlines() if line.startswith("adapter of step")]
  assert said == ["adapter of step 10"]


@pytest.mark.parametrize("output", ("merged", "of_adapter"))
def test_merged_models(results, folder, output):
  assert all(results[name][0] == 0 for name in EXPORTS)
  base, merged = load_pretrained(folder / "tiny"), load_pretrained(folder / output)
  expected = merge_lora(base, adapter_of(10, base))
  jax.tree.map(np.testing.assert_array_equal, merged.params, expected.params)
  assert merged.tokenizer("6 - 0").input_ids == base.tokenizer("6 - 0").input_ids
  tokens, mask = tokens_and_mask(base.config.vocab_size)
  assert np.abs(logits(merged, tokens, mask) - logits(base, tokens, mask))[mask].max() > 0.1


def test_a_merged_model_in_bfloat16(results, folder):
  assert results["merged in bfloat16"][0] == 0
  half = load_pretrained(folder / "tiny", "bfloat16")
  expected = merge_lora(half, adapter_of(10, half))
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(folder / "half", "bfloat16").params, expected.params)
  assert json.loads((folder / "half" / "config.json").read_text())["dtype"] == "bfloat16"
