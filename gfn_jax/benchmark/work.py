"""What a step's phases must compute, counted by hand from its trajectories: no padding, nothing twice.

Samples of a query share its prompt and, in the reward, their common prefixes. A token attends to itself and to what
stands before it. Logits are needed where a token or a stop is scored.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from jaxtyping import Bool, Int
import numpy as np

from gfn_jax.flops import backward_flops, forward_flops
from gfn_jax.models import LoraConfig
from gfn_jax.models.architectures import ModelConfig
from gfn_jax.prefix_tree import build_tree
from gfn_jax.types import Trajectory

ROOT = np.zeros(1, np.int32)  # stands for a prompt, which is counted apart


@dataclasses.dataclass(frozen=True)
class Pass:
  """A pass through the model, in sums over its rows.

  Attributes:
    tokens: that pass through the layers.
    pairs: of a token and a position that it attends to.
    outputs: positions whose logits are needed.
  """

  tokens: int = 0
  pairs: int = 0
  outputs: int = 0

  def __add__(self, other: "Pass") -> "Pass":
    return Pass(self.tokens + other.tokens, self.pairs + other.pairs, self.outputs + other.outputs)

  def _sizes(self) -> dict[str, float]:
    return {"tokens": self.tokens, "keys": self.pairs / max(1, self.tokens), "outputs": self.outputs}

  def forward(self, model: ModelConfig, lora: LoraConfig | None) -> float:
    """FLOPs."""
    return forward_flops(model, lora, **self._sizes())

  def with_gradient(self, model: ModelConfig, lora: LoraConfig) -> float:
    """FLOPs of the forward pass and of the adapter's gradient, nothing computed again."""
    return self.forward(model, lora) + backward_flops(model, lora, **self._sizes())


def prompts(length: Int[np.ndarray, "Q"], outputs: int = 1, before: int = 0) -> Pass:
  """Prompts, once each, behind `before` shared tokens; `outputs` of each."""
  n = length.astype(int)
  return Pass(int(n.sum()), int((n * before + n * (n + 1) // 2).sum()), outputs * len(n))


def samples(prompt_length: Int[np.ndarray, "B"], length: Int[np.ndarray, "B"], max_length: int) -> Pass:
  """Z behind their prompts, whose own outputs predict the first tokens; at max_length stopping is forced."""
  p, n = prompt_length.astype(int), length.astype(int)
  return Pass(int(n.sum()), int((n * p + n * (n + 1) // 2).sum()), int(np.minimum(n, max_length - 1).sum()))


def prefixes(
  prompt_length: Int[np.ndarray, "Q"], tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"], max_length: int
) -> Pass:
  """The distinct prefixes of each query's samples, behind its prompt; at max_length stopping is forced."""
  total, num_samples = Pass(), len(tokens) // len(prompt_length)
  for q, before in enumerate(prompt_length.astype(int).tolist()):
    rows = slice(q * num_samples, (q + 1) * num_samples)
    depths = build_tree(ROOT, tokens[rows], length[rows]).depths[1:]
    total += Pass(len(depths), int((before + depths).sum()), int((depths < max_length).sum()))
  return total


def rewards(
  prompt_length: Int[np.ndarray, "Q"],
  target_length: Int[np.ndarray, "Q L"],
  z: Trajectory,
  context: int,
  wanted: Bool[np.ndarray, "B S"],
) -> tuple[Pass, Pass]:
  """Trunk, prompts included, and branches: each target behind every distinct prefix that is wanted.

  A prior p(Z) is a pass of its own, and is not counted.

  Args:
    prompt_length: of X as the reward reads it; target_length: of Y and the rivals that it scores; 0 for none.
    z: B = Q * N samples; `wanted`: of their prefixes.
    context: tokens before every prompt, whose keys and values are there already.
  """
  trunk, branches = prompts(prompt_length, before=context), Pass()
  num_samples = len(z.tokens) // len(prompt_length)
  for q, targets in enumerate(target_length):
    rows = slice(q * num_samples, (q + 1) * num_samples)
    tree = build_tree(ROOT, z.tokens[rows], z.length[rows])
    before, depths, nodes = context + int(prompt_length[q]), tree.depths, len(tree) - 1
    trunk += Pass(nodes, int(nodes * before + depths.sum()), nodes)
    ends = np.unique(tree.node_of[wanted[rows]])
    for n in (targets[targets > 0] - 1).tolist():  # the trunk scores a target's first token
      branches += Pass(n * len(ends), int((n * (before + depths[ends]) + n * (n + 1) // 2).sum()), n * len(ends))
  return trunk, branches


def decode_trips(crowds: Sequence[int], active: Any, length: Any, after: Any) -> tuple[float, ...]:
  """How often the loops of a decoding round ran, one for each of its `crowds`; means over devices.

  Args:
    crowds: `sampler.crowds` of a device's q * N rows.
    active, length: [D, q, N], of the rows before the round. after: the `sampler.RolloutState` that it left.
  """
  grown = np.asarray(after.length) - length
  ended = ~(np.asarray(after.waiting) | np.asarray(after.active))
  stopped = active & ended & (np.asarray(after.length) < after.tokens.shape[-1])
  trips = -np.sort(-(grown + stopped).reshape(len(length), -1))  # of each row, the most first
  # A loop is over when no more rows are active than the next one takes.
  until = [trips[:, size].mean() for size in crowds[1:]] + [trips[:, 0].mean()]
  return tuple(np.diff(until, prepend=0.0).tolist())
