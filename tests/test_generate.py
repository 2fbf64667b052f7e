"""`python -m gfn_jax.generate`: samples beside log q and log R, and what a user's slips get."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from gfn_jax.datasets import arithmetic
from gfn_jax.metrics import read_jsonl
from gfn_jax.models import load_adapter, load_pretrained, logits, save_adapter, save_pretrained
from gfn_jax.rewards import prefix_log_rewards
from gfn_jax.tasks.arith import ALLOWED_CHARACTERS, parse_answer
from testing import REPOSITORY, assert_one_line, random_lora, run_commands, run_python, tiny_pretrained

ARITH = ["--config=configs/arith.py:smoke", "--config.data.dir={}/tfds"]
TINY = ["--model={}/tiny", "--prompt=6 -"]
QUESTION = "Question: 6 - 0 - 4 = ? Answer:"

RUNS = {
  "questions": [
    *ARITH, "--adapter={}/arith_adapter", f"--prompt={QUESTION}", "--prompt=Question: 1 + 1 = ? Answer:",
    "--num_samples=3", "--output={}/questions.jsonl",
  ],
  "problems": [*ARITH, "--num_samples=2", "--temperature=0", "--output={}/problems.jsonl"],
  "target": [
    "--adapter={}/adapter", "--prompt=Question: 6 - 0", "--target= is 6", "--stop=.", "--temperature=0",
    "--max_length=3", "--num_samples=1", "--output={}/target.jsonl",
  ],
  "text": [*TINY, "--max_length=5", "--min_length=2", "--top_k=9", "--top_p=0.9", "--output={}/text.jsonl"],
}  # fmt: skip

SLIPS = {
  # name: (arguments, what the line must hold)
  "no prompt": (["--model={}/tiny"], ["--prompt is missing"]),
  "no model": (["--prompt=6 -"], ["--model, --config or the adapter_config.json of --adapter"]),
  "an adapter that names no base": (["--prompt=6 -", "--adapter={}/anonymous"], ["no model is named"]),
  "an empty prompt": (["--model={}/tiny", "--prompt="], ["prompt ''", "no tokens"]),
  "a stop of several tokens": ([*TINY, "--stop=Question:"], ["stop 'Question:'", "['Question', ':']"]),
  "an unknown stop": ([*TINY, "--stop=!"], ["stop '!'", "one token"]),
  "a model without tokenizer": (["--model={}/wordless", "--prompt=6 -"], ["{}/wordless", "no tokenizer"]),
  "top_p of nothing": ([*TINY, "--top_p=0"], ["top_p 0", "above 0 and at most 1"]),
  "top_p above 1": ([*TINY, "--top_p=1.5"], ["top_p 1.5", "above 0 and at most 1"]),
  "top_k of nothing": ([*TINY, "--top_k=0"], ["top_k 0", "at least 1"]),
  "a negative temperature": ([*TINY, "--temperature=-1"], ["temperature -1", "0 (greedy)"]),
  "no samples": ([*TINY, "--num_samples=0"], ["num_samples", "0"]),
  "a negative length": ([*TINY, "--max_length=-3"], ["max_length -3"]),
  "lengths the wrong way round": ([*TINY, "--max_length=3", "--min_length=4"], ["min_length 4 and max_length 3"]),
  "a negative minimum": ([*TINY, "--min_length=-1"], ["min_length -1"]),
  "a text beyond the context": ([*TINY, "--max_length=255"], ["'6 -'", "255 more", "256 positions"]),
  "a question beyond the context": (
    [*ARITH, f"--prompt={QUESTION}", "--max_length=1024"],
    [QUESTION, "positions"],
  ),
  "an adapter of another model": ([*TINY, "--adapter={}/arith_adapter"], ["{}/arith_adapter", "does not fit"]),
  "no adapter there": ([*TINY, "--adapter={}/nothing"], ["{}/nothing is no adapter", "adapter_config.json"]),
  "no model there": (["--model={}/nothing", "--prompt=6 -"], ["{}/nothing", "no folder"]),
  "an unknown dtype": ([*TINY, "--dtype=float8"], ["'float8'", "bfloat16"]),
  "a prompt that is no question": ([*ARITH, "--prompt=Hello"], ["'Hello'", "no question", QUESTION]),
  "a question of letters": ([*ARITH, "--prompt=Question: a + b = ? Answer:"], ["a + b", "no question"]),
  "a target beside a task": ([*ARITH, "--target=."], ["--target=.", "the task of --config"]),
  "a stop beside a task": ([*ARITH, "--stop=."], ["--stop=.", "the task of --config"]),
  "output in no folder": ([*TINY, "--output={}/no/file.jsonl"], ["{}/no", "does not exist"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Models, adapters, and what the runs write."""
  folder = tmp_path_factory.mktemp("generate")
  tiny = dataclasses.replace(tiny_pretrained(), source=str(folder / "tiny"))
  save_pretrained(folder / "tiny", tiny)
  save_pretrained(folder / "wordless", dataclasses.replace(tiny, tokenizer=None))
  save_adapter(folder / "adapter", random_lora(tiny), tiny)
  save_adapter(folder / "anonymous", random_lora(tiny), dataclasses.replace(tiny, source=""))
  arith = load_pretrained("embedded/arith-2m")
  save_adapter(folder / "arith_adapter", random_lora(arith, ("q_proj",)), arith)
  return folder


