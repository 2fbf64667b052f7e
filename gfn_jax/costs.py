"""What a training step costs on a slice of accelerators: work by phase, counted by hand, and seconds from peak rates.

    work = step_work(config, layout, Lengths())     # phase -> Work of one device
    {name: seconds(w, layout) for name, w in work.items()}

A calculation, not a measurement. It counts what the programs compute, positions that a mask hides and what fills up
bins of prefix trees and calls among it, where no two samples of a query have a prefix in common. No phase waits for
another device or overlaps with communication, and the host (the calculator, prefix trees, replay) costs nothing.
"""

from collections.abc import Mapping
import dataclasses

import ml_collections
import numpy as np

from gfn_jax.config import num_micro_batches
from gfn_jax.data import num_sampled
from gfn_jax.flops import activation_bytes, adapter_bytes, backward_flops, decode_bytes, forward_flops
from gfn_jax.layouts import Layout
from gfn_jax.losses import PREFIX_LOSSES
from gfn_jax.models.architectures import lora_targets
from gfn_jax.models.lora import LoraConfig
from gfn_jax.prefix_tree import PADDING, bin_size, branches_of_bin, build_trees, fill_bins, unlike_samples
from gfn_jax.rewards import bins_of_call
from gfn_jax.shards import shard_of, summed_bytes, summed_gradient_bytes

# What a program reaches of a chip's peak rates.
MATMUL_EFFICIENCY = 0.4
BANDWIDTH_EFFICIENCY = 0.6  # of memory and of the interconnect

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens that a config does not tell, as GPT-2's and like tokenizers count them for arithmetic.

  Attributes:
    prompt: P, of a question of four operands to the next multiple of 8, with some room.
    context: before every prompt in the reward, of three demonstrations.
    target: Y.
  """

  prompt: int = 24
  context: int = 105
  target: int = 7


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does in one phase of a step.

  Attributes:
    flops: of matrix products.
    bytes: from and to its memory: weights, keys and values, operands and results of products.
    model_sums, data_sums: bytes that it puts into sums over the axes `model` and `data`.
  """

  flops: float = 0.0
  bytes: float = 0.0
  model_sums: float = 0.0
  data_sums: float = 0.0

  def __add__(self, other: "Work") -> "Work":
    return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, times: float) -> "Work":
    return Work(*(a * times for a in dataclasses.astuple(self)))


class _Passes:
  """Passes of one device's share through its part of the model."""

  def __init__(self, config: ml_collections.ConfigDict, layout: Layout):
    self._model, self._num_model, self._num_data = layout.model, layout.num_model, layout.num_data
    self._shard = shard_of(layout.model, layout.num_model)
    self._remat = config.model.remat
    self._itemsize = _ITEMSIZE[config.model.dtype]
    self._kernel_itemsize = 1 if config.model.quantization else self._itemsize
    targets = lora_targets(layout.model, tuple(config.lora.targets))
    self.lora = LoraConfig(config.lora.rank, config.lora.alpha, targets)

  def _read(self, lora: LoraConfig | None, keys: float) -> float:
    return decode_bytes(self._shard, lora, keys=keys, itemsize=self._itemsize, kernel_itemsize=self._kernel_itemsize)

  def forward(self, lora: LoraConfig | None, tokens: float, keys: float, outputs: float, cached: float = 0.0) -> Work:
    """One pass. Arguments as of `flops.forward_flops`; `cached`: earlier positions whose keys and values are read."""
    size = {"tokens": tokens, "keys": keys, "outputs": outputs}
    return Work(
      forward_flops(self._shard, lora, **size),
      self._read(lora, cached) + activation_bytes(self._shard, lora, **size, itemsize=self._itemsize),
      summed_bytes(self._model, lora, self._num_model, tokens=tokens),
    )

  def backward(self, tokens: float, keys: float, outputs: float) -> Work:
    """What the adapter's gradient adds to a pass: weights once more, and operands, results and their gradients."""
    lora, size = self.lora, {"tokens": tokens, "keys": keys, "outputs": outputs}
    again = self.forward(lora, tokens, keys, 0.0) if self._remat == "full" else Work()
    return Work(
      backward_flops(self._shard, lora, **size, remat=self._remat),
      self._read(lora, 0.0) + 2 * activation_bytes(self._shard, lora, **size, itemsize=self._itemsize) + again.bytes,
      summed_gradient_bytes(self._model, lora, self._num_model, tokens=tokens, outputs=outputs) + again.model_sums,
    )

  def training(self, tokens: float, keys: float, outputs: float) -> Work:
    """Forward and backward."""
    return self.forward(self.lora, tokens, keys, outputs) + self.backward(tokens, keys, outputs)

  def update(self) -> Work:
    """The gradient's sum over `data`, and AdamW: it reads parameter, gradient and two moments, and writes three."""
    size = adapter_bytes(self._shard, self.lora)
    return Work(bytes=7 * size, data_sums=size if self._num_data > 1 else 0.0)


