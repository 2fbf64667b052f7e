"""Classification (paper section 4.3): through sampled reasons, or straight behind the prompt.

Labels are compared by their probability under an LM. What a label reads like, behind a reason and behind the prompt
itself, is the task's: `labels`, `target_of` and `direct_target`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import dataclasses

import jax
from jaxtyping import Float
import numpy as np

from gfn_jax.data import query_table
from gfn_jax.evaluators.evaluator import Evaluator, Problems
from gfn_jax.evaluators.records import sample_records
from gfn_jax.models import Lora
from gfn_jax.rewards import RewardModel
from gfn_jax.types import Example

SHOWN = 4  # reviews whose first reason is recorded
TOP = 10  # reasons of a label that are listed (paper, appendix D.5)


def vote(log_p: Float[np.ndarray, "Q N L"]) -> np.ndarray:
  """The label that most of N reasons lead to, int [Q]; among equals, the one that they make likelier."""
  favourites = log_p.argmax(-1)
  counts = np.stack([(favourites == label).sum(-1) for label in range(log_p.shape[-1])], axis=-1)
  return np.lexsort((average(log_p), counts), axis=-1)[:, -1]


def average(log_p: Float[np.ndarray, "Q N L"]) -> Float[np.ndarray, "Q L"]:
  """The posterior predictive: the mean over N reasons of p(label | X, Z), renormalised over the labels."""
  p = np.exp(log_p - log_p.max(-1, keepdims=True))
  return (p / p.sum(-1, keepdims=True)).mean(1)


class Reasons(Evaluator):
  """Samples config.eval.num_votes reasons a review, and lets the LM that rewards conclude from each.

  The policy is not told the label.
  """

  needs = ("labels", "config.subj")

  def __init__(self, parts, context=(), draws=None):
    super().__init__(parts, context, draws)
    self._draw = self._sampler(max_length=parts.config.sampler.max_length).draw

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields `accuracy/N` by a vote of the reasons and `accuracy_average/N` by the posterior predictive.

    N is the number of labels that were trained on (paper, Table 3). `samples` has the first reason of some reviews, and
    then the reasons that lead to each label most often, with their shares (paper, appendix D.5).
    """
    parts, task = self._parts, self._parts.task
    examples, n = [e for kind in problems.values() for e in kind], parts.config.eval.num_votes
    reserved = parts.config.sampler.max_length + len(self._context)
    first, *others = map(task.target_of, task.labels)
    asked = [dataclasses.replace(e, target=first, rivals=tuple(others)) for e in examples]
    t = query_table(asked, task, parts.pretrained.config.max_positions, reserved)
    z = self._draw(
      lora, t.prompt_tokens, t.prompt_mask, num_samples=n, temperature=parts.config.eval.temperature, key=key,
      on_round=on_round,
    )  # fmt: skip
    whole = np.arange(z.tokens.shape[1] + 1) == z.length[:, None]
    _, log_p = parts.reward.model(
      t.reward_prompt_tokens, t.reward_prompt_mask, z.tokens, z.length, whole, t.target_tokens, t.target_mask
    )
    log_p = log_p[whole].reshape(len(examples), n, len(task.labels))
    right = np.array([task.labels.index(e.answer) for e in examples])
    shown = np.arange(min(SHOWN, len(examples)))
    queries = query_table([examples[i] for i in shown], task, parts.pretrained.config.max_positions, reserved)
    self.samples = sample_records(task, parts.reward, queries, z.rows(shown * n))
    texts = [task.decode(row[:length]) for row, length in zip(z.tokens.tolist(), z.length)]
    self.samples += top_reasons(texts, log_p.argmax(-1).reshape(-1), task.labels)
    slice_ = f"/{parts.config.subj.num_labels}"
    yield "accuracy" + slice_, float((vote(log_p) == right).mean())
    yield "accuracy_average" + slice_, float((average(log_p).argmax(-1) == right).mean())

  def baselines(
    self, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    """Prompting without reasons, `accuracy/N` of each: zero_shot, and K_shot with the training labels shown.

    The second is left out, with a line that says so, where the model has no room for it.
    """
    parts = self._parts
    shots, room = parts.config.subj.num_labels, parts.pretrained.config.max_positions
    longest = max(len(parts.task.encode_prompt(e.prompt)) for kind in problems.values() for e in kind) + 8
    for name, context in (("zero_shot", []), (f"{shots}_shot", parts.task.context_tokens(shots, parts.config.seed))):
      if len(context) + longest > room:
        print(f"{name} is left out: {len(context)} tokens of labelled reviews do not fit {room} positions", flush=True)
        continue
      yield name, self._prompted(context, problems, key, on_round)

  def _prompted(self, context, problems, key, on_round) -> Iterator[tuple[str, float]]:
    direct = Direct(self._parts, context)
    yield from direct(None, problems, key, on_round)
    self.samples = direct.samples


def top_reasons(texts: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> list[dict]:
  """The most frequent reasons among those that lead to each label, with their shares."""
  found = []
  for label, name in enumerate(names):
    led = [text for text, leads_to in zip(texts, labels) if leads_to == label]
    found += [
      {"X": "(all)", "Y": name, "Z": text, "share": round(count / len(led), 4)}
      for text, count in Counter(led).most_common(TOP)
    ]
  return found


class Direct(Evaluator):
  """The label that is likeliest behind the prompt itself: prompting, and supervised fine-tuning."""

  needs = ("labels", "config.subj")

  def __call__(
    self, lora: Lora | None, problems: Problems, key: jax.Array, on_round: Callable[[], None] | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields `accuracy/N`, N the number of labels that were trained on."""
    del key, on_round
    parts, task = self._parts, self._parts.task
    examples = [e for kind in problems.values() for e in kind]
    model = RewardModel(
      parts.pretrained, params=parts.params, lora=lora, context=np.array(self._context, np.int32),
      num_replaced=len(task.start_tokens), devices=parts.devices,
    )  # fmt: skip
    nothing = np.zeros((len(examples), 1), np.int32), np.zeros(len(examples), np.int32)
    whole = np.tile([True, False], (len(examples), 1))
    first, *others = map(task.direct_target, task.labels)
    asked = [Example(e.prompt, None, first, e.answer, rivals=tuple(others)) for e in examples]
    t = query_table(asked, task, parts.pretrained.config.max_positions, len(self._context))
    _, log_p = model(t.prompt_tokens, t.prompt_mask, *nothing, whole, t.target_tokens, t.target_mask)
    found = log_p[:, 0].argmax(-1)
    self.samples = [{"X": e.prompt, "Z": task.labels[i], "Y": e.answer} for e, i in zip(examples[:SHOWN], found)]
    yield f"accuracy/{parts.config.subj.num_labels}", float(
      np.mean([task.labels[i] == e.answer for e, i in zip(examples, found)])
    )
