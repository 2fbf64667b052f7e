"""The splits of expressions, the arithmetic TFDS builder, its files, and the task that reads it."""

import json
import re

import numpy as np
import pytest

from configs import arith as arith_config
from gfn_jax.datasets import arithmetic, arithmetic_corpus, expressions
from gfn_jax.tasks import make_task
from gfn_jax.tasks.arith import majority, parse_answer
from testing import shared_folder, tiny_tokenizer

EVALUATION_SPLITS = [f"{split}_{k}" for split in ("validation", "test") for k in (3, 4, 5)]


def value_of(expression: str) -> int:
  """Python's own integers, term by term."""
  return sum(int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", expression))


def parts_of(text: str) -> set[str]:
  """Every contiguous part, with three operands or more, of every run "a + b - c ..." in a text."""
  found = set()
  for run in re.findall(r"\d+(?: [+-] \d+)+", text):
    words = run.split(" ")
    found |= {" ".join(words[i : j + 1]) for i in range(0, len(words), 2) for j in range(i + 4, len(words), 2)}
  return found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def generated(data_dir):
  """Every split of the default config."""
  config = arithmetic.make_config(0)
  return {s: arithmetic.load(config, s, data_dir) for s in ("train", "demonstrations", *EVALUATION_SPLITS)}


def test_split_of_is_a_fixed_function():
  # Golden values: the embedded LM was trained with this split, so a change would leak test problems into its corpus.
  golden = {
    "6 - 0 - 4": "train", "0 - 0 - 0": "train", "9 + 4 - 8": "test", "1 + 1 + 1": "test", "5 + 8 + 9": "test",
    "8 - 1 - 5": "validation", "1 - 0 + 4 + 3 - 1": "validation",
  }  # fmt: skip
  assert {e: expressions.split_of(e) for e in golden} == golden


def test_splits_have_their_shares():
  rng = np.random.default_rng(0)
  splits = [expressions.split_of(expressions.random_expression(rng, 5)) for _ in range(4000)]
  assert abs(splits.count("test") / 4000 - 0.15) < 0.02
  assert abs(splits.count("validation") / 4000 - 0.05) < 0.012


def test_parts_of_sees_what_it_should_see():
  assert parts_of("Question: 1 + 2 - 3 + 4 = ? Answer: 1 + 2 = 3.") == {"1 + 2 - 3", "2 - 3 + 4", "1 + 2 - 3 + 4"}


def test_the_pretraining_corpus_holds_no_held_out_expression_not_even_as_a_part():
  rng = np.random.default_rng(3)
  parts = set()
  for _ in range(300):
    parts |= parts_of(arithmetic_corpus.document(rng, 14, 0.3))
  assert len(parts) > 2000
  assert not [p for p in parts if expressions.split_of(p) != "train"]


@pytest.mark.parametrize("seed", [0, 7])
def test_training_queries_and_demonstrations_hold_no_held_out_expression(seed, data_dir):
  config = arithmetic.make_config(seed)
  train, demonstrations = (arithmetic.load(config, s, data_dir) for s in ("train", "demonstrations"))
  parts = set().union(*(parts_of(r["prompt"] + r["rationale"]) for r in train + demonstrations))
  assert len(parts) > 1000
  assert not [p for p in parts if expressions.split_of(p) != "train"]
  held_out = [r["prompt"] for s in EVALUATION_SPLITS for r in arithmetic.load(config, s, data_dir)]
  assert not parts & set(map(expressions.expression_of, held_out))


def test_the_builder_has_the_documented_sizes_and_kinds(generated):
  sizes = {s: len(records) for s, records in generated.items()}
  assert sizes == {"train": 1000, "demonstrations": 50} | {s: 500 if "test" in s else 100 for s in EVALUATION_SPLITS}
  for split in EVALUATION_SPLITS:
    assert {expressions.num_operands(r["prompt"]) for r in generated[split]} == {int(split[-1])}
    assert {expressions.split_of(expressions.expression_of(r["prompt"])) for r in generated[split]} == {split[:-2]}
  assert {expressions.num_operands(r["prompt"]) for r in generated["train"]} == {3, 4}
  prompts = [r["prompt"] for records in generated.values() for r in records]
  assert len(set(prompts)) == len(prompts)


def test_answers_and_steps_are_right(generated):
  for split, records in generated.items():
    for r in records:
      assert re.fullmatch(r"Question: \d( [+-] \d)+ = \? Answer:", r["prompt"])
      assert r["answer"] == value_of(expressions.expression_of(r["prompt"]))
      if split == "train":
        assert r["rationale"] == ""
        continue
      for step in r["rationale"].split(", "):
        left, operator, right, equals, result = step.split(" ")
        assert equals == "="
        assert int(result) == int(left) + (1 if operator == "+" else -1) * int(right)
      assert int(result) == r["answer"]


def test_the_builder_keeps_order_and_is_a_function_of_its_seed(generated, data_dir, tmp_path):
  again = arithmetic.make_config(0)
  for split in ("train", "test_5"):  # prepared anew, in another folder
    assert arithmetic.load(again, split, str(tmp_path)) == generated[split]
  other = arithmetic.load(arithmetic.make_config(7), "train", data_dir)
  assert other != generated["train"]
  # In the order generated, which no sort by key or by text would give.
  assert [r["prompt"] for r in other] != sorted(r["prompt"] for r in other)


def test_released_files_are_read_in_their_order(data_dir):
  folder = shared_folder() / "data" / "arithmetic"
  config = arithmetic.make_config(0, str(folder))
  seen = set()
  for split, name in arithmetic.RELEASED_FILES.items():
    raw = json.loads((folder / name).read_text())
    records = arithmetic.load(config, split, data_dir)
    assert [(r["prompt"], r["answer"]) for r in records] == [(r["str_query"], r["num_sol"]) for r in raw]
    assert [r["rationale"] for r in records] == [r.get("str_rationale", "") for r in raw]
    seen |= {r["str_query"] for r in raw}
  for split in EVALUATION_SPLITS:
    records = arithmetic.load(config, split, data_dir)
    assert len(records) == (500 if "test" in split else 100)
    assert not seen & {r["prompt"] for r in records}


def test_a_folder_without_the_released_files_is_named(tmp_path):
  (tmp_path / "hw_1000.json").write_text("[]")
  with pytest.raises(ValueError, match="config.data.path .* has no train_50_no_tool.json") as e:
    arithmetic.make_config(0, str(tmp_path))
  assert "\n" not in str(e.value)


def test_other_contents_get_another_name(tmp_path):
  names = set()
  for answer in (1, 2):
    for name in arithmetic.RELEASED_FILES.values():
      (tmp_path / name).write_text(json.dumps([{"str_query": "x", "num_sol": answer}]))
    names |= {arithmetic.make_config(seed, str(tmp_path)).name for seed in (0, 1)}
  assert len(names) == 4


def test_records_are_read_from_a_list_and_from_lines(tmp_path):
  question = "Question: 1 + 2 - 3 = ? Answer:"
  raw = [{"str_query": question, "num_sol": 0, "str_rationale": "a"}, {"str_query": "q", "num_sol": -7}]
  (tmp_path / "list.json").write_text(json.dumps(raw, indent=1))
  (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, raw)) + "\n\n")
  expected = [
    {"prompt": question, "rationale": "a", "answer": 0},
    {"prompt": "q", "rationale": "", "answer": -7},
  ]
  assert arithmetic.read_records(tmp_path / "list.json") == expected
  assert arithmetic.read_records(tmp_path / "lines.jsonl") == expected


