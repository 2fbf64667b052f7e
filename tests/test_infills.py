"""Infilling's examples and evaluators: what the judge reads, and that texts are drawn once."""

import jax
import pytest

from configs import infill
from gfn_jax.evaluators import infills
from gfn_jax.evaluators.evaluator import Draws, Evaluator
from gfn_jax.experiment import build
from gfn_jax.tasks.infill import to_example

SENTENCES = ["Mr. A ran.", "He fell.", "It hurt.", "He cried!", "Then he laughed."]


@pytest.mark.parametrize("reverse, before", ((False, tuple(SENTENCES[:3])), (True, ())))
def test_a_story(reverse, before):
  story = to_example(SENTENCES, reverse)
  assert (story.before, story.answer, story.after) == (before, "He cried", (SENTENCES[4],))
  assert (story.reward_prompt, story.target) == (" ".join(before), ". Then he laughed.")


def test_draws_are_made_again_for_anything_else():
  draws, made = Draws(), []
  draw = lambda: made.append(1) or len(made)  # noqa: E731
  key, problems = jax.random.key(0), {"": []}
  assert [draws.get((None, problems, key), draw) for _ in range(2)] == [1, 1]
  assert draws.get((None, {"": []}, key), draw) == 2  # equal, and not the same
  assert draws.get((None, problems, key), draw) == 3
  draws.forget()
  assert draws.get((None, problems, key), draw) == 4


def test_a_judge_who_reads_nothing_is_refused():
  config = infill.get_config("smoke")
  config.infill.judge_samples = 0
  with pytest.raises(ValueError, match="config.infill.judge_samples is 0: must be positive"):
    build(config, jax.local_devices()[:1])


def test_the_test_draws_once_and_the_judge_reads_a_sentence_a_line(monkeypatch, tmp_path):
  drawn, judged = [], []

  def draw(self, lora, problems, key, on_round):
    drawn.append(key)
    examples = [e for kind in problems.values() for e in kind]
    votes = self._parts.config.eval.num_votes
    return examples, [{"X": e.prompt, "Z": " he won", "log_R": -2.0} for e in examples for _ in range(votes)]

  class Judge:
    def __init__(self, *_, cache):
      pass

    def rate(self, stories):
      judged.extend(stories)
      return [4.0] * len(stories)

  monkeypatch.setattr(Evaluator, "_draw_records", draw)
  monkeypatch.setattr(infills, "Judge", Judge)
  config = infill.get_config("smoke")
  config.data.dir, config.infill.judge_url, config.infill.judge_samples = str(tmp_path), "http://localhost/v1", 2
  parts, suite = build(config, jax.local_devices()[:1])
  results, _ = suite.test(None, 1.0, jax.random.key(0), say=lambda _: None)
  assert len(drawn) == 1
  assert results["infill/base/coherence"] == 4 and results["infill/base/log_reward"] == -2
  assert results["infill/base/distinct_share"] == 1 / config.eval.num_votes and "infill/base/bleu4" in results
  stories = parts.task.test_examples(config.eval.num_test)[""]
  assert len(judged) == 2 * len(stories) and judged[0] == judged[1]
  for story, text in zip(stories, judged[::2]):
    lines = text.split("\n")
    assert len(lines) == 5 and lines[3] == "he won."
    assert " ".join(lines[:3]) == story.reward_prompt and f". {lines[4]}" == story.target
