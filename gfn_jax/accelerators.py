"""What accelerators can do at best, by their makers' public figures, and the names of slices of them: "v5e-16"."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One chip, which is one device of JAX.

  Attributes:
    flops: FLOP/s of dense bfloat16 matrix products.
    memory: bytes.
    memory_bandwidth: bytes/s.
    interconnect: bytes/s that it sends to the chips beside it, over all links together; makers count both directions.
    max_chips: that this interconnect joins: a pod, or the GPUs of a host.
    cores: TensorCores of a chip where a slice's name counts these, else 1.
    lone_host_chips: the most chips of a slice that is one host; in a slice of several, each has `chips_per_host`.
  """

  flops: float
  memory: float
  memory_bandwidth: float
  interconnect: float
  max_chips: int
  cores: int = 1
  lone_host_chips: int = 8
  chips_per_host: int = 8

  def chips_of_a_host(self, num_chips: int) -> int:
    """In a slice of so many."""
    return num_chips if num_chips <= self.lone_host_chips else self.chips_per_host


ACCELERATORS = {
  # https://cloud.google.com/tpu/docs/v4. Interconnect: 6 links of 50 GB/s, https://arxiv.org/abs/2304.01433, table 4.
  "v4": Accelerator(275e12, 32 * 2**30, 1200e9, 300e9, 4096, cores=2, lone_host_chips=4, chips_per_host=4),
  # https://cloud.google.com/tpu/docs/v5e: 400 GB/s in both directions.
  "v5e": Accelerator(197e12, 16e9, 819e9, 200e9, 256, chips_per_host=4),
  # https://cloud.google.com/tpu/docs/v5p: 1200 GB/s in both directions; 6144 chips are the largest job.
  "v5p": Accelerator(459e12, 95e9, 2765e9, 600e9, 6144, cores=2, lone_host_chips=4, chips_per_host=4),
  # https://cloud.google.com/tpu/docs/v6e: 800 GB/s in both directions.
  "v6e": Accelerator(918e12, 32e9, 1638e9, 400e9, 256, chips_per_host=4),
  # SXM, without sparsity, NVLink in one direction. https://www.nvidia.com/en-us/data-center/a100
  "a100": Accelerator(312e12, 80e9, 2039e9, 300e9, 8),
  # https://www.nvidia.com/en-us/data-center/h100
  "h100": Accelerator(989e12, 80e9, 3350e9, 450e9, 8),
  # https://www.nvidia.com/en-us/data-center/h200
  "h200": Accelerator(989e12, 141e9, 4800e9, 450e9, 8),
}


def read_slice(name: str) -> tuple[Accelerator, int]:
  """ "v5e-16" -> the accelerator, and how many chips.

  Raises:
    ValueError: no such name, a number that is no multiple of a chip's cores, or more chips than are joined.
  """
  match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", name)
  if not match or match[1] not in ACCELERATORS:
    raise ValueError(f"{name!r} is no slice: must be NAME-COUNT, where NAME is one of {', '.join(ACCELERATORS)}")
  accelerator, count = ACCELERATORS[match[1]], int(match[2])
  if count < 1 or count % accelerator.cores:
    counted = f"TensorCores, {accelerator.cores} a chip: a multiple of it" if accelerator.cores > 1 else "chips"
    raise ValueError(f"{name!r}: COUNT of {match[1]} counts {counted}, and must be at least {accelerator.cores}")
  if count // accelerator.cores > accelerator.max_chips:
    most = accelerator.max_chips * accelerator.cores
    raise ValueError(f"{name!r}: the interconnect of {match[1]} joins at most {match[1]}-{most}")
  return accelerator, count // accelerator.cores
