"""The package as a user installs it: a wheel, another folder."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from testing import REPOSITORY

pytestmark = pytest.mark.slow


def check(*command, cwd, env=None):
  """Runs a command that must succeed; returns its stdout."""
  done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  # From a copy, since setuptools leaves its build folder in the source tree.
  tracked = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "gfn_jax", "configs"]
  source = folder / "source"
  source.mkdir()
  check("cp", "-r", *tracked, source, cwd=REPOSITORY)
  check(
    sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder
  )
  (file,) = folder.glob("gfn_jax-*.whl")
  return file


def test_the_wheel_holds_code_configs_the_embedded_model_and_data(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  modules = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "gfn_jax").rglob("*.py")}
  assert modules <= set(names)
  expected = {"gfn_jax/configs/arith.py", "gfn_jax/configs/pretrain_arith.py"}
  model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
  expected |= {f"gfn_jax/embedded/arith-2m/{name}" for name in model}
  data = REPOSITORY / "gfn_jax" / "embedded" / "data"
  expected |= {p.relative_to(REPOSITORY).as_posix() for p in data.rglob("*") if p.is_file()}
  assert expected <= set(names)
  assert not [n for n in names if n.startswith(("tests/", "configs/"))]
  assert wheel.stat().st_size < 10e6


def test_the_main_job_runs_from_another_folder(wheel, tmp_path):
  check(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
  python = tmp_path / "venv" / "bin" / "python"
  # Its dependencies are those of this environment, found after its own packages.
  own = pathlib.Path(check(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=tmp_path).strip())
  (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
  check(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # it compiles quickly
  where = check(python, "-c", "import gfn_jax.version as v; print(v.__file__)", cwd=elsewhere, env=env)
  assert pathlib.Path(where.strip()).is_relative_to(own)
  out = check(
    python, "-m", "gfn_jax.main", "--config=configs/arith.py:smoke", f"--config.data.dir={tmp_path}/tfds",
    "--config.train.num_steps=1", "--config.eval.num_validation=0", "--config.eval.baselines=False",
    cwd=elsewhere, env=env,
  )  # fmt: skip
  assert "embedded/arith-2m" in out
  assert (elsewhere / "runs" / "arith-smoke" / "results.json").is_file()
  assert sorted(p.name for p in elsewhere.iterdir()) == ["runs"]
  (elsewhere / "configs").mkdir()  # of a user's own
  named = "from gfn_jax.named import load_named as f; print(f('configs.six_words:SixWordsTask').__module__)"
  assert check(python, "-c", named, cwd=elsewhere, env=env).strip() == "gfn_jax.configs.six_words"
