"""What a user's slips get: exit code 2 and one line that names the value, from `python -m gfn_jax.main` itself."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from gfn_jax import cli
from gfn_jax.experiment import keep_programs
from gfn_jax.models import load_pretrained, save_adapter, save_pretrained
from gfn_jax.version import __version__
from testing import REPOSITORY, assert_one_line, random_lora, run_commands, tiny_hf_config, tiny_pretrained

ARITH = "--config=configs/arith.py"
SMOKE = "--config=configs/arith.py:smoke"


def run_main(*arguments, cwd=None):
  """`python -m gfn_jax.main` in a process of its own."""
  env = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "gfn_jax.main", *arguments]
  return subprocess.run(command, env=env, cwd=cwd or REPOSITORY, capture_output=True, text=True, timeout=120)


def test_version():
  done = run_main("--version")
  assert (done.returncode, done.stdout, done.stderr) == (0, f"gfn_jax {__version__}\n", "")


def test_no_config():
  done = run_main()
  assert_one_line(done.returncode, done.stderr, ["--config is missing", "--config=configs/arith.py"])


def test_unknown_variant():
  done = run_main("--config=configs/arith.py:tiny")
  assert_one_line(done.returncode, done.stderr, ["'tiny'", "smoke, smollm2, paper, reference"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Broken models, files and folders to name on the command line."""
  folder = tmp_path_factory.mktemp("cli")
  save_pretrained(folder / "damaged", tiny_pretrained())
  weights = folder / "damaged" / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:1000])
  arith = load_pretrained("embedded/arith-2m")
  save_adapter(folder / "adapter", random_lora(arith, ("q_proj", "v_proj")), arith)
  (folder / "hollow").mkdir()
  (folder / "hollow" / "config.json").write_text(json.dumps(tiny_hf_config()))
  (folder / "empty").mkdir()
  (folder / "file").write_text("")
  (folder / "broken.py").write_text("def get_config(:\n")
  (folder / "refuses.py").write_text("def get_config():\n  raise ValueError('no such day')\n")
  (folder / "unknown_key.py").write_text("def get_config():\n  return {}['train']\n")
  (folder / "unknown_name.py").write_text("def get_config():\n  return x\n")
  (folder / "list.py").write_text("def get_config():\n  return [1]\n")
  (folder / "listed").mkdir()
  (folder / "listed" / "config.json").write_text('{"config": [1]}')
  (folder / "other").mkdir()
  (folder / "other" / "config.json").write_text("{}")
  return folder