@pytest.mark.parametrize(
  "content, named",
  [
    (b"", "has no records"),
    (b"[]", "has no records"),
    (b"{not json", "is no JSON list and no JSON lines"),
    (b'[{"str_query": "q", "num_sol": 1}', "is no JSON list and no JSON lines"),
    (b"\xff\xfe\x00", "is no JSON list and no JSON lines"),
    (b'[{"str_query": "q", "num_sol": 1}, {"str_query": "q"}]', "record 1: str_query (text) and num_sol (integer)"),
    (b'[{"str_query": 5, "num_sol": 1}]', "record 0"),
    (b'{"str_query": "q", "num_sol": "1"}', "record 0"),
    (b"[3]", "record 0"),
  ],
)
def test_bad_files_get_one_line_that_names_them(content, named, tmp_path):
  file = tmp_path / "problems.json"
  file.write_bytes(content)
  with pytest.raises(ValueError) as e:
    arithmetic.read_records(file)
  message = str(e.value)
  assert str(file) in message and named in message and "\n" not in message


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="problems.json cannot be read: No such file"):
    arithmetic.read_records(tmp_path / "problems.json")


@pytest.mark.parametrize(
  "rationale, answer",
  [
    (" 6 - 0 = 6, 6 - 4 = 2", "2"),
    (" 2 - 8 = -6", "-6"),
    (" 2 - 8 =-6, and more", "-6"),
    ("1 = 5", "5"),
    (" 1 - 1 = 007", "7"),
    (" 1 - 1 = -0", "0"),
    (" 6 - 0 = 6, 6 - 4 =", None),  # the first step's result is no answer
    (" 6 - 0 = ,", None),
    (" 6 - 0 = - 6", None),
    (" 6 - 4", None),
    ("", None),
  ],
)
def test_parse_answer(rationale, answer):
  assert parse_answer(rationale) == answer


