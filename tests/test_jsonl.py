"""A user's own records, templates and constraints."""

import functools
import json

import ml_collections
import numpy as np
import pytest

from configs.jsonl import VARIANTS, get_config
from gfn_jax.config import validate
from gfn_jax.data import query_table
from gfn_jax.models import load_pretrained
from gfn_jax.named import load_named
from gfn_jax.tasks import make_task
from gfn_jax.tasks.jsonl import JsonlTask, Words
from gfn_jax.types import Example


@pytest.fixture(scope="module")
def base():
  return load_pretrained("embedded/arith-2m")


def records(tmp_path, rows, name="mine.jsonl"):
  path = tmp_path / name
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  return str(path)


def make(base, path, test_path=None, **fields):
  config = get_config("")
  config.model.name, config.data.path, config.data.test_path = "embedded/arith-2m", path, test_path
  for name, value in fields.items():
    config.jsonl[name] = value
  return JsonlTask(config, base.tokenizer, base.config.vocab_size)


ROWS = [{"q": f"{i} + 1", "a": str(i + 1), "why": f"{i} + 1 = {i + 1}"} for i in range(20)]


def test_templates_make_x_y_and_z(base, tmp_path):
  path = records(tmp_path, [*ROWS, {"q": "7", "a": "7", "steps": "none"}])
  task = make(base, path, prompt="Question: {q} = ? Answer:", target=". The answer is {a}.", rationale=" {why}",
              reward_prompt="{q}", answer="{a}")  # fmt: skip
  assert all(e.rationale for e in task.examples[: task.num_seeded])  # who shows no Z stands behind them
  assert len(task.examples) - task.num_seeded == sum(e.prompt == "Question: 7 = ? Answer:" for e in task.examples)
  example = task.examples[0]
  i = int(example.answer) - 1
  assert example.prompt == f"Question: {i} + 1 = ? Answer:" and example.target == f". The answer is {i + 1}."
  assert example.reward_prompt == f"{i} + 1" and task.decode([task.stop_token_id]) == "."
  tokens, _ = task.rationale_tokens(example, 99)
  assert task.decode(tokens) == f" {i} + 1 = {i + 1}"
  assert task.is_right(example, task.encode(f" {i + 1}")) and not task.is_right(example, tokens)
  queries = query_table(task.examples[:2], task, 1024, 10)
  assert task.decode(queries.reward_prompt_tokens[0][queries.reward_prompt_mask[0]].tolist()) == f"{i} + 1"


def test_records_are_held_out(base, tmp_path):
  task = make(base, records(tmp_path, ROWS), prompt="{q}", held_out_share=0.3)
  parts = [task.examples, task.validation_examples(99)[""], task.test_examples(99)[""]]
  prompts = [{e.prompt for e in part} for part in parts]
  assert [len(p) for p in prompts] == [14, 3, 3] and len(set.union(*prompts)) == 20
  other = records(tmp_path, [{"q": "z"}, {"q": "y"}], "test.jsonl")
  task = make(base, records(tmp_path, ROWS), test_path=other, prompt="{q}")
  assert [e.prompt for e in task.test_examples(1)[""]] == ["z", "y"]  # all of it
  validation = {e.prompt for e in task.validation_examples(99)[""]}
  assert len(task.examples) == 18 and len(validation) == 2 and not validation & {e.prompt for e in task.examples}


def test_an_empty_reward_prompt_is_the_beginning_of_a_text(base, tmp_path):
  task = make(base, records(tmp_path, ROWS), prompt="{q}", reward_prompt="")
  queries = query_table(task.examples[:1], task, 1024, 10)
  assert queries.reward_prompt_tokens[0][queries.reward_prompt_mask[0]].tolist() == [base.tokenizer.eos_token_id]


def test_demonstrations_are_shown_as_the_reward_reads_them(base, tmp_path):
  fields = {"prompt": "{q}", "reward_prompt": "", "rationale": " {why}", "target": ", so {a}"}
  task = make(base, records(tmp_path, ROWS), **fields)
  shown = task.shown(1)[0]
  assert task.decode(task.context_tokens(1)) == f"{shown.rationale}{shown.target}\n"


def test_whether_z_answers_a_prompt_of_ones_own_is_not_known(base, tmp_path):
  task = make(base, records(tmp_path, ROWS), prompt="{q}", answer="{a}")
  assert task.is_right(task.example_of("2 + 2"), task.encode(" 4")) is None
  task = make(base, records(tmp_path, ROWS), prompt="{q}", required_words=("4",))
  assert task.is_right(task.example_of("2 + 2"), task.encode(" 4")) is True


def test_the_vocabulary_of_z(base, tmp_path):
  task = make(base, records(tmp_path, ROWS), prompt="{q}", allowed_characters="0123456789 ", stop="\n")
  allowed = {task.decode([i]) for i in np.flatnonzero(task.allowed_tokens).tolist()}
  assert "\n" in allowed and all(set(text) <= set("0123456789 ") for text in allowed - {"\n"})


