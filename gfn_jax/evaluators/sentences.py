"""Likelihood and diversity of next sentences (paper section 4.1, Fig. 3), beside other ways to decode the base."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from gfn_jax.beam_search import beam_search
from gfn_jax.data import query_table
from gfn_jax.evaluators.diversity import mean_pairwise_cosine_distance
from gfn_jax.evaluators.evaluator import Evaluator, Problems
from gfn_jax.evaluators.records import sample_records
from gfn_jax.models import Lora, load_encoder, sentence_embeddings
from gfn_jax.types import Queries, Trajectory

SHOWN = 4  # prompts whose samples are recorded


class Sentences(Evaluator):
  """Draws config.eval.num_votes sentences a prompt; the paper draws 8.

  `max_log_likelihood` is log p_LM(Z . | X) of a prompt's likeliest sentence, nats, over the task's vocabulary;
  `diversity` the mean pairwise cosine distance of a prompt's sentences under config.eval.encoder. Both are meaned over
  prompts.
  """

  needs = ("config.next_sentence",)

  def __init__(self, parts, context=(), draws=None):
    super().__init__(parts, context, draws)
    c = parts.config.next_sentence
    for field, fits, rule in (
      ("sampling_temperatures", lambda t: 1e-6 <= t <= 1e6, "between 1e-6 and 1e6"),
      ("top_k", lambda k: isinstance(k, int) and k >= 1, "whole numbers from 1"),
      ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
      ("beam_compute", lambda times: isinstance(times, int) and times >= 1, "whole numbers from 1"),
    ):
      if not all(map(fits, c[field])):
        raise ValueError(f"config.next_sentence.{field} is {tuple(c[field])}: must be {rule}")
    if not 0 <= c.diversity_penalty < float("inf"):
      raise ValueError(f"config.next_sentence.diversity_penalty is {c.diversity_penalty}: must not be negative")
    self._encoder = None if parts.config.eval.encoder is None else load_encoder(parts.config.eval.encoder)

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields `max_log_likelihood`, `log_likelihood` (of a sample), and `diversity` where there is an encoder."""
    queries = self._queries(problems)
    yield from self._measure(queries, self._decode(queries, lora, key, on_round, self._parts.config.eval.num_votes))

  def baselines(
    self, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    """The same of greedy, tempered, top-k and nucleus sampling, and of beam searches."""
    parts, queries = self._parts, self._queries(problems)
    c, n = parts.config.next_sentence, parts.config.eval.num_votes

    def sample(num_samples=n, temperature=1.0, **filters):
      return lambda: self._decode(queries, None, key, on_round, num_samples, temperature, **filters)

    def beam(times, groups, penalty):
      return lambda: beam_search(
        parts.pretrained.config, parts.params, queries.prompt_tokens, queries.prompt_mask,
        allowed_tokens=parts.task.allowed_tokens, stop_token_id=parts.task.stop_token_id,
        max_length=parts.config.eval.max_length, min_length=parts.config.sampler.min_length, num_beams=times * n,
        num_groups=groups, diversity_penalty=penalty, num_returned=n, devices=parts.devices,
      )  # fmt: skip

    decoders = {"greedy": sample(1, 0.0)}
    decoders |= {f"sampling_{t:g}": sample(temperature=t) for t in c.sampling_temperatures}
    decoders |= {f"top_k_{k}": sample(top_k=k) for k in c.top_k} | {f"nucleus_{p:g}": sample(top_p=p) for p in c.top_p}
    for times in c.beam_compute:
      more = "" if times == 1 else f"_{times}x"
      decoders["beam" + more] = beam(times, 1, 0.0)
      decoders["diverse_beam" + more] = beam(times, n, c.diversity_penalty)
    for name, decode in decoders.items():
      yield name, self._decoded(queries, decode)

  def _decoded(self, queries: Queries, decode: Callable[[], Trajectory]) -> Iterator[tuple[str, float]]:
    yield from self._measure(queries, decode())

  def _queries(self, problems: Problems) -> Queries:
    parts = self._parts
    examples = [e for kind in problems.values() for e in kind]
    reserved = parts.config.eval.max_length + len(self._context)
    return query_table(examples, parts.task, parts.pretrained.config.max_positions, reserved)

  def _decode(self, queries, lora, key, on_round, num_samples, temperature=None, **filters) -> Trajectory:
    settings = self._parts.config.eval
    return self._sampler(**filters).draw(
      lora, queries.prompt_tokens, queries.prompt_mask, num_samples=num_samples,
      temperature=settings.temperature if temperature is None else temperature, key=key, on_round=on_round,
    )  # fmt: skip

  def _measure(self, queries: Queries, z: Trajectory) -> Iterator[tuple[str, float]]:
    n = len(z.length) // len(queries)
    records = sample_records(self._parts.task, self._parts.reward, queries, z)
    self.samples = records[: SHOWN * n]
    log_p = np.array([r["log_R"] for r in records]).reshape(-1, n)
    yield "max_log_likelihood", float(log_p.max(-1).mean())
    yield "log_likelihood", float(log_p.mean())
    if self._encoder is not None:
      embeddings = sentence_embeddings(self._encoder, [r["Z"].strip() for r in records])
      if n > 1:
        yield "diversity", float(mean_pairwise_cosine_distance(embeddings.reshape(len(queries), n, -1)).mean())