@pytest.mark.parametrize(
  "prompt, is_one",
  (
    ("Question: 6 - 0 - 4 = ? Answer:", True),
    ("Question: -8 + 12 = ? Answer:", True),
    ("Question: 6 = ? Answer:", False),
    ("Question: 6 * 2 = ? Answer:", False),
    ("Question: 6-0 = ? Answer:", False),
    ("Question: 6 - 0 - = ? Answer:", False),
    ("Question: 6 - 0 = ? Answer: 6", False),
    ("Question: 1 - 0 = ? Answer: 1. Question: 6 - 0 = ? Answer:", False),
    (f"Question: {'9' * 70} - 0 = ? Answer:", False),  # more than the calculator reads
    ("6 - 0", False),
    ("", False),
  ),
)
def test_what_is_a_question(prompt, is_one):
  assert expressions.is_question(prompt) == is_one
  if is_one:
    assert isinstance(expressions.solve(expressions.expression_of(prompt))[1], int)


def test_majority_counts_what_parses():
  assert majority(["2", None, "3", "3", None, None]) == "3"
  assert majority(["4", "2", "2", "4"]) == "4"  # the first reached among equals
  assert majority(["-6"]) == "-6"
  assert majority([None, None]) is None
  assert majority([]) is None


@pytest.fixture(scope="module")
def task(data_dir):
  config = arith_config.get_config()
  config.data.dir = data_dir
  return make_task(config, tiny_tokenizer(), len(tiny_tokenizer()))


def test_the_tasks_queries_are_demonstrations_first(task, generated):
  assert task.num_seeded == 50 and len(task.examples) == 1050
  first = task.examples[0]
  record = generated["demonstrations"][0]
  assert (first.prompt, first.rationale, first.answer) == (record["prompt"], record["rationale"], str(record["answer"]))
  assert first.target == f". The answer is {record['answer']}."
  assert all(e.rationale for e in task.examples[:50]) and not any(e.rationale for e in task.examples[50:])


def test_a_demonstration_is_written_as_a_rollout_would_have(task):
  for example in task.examples[:50]:
    tokens, chosen = task.rationale_tokens(example, 100)
    assert task.decode(tokens) == " " + example.rationale
    # What the policy chose is the rationale without its results.
    kept = task.decode([t for t, c in zip(tokens, chosen) if c])
    assert kept == " " + expressions.without_results(example.rationale)
    assert len(tokens) == len(chosen) and chosen.count(False) >= example.rationale.count("=")
    assert task.is_right(example, tokens)
    length = len(tokens)
    assert task.rationale_tokens(example, length) == (tokens, chosen)
    # One token less, and the last result does not fit: the call is not made (DESIGN 4), or Z itself is too long.
    shorter = task.rationale_tokens(example, length - 1)
    assert shorter is None or (len(shorter[0]) < length and shorter[1][-1])