@pytest.fixture(scope="module")
def results(folder):
  """Name of a run or a slip -> (exit code, stdout, stderr)."""
  commands = RUNS | {name: arguments for name, (arguments, _) in SLIPS.items()}
  there = [["gfn_jax.generate", *(a.replace("{}", str(folder)) for a in arguments)] for arguments in commands.values()]
  return dict(zip(commands, run_commands(there)))


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_gets_one_line_and_exit_code_2(case, results, folder):
  code, stdout, stderr = results[case]
  assert_one_line(code, stderr, [part.replace("{}", str(folder)) for part in SLIPS[case][1]])
  assert stdout == ""


@pytest.mark.parametrize("case", RUNS)
def test_a_row_a_sample_the_likeliest_first(case, results, folder):
  code, stdout, stderr = results[case]
  assert (code, stderr) == (0, "")
  records = read_jsonl(folder / f"{case}.jsonl")
  rows = [line for line in stdout.splitlines() if line.startswith("  ")]
  assert len(rows) == len(records)
  for prompt in dict.fromkeys(r["X"] for r in records):
    ranked = sorted((r for r in records if r["X"] == prompt), key=lambda r: -r["log_q"])
    block = stdout.split(f'"{prompt}"', 1)[1].split("\n\n")[0].splitlines()[1:]
    assert [row.endswith(f'"{r["Z"]}"') for row, r in zip(block, ranked)] == [True] * len(ranked)
    assert all(f"log q {r['log_q']:7.1f}" in row for row, r in zip(block, ranked))


def test_answers_to_questions(results, folder):
  records = read_jsonl(folder / "questions.jsonl")
  assert [r["Y"] for r in records] == [". The answer is 2."] * 6
  assert [r["X"] for r in records] == [QUESTION] * 3 + ["Question: 1 + 1 = ? Answer:"] * 3
  assert set("".join(r["Z"] for r in records)) <= ALLOWED_CHARACTERS
  assert all(r["right"] == (parse_answer(r["Z"]) == "2") for r in records)
  verdicts = [line.split()[0] for line in results["questions"][1].splitlines() if line.startswith("  ")]
  assert sorted(verdicts) == sorted("right" if r["right"] else "wrong" for r in records)
  assert f'"{QUESTION}"  ->  ". The answer is 2."' in results["questions"][1]


def log_q(pretrained, lora, prompt, z, stop, allowed):
  """log q(z stop), from one full forward pass."""
  scores = np.asarray(logits(pretrained, np.array([prompt + z]), lora=lora))[0, len(prompt) - 1 :]
  log_probs = np.log(np.exp(scores) / np.where(allowed, np.exp(scores), 0).sum(-1, keepdims=True))
  return sum(log_probs[t, token] for t, token in enumerate([*z, stop][: len(scores)]))


