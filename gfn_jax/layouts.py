"""On which devices a run is planned: numbers of them, or slices of accelerators by name, and how they share a model."""

from collections.abc import Sequence
import dataclasses
import math

import ml_collections

from gfn_jax.accelerators import ACCELERATORS, Accelerator, read_slice
from gfn_jax.config import validate
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.partition import check_split, largest_split


@dataclasses.dataclass(frozen=True)
class Layout:
  """One row of a plan: a model, by name, on `num_devices` of which `num_model` hold one copy of it between them.

  `slice_name` and `accelerator` are those of a slice; None where the devices are a mere number.
  """

  name: str
  model: ModelConfig
  num_devices: int
  num_model: int
  slice_name: str | None = None
  accelerator: Accelerator | None = None

  @property
  def num_data(self) -> int:
    return self.num_devices // self.num_model

  @property
  def devices(self) -> str:
    """As the user names them."""
    return self.slice_name or str(self.num_devices)

  @property
  def split(self) -> str:
    """As a table shows it."""
    return f"{self.num_data} × {self.num_model}"


def read_devices(text: str, whole: str) -> tuple[int, str | None, Accelerator | None]:
  """ "8" or "v5e-16" -> devices, and the slice's name and accelerator.

  Raises:
    ValueError: it is neither. `whole` is the list that it stands in.
  """
  if text.isdecimal() and int(text):
    return int(text), None, None
  if "-" not in text.strip("-"):
    raise ValueError(
      f"--devices={whole}: {text!r} must be a number of devices, as in --devices=1,4,8, or a slice, as in "
      f"--devices=v5e-16, of {', '.join(ACCELERATORS)}"
    )
  try:
    accelerator, num_chips = read_slice(text)
  except ValueError as e:
    raise ValueError(f"--devices={whole}: {e}") from None
  return num_chips, text, accelerator


def make_layouts(
  models: dict[str, ModelConfig],
  config: ml_collections.ConfigDict,
  devices: Sequence[str],
  model_parallel: str,
  prompt_tokens: int,
) -> list[Layout]:
  """The rows of a plan, checked before anything starts.

  Args:
    models: by name.
    devices: numbers or names of slices, as text.
    model_parallel: "auto", config.mesh.model or, where that is 1, the largest split that the model and the devices of
      one host allow; or a number.
    prompt_tokens: P.

  Raises:
    ValueError: no number or slice where one must be, a model or a batch that cannot be split so, or tokens beyond the
      context; a slice for a method whose costs are not known.
  """
  if prompt_tokens < 1:
    raise ValueError(f"--prompt_tokens={prompt_tokens}: must be at least 1")
  if not devices:
    raise ValueError("--devices is empty: name at least one number of devices or slice, as in --devices=1,4,v5e-16")
  layouts = []
  for name, model in models.items():
    for text in devices:
      num_devices, slice_name, accelerator = read_devices(text, ",".join(devices))
      if accelerator and config.method != "gfn":
        raise ValueError(
          f"--devices={text}: seconds are known for config.method 'gfn' alone, not for {config.method!r}; name plain "
          f"numbers of devices, as in --devices={num_devices}, for its bytes"
        )
      if model_parallel == "auto" and config.mesh.model == 1:
        of_host = accelerator.chips_of_a_host(num_devices) if accelerator else num_devices
        num_model = largest_split(model, math.gcd(num_devices, of_host))
      elif model_parallel == "auto" and num_devices % config.mesh.model == 0:
        num_model = config.mesh.model
      elif model_parallel.isdecimal() and int(model_parallel) and num_devices % int(model_parallel) == 0:
        num_model = int(model_parallel)
      else:
        raise ValueError(
          f"--model_parallel={model_parallel}, config.mesh.model {config.mesh.model}: must be auto, or divide the "
          f"{num_devices} devices"
        )
      if prompt_tokens + config.sampler.max_length > model.max_positions:
        raise ValueError(
          f"--prompt_tokens={prompt_tokens} and Z of {config.sampler.max_length} exceed the {model.max_positions} "
          f"positions of {name}"
        )
      check_split(model, num_model)
      validate(config, num_devices // num_model)
      layouts.append(Layout(name, model, num_devices, num_model, slice_name, accelerator))
  return layouts


def split_note(name: str, model: ModelConfig) -> str:
  """Why a model is split over no more devices."""
  return (
    f"{name}: {model.num_heads} heads, {model.num_kv_heads} key-value heads and {model.mlp_size} MLP channels can be "
    f"split over {largest_split(model, 0)} devices or a divisor of that; what is left shares the data."
  )