def test_the_reward_sees_demonstrations_with_their_results(task, generated):
  lines = [f"{r['prompt']} {r['rationale']}. The answer is {r['answer']}.\n" for r in generated["demonstrations"][:3]]
  assert task.context_tokens(3) == task.encode("".join(lines))
  # The tiny tokenizer has no line break: all else comes back.
  assert task.decode(task.context_tokens(3)) == "".join(lines).replace("\n", "")
  assert task.context_tokens(0) == []


def test_only_numbers_and_operators_are_allowed(task):
  texts = {task.decode([i]) for i in np.flatnonzero(task.allowed_tokens).tolist()}
  assert {" -", " +", " =", ",", ".", "7", " 7"} <= texts
  assert all(set(t) <= set("0123456789+-=,. ") for t in texts)
  forbidden = {task.decode([i]) for i in np.flatnonzero(~task.allowed_tokens).tolist()}
  assert {"Q", "?", ":", " The", "<|endoftext|>"} <= forbidden
  assert task.decode([task.stop_token_id]) == "." and task.allowed_tokens[task.stop_token_id]


def test_votes_that_do_not_parse_are_never_right(task):
  example = next(e for e in task.examples if e.answer == "-1")  # the reference took a failed parse for -1
  assert task.predict([task.encode(" 1 - 2"), task.encode(" 1 - 2 =")]) is None
  assert not task.is_right(example, task.encode(" 1 - 2"))
  assert task.predict([task.encode(" 1 - 2 = -1"), task.encode(" 1"), task.encode(" 2")]) == "-1"
  assert task.is_right(example, task.encode(" 1 - 2 = -1"))


def test_validation_and_test_problems(task, generated):
  validation, test = task.validation_examples(5), task.test_examples(7)
  assert [e.prompt for e in validation["4"]] == [r["prompt"] for r in generated["validation_4"][:5]]
  assert {k: len(v) for k, v in test.items()} == {"3": 7, "4": 7, "5": 7}


def test_test_problems_from_a_file(data_dir, tmp_path):
  file = tmp_path / "problems.json"
  problems = ["1 + 2 + 3 + 4", "9 - 9 - 9", "1 - 2 - 3", "5 - 5 + 5"]
  file.write_text(json.dumps([{"str_query": expressions.question(p), "num_sol": value_of(p)} for p in problems]))
  config = arith_config.get_config()
  config.data.dir, config.data.test_path = data_dir, str(file)
  examples = make_task(config, tiny_tokenizer(), len(tiny_tokenizer())).test_examples(2)
  assert {k: [e.answer for e in v] for k, v in examples.items()} == {"3": ["-9", "-4", "5"], "4": ["10"]}  # all of them


def test_queries_without_seeds(data_dir):
  config = arith_config.get_config()
  config.data.dir, config.data.num_seed_rationales = data_dir, 0
  task = make_task(config, tiny_tokenizer(), len(tiny_tokenizer()))
  assert task.num_seeded == 0 and len(task.examples) == 1050 and not any(e.rationale for e in task.examples)
  config.data.num_seed_rationales = 10
  task = make_task(config, tiny_tokenizer(), len(tiny_tokenizer()))
  assert task.num_seeded == 10 and sum(e.rationale is not None for e in task.examples) == 10


def test_more_demonstrations_than_the_data_has(data_dir):
  config = arith_config.get_config()
  config.data.dir, config.data.num_seed_rationales = data_dir, 51
  with pytest.raises(ValueError, match="config.data.num_seed_rationales 51: the data has 50"):
    make_task(config, tiny_tokenizer(), len(tiny_tokenizer()))


def test_unknown_task_and_missing_tokenizer():
  config = arith_config.get_config()
  with pytest.raises(ValueError, match="'embedded/arith-2m' has no tokenizer"):
    make_task(config, None, 10)
  config.task = "chess"
  with pytest.raises(ValueError, match="config.task 'chess' is unknown: choose from arith"):
    make_task(config, tiny_tokenizer(), 10)
