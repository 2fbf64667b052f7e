"""Fields, the rules between them, and the variants of configs/arith.py."""

import json

import pytest

from configs import arith
from gfn_jax.config import RESUMABLE, base_config, first_difference, flatten, validate


def config_with(**fields):
  """The defaults, with "a__b" = value set."""
  config = base_config()
  config.sampler.min_length, config.sampler.max_length = 5, 24
  for field, value in fields.items():
    *path, leaf = field.split("__")
    node = config
    for part in path:
      node = node[part]
    with node.unlocked():
      node[leaf] = value
  return config


BAD_FIELDS = [
  # (fields, devices, what the line must hold)
  ({"method": "magic"}, 1, ["config.method", "'magic'", "gfn"]),
  ({"loss__name": "subTB"}, 1, ["config.loss.name", "'subTB'", "subtb, tb, vargrad, db"]),
  ({"model__dtype": "int8"}, 1, ["config.model.dtype", "'int8'", "bfloat16"]),
  ({"replay__seed_from": "friends"}, 1, ["config.replay.seed_from", "'friends'", "inverse_prompt, samples, nothing"]),
  ({"sampler__max_length": -1}, 1, ["config.sampler.max_length", "-1"]),
  ({"sampler__max_length": 0}, 1, ["config.sampler.max_length", "is 0", "positive"]),
  ({"sampler__min_length": -2}, 1, ["config.sampler.min_length", "-2", "not be negative"]),
  ({"sampler__min_length": 30}, 1, ["min_length 30", "max_length 24"]),
  ({"eval__max_length": 4}, 1, ["min_length 5", "config.eval.max_length 4"]),
  ({"sampler__num_samples": 0}, 1, ["config.sampler.num_samples", "0"]),
  ({"seed": -3}, 1, ["config.seed", "-3"]),
  ({"lora__rank": 0}, 1, ["config.lora.rank", "0"]),
  ({"lora__alpha": -16.0}, 1, ["config.lora.alpha", "-16"]),
  ({"lora__dropout": 1.0}, 1, ["config.lora.dropout", "1.0", "below 1"]),
  ({"lora__targets": ()}, 1, ["config.lora.targets", "empty"]),
  ({"loss__subtb_lambda": 0.0}, 1, ["config.loss.subtb_lambda", "0.0"]),
  ({"loss__subtb_lambda": 1.5}, 1, ["config.loss.subtb_lambda", "1.5"]),
  ({"behavior__buffer": 1.25}, 1, ["config.behavior.buffer", "1.25", "between 0 and 1"]),
  ({"behavior__tempered": -0.5}, 1, ["config.behavior.tempered", "-0.5"]),
  ({"behavior__buffer": 0.6}, 1, ["config.behavior.buffer 0.6", "config.behavior.tempered 0.5", "above 1"]),
  ({"behavior__temperature_low": 3.0}, 1, ["temperature_low 3.0", "temperature_high"]),
  ({"behavior__temperature_low": 0.0}, 1, ["config.behavior.temperature_low", "0.0"]),
  ({"reward__temperature_start": 0.0}, 1, ["config.reward.temperature_start", "0.0"]),
  ({"reward__temperature_end": -1.0}, 1, ["config.reward.temperature_end", "-1.0"]),
  ({"reward__temperature_horizon": 0}, 1, ["config.reward.temperature_horizon", "0"]),
  ({"reward__num_demonstrations": -1}, 1, ["config.reward.num_demonstrations", "-1"]),
  ({"replay__capacity": 0}, 1, ["config.replay.capacity", "0"]),
  ({"replay__similarity": 2.0}, 1, ["config.replay.similarity", "2.0"]),
  ({"train__num_steps": 0}, 1, ["config.train.num_steps", "0"]),
  ({"train__learning_rate": float("nan")}, 1, ["config.train.learning_rate", "nan"]),
  ({"train__weight_decay": -0.1}, 1, ["config.train.weight_decay", "-0.1"]),
  ({"train__num_queries": 6}, 4, ["config.train.num_queries 6", "4 devices"]),
  ({"train__micro_batch_queries": 3}, 1, ["config.train.num_queries 8", "micro_batch_queries 3"]),
  ({"train__micro_batch_queries": 4}, 4, ["config.train.num_queries 8", "4 devices", "micro_batch_queries 4"]),
  ({"train__decay_steps": 100}, 1, ["config.train.decay_steps 100", "config.train.num_steps 250"]),
  ({"checkpoint__every_steps": 0}, 1, ["config.checkpoint.every_steps", "0"]),
  ({"eval__num_votes": 0}, 1, ["config.eval.num_votes", "0"]),
  ({"eval__num_test": 0}, 1, ["config.eval.num_test", "0"]),
  ({"eval__split": "validation", "data__test_path": "x"}, 1, ["config.data.test_path 'x'", "must be 'test'"]),
  ({"eval__split": "train"}, 1, ["config.eval.split", "'train'", "test, validation"]),
  ({"loss__name": "vargrad", "sampler__num_samples": 1}, 1, ["sampler.num_samples 1", "'vargrad'", "at least 2"]),
  ({"em__num_rounds": 1, "method": "sft"}, 1, ["config.em.num_rounds", "'sft'", "must be 0"]),
  ({"eval__num_validation": -1}, 1, ["config.eval.num_validation", "-1"]),
  ({"eval__temperature": 0.0}, 1, ["config.eval.temperature", "0.0"]),
  ({"eval__temperature": 1e-9}, 1, ["config.eval.temperature", "1e-09", "between 1e-6 and 1e6"]),
  ({"behavior__temperature_high": float("inf")}, 1, ["config.behavior.temperature_high", "inf", "1e-6 and 1e6"]),
  ({"data__unseeded_weight": -0.2}, 1, ["config.data.unseeded_weight", "-0.2"]),
  ({"data__num_seed_rationales": -1}, 1, ["config.data.num_seed_rationales", "-1"]),
]


