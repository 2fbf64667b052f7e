"""Votes, posterior predictive and reasons; the subj task and its EM loop."""

import json
import pathlib

import ml_collections
import numpy as np
import pytest

from configs import rng
from gfn_jax import em
from gfn_jax.config import validate
from gfn_jax.evaluators.labels import average, top_reasons, vote
from gfn_jax.models import load_pretrained
from gfn_jax.tasks import require_abilities
from gfn_jax.tasks.subj import SubjTask, prompt_of, to_example


def test_the_vote_by_hand():
  """Two labels, three reasons a review: 2 of 3 win, however sure the third is; where they tie, the likelier."""
  log_p = np.log(np.array([
    [[0.6, 0.4], [0.6, 0.4], [0.0001, 0.9999]],
    [[0.4, 0.6], [0.4, 0.6], [0.9, 0.1]],
  ]))  # fmt: skip
  assert vote(log_p).tolist() == [0, 1]
  tie = np.log(np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.6, 0.4], [0.1, 0.9]]]))
  assert vote(tie).tolist() == [0, 1]


def test_the_posterior_predictive_by_hand():
  """p(label | X, Z) is renormalised over the labels for each reason, whatever the reason's own likelihood."""
  log_p = np.log(np.array([[[0.3, 0.1], [1e-9, 4e-9]]]))
  np.testing.assert_allclose(average(log_p), [[(0.75 + 0.2) / 2, (0.25 + 0.8) / 2]])


def test_top_reasons_are_counted_by_label():
  found = top_reasons(["a", "b", "a", "c"], np.array([0, 0, 0, 1]), ("objective", "subjective"))
  assert [(r["Y"], r["Z"], r["share"]) for r in found] == [
    ("objective", "a", 0.6667),
    ("objective", "b", 0.3333),
    ("subjective", "c", 1.0),
  ]


# ---- The task


def config(method="gfn", **em_fields):
  return ml_collections.ConfigDict({
    "method": method,
    "model": {"name": "embedded/arith-2m"},
    "subj": {"num_labels": 4, "label_seed": None},
    "data": {"path": "embedded", "test_path": None, "dir": None},
    "reward": {"num_demonstrations": 0},
    "sampler": {"stop_at_eos": False},
    "em": {"rationales_path": None, "objective": "joint"} | em_fields,
  })  # fmt: skip


@pytest.fixture(scope="module")
def base():
  return load_pretrained("embedded/arith-2m")


def make_task(base, tmp_path, *arguments, **fields):
  c = config(*arguments, **fields)
  c.data.dir = str(tmp_path)
  return SubjTask(c, base.tokenizer, base.config.vocab_size)


def test_texts_are_the_papers(base, tmp_path):
  example = to_example({"text": "a film", "label": "subjective"})
  assert example.prompt == 'Classify this movie review as objective or subjective: "a film" This review is'
  assert (example.target, example.rivals) == (", so it is subjective.", (", so it is objective.",))
  task = make_task(base, tmp_path)
  assert task.decode([task.stop_token_id]) == ","
  assert task.inverse_prompt(example) == f"{example.prompt} subjective because it is"
  context = task.decode(task.context_tokens(2))
  assert context.count("\n") == 2 and f"{task.demonstrations[0].prompt} {task.demonstrations[0].answer}.\n" in context


def test_reasons_may_end_with_the_text_as_in_the_authors_code(base, tmp_path):
  c = config()
  c.data.dir, c.sampler.stop_at_eos = str(tmp_path), True
  task = SubjTask(c, base.tokenizer, base.config.vocab_size)
  assert task.stop_token_id == base.tokenizer.eos_token_id and task.examples[0].target.startswith(", so")


def test_a_baselines_demonstrations_are_shuffled_by_its_seed(base, tmp_path):
  task = make_task(base, tmp_path)
  texts = [task.decode(task.context_tokens(4, seed)) for seed in (None, 0, 1, 1)]
  shown = [[line.strip() for line in text.split("Classify")] for text in texts]
  assert shown[2] == shown[3] and shown[0] != shown[1] != shown[2]
  assert sorted(shown[0]) == sorted(shown[1]) == sorted(shown[2])
  assert len(task.context_tokens(2, 1)) < len(task.context_tokens(4, 1))


@pytest.mark.parametrize(
  "fields, named",
  (
    ({"data.test_path": "x.json"}, "config.data.test_path 'x.json': RngTask has no reads_test_path"),
    ({"task": "json:loads"}, "'json:loads' is no class derived from gfn_jax.task.Task"),
    ({"em.num_rounds": 1}, "config.em.num_rounds 1: RngTask has no has_m_step"),
  ),
)
def test_what_a_task_cannot_do_is_refused(fields, named):
  c = rng.get_config("smoke")
  c.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=named):
    require_abilities(c)


