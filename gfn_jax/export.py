"""An adapter out of a run, for PEFT or merged into its base.

python -m gfn_jax.export --checkpoint=runs/arith --format=merged --output=merged_model
"""


from absl import flags
import jax
import jax.numpy as jnp

from gfn_jax import cli
from gfn_jax.checkpoint import Checkpoints
from gfn_jax.files import Path, local_path, read_json, to_path
from gfn_jax.models import (
  Lora,
  LoraConfig,
  Pretrained,
  init_lora,
  load_adapter,
  load_pretrained,
  merge_lora,
  save_adapter,
  save_pretrained,
)
from gfn_jax.models.architectures import lora_targets
from gfn_jax.models.hf import DTYPES

FORMATS = ("peft", "merged")


def load_checkpoint(path: Path, model: str | None, dtype: str | None) -> tuple[Pretrained, Lora]:
  """The base and the adapter of a run.

  Args:
    path: a run's workdir (its newest whole checkpoint), one of its checkpoints (workdir/checkpoints/100), or a folder
      with a PEFT adapter.
    model: the base; None for the one that the run, or the adapter, names.
    dtype: of the base; None for the run's, or float32.

  Raises:
    ValueError: there is nothing of the kind at `path`.
  """
  if (path / "adapter_config.json").is_file():
    options = read_json(path / "adapter_config.json")
    named, revision = options.get("base_model_name_or_path"), options.get("revision")
    if not (model or named):
      raise ValueError(f"{path} does not name its base model: add --model")
    base = load_pretrained(model or named, dtype or "float32", revision=None if model else revision)
    return base, load_adapter(path, base)
  step = int(path.name) if path.name.isdecimal() and path.parent.name == "checkpoints" else None
  workdir = path if step is None else path.parent.parent
  if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
    raise ValueError(f"--checkpoint={path} is no run's workdir, none of its checkpoints and no adapter")
  config = read_json(workdir / "config.json").get("config", {})
  fields = ("model.name", "model.dtype", "lora.rank", "lora.alpha", "lora.targets", "lora.dropout")
  lacking = [f for f in fields if f not in config]
  if lacking:
    raise ValueError(f"{workdir / 'config.json'} is damaged: it lacks the field {lacking[0]!r}")
  name, its_dtype, rank, alpha, targets, dropout = (config[f] for f in fields)
  base = load_pretrained(model or name, dtype or its_dtype, revision=None if model else config.get("model.revision"))
  targets = lora_targets(base.config, tuple(targets))
  lora_config = LoraConfig(rank, alpha, targets, dropout, config.get("lora.rslora", False))
  checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
  try:
    found, steps = checkpoints.restore_adapter(step), checkpoints.steps()
  finally:
    checkpoints.close()
  if found is None:
    what = "checkpoint" if step is None else f"checkpoint {step}"
    have = ", ".join(map(str, steps)) or "none"
    raise ValueError(f"{workdir / 'checkpoints'} has no whole {what}: it has {have}")
  shapes = lambda layers: {n: {k: x.shape for k, x in leaves.items()} for n, leaves in layers.items()}  # noqa: E731
  wanted = shapes(jax.eval_shape(lambda: init_lora(base.config, lora_config, jax.random.key(0))).params["layers"])
  wrong = [n for n, leaves in wanted.items() if shapes(found[1]).get(n) != leaves]
  if wrong:
    raise ValueError(f"the adapter in {workdir} does not fit {base.source}: {wrong[0]} has other sizes")
  print(f"adapter of step {found[0]}")
  return base, Lora({"layers": jax.tree.map(jnp.asarray, found[1])}, lora_config)


def main() -> int:
  if _CHECKPOINT.value is None or _OUTPUT.value is None:
    raise ValueError("--checkpoint and --output are needed, as in --checkpoint=runs/arith --output=exported")
  output = local_path(_OUTPUT.value)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"--output={output} exists: name a new or empty folder")
  base, lora = load_checkpoint(to_path(_CHECKPOINT.value), _MODEL.value, _DTYPE.value)
  if _FORMAT.value == "peft":
    save_adapter(output, lora, base)
  else:
    save_pretrained(output, merge_lora(base, lora), dtype=str(jnp.dtype(base.params["embed"]["embedding"].dtype)))
  size = sum(p.stat().st_size for p in output.iterdir())
  print(f"{output}: {', '.join(sorted(p.name for p in output.iterdir()))} ({size / 1e6:.1f} MB)")
  return 0


if __name__ == "__main__":
  _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's workdir, one of its checkpoints, or an adapter.")
  _FORMAT = flags.DEFINE_enum("format", "peft", FORMATS, "An adapter for peft, or a whole model for transformers.")
  _OUTPUT = flags.DEFINE_string("output", None, "The folder to write.")
  _MODEL = flags.DEFINE_string("model", None, "The base, where it is not what the run or the adapter names.")
  _DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of a merged model; by default the run's, or float32.")
  cli.launch(main, needs_config=False)
