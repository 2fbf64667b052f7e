"""Next sentences: the vocabulary, and what is measured."""

import jax
import ml_collections
import numpy as np
import pytest

from configs.next_sentence import get_config
from gfn_jax.evaluators import sentences
from gfn_jax.evaluators.evaluator import Parts
from gfn_jax.evaluators.sentences import Sentences
from gfn_jax.experiment import build
from gfn_jax.models import load_pretrained
from gfn_jax.plots.frontier import points
from gfn_jax.tasks.next_sentence import NextSentenceTask, is_legal
from gfn_jax.types import Trajectory


@pytest.mark.parametrize("text", (" a", "word", " The", ",", " 12", "'s", " I", "-", " A", "é"))
def test_what_stands_in_a_sentence(text):
  assert is_legal(text)


@pytest.mark.parametrize(
  "text",
  ("", ".", "U.S", "\n", " \t", '"', "“", "!", "?", "...", ",,", " http", "www", "A", " Mr", "St", "\ufffd", "<|end|>"),
)
def test_what_breaks_a_sentence(text):
  assert not is_legal(text)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  base = load_pretrained("embedded/arith-2m")
  config = ml_collections.ConfigDict({
    "model": {"name": "embedded/arith-2m"},
    "data": {"path": "embedded", "seed": 0, "dir": str(tmp_path_factory.mktemp("tfds"))},
    "next_sentence": get_config("smoke").next_sentence.to_dict()
    | {"kind": "prompts", "num_train": None, "num_validation": None, "num_test": None},
    "sampler": {"min_length": 1, "max_length": 12},
    "eval": {"num_votes": 3, "max_length": 12, "temperature": 1.0, "encoder": None},
    "reward": {"num_demonstrations": 0, "renormalize": True, "alpha": 1.0, "beta": 0.0, "rival_penalty": 0.0},
  })  # fmt: skip
  task = NextSentenceTask(config, base.tokenizer, base.config.vocab_size)
  reward = task.make_reward(config, base, base.params, None, jax.devices()[:1])
  sampler = task.make_sampler(base, max_length=12)
  return Parts(config, base, base.params, task, sampler, reward, jax.devices()[:1])


def test_an_untouched_policy_samples_its_reward(parts):
  """At T = 1 log q = log R for every sentence: the stop is scored with it, over the same vocabulary."""
  evaluator = Sentences(parts)
  problems = parts.task.test_examples(2)
  values = dict(evaluator(None, problems, jax.random.key(0)))
  assert len(evaluator.samples) == 2 * 3
  short = [r for r in evaluator.samples if len(parts.task.encode(r["Z"])) < 12]  # at the maximum the stop is forced
  assert short
  for record in short:
    assert record["log_q"] == pytest.approx(record["log_R"], abs=1e-3)
  assert values["max_log_likelihood"] >= values["log_likelihood"]


def test_best_mean_and_diversity_by_hand(parts, monkeypatch):
  """Two prompts with two sentences each; embeddings that stand at right angles, and that are the same."""
  evaluator = Sentences(parts)
  records = [{"Z": z, "log_R": r} for z, r in ((" a", -1.0), (" b", -3.0), (" c", -2.0), (" c", -6.0))]
  monkeypatch.setattr(sentences, "sample_records", lambda *arguments: records)
  vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [1.0, 1.0]}
  monkeypatch.setattr(sentences, "sentence_embeddings", lambda encoder, texts: np.array([vectors[t] for t in texts]))
  evaluator._encoder = "known"
  z = Trajectory(*(np.zeros((4, 1)),), np.zeros(4, int), *(np.zeros((4, 1)),) * 3)
  queries = evaluator._queries(parts.task.test_examples(2))
  found = dict(evaluator._measure(queries, z))
  assert found == pytest.approx({"max_log_likelihood": -1.5, "log_likelihood": -3.0, "diversity": 0.5})


@pytest.mark.parametrize(
  ("field", "value", "rule"),
  (
    ("sampling_temperatures", (0.8, 0.0), "between 1e-6 and 1e6"), ("top_k", (0,), "whole numbers from 1"),
    ("top_p", (95,), "above 0 and at most 1"), ("beam_compute", (0,), "whole numbers from 1"),
    ("diversity_penalty", -1.0, "must not be negative"),
  ),
)  # fmt: skip
def test_a_decoder_that_cannot_be_is_refused_before_anything_runs(field, value, rule):
  config = get_config("smoke")
  config.next_sentence[field] = value
  with pytest.raises(ValueError, match=f"config.next_sentence.{field} is .*{rule}"):
    build(config, jax.local_devices()[:1])


def test_points_of_figure_3():
  results = {
    "next_sentence/gfn/diversity": 0.7, "next_sentence/gfn/max_log_likelihood": -12.0,
    "next_sentence/greedy/max_log_likelihood": -15.0, "next_sentence/validation/diversity": 0.1,
    "next_sentence/validation/max_log_likelihood": 0.0, "step": 4,
  }  # fmt: skip
  assert points(results) == {"gfn": (0.7, -12.0)}