@pytest.mark.parametrize("fields, devices, named", BAD_FIELDS, ids=lambda x: str(x) if isinstance(x, dict) else None)
def test_a_bad_field_is_refused_in_one_line_that_names_it(fields, devices, named):
  with pytest.raises(ValueError) as refused:
    validate(config_with(**fields), devices)
  message = str(refused.value)
  assert "\n" not in message
  for part in named:
    assert part in message


def test_fields_at_the_edge_of_their_range_are_taken():
  validate(config_with(sampler__min_length=24, eval__max_length=24, behavior__buffer=0.5, loss__subtb_lambda=1.0), 8)
  validate(config_with(sampler__min_length=0, train__warmup_steps=0, train__weight_decay=0.0, seed=0), 2)


def test_flatten_gives_plain_json():
  flat = flatten(config_with(lora__targets=("q_proj", "v_proj")))
  assert flat["lora.targets"] == ["q_proj", "v_proj"]
  assert flat["loss.name"] == "subtb"
  assert json.loads(json.dumps(flat)) == flat


def test_fields_that_do_not_change_the_mathematics_may_differ():
  changes = {
    "train__num_steps": 7, "train__log_every": 3, "checkpoint__every_steps": 9, "checkpoint__keep": 5,
    "debug_nans": True, "profile": True, "data__dir": "elsewhere", "eval__every_steps": 11,
    "train__micro_batch_queries": 2, "mesh__model": 2, "model__remat": "full", "wandb_project": "mine",
  }  # fmt: skip
  assert {f.replace("__", ".") for f in changes} == {  # so that no resumable field goes untested
    f for f in flatten(base_config()) if any(f == r or f.startswith(r + ".") for r in RESUMABLE)
  }
  assert first_difference(flatten(config_with()), flatten(config_with(**changes))) is None


def test_the_first_other_difference_is_named_with_both_values():
  ours, theirs = flatten(config_with()), flatten(config_with(train__num_steps=7, sampler__max_length=9, seed=4))
  assert first_difference(ours, theirs) == "config.sampler.max_length is 24 here and 9 there"
  assert "config.seed" in first_difference(ours, flatten(config_with(seed=1)))


def test_a_field_that_only_one_side_has_is_a_difference():
  ours = flatten(config_with())
  theirs = {k: v for k, v in ours.items() if k != "replay.prioritized"}
  assert "config.replay.prioritized is True here and None there" in first_difference(ours, theirs)


def test_targets_survive_the_way_through_json():
  ours = flatten(config_with())
  assert first_difference(ours, json.loads(json.dumps(ours))) is None


@pytest.mark.parametrize("variant", arith.VARIANTS)
def test_every_variant_validates_on_one_device(variant):
  config = arith.get_config(variant)
  validate(config, 1)
  assert (config.name, config.variant, config.task) == ("arith", variant, "arith")
  assert config.keys() == base_config().keys()


def test_unknown_variant_names_the_choices():
  with pytest.raises(ValueError, match="'tiny' is unknown: choose from smoke, smollm2, paper, reference"):
    arith.get_config("tiny")


SHARED_WITH_THE_REFERENCE = {
  "model.name": "nlpcloud/instruct-gpt-j-fp16",
  "lora.rank": 64,
  "lora.alpha": 16.0,
  "lora.dropout": 0.1,
  "lora.targets": ["q_proj", "k_proj", "v_proj", "out_proj"],
  "sampler.num_samples": 16,
  "train.num_queries": 32,
  "train.learning_rate": 1e-4,
  "train.num_steps": 1000,
  "train.warmup_steps": 20,
  "train.weight_decay": 0.01,
  "reward.temperature_start": 1.1,
  "reward.temperature_end": 0.5,
  "reward.temperature_horizon": 150,
  "reward.num_demonstrations": 3,
  "sampler.min_length": 5,
  "replay.capacity": 50,
  "replay.similarity": 0.25,
  "replay.seed_from": "demonstrations",
  "data.num_seed_rationales": 50,
  "data.seeded_weight": 1.0,
  "data.unseeded_weight": 0.2,
  "eval.num_votes": 10,
  "eval.temperature": 0.1,
  "behavior.temperature_low": 0.5,
  "behavior.temperature_high": 2.0,
  "loss.name": "subtb",
}


def test_paper_has_the_numbers_of_table_e2():
  flat = flatten(arith.get_config("paper"))
  expected = SHARED_WITH_THE_REFERENCE | {"sampler.max_length": 20 + 6, "eval.max_length": 20 + 8}
  assert {k: flat[k] for k in expected} == expected


def test_reference_has_the_numbers_of_the_authors_code():
  flat = flatten(arith.get_config("reference"))
  expected = SHARED_WITH_THE_REFERENCE | {"sampler.max_length": 18 + 6, "eval.max_length": 21 + 8}
  assert {k: flat[k] for k in expected} == expected