def step_work(config: ml_collections.ConfigDict, layout: Layout, lengths: Lengths) -> Mapping[str, Work]:
  """Phase -> what one device does in it, in a step of method "gfn" in which all that can be replayed is.

  Every sample is as long as it can be and decoded in one round: calls of a tool, for which rows wait, add trips that
  read the weights again. Rewards are those of an LM; log p(Z), where a config has it, is a pass of its own, and rival
  targets are more branches: neither is counted.

  Args:
    config: of the run; its lora.targets fit the model. A split of the model is the same in all phases.
    layout: the devices.
    lengths: in tokens.
  """
  run, p, y = _Passes(config, layout), lengths.prompt, lengths.target
  samples, t = config.sampler.num_samples, config.sampler.max_length
  queries = config.train.num_queries // layout.num_data
  fresh = -(-num_sampled(config.behavior, config.train.num_queries) // layout.num_data)
  rows = fresh * samples

  decode = run.forward(run.lora, rows, p + t + 1, rows, cached=fresh * p + rows * t) * t

  # As `RewardModel` packs and scores them on accelerators, each call as its fullest.
  largest = bin_size(p, samples, t, layout.model.hidden_size, PADDING)
  # The whole sample among the prefixes that are wanted, and the trunk scores Y's first token.
  scored = 1 if config.loss.name not in PREFIX_LOSSES else config.loss.num_prefixes or t + 1
  wanted = np.tile(np.arange(t + 1) > t - scored, (rows, 1))
  bins, size = fill_bins(*unlike_samples(fresh, samples, p, t), largest, wanted, y - 1, PADDING)
  trunk, branch = Work(), Work()
  if bins:
    ends = (sum(min(len(x.tree) - p + 1, len(x.rows) * scored) for x in parts) for parts in bins)
    behind = branches_of_bin(max(ends)) * (y - 1)  # tokens of a bin's branches
    of_call = bins_of_call(len(bins), 1, max(size, behind), layout.model.vocab_size, PADDING)
    nodes, behind, keys, calls = of_call * size, of_call * behind, lengths.context + size, -(-len(bins) // of_call)
    trunk = run.forward(None, nodes, keys, nodes, cached=lengths.context) * calls
    if behind:
      branch = run.forward(None, behind, keys + y - 1, behind, cached=lengths.context + nodes) * calls

  micro = num_micro_batches(config, layout.num_data)
  trees = build_trees(*unlike_samples(queries // micro, samples, p, t), largest)
  loss_bins, loss_size = trees.tokens.shape
  loss = run.training(loss_bins * loss_size, loss_size, loss_bins * loss_size)
  return {
    "prefill": run.forward(run.lora, fresh * p, p, fresh),
    "decode": decode,
    "reward trunk": trunk,
    "reward branch": branch,
    "loss, forward + backward": loss * micro + run.update(),
  }


def compute_seconds(work: Work, layout: Layout) -> float:
  """Of products and memory, whichever takes longer."""
  chip = layout.accelerator
  return max(work.flops / (chip.flops * MATMUL_EFFICIENCY), work.bytes / (chip.memory_bandwidth * BANDWIDTH_EFFICIENCY))


def communication_seconds(work: Work, layout: Layout) -> float:
  """Of sums over rings of n devices, which send 2 (n - 1) / n of the bytes that each device puts in. No latency."""
  rings = ((work.model_sums, layout.num_model), (work.data_sums, layout.num_data))
  sent = sum(2 * (n - 1) / n * size for size, n in rings)
  return sent / (layout.accelerator.interconnect * BANDWIDTH_EFFICIENCY)


HEADER = (
  "phase", "TFLOPs", "GB of memory traffic", "seconds", "GB summed over model", "over data", "seconds of the sums",
)  # fmt: skip


def cost_table(config: ml_collections.ConfigDict, layout: Layout, lengths: Lengths) -> str:
  """Markdown: a row a phase, their sum, and what follows from it."""
  work = step_work(config, layout, lengths)
  rows, total, compute, communication = [], Work(), 0.0, 0.0
  for name, w in work.items():
    a, b = compute_seconds(w, layout), communication_seconds(w, layout)
    rows.append((name, w, a, b))
    total, compute, communication = total + w, compute + a, communication + b
  lines = [f"| {' | '.join(HEADER)} |", f"|---|{'---:|' * (len(HEADER) - 1)}"]
  for name, w, a, b in (*rows, ("sum", total, compute, communication)):
    numbers = (w.flops / 1e12, w.bytes / 1e9, a, w.model_sums / 1e9, w.data_sums / 1e9, b)
    lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in numbers)} |")
  step = compute + communication
  trajectories = config.train.num_queries * config.sampler.num_samples / step
  flops = total.flops * layout.num_devices
  return "\n".join((
    *lines, "",
    f"{layout.name} on {layout.devices}, {layout.split}: {step:.2f} s a step and {trajectories:.3g} trajectories a "
    f"second expected, {flops / 1e12:.4g} TFLOPs a step on all {layout.num_devices} devices.",
  ))  # fmt: skip


def memory_note(layout: Layout, used: float) -> str | None:
  """A line where the bytes `used` on each device are more than a chip has, else None."""
  memory = layout.accelerator.memory
  if used <= memory:
    return None
  return (
    f"{layout.name} does not fit {layout.devices} as {layout.split}: a step takes {used / 1e9:.2f} GB of a chip's "
    f"{memory / 1e9:.2f}."
  )


def notes(lengths: Lengths) -> str:
  """What the numbers hold, under the tables."""
  return (
    f"Calculated, not measured: work of one device in one step; {MATMUL_EFFICIENCY:.0%} of the chip's peak in bfloat16 "
    f"products and {BANDWIDTH_EFFICIENCY:.0%} of its memory's and its interconnect's bandwidth. Seconds of a phase are "
    "those of its products or of its memory traffic, whichever take longer; its sums come on top, without latency.\n"
    f"Every sample is as long as it can be, no two share a prefix, the reward's context has {lengths.context} tokens "
    f"and its targets {lengths.target}; the host and a tool's rounds are not counted. A model that is split over the "
    "chips of several processes is planned here, but not trained: config.mesh.model must divide those of each."
  )
