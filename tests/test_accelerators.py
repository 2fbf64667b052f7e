"""Names of slices."""

import pytest

from gfn_jax.accelerators import ACCELERATORS, read_slice


@pytest.mark.parametrize(
  ("name", "kind", "chips"),
  [("v5e-16", "v5e", 16), ("v6e-8", "v6e", 8), ("v4-32", "v4", 16), ("v5p-8", "v5p", 4), ("h200-8", "h200", 8)],
)
def test_a_name_tells_chips(name, kind, chips):
  assert read_slice(name) == (ACCELERATORS[kind], chips)


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("v9-8", ["'v9-8'", "NAME-COUNT", "v5e", "h100"]),
    ("v5e-", ["'v5e-'", "NAME-COUNT"]),
    ("v5e-0", ["'v5e-0'", "counts chips", "at least 1"]),
    ("v4-7", ["'v4-7'", "TensorCores, 2 a chip"]),
    ("h100-16", ["'h100-16'", "at most h100-8"]),
    ("v4-8194", ["at most v4-8192"]),
  ],
)
def test_a_slip_is_told(name, told):
  with pytest.raises(ValueError) as error:
    read_slice(name)
  assert all(part in str(error.value) for part in told), error.value


def test_a_product_is_the_bottleneck_before_the_memory_of_a_large_batch():
  """Rates in the order of magnitude that chips have: some hundred FLOPs for each byte of memory."""
  for accelerator in ACCELERATORS.values():
    assert 100 < accelerator.flops / accelerator.memory_bandwidth < 600
    assert 2 < accelerator.memory_bandwidth / accelerator.interconnect < 20