def test_words_that_are_required_and_forbidden():
  words = functools.partial(Words(("home", "Sea"), ("not",), 10.0), Example("", None, "", ""))
  assert words(" The sea is my HOME") == 0
  assert words(" seaside") == -20  # no part of a word
  assert words("home and sea, not land") == -10
  phrases = functools.partial(Words(("New York",), ("don't", "e-mail"), 10.0), Example("", None, "", ""))
  assert phrases("I don't like new york.") == -10 and phrases("New Yorkers e-mail") == -20


def test_a_constraint_of_ones_own(base, tmp_path):
  source = tmp_path / "mine.py"
  source.write_text("def even(example, text):\n  return 0.0 if len(text) % 2 == 0 else -3.0\n")
  task = make(base, records(tmp_path, ROWS), prompt="{q}", constraint=f"{source}:even")
  tokens = task.encode("abc")
  assert task.log_constraint(task.examples[0], tokens) == -3.0 and not task.is_right(task.examples[0], tokens)
  assert task.log_constraint(task.examples[0], task.encode("ab")) == 0.0


@pytest.mark.parametrize(
  "fields, named",
  (
    ({"prompt": "{nothing}"}, "record 1: template '{nothing}' names 'nothing'"),
    ({"prompt": "{q"}, "template '{q'"),
    ({"prompt": "{q}", "stop": "of two"}, "stop 'of two' must be one token"),
    ({"prompt": "{q}", "target": "{a}."}, "the target '.*' of '.*' begins with '.*', others with"),
    ({"prompt": "{q}", "constraint": "nothing"}, "'nothing' names nothing"),
    ({"prompt": "{q}", "constraint": "json:lods"}, "json has no 'lods'"),
    ({"prompt": "{q}", "constraint": "no.such.module:f"}, "cannot be imported"),
    ({"prompt": "{q}", "constraint": "json:loads", "required_words": ("a",)}, "takes the place of the lists"),
    ({"prompt": "{q}", "held_out_share": 1.0}, "20 records and 20 are held out"),
  ),
)
def test_bad_settings_are_named(base, tmp_path, fields, named):
  with pytest.raises(ValueError, match=named):
    make(base, records(tmp_path, ROWS), **fields)


@pytest.mark.parametrize(
  "row, fields, named",
  (
    ({"q": "7", "a": ""}, {"target": "{a}"}, "the target '' of '7' begins with no token"),
    ({"q": None, "a": "7"}, {}, "record 21: template '{q}' names 'q', which is null"),
    ({"a": "7"}, {}, "record 21: template '{q}' names 'q': the record has a"),
  ),
)
def test_a_bad_record_is_named(base, tmp_path, row, fields, named):
  with pytest.raises(ValueError, match=named):
    make(base, records(tmp_path, [dict(r, a="1") for r in ROWS] + [row]), **{"prompt": "{q}", **fields})


@pytest.mark.parametrize(
  "code, named",
  (("def c(example, text):\n  return None\n", "gave None: must be finite nats"),
   ("def c(example, text):\n  return -float('inf')\n", "gave -inf: must be finite nats"), ("def c(:\n", "SyntaxError"),
   ("\nnothing()\n", "bad.py, line 2: NameError: name 'nothing'")),
)  # fmt: skip
def test_a_bad_constraint_is_named(base, tmp_path, code, named):
  (tmp_path / "bad.py").write_text(code)
  with pytest.raises(ValueError, match=named):
    task = make(base, records(tmp_path, ROWS), prompt="{q}", constraint=f"{tmp_path}/bad.py:c")
    task.log_constraint(task.examples[0], task.encode("a"))


def test_demonstrations_that_no_record_gives_are_said(base, tmp_path, capsys):
  task = make(base, records(tmp_path, ROWS), prompt="{q}", rationale=" {whi}")
  assert task.num_seeded == 0 and "rationale ' {whi}': no record of" in capsys.readouterr().out


def test_a_missing_path_is_named(base):
  with pytest.raises(ValueError, match="config.data.path is missing"):
    make(base, None)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_the_papers_general_forms_are_settings(base, variant):
  """Each variant makes a task of the records that ship, on any model."""
  config = get_config(variant)
  config.model.name = "embedded/arith-2m"
  validate(config, num_devices=1)
  task = make_task(config, base.tokenizer, base.config.vocab_size)
  example = task.examples[0]
  assert task.decode([task.stop_token_id]) == "."
  seen = (bool(example.target), example.reward_prompt, config.reward.beta, task.log_constraint is not None)
  begins = example.reward_prompt or "" if variant in ("infilling", "smoke") else None
  assert seen == {
    "tempered": (False, None, 0.0, False),
    "contrastive": (False, None, -0.5, False),
    "infilling": (True, begins, 0.0, False),
    "smoke": (True, begins, 0.0, False),
    "reverse": (True, "", 0.0, False),
    "constrained": (False, None, 0.0, True),
  }[variant]


def test_a_task_of_ones_own_by_name(base):
  config = ml_collections.ConfigDict({"task": "configs.six_words:SixWordsTask", "model": {"name": "tiny"}})
  task = make_task(config, base.tokenizer, base.config.vocab_size)
  assert task.name == "six_words" and load_named(config.task) is type(task)
  config.task = "seven_words"
  with pytest.raises(ValueError, match="'seven_words' is unknown: choose from arith, .*, or name module:Class"):
    make_task(config, base.tokenizer, base.config.vocab_size)