CASES = {
  # name: (arguments after the module's name, what the line must hold); {} is the folder above
  "missing config file": (["--config=configs/nothing.py"], ["'configs/nothing.py'", "does not exist"]),
  "config file after a space": (["--config", "configs/nothing.py:smoke"], ["'configs/nothing.py'", "does not exist"]),
  "config file that is no Python": (["--config={}/broken.py"], ["broken.py"]),
  "config that refuses": (["--config={}/refuses.py"], ["refuses.py: no such day"]),
  "config file with an unknown name": (["--config={}/unknown_name.py"], ["unknown_name.py: NameError", "'x'"]),
  "config file that returns something else": (["--config={}/list.py"], ["list", "ConfigDict"]),
  "config of another program": (["--config=configs/pretrain_arith.py"], ["no config of a run", "lacks config."]),
  "unknown field": (
    [ARITH, "--config.train.num_step=3"], ["--config.train.num_step: the config has no", 'Did you mean "num_steps"'],
  ),
  "unknown section": ([ARITH, "--config.trian.num_steps=3"], ["--config.trian.num_steps: the config has no 'trian'"]),
  "unknown field beside one that holds its name": (
    [ARITH, "--config.model.name=q", "--config.train.name=z"],
    ["--config.model.name or --config.train.name: the config has no 'name'"],
  ),
  "config file with an unknown key": (
    ["--config={}/unknown_key.py", "--config.train.num_steps=3"], ["unknown_key.py: KeyError: train"],
  ),
  "unknown field of another name": ([ARITH, "--config.nothing=3"], ["--config.nothing: the config has no 'nothing'"]),
  "value of a wrong type": ([ARITH, "--config.train.num_steps=many"], ["num_steps", "many"]),
  "unknown flag": ([ARITH, "--workdr=x"], ["workdr"]),
  "an argument too many": ([ARITH, "configs"], ["'configs'"]),
  "negative length": ([ARITH, "--config.sampler.max_length=-4"], ["config.sampler.max_length", "-4"]),
  "lengths the wrong way round": ([ARITH, "--config.sampler.min_length=400"], ["min_length 400", "max_length"]),
  "batch that does not divide": ([ARITH, "--config.train.micro_batch_queries=5"], ["num_queries", "queries 5"]),
  "unknown loss": ([ARITH, "--config.loss.name=l2"], ["'l2'", "subtb, tb, vargrad, db"]),
  "unwritable workdir": ([SMOKE, "--workdir={}/file/run"], ["{}/file/run", "cannot be written", "Not a directory"]),
  "remote workdir": ([SMOKE, "--workdir=s3://bucket/run"], ["'s3://bucket/run'", "no gs:// URL"]),
  "groups that devices do not fill": ([SMOKE, "--config.mesh.model=2"], ["config.mesh.model 2", "1 devices"]),
  "no device for a model": ([SMOKE, "--config.mesh.model=0"], ["config.mesh.model 0"]),
  "grpo of one sample": (
    [SMOKE, "--config.method=grpo", "--config.sampler.num_samples=1"], ["config.sampler.num_samples 1", "at least 2"],
  ),
  "negative shots": ([SMOKE, "--config.eval.shots=(-1,)"], ["config.eval.shots", "(-1,)", "positive"]),
  "too many shots": ([SMOKE, "--config.eval.shots=(60,)"], ["60 demonstrations", "config.eval.shots", "has 50"]),
  "damaged workdir": ([SMOKE, "--workdir={}/other"], ["{}/other/config.json", "damaged", "another folder"]),
  "workdir whose config is a list": ([SMOKE, "--workdir={}/listed"], ["{}/listed/config.json", "damaged"]),
  "rate that ends too early": ([ARITH, "--config.train.num_steps=500"], ["decay_steps 250", "num_steps 500"]),
  "too few queries to draw": ([SMOKE, "--config.data.num_seed_rationales=2"], ["num_queries 4", "only 2 queries"]),
  "model that does not exist": ([SMOKE, "--config.model.name={}/no/model"], ["{}/no/model", "no folder"]),
  "embedded model that does not exist": ([SMOKE, "--config.model.name=embedded/x"], ["'embedded/x'", "choose from"]),
  "model folder without config": ([SMOKE, "--config.model.name={}/empty"], ["{}/empty", "config.json"]),
  "model folder without weights": ([SMOKE, "--config.model.name={}/hollow"], ["{}/hollow", "model.safetensors"]),
  "damaged weights": ([SMOKE, "--config.model.name={}/damaged"], ["{}/damaged/model.safetensors", "damaged"]),
  "no test problems": (
    ["--config=configs/next_sentence.py:smoke", "--config.next_sentence.num_test=0"],
    ["'next_sentence'", "no test problems"],
  ),
  "unknown task": ([SMOKE, "--config.task=chess"], ["'chess'", "choose from arith"]),
  "unknown LoRA target": ([SMOKE, "--config.lora.targets=('q_prj',)"], ["q_prj", "q_proj"]),
  "adapter of another rank": ([SMOKE, "--config.lora.init_from={}/adapter"], ["config.lora.rank is 16", "{}/adapter"]),
  "adapter on other projections": (
    [SMOKE, "--config.lora.init_from={}/adapter", "--config.lora.rank=4", "--config.lora.alpha=8"],
    ["config.lora.targets is ('q', 'k', 'v', 'o')", "has ('q', 'v')"],
  ),
  "adapter that is not there": ([SMOKE, "--config.lora.init_from={}/empty"], ["{}/empty is no adapter"]),
  "data.path without files": ([SMOKE, "--config.data.path={}/empty"], ["{}/empty", "hw_1000.json"]),
  "missing test_path": ([SMOKE, "--config.data.test_path={}/no.json"], ["{}/no.json", "No such file"]),
  "evaluate: no adapter there": (["gfn_jax.evaluate", SMOKE, "--adapter={}/empty", "--output={}/r.json"], ["{}/empty"]),
  "evaluate: output in no folder": (["gfn_jax.evaluate", SMOKE, "--output={}/no/r.json"], ["{}/no", "does not exist"]),
  "evaluate: output cannot be written": (
    ["gfn_jax.evaluate", SMOKE, "--output=/proc/r.json"],
    ["/proc/r.json", "No such file"],
  ),
  "pretrain: unknown variant": (["gfn_jax.pretrain", "--config=configs/pretrain_arith.py:big"], ["'big'", "smoke"]),
  "evaluate: output is a folder": (["gfn_jax.evaluate", SMOKE, "--output={}/empty"], ["{}/empty", "is a folder"]),
}


@pytest.fixture(scope="module")
def results(folder):
  """Case -> (exit code, stdout, stderr)."""
  commands = []
  for arguments, _ in CASES.values():
    arguments = [a.replace("{}", str(folder)) for a in arguments]
    module = arguments.pop(0) if arguments[0].startswith("gfn_jax.") else "gfn_jax.main"
    if module == "gfn_jax.main" and not any(a.startswith("--workdir") for a in arguments):
      arguments.append(f"--workdir={folder}/run")
    if any(a.startswith((ARITH, "gfn_jax")) for a in arguments):
      arguments.append(f"--config.data.dir={folder}/tfds")
    commands.append([module, *arguments])
  return dict(zip(CASES, run_commands(commands)))


@pytest.mark.parametrize("case", CASES)
def test_a_slip_gets_one_line_and_exit_code_2(case, results, folder):
  code, _, stderr = results[case]
  assert_one_line(code, stderr, [part.replace("{}", str(folder)) for part in CASES[case][1]])


def test_a_refused_run_leaves_nothing_half_written(results, folder):
  del results
  run = folder / "run"
  assert not [p for p in run.rglob("*") if p.is_file()]
  assert (folder / "other" / "config.json").read_text() == "{}"
  assert not (folder / "r.json").exists()


def test_find_config_prefers_the_folders_own_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.find_config("configs/none.py:smoke") == "configs/none.py:smoke"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "arith.py").write_text("")
  assert cli.find_config("configs/arith.py:smoke") == "configs/arith.py:smoke"


def test_fail_prints_one_line_of_whatever_it_is_given(capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.fail(ValueError("two\n  lines"))
  assert stopped.value.code == 2
  assert re.fullmatch("error: two lines\n", capsys.readouterr().err)


def test_what_is_compiled_for_an_accelerator_is_kept(monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  found = []
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    for backend, named in (("cpu", None), ("tpu", "elsewhere"), ("tpu", None)):
      monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
      monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
      if named is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
      keep_programs()
      found.append(jax.config.jax_compilation_cache_dir)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  assert found == [None, None, str(pathlib.Path("~/.cache/gfn_jax").expanduser())]
