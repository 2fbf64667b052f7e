"""The few dataclasses that travel between modules, and the legend of dimensions.

  B  trajectories, grouped by query: B = Q * N        Q  queries        N  samples of a query
  P  prompt tokens (left-padded)                      T  generated tokens (right-padded)
  S  prefixes of a trajectory: S = T + 1, the empty one first. T and S are never mixed
  G  bins of prefix trees                             U  nodes of a bin, or of a tree
  Y  target tokens                                    L  targets of a query: Y itself, then its rivals
  C  context tokens (demonstrations)                  V  vocabulary
  M  branches, targets behind prefixes, of a block    K  blocks of a bin
  D  devices

Masks are bool and True keeps. Every `log_` quantity is in nats. Fields are arrays of NumPy or JAX.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
  """One record of a task as text.

  Attributes:
    prompt: X as the policy reads it.
    rationale: a demonstration Z, or None.
    target: Y; "" where nothing follows Z.
    answer: what a right Z leads to; None where that is not known.
    reward_prompt: X as the reward reads it, where that is not the prompt; None where it is.
    rivals: targets that Y competes with (the other labels), all of them wrong.
  """

  prompt: str
  rationale: str | None
  target: str
  answer: str | None
  reward_prompt: str | None = None
  rivals: tuple[str, ...] = ()

  @property
  def rewarded_prompt(self) -> str:
    """X as the reward reads it."""
    return self.prompt if self.reward_prompt is None else self.reward_prompt


@dataclasses.dataclass(frozen=True)
class Queries:
  """Q examples in tokens, padded once for all.

  Attributes:
    prompt_tokens, prompt_mask: [Q, P], left-padded; X as the policy reads it.
    reward_prompt_tokens, reward_prompt_mask: [Q, P'], left-padded; X as the reward reads it.
    target_tokens, target_mask: [Q, L, Y], right-padded: Y, then its rivals; a query with fewer has empty ones.
    examples: [Q] of `Example`.
  """

  prompt_tokens: np.ndarray
  prompt_mask: np.ndarray
  reward_prompt_tokens: np.ndarray
  reward_prompt_mask: np.ndarray
  target_tokens: np.ndarray
  target_mask: np.ndarray
  examples: np.ndarray

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, ids: Any) -> "Queries":
    """The rows that an array or a slice picks."""
    return Queries(*(getattr(self, f.name)[ids] for f in dataclasses.fields(self)))


@flax.struct.dataclass
class Trajectory:
  """B rollouts Z.

  Attributes:
    tokens: int [B, T], right-padded.
    length: int [B], tokens of Z; the stop token is not one of them.
    action_mask: bool [B, T], True where the policy (or a demonstrator) chose the token, False where the tool wrote it
      and on padding.
    log_pf: float [B, T], log q(z_t | z_<t) of the policy that sampled, at temperature 1 over the allowed vocabulary; 0
      where action_mask is False.
    log_pterm: float [B, S], log q(stop | z_1:t); 0 at the maximum length, where stopping is forced, and past `length`.
  """

  tokens: Any
  length: Any
  action_mask: Any
  log_pf: Any
  log_pterm: Any

  @property
  def terminable(self) -> np.ndarray:
    """bool [B, S]; see `terminable_prefixes`."""
    return terminable_prefixes(self.length, self.action_mask)

  @property
  def log_q(self) -> np.ndarray:
    """float [B], log q(Z stop): what the policy chose, and its stop."""
    end = np.take_along_axis(np.asarray(self.log_pterm), np.asarray(self.length)[:, None], axis=1)[:, 0]
    return np.asarray(self.log_pf).sum(-1) + end

  def log_drawn(self, min_length: int) -> np.ndarray:
    """float [B], log-probability with which Z is drawn at temperature 1: log q, but that no stop comes before
    `min_length`."""
    log_stop = np.asarray(self.log_pterm, np.float64)[:, :min_length]
    chosen = np.asarray(self.action_mask)[:, :min_length]
    return self.log_q - np.where(chosen, np.log1p(-np.exp(np.minimum(log_stop, -1e-7))), 0.0).sum(-1)

  def rows(self, index) -> "Trajectory":
    """The rows that `index` picks."""
    return jax.tree.map(lambda x: x[index], self)

  def beginnings(self, length: Array) -> "Trajectory":
    """Of each row its first `length` tokens, int [B]."""
    prefixes, length = np.arange(np.shape(self.log_pterm)[1]), np.asarray(length, np.int32)
    behind, written = prefixes > length[:, None], prefixes[:-1] < length[:, None]
    tokens, chosen, log_pf = (np.where(written, x, 0) for x in (self.tokens, self.action_mask, self.log_pf))
    return Trajectory(tokens, length, chosen.astype(bool), log_pf, np.where(behind, 0, self.log_pterm))


def terminable_prefixes(length: Array, action_mask: Array) -> np.ndarray:
  """Where stopping is possible: prefixes up to `length`, but not before a token that the tool writes.

  Args:
    length: int [B].
    action_mask: bool [B, T].

  Returns:
    bool [B, S].
  """
  length, action_mask = np.asarray(length)[:, None], np.asarray(action_mask)
  prefixes = np.arange(action_mask.shape[1] + 1)
  inside = prefixes <= length
  before_tool = np.pad(~action_mask, ((0, 0), (0, 1))) & (prefixes < length)
  return inside & ~before_tool


@flax.struct.dataclass
class Trees:
  """The distinct prefixes of a batch's trajectories, behind their prompts: G bins of U nodes (see `prefix_tree`).

  Attributes:
    tokens: int [G, U], the last token of each node's text.
    parents: int [G, U].
    positions: int [G, U], tokens before it.
    ancestors: bool [G, U, U], which nodes stand on the way to a node, itself included.
    node_of: int [B, S], where the prefixes of each trajectory stand among the G U nodes of its share of the batch.
    num_bins: int [shares], how many bins of each share of the batch, from its first one, hold more than padding: of all
      as many as the fullest has, since groups of devices that hold a model together go through them together.
  """

  tokens: Any
  parents: Any
  positions: Any
  ancestors: Any
  node_of: Any
  num_bins: Any


@flax.struct.dataclass
class Acts:
  """What policy gradients know of a step's trajectories before they update: [B, S], of what is done at each prefix.

  Attributes:
    mask: bool, where the policy acts: it chose the next token, or to stop.
    log_prob: log q of the act under the policy that sampled, nats; log_reference: under the base.
    advantage: of the act. value: predicted at the prefix; value_target: what it should have been.
  """

  mask: Any
  log_prob: Any
  log_reference: Any
  advantage: Any
  value: Any
  value_target: Any


@flax.struct.dataclass
class Batch:
  """What one training step learns from. Leading axis Q (queries) or B = Q * N (rows, grouped by query).

  Attributes:
    query_ids: int [Q], rows of the training set.
    tokens, length, action_mask: as in `Trajectory`.
    terminable: bool [B, S], the prefixes that enter the objective: of those where stopping is possible, the ones that
      have been scored.
    log_reward_untempered: float [B, S].
    trees: of the trajectories' prefixes, behind their prompts.
    acts: of policy-gradient methods alone.
  """

  query_ids: Any
  tokens: Any
  length: Any
  action_mask: Any
  terminable: Any
  log_reward_untempered: Any
  trees: Trees
  acts: Acts | None = None


@flax.struct.dataclass
class TrainState:
  """Everything that an update changes.

  Attributes:
    step: int scalar, steps made.
    trained: {"lora": Lora}, with the loss that learns it {"log_partition": float [num_queries]}, with a critic
      {"value": its parameters}. In full fine-tuning: the model's parameters.
    opt_state: of optax, for `trained`.
  """

  step: Any
  trained: Any
  opt_state: Any


@flax.struct.dataclass
class LaggedState(TrainState):
  """A state whose next step is sampled by the adapter that the last one started from: config.train.max_staleness 1.

  Attributes:
    previous_lora: that adapter; before the first step, the one that it starts from. Its arrays are its own.
  """

  previous_lora: Any
