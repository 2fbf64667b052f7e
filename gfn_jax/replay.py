"""The replay buffer: for every query, the best rationales met so far (paper section 3.3).

It lives on the host, and nothing in it is random: what it holds follows from what was added in which order, and what it
draws from that and the generator it is given.
"""

from collections.abc import Mapping
import dataclasses

from jaxtyping import Bool, Float, Int
import numpy as np
from rapidfuzz.distance import Levenshtein

from gfn_jax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Rationale:
  """One Z, padded to max_length."""

  text: str  # a character a token: comparing strings is several times faster than comparing lists
  score: float  # untempered log-reward of the whole Z
  tokens: np.ndarray
  action_mask: np.ndarray
  log_reward: np.ndarray


class ReplayBuffer:
  """Per query, the best `capacity` distinct rationales by untempered log-reward, best first.

  Two rationales a and b are near-duplicates if they are equal or their edit distance in tokens is below
  similarity * (len(a) + len(b)). Of those the better one stays; at a tie, the one that came first.
  """

  def __init__(self, capacity: int, similarity: float, max_length: int):
    """Args: `capacity` rationales a query; `similarity` in [0, 1], see above; `max_length` of a rationale, in tokens.

    Raises:
      ValueError: capacity < 1, similarity outside [0, 1] or max_length < 0.
    """
    if capacity < 1:
      raise ValueError(f"capacity={capacity} must be at least 1")
    if not 0 <= similarity <= 1:
      raise ValueError(f"similarity={similarity} must lie in [0, 1]")
    if max_length < 0:
      raise ValueError(f"max_length={max_length} must not be negative")
    self.capacity, self.similarity, self.max_length = capacity, similarity, max_length
    self._queries: dict[int, list[_Rationale]] = {}

  def __contains__(self, query_id: int | np.integer) -> bool:
    """Whether the query holds a rationale."""
    return int(query_id) in self._queries

  def __len__(self) -> int:
    """Rationales of all queries."""
    return sum(map(len, self._queries.values()))

  def add(
    self,
    query_id: int | np.integer,
    tokens: Int[Array, "N T"],
    length: Int[Array, "N"],
    action_mask: Bool[Array, "N T"],
    log_reward_untempered: Float[Array, "N S"],
  ) -> None:
    """Offers N rationales of one query, in order.

    A newcomer that beats all its near-duplicates takes their place, one that does not is dropped; then the worst over
    capacity goes.

    Args:
      query_id: row of the training set.
      tokens, length, action_mask: as in `types.Trajectory`.
      log_reward_untempered: nats; kept as it is up to `length`, NaN at prefixes that are not terminable included.

    Raises:
      ValueError: a length outside [0, min(T, max_length)], shapes that do not fit, or the log-reward of a whole Z (at
        index `length`) that is not finite. Nothing is added then.
    """
    tokens, length, action_mask = np.asarray(tokens), np.asarray(length), np.asarray(action_mask)
    log_reward = np.asarray(log_reward_untempered, np.float32)
    num_rows, num_tokens = tokens.shape
    shapes = (length.shape, action_mask.shape, log_reward.shape)
    if shapes != ((num_rows,), (num_rows, num_tokens), (num_rows, num_tokens + 1)):
      raise ValueError(f"shapes {shapes} of length, action_mask and log-reward do not fit tokens {tokens.shape}")
    longest = min(num_tokens, self.max_length)
    if (bad := (length < 0) | (length > longest)).any():
      raise ValueError(f"query {query_id}: length={length[bad][0]} must lie in [0, {longest}]")
    scores = log_reward[np.arange(num_rows), length]
    if (bad := ~np.isfinite(scores)).any():
      raise ValueError(f"query {query_id}: log-reward {scores[bad][0]} of a whole rationale must be finite")
    for row in range(num_rows):
      held = self._queries.get(int(query_id), [])
      score = float(scores[row])
      if len(held) == self.capacity and score <= held[-1].score:
        continue  # it could only be dropped
      kept = tokens[row, : length[row]]
      text = "".join(map(chr, kept.tolist()))
      near = [other for other in held if self._near(text, other.text)]
      if any(other.score >= score for other in near):
        continue
      new = _Rationale(
        text=text,
        score=score,
        tokens=_padded(kept, self.max_length, np.int32),
        action_mask=_padded(action_mask[row, : length[row]], self.max_length, bool),
        log_reward=_padded(log_reward[row, : length[row] + 1], self.max_length + 1, np.float32),
      )
      held = [other for other in held if other not in near] + [new]
      held.sort(key=lambda rationale: -rationale.score)  # stable: among equals the older one is safer
      self._queries[int(query_id)] = held[: self.capacity]

  def sample(
    self, query_id: int | np.integer, num_samples: int, rng: np.random.Generator, prioritized: bool
  ) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N"], Bool[np.ndarray, "N T"], Float[np.ndarray, "N S"]]:
    """Draws rationales of a query.

    Args:
      query_id: row of the training set.
      num_samples: N.
      rng: the only source of randomness; it is advanced.
      prioritized: in proportion to the untempered reward, with replacement; otherwise every one equally often, and what
        is left over of N uniformly.

    Returns:
      tokens, length, action_mask and untempered log-reward, T = max_length; 0 past a row's length.

    Raises:
      ValueError: the query holds nothing.
    """
    held = self._queries.get(int(query_id))
    if held is None:
      raise ValueError(f"query {query_id} has no rationale in the replay buffer")
    if prioritized:
      scores = np.array([rationale.score for rationale in held])
      weights = np.exp(scores - scores.max())
      drawn = rng.choice(len(held), num_samples, p=weights / weights.sum())
    else:
      drawn = np.resize(rng.permutation(len(held)), num_samples)
    arrays = self._stack([held[i] for i in drawn])
    return arrays["tokens"], arrays["length"], arrays["action_mask"], arrays["log_reward"]

  def log_partition_bounds(self, num_queries: int, reward_temperature: float) -> Float[np.ndarray, "Q"]:
    """Lower bounds of the queries' log Z, nats: log sum R^(1/T) over what it holds, which must be something.

    A query of which it holds nothing gets the mean of the others, which is a guess and no bound.
    """
    bounds = {
      q: np.logaddexp.reduce([rationale.score / reward_temperature for rationale in held])
      for q, held in self._queries.items()
    }
    mean = np.mean(list(bounds.values()))
    return np.array([bounds.get(q, mean) for q in range(num_queries)], np.float32)

  def to_arrays(self) -> dict[str, np.ndarray]:
    """The whole content for a checkpoint, E rationales by query and, within it, best first.

    Returns:
      query_ids int64 [E], tokens int32 [E, T], length int32 [E], action_mask bool [E, T], log_reward float32 [E, S].
    """
    ids = sorted(self._queries)
    content = self._stack([rationale for i in ids for rationale in self._queries[i]])
    return {"query_ids": np.repeat(np.array(ids, np.int64), [len(self._queries[i]) for i in ids]), **content}

  @classmethod
  def from_arrays(
    cls, arrays: Mapping[str, np.ndarray], *, capacity: int, similarity: float, max_length: int
  ) -> "ReplayBuffer":
    """A buffer that goes on exactly where the one that wrote `to_arrays` stood.

    Args:
      arrays: what `to_arrays` returned.
      capacity, similarity, max_length: as that buffer was made.

    Raises:
      ValueError: the arrays are of another max_length, or hold more than `capacity` rationales of a query.
    """
    buffer = cls(capacity, similarity, max_length)
    if (width := arrays["tokens"].shape[1]) != max_length:
      raise ValueError(f"max_length={max_length} differs from the stored buffer's {width}")
    for row, query_id in enumerate(np.asarray(arrays["query_ids"]).tolist()):
      length = int(arrays["length"][row])
      tokens, log_reward = np.array(arrays["tokens"][row]), np.array(arrays["log_reward"][row])
      rationale = _Rationale(
        text="".join(map(chr, tokens[:length].tolist())),
        score=float(log_reward[length]),
        tokens=tokens,
        action_mask=np.array(arrays["action_mask"][row]),
        log_reward=log_reward,
      )
      buffer._queries.setdefault(query_id, []).append(rationale)
    if (largest := max(map(len, buffer._queries.values()), default=0)) > capacity:
      raise ValueError(f"capacity={capacity} is below the {largest} rationales that the stored buffer holds of a query")
    return buffer

  def _near(self, a: str, b: str) -> bool:
    threshold = self.similarity * (len(a) + len(b))
    # The cutoff lets the comparison end early; it returns a larger number than that for anything farther.
    return a == b or Levenshtein.distance(a, b, score_cutoff=int(threshold) + 1) < threshold

  def _stack(self, rationales: list[_Rationale]) -> dict[str, np.ndarray]:
    count, width = len(rationales), self.max_length
    return {
      "tokens": np.array([r.tokens for r in rationales], np.int32).reshape(count, width),
      "length": np.array([len(r.text) for r in rationales], np.int32),
      "action_mask": np.array([r.action_mask for r in rationales], bool).reshape(count, width),
      "log_reward": np.array([r.log_reward for r in rationales], np.float32).reshape(count, width + 1),
    }


def _padded(row: np.ndarray, width: int, dtype: type) -> np.ndarray:
  out = np.zeros(width, dtype)
  out[: len(row)] = row
  return out
