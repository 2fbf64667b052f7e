"""log q of texts that somebody else chose."""

from collections.abc import Sequence
import functools

import jax
from jaxtyping import Float
import numpy as np

from gfn_jax import policy
from gfn_jax.data import pad_right
from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.models import Lora
from gfn_jax.parallel import settled
from gfn_jax.types import Queries

ROWS_PER_PASS = 512  # bounds the memory of logits


@functools.lru_cache
def _compiled(model, stop_token_id: int, max_length: int):
  score = functools.partial(policy.score, model, stop_token_id=stop_token_id, max_length=max_length)
  return settled(jax.jit(score))


def log_q(lora: Lora | None, parts: Parts, query: Queries, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "B"]:
  """log q(Z stop | X) of B texts Z of one query, nats; every token counts as the policy's own choice.

  Args:
    query: one. rows: tokens of each Z, at most config.sampler.max_length of them.
  """
  task, max_length = parts.task, parts.config.sampler.max_length
  tokens, mask = pad_right([*rows, [0] * max_length])  # one width for all calls
  at_once = min(len(rows), ROWS_PER_PASS)
  score = _compiled(parts.pretrained.config, task.stop_token_id, max_length)
  found = []
  for begin in range(0, len(rows), at_once):
    ids = np.minimum(np.arange(begin, begin + at_once), len(rows) - 1)  # the last pass is padded
    length = mask[ids].sum(-1)
    log_pf, log_pterm = score(
      parts.params, lora, query.prompt_tokens, query.prompt_mask, tokens[ids], length, mask[ids],
      allowed_tokens=task.allowed_tokens,
    )  # fmt: skip
    ends = np.take_along_axis(np.asarray(log_pterm), length[:, None], axis=1)[:, 0]
    found.append(np.asarray(log_pf, np.float64).sum(-1) + ends)
  return np.concatenate(found)[: len(rows)]
