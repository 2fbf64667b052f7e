"""The exact distribution of random numbers (paper section 2, Fig. 2), and a histogram of samples beside it."""

from collections.abc import Callable, Iterator, Mapping
import math

import jax
from jaxtyping import Float
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.evaluators import scoring
from gfn_jax.evaluators.evaluator import Evaluator, Parts, Problems
from gfn_jax.models import Lora
from gfn_jax.types import Queries


def number_log_probs(lora: Lora | None, parts: Parts) -> dict[int, float]:
  """log q(n stop | X) of every number of an rng task's support, nats, without sampling: its tokens are scored."""
  task, query = parts.task, _query(parts)
  return dict(zip(task.number_tokens, scoring.log_q(lora, parts, query, list(task.number_tokens.values())).tolist()))


def _query(parts: Parts) -> Queries:
  """The one prompt of an rng task."""
  task, room = parts.task, parts.pretrained.config.max_positions
  return query_table([task.example_of(task.prompt)], task, room, parts.config.sampler.max_length)


def distances(log_q: Float[np.ndarray, "K"], log_p: Float[np.ndarray, "K"]) -> dict[str, float]:
  """How far q is from the target p, both over the K numbers of the support; q may have mass elsewhere.

  Returns:
    valid_mass: q of the support. kl_q_target and kl_target_q: in nats, of q renormalised over the support (KL is
    infinite while any mass lies outside). total_variation: with that mass.
  """
  log_q, log_p = np.asarray(log_q, np.float64), np.asarray(log_p, np.float64)
  top = log_q.max()
  log_valid = top + np.log(np.exp(log_q - top).sum())
  q, p, difference = np.exp(log_q - log_valid), np.exp(log_p), log_q - log_valid - log_p
  return {
    "valid_mass": float(np.exp(log_valid)),
    "kl_q_target": float((q * difference).sum()),
    "kl_target_q": float(-(p * difference).sum()),
    "total_variation": float(np.abs(np.exp(log_q) - p).sum() + max(0.0, 1 - np.exp(log_valid))) / 2,
  }


class Numbers(Evaluator):
  """Exact: no sampling error. `samples` has a record a number."""

  needs = ("number_tokens",)

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields what `distances` returns."""
    del problems, key, on_round
    task = self._parts.task
    log_q = number_log_probs(lora, self._parts)
    self.samples = [
      {"X": task.prompt, "Z": str(n), "log_q": round(q, 6), "log_R": round(task.log_probs[n], 6)}
      for n, q in log_q.items()
    ]
    yield from distances(np.array(list(log_q.values())), np.array(list(task.log_probs.values()))).items()


class Histogram(Evaluator):
  """config.eval.num_votes samples (the paper: 512,000), counted; what the paper estimates its KL from."""

  needs = ("number_tokens",)

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields `histogram/valid_share` and, where it is above 0, `histogram/kl_q_target`, nats, of the valid samples."""
    del problems
    parts, task = self._parts, self._parts.task
    query, total = _query(parts), parts.config.eval.num_votes
    z = self._sampler(max_length=parts.config.sampler.max_length).draw(
      lora, query.prompt_tokens, query.prompt_mask, num_samples=total, temperature=1.0, key=key, on_round=on_round
    )
    names = {tokens: n for n, tokens in task.number_tokens.items()}
    found = [names.get(tuple(row[:n])) for row, n in zip(z.tokens.tolist(), z.length)]
    counts = {n: 0 for n in task.number_tokens}
    for n in found:
      if n is not None:
        counts[n] += 1
    valid = sum(counts.values())
    self.samples = [{"X": task.prompt, "Z": str(n), "count": count} for n, count in counts.items()]
    yield "histogram/valid_share", valid / total
    if valid:
      yield "histogram/kl_q_target", histogram_kl(counts, task.log_probs)


def histogram_kl(counts: Mapping[int, int], log_p: Mapping[int, float]) -> float:
  """KL(shares || p) in nats, of counted numbers, at least one."""
  total = sum(counts.values())
  return sum(c / total * (math.log(c / total) - log_p[n]) for n, c in counts.items() if c)