def test_training_validation_and_test_share_no_review(base, tmp_path):
  task = make_task(base, tmp_path)
  parts = [task.examples, task.validation_examples(8)[""], task.test_examples(8)[""]]
  prompts = [{e.prompt for e in part} for part in parts]
  assert [len(p) for p in prompts] == [4, 8, 8]
  assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_inverse_prompting_keeps_the_words_before_the_first_mark(base, tmp_path):
  task = make_task(base, tmp_path)
  for text, kept in ((" 12 a, b", " 12 a"), (", a", ""), (" a", " a")):
    assert task.decode(task.first_words(task.encode(text))) == kept


def test_supervised_fine_tuning_reads_the_label(base, tmp_path):
  task = make_task(base, tmp_path, "sft")
  for example in task.examples:
    tokens, chosen = task.rationale_tokens(example, 99)
    assert task.decode(tokens) == f" {example.answer}." and all(chosen)
    assert [*task.encode(example.prompt), *tokens] == base.tokenizer.encode(f"{example.prompt} {example.answer}.")
  assert task.num_seeded == 4 and task.stop_token_id == base.tokenizer.eos_token_id


@pytest.mark.parametrize(
  "objective, prompt, z",
  (("joint", "", " fun, so it is subjective."), ("label", " fun, so it is", " subjective")),
)
def test_the_m_step_learns_from_sampled_reasons(base, tmp_path, objective, prompt, z):
  path = tmp_path / "rationales.jsonl"
  path.write_text(json.dumps({"X": prompt_of("x"), "Z": " fun", "Y": ", so it is subjective."}) + "\n")
  task = make_task(base, tmp_path, "sft", rationales_path=str(path), objective=objective)
  (example,) = task.examples
  assert example.prompt == prompt_of("x") + prompt
  tokens, chosen = task.rationale_tokens(example, 99)
  assert task.decode(tokens) == z and all(chosen)
  allowed = {task.decode([i]) for i in np.flatnonzero(task.allowed_tokens).tolist() if i != task.stop_token_id}
  labels = {task.decode([i]) for i in task.encode_after(" objective") + task.encode_after(" subjective")}
  assert allowed == labels if objective == "label" else len(allowed) > len(labels)


def test_a_label_is_learned_without_its_end(base, tmp_path):
  task = make_task(base, tmp_path)
  c = config(objective="label")
  assert em.learned_length(c, task) == max(len(task.encode_after(f" {label}")) for label in task.labels)
  c.em.objective, c.sampler.max_length = "joint", 5
  assert em.learned_length(c, task) == 5 + max(len(task.encode_after(f", so it is {label}.")) for label in task.labels)


def test_steps_of_a_round_differ_as_they_should():
  import importlib

  whole = importlib.import_module("configs.subj").get_config("smoke")
  first, later = em.e_step(whole, None), em.e_step(whole, pathlib.Path("/m/adapter"))
  assert (first.reward.adapter, later.reward.adapter) == (None, "/m/adapter")
  assert first.method == later.method == "gfn" and first.em.num_rounds == 0
  step = em.m_step(whole, pathlib.Path("/r.jsonl"), 12)
  assert (step.method, step.em.rationales_path, step.sampler.max_length) == ("sft", "/r.jsonl", 12)
  assert step.train.num_steps == whole.em.num_steps and step.train.learning_rate == whole.em.learning_rate
  assert whole.method == "gfn" and whole.em.rationales_path is None  # the whole is left as it was
  whole.sampler.min_length = 3
  validate(em.m_step(whole, pathlib.Path("/r.jsonl"), 2), 1)  # whose labels may be shorter


def test_rounds_of_other_steps_are_not_mixed(tmp_path):
  import importlib

  config = importlib.import_module("configs.subj").get_config("smoke")
  (tmp_path / "config.json").write_text(json.dumps({"config": {"train.num_steps": config.train.num_steps}}))
  config.train.num_steps += 1
  em._require_same_steps(config, tmp_path)  # nothing has learned from q yet
  (tmp_path / "round0").mkdir()
  (tmp_path / "round0" / "rationales.jsonl").touch()
  with pytest.raises(ValueError, match="config.train.num_steps 5: workdir .* holds rounds of 4 steps"):
    em._require_same_steps(config, tmp_path)
  config.train.num_steps -= 1
  em._require_same_steps(config, tmp_path)


def test_a_slip_in_the_first_step_of_a_round_can_be_mended(tmp_path):
  import importlib

  config = importlib.import_module("configs.subj").get_config("smoke")
  config.model.name, config.data.dir = str(tmp_path / "no_model"), str(tmp_path / "tfds")
  with pytest.raises(ValueError, match="no_model"):
    em.run(config.lock(), tmp_path / "run")
  assert not list((tmp_path / "run").rglob("config.json"))