def test_numbers_of_the_task(results, folder):
  """Greedy samples of held-out problems: text that the tokenizer reads as it was written."""
  assert results["problems"][0] == 0
  records = read_jsonl(folder / "problems.jsonl")
  base, config = load_pretrained("embedded/arith-2m"), arithmetic.make_config(0)
  encode = base.tokenizer.encode
  allowed = np.array([set(base.tokenizer.decode([i])) <= ALLOWED_CHARACTERS for i in range(base.config.vocab_size)])
  shown = [arithmetic.load(config, "demonstrations", str(folder / "tfds"))[i] for i in range(3)]
  context = "".join(f"{e['prompt']} {e['rationale']}. The answer is {e['answer']}.\n" for e in shown)
  for k, pair in zip(arithmetic.EVALUATED_OPERANDS, zip(records[::2], records[1::2], strict=True), strict=True):
    problem = arithmetic.load(config, f"validation_{k}", str(folder / "tfds"))[0]
    record = pair[0]
    assert pair[1] == record and record["X"] == problem["prompt"] and record["Y"].endswith(f" {problem['answer']}.")
    prompt, z = encode(record["X"]), encode(record["Z"])
    if k > 3:
      continue  # other lengths would compile other programs
    assert "=" not in record["Z"]  # the base repeats the question: no tool, all scored
    assert abs(record["log_q"] - log_q(base, None, prompt, z, encode(record["Y"])[0], allowed)) < 1e-3
    expected = prefix_log_rewards(
      base, context=encode(context), prompt=prompt, tokens=np.array([z]), lengths=np.array([len(z)]),
      target=encode(record["Y"]), allowed_tokens=allowed,
    )  # fmt: skip
    assert abs(record["log_R"] - expected[0, -1]) < 1e-3


@pytest.mark.slow
def test_a_base_split_over_two_devices_says_the_same(results, folder):
  assert results["problems"][0] == 0
  arguments = [a.replace("{}", str(folder)).replace("problems.jsonl", "split.jsonl") for a in RUNS["problems"]]
  run_python(
    f"import runpy, sys\nsys.argv[1:] = {[*arguments, '--config.mesh.model=2']!r}\n"
    "runpy.run_module('gfn_jax.generate', run_name='__main__', alter_sys=True)",
    devices=2,
  )
  whole, split = (read_jsonl(folder / name) for name in ("problems.jsonl", "split.jsonl"))
  assert [(r["X"], r["Z"]) for r in split] == [(r["X"], r["Z"]) for r in whole]
  for name in ("log_q", "log_R"):
    np.testing.assert_allclose([r[name] for r in split], [r[name] for r in whole], rtol=0, atol=1e-3)


def test_numbers_of_a_target(results, folder):
  """The adapter names its base; log q is of both, log R of the base alone."""
  assert results["target"][0] == 0
  (record,) = read_jsonl(folder / "target.jsonl")
  base = load_pretrained(folder / "tiny")
  lora, encode = load_adapter(folder / "adapter", base), base.tokenizer.encode
  prompt, z = encode(record["X"]), encode(record["Z"])
  assert base.tokenizer.decode(z) == record["Z"] and record["Y"] == " is 6" and "right" not in record
  allowed = np.ones(base.config.vocab_size, bool)
  # At max_length stopping is forced, and costs nothing.
  stop = encode(".") if len(z) < 3 else []
  scored = log_q(base, lora, prompt, z if stop else z[:-1], stop[0] if stop else z[-1], allowed)
  assert abs(record["log_q"] - scored) < 1e-3
  expected = prefix_log_rewards(
    base, context=[], prompt=prompt, tokens=np.array([z]), lengths=np.array([len(z)]), target=encode(" is 6")
  )
  assert abs(record["log_R"] - expected[0, -1]) < 1e-3


def test_text_without_a_target_has_no_reward(results, folder):
  records = read_jsonl(folder / "text.jsonl")
  assert len(records) == 4 and all(r.keys() == {"X", "Z", "log_q"} for r in records)
  assert "log R" not in results["text"][1] and "->" not in results["text"][1]


def test_a_process_of_its_own_starts_without_warnings():
  env = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-m", "gfn_jax.generate", "--version"], env=env, capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("gfn_jax ")
