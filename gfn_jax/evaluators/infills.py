"""How good infilled sentences are (paper section 4.2, Table 2)."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from gfn_jax import distributed
from gfn_jax.evaluators.bertscore import bert_score
from gfn_jax.evaluators.evaluator import Evaluator, Problems
from gfn_jax.evaluators.judge import Judge, mean_rating
from gfn_jax.evaluators.overlap import bleu4, gleu4
from gfn_jax.models import Lora, load_encoder

SHOWN = 4  # stories whose first infill is recorded


class Infills(Evaluator):
  """Draws config.eval.num_votes sentences a story, and compares them with the story's own."""

  needs = ("config.infill",)

  def __init__(self, parts, context=(), draws=None):
    super().__init__(parts, context, draws)
    c = parts.config.infill
    self._bert = None if c.bertscore_model is None else load_encoder(c.bertscore_model)
    layers = None if self._bert is None else self._bert.config.num_layers
    if layers is not None and not 0 <= c.bertscore_layer <= layers:
      raise ValueError(f"config.infill.bertscore_layer {c.bertscore_layer}: {c.bertscore_model!r} has {layers} layers")
    if c.judge_samples < 1:
      raise ValueError(f"config.infill.judge_samples is {c.judge_samples}: must be positive")
    asks = c.judge_url is not None and distributed.is_first()  # it is paid for
    self._judge = Judge(c.judge_url, c.judge_model, cache=c.judge_cache) if asks else None

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields `bleu4` and `gleu4` (per cent), `log_reward` (nats, a sample's mean); and, where the config names a model,
    `bertscore` (F1), `coherence` (1 to 5) and `coherence_missing` (the share of stories that got no rating)."""
    c, n = self._parts.config.infill, self._parts.config.eval.num_votes
    examples, records = self._sample(lora, problems, key, on_round)
    self.samples = records[: SHOWN * n : n]
    yield "log_reward", float(np.mean([r["log_R"] for r in records]))
    texts = [r["Z"].strip() + "." for r in records]
    candidates = [texts[i : i + n] for i in range(0, len(texts), n)]
    references = [f"{e.answer}." for e in examples]
    yield "bleu4", bleu4(candidates, references)
    yield "gleu4", gleu4(candidates, references)
    if self._bert is not None:
      beside = [reference for reference in references for _ in range(n)]
      yield "bertscore", float(np.mean(bert_score(self._bert, texts, beside, num_layers=c.bertscore_layer).f1))
    if c.judge_url is not None:
      shown = [
        "\n".join([*story.before, text, *story.after])
        for story, found in zip(examples, candidates)
        for text in found[: c.judge_samples]
      ]
      ratings = self._judge.rate(shown) if self._judge is not None else [None] * len(shown)
      found = distributed.of_first(np.array([np.nan if r is None else r for r in ratings], np.float32))
      ratings = [None if np.isnan(r) else float(r) for r in found]
      yield "coherence_missing", sum(r is None for r in ratings) / len(ratings)
      if any(r is not None for r in ratings):
        yield "coherence", mean_rating(ratings)[0]
