"""Full fine-tuning: its loss beside PyTorch's, accumulation, resuming, the folder it leaves, and a user's slips."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.finetune import get_config
from gfn_jax import finetune as program
from gfn_jax import texts
from gfn_jax.data import pad_right
from gfn_jax.finetune import finetune
from gfn_jax.likelihood import make_optimizer, next_token_terms
from gfn_jax.metrics import read_jsonl
from gfn_jax.models import load_pretrained, logits, save_pretrained
from gfn_jax.parallel import DATA_AXIS
from gfn_jax.preemption import Preempted, Preemption
from gfn_jax.types import TrainState
from testing import (
  assert_logits,
  assert_one_line,
  run_commands,
  run_python,
  tiny_hf_config,
  tiny_pretrained,
  torch_logits,
  torch_model,
)

LOSS = "finetune/validation_loss"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny GPT-J ("base"), and 22 texts of unlike length ("texts.txt")."""
  folder = tmp_path_factory.mktemp("finetune")
  save_pretrained(folder / "base", tiny_pretrained(n_layer=1, n_positions=64))
  sums = [f"Question: {a} + {b} = ? Answer: {a + b}" for a in range(3) for b in range(3)]
  others = [f"{a} - 1 = {a - 1}, {a}" for a in range(13)]
  (folder / "texts.txt").write_text("\n".join([*sums, "", *others]) + "\n")
  return folder


def smoke(folder, **fields):
  """The smoke config on the tiny model and texts, with fields of `train` to change."""
  config = get_config("smoke")
  config.model.name, config.data.path = str(folder / "base"), str(folder / "texts.txt")
  config.data.validation_share = 0.2
  config.train.update(fields)
  return config


@pytest.fixture(scope="module")
def tuned(folder):
  """The folder of a run that nothing interrupted."""
  assert finetune(smoke(folder), folder / "tuned") == 0
  return folder / "tuned"


def weights(folder):
  return (folder / "model.safetensors").read_bytes()


def distance(a, b):
  """Between parameters, as one number: Adam turns the rounding of a gradient near 0 into steps of single elements."""
  return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def test_loss_and_gradient_are_those_of_torch(tmp_path):
  import torch

  model = torch_model(tiny_hf_config("gpt2"))
  model.save_pretrained(tmp_path)
  base = load_pretrained(tmp_path)
  tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, (3, 9))
  mask = np.arange(9) < np.array([9, 5, 2])[:, None]

  labels = torch.tensor(np.where(mask, tokens, -100)).long()
  loss = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), labels=labels).loss
  loss.backward()
  value_and_grad = jax.jit(jax.value_and_grad(functools.partial(next_token_terms, base.config), has_aux=True))
  (nats, count), grads = value_and_grad(base.params, jnp.asarray(tokens), jnp.asarray(mask))

  assert count == 8 + 4 + 1
  assert nats / count == pytest.approx(loss.item(), rel=1e-5)
  theirs = model.get_input_embeddings().weight.grad.numpy()
  np.testing.assert_allclose(grads["embed"]["embedding"] / count, theirs, rtol=1e-3, atol=1e-5)


def accumulated(base, tokens, mask, dtype, micro_batch, rows):
  """(nats, tokens, gradient) of all rows, given so many at a time."""
  add = functools.partial(program.accumulate, base.config, dtype, micro_batch)
  add = jax.pmap(add, axis_name=DATA_AXIS, in_axes=(None, None, 0, 0), out_axes=None)
  total = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, base.params))
  for begin in range(0, len(tokens), rows):
    total = add(base.params, total, tokens[None, begin : begin + rows], mask[None, begin : begin + rows])
  return total


def test_an_update_is_by_the_mean_over_all_tokens_however_they_were_accumulated():
  base = tiny_pretrained(n_layer=1)
  tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, base.config.vocab_size)
  mask = jnp.arange(12) < jnp.array([12, 12, 9, 7, 5, 3, 2, 2])[:, None]
  optimizer = make_optimizer(1e-2, 0, 10, 0.01)
  update = jax.jit(functools.partial(program.update, optimizer))

  def updated(total):
    return update(TrainState(jnp.int32(0), base.params, optimizer.init(base.params)), total)

  state, zeros, metrics = updated(accumulated(base, tokens, mask, "float32", 8, 8))
  log_probs = jax.nn.log_softmax(logits(base, tokens, mask)[:, :-1])
  nats = -np.take_along_axis(np.asarray(log_probs), np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
  assert metrics["loss"] == pytest.approx(nats[np.asarray(mask)[:, 1:]].mean(), rel=1e-5)
  assert int(state.step) == 1 and not any(x.any() for x in jax.tree.leaves(zeros))

  parts = accumulated(base, tokens, mask, "float32", 1, 4)  # two calls that scan four rows each
  also, _, metrics_also = updated(parts)
  assert float(metrics_also["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
  assert distance(also.trained, state.trained) < 1e-3 * distance(state.trained, base.params)

  coarse = accumulated(base, tokens, mask, "bfloat16", 8, 8)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(coarse))
  assert 0 < distance(coarse[2], parts[2]) < 0.05 * optax.tree.norm(parts[2])


def test_training_lowers_the_held_out_loss(tuned):
  records = read_jsonl(tuned / "metrics.jsonl")
  losses = [(r["finetune/epoch"], r[LOSS], r["finetune/validation_perplexity"]) for r in records if LOSS in r]
  assert [epoch for epoch, *_ in losses] == [0, 1, 2]
  assert losses[2][1] < losses[1][1] < losses[0][1] - 0.1
  assert losses[2][2] == pytest.approx(np.exp(losses[2][1]))
  assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]  # 18 texts, 8 a step, twice


def test_the_held_out_loss_is_that_of_the_folder_it_leaves(tuned, folder):
  base = load_pretrained(tuned)
  lines = texts.read_texts(folder / "texts.txt")
  rows, num_cut = texts.tokenize(lines, base, "texts.txt")
  _, held_out = texts.split(len(rows), 0.2)
  assert len(held_out) == 4 and num_cut == 0
  assert all(base.tokenizer.decode(row).endswith("<|endoftext|>") for row in rows)
  nats, count, (tokens, mask) = 0.0, 0, pad_right([rows[i] for i in held_out])
  log_probs = np.asarray(jax.nn.log_softmax(logits(base, tokens, mask)))
  for row, scores in zip((rows[i] for i in held_out), log_probs):
    nats -= sum(scores[i, token] for i, token in enumerate(row[1:]))
    count += len(row) - 1
  assert read_jsonl(tuned / "metrics.jsonl")[-1][LOSS] == pytest.approx(nats / count, rel=1e-5)


def test_the_folder_loads_in_transformers_with_the_same_logits(tuned, folder):
  import transformers

  theirs = transformers.AutoModelForCausalLM.from_pretrained(tuned).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
  tokens = np.array([tokenizer("Question: 1 + 2 = ? Answer: 3").input_ids])
  ours = load_pretrained(tuned)
  assert_logits(logits(ours, tokens), torch_logits(theirs, tokens))
  untuned = logits(load_pretrained(folder / "base"), tokens)
  assert np.abs(untuned - logits(ours, tokens)).max() > 0.01
  record = json.loads((tuned / "finetune.json").read_text())
  assert record["config"]["train.num_epochs"] == 2 and "gfn_jax" in record["versions"]
  assert "\nHeld-out texts: 6." in (tuned / "README.md").read_text()
  assert not tuned.with_name("tuned.run").exists() and not tuned.with_name("tuned.tmp").exists()


def test_four_devices_learn_what_one_does(tuned, folder):
  code = (
    "import pathlib, test_finetune as t\n"
    f"folder = pathlib.Path({str(folder)!r})\n"
    "assert t.jax.local_device_count() == 4\n"
    "assert t.finetune(t.smoke(folder, micro_batch=1), folder / 'devices') == 0\n"
  )
  run_python(code, devices=4)
  ours, theirs = load_pretrained(folder / "devices").params, load_pretrained(tuned).params
  assert distance(ours, theirs) < 1e-3 * distance(theirs, load_pretrained(folder / "base").params)


def interrupted_at(calls):
  """`Preemption.check` once SIGTERM has come, which is when it is called so many times."""
  count = itertools.count(1)

  def check(self):
    if next(count) >= calls:
      raise Preempted

  return check


def killed(path, pretrained):
  """`save_pretrained` until a kill."""
  save_pretrained(path, dataclasses.replace(pretrained, tokenizer=None))
  raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_bits(tuned, folder, monkeypatch, capsys):
  output, other = folder / "interrupted", smoke(folder)
  # A check before each of the 3 steps of an epoch, and one before the evaluation at its beginning.
  for calls, made in ((4, 2), (2, 3)):  # inside an epoch, and between two
    with monkeypatch.context() as patch:
      patch.setattr(Preemption, "check", interrupted_at(calls))
      assert finetune(smoke(folder), output) == 143
    assert f"saved after step {made};" in capsys.readouterr().out
  other.seed = 1
  with pytest.raises(ValueError, match="interrupted.run' holds another run: config.seed is 1 here and 0 there"):
    finetune(other, output)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(program, "save_pretrained", killed)
    finetune(smoke(folder), output)
  assert "steps     3 of 6 made" in capsys.readouterr().out and not output.exists()
  assert finetune(smoke(folder), output) == 0
  assert "steps     6 of 6 made" in capsys.readouterr().out
  assert weights(output) == weights(tuned) and (output / "tokenizer.json").is_file()
  untimed = lambda r: {k: v for k, v in r.items() if "second" not in k}  # noqa: E731
  ours, theirs = (read_jsonl(f / "metrics.jsonl") for f in (output, tuned))
  assert [*map(untimed, ours)] == [*map(untimed, theirs)]


def test_the_order_is_a_function_of_seed_and_epoch():
  order = texts.epoch_order(3, 1, 50)
  assert sorted(order) == list(range(50))
  np.testing.assert_array_equal(order, texts.epoch_order(3, 1, 50))
  assert (order != texts.epoch_order(3, 2, 50)).any() and (order != texts.epoch_order(4, 1, 50)).any()
  training, held_out = texts.split(50, 0.1)
  assert len(held_out) == 5 and sorted([*training, *held_out]) == list(range(50))
  assert [len(part) for part in texts.split(50, 0.0)] == [50, 0]


def test_a_batch_is_laid_out_in_groups_of_like_length():
  rows = [[i + 1] * n for i, n in enumerate((5, 40, 3, 18, 30))]
  groups = list(texts.lay_out(rows, 8, 4, longest=64))
  assert [tokens.shape for tokens, _ in groups] == [(2, 49), (2, 25), (2, 17)]  # the fourth group has no row
  found = [list(t[m]) for tokens, mask in groups for t, m in zip(tokens, mask) if m.any()]
  assert sorted(found) == sorted(rows)
  assert texts.bucket(33, 40) == 40 and texts.bucket(64, 64) == 64 and texts.bucket(1, 64) == 16
  widths = {texts.bucket(n, 1024) for n in range(1, 1025)}
  assert len(widths) == 13 and all(texts.bucket(n, 1024) >= n for n in range(1, 1025))


def test_texts_are_read_as_they_stand(tmp_path):
  plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
  plain.write_bytes("\ufeff one\r\n\n \ntwo \u2028 lines\n".encode())
  assert texts.read_texts(plain) == {1: " one", 4: "two \u2028 lines"}
  lines.write_text('{"text": "one\\ntwo"}\n\n{"text": ["A.", "B."], "id": 3}\n')
  assert texts.read_texts(lines) == {1: "one\ntwo", 3: "A. B."}


def test_a_text_that_is_too_long_is_cut_and_has_no_end():
  base = tiny_pretrained(family="gpt2", n_positions=8)
  rows, num_cut = texts.tokenize({1: "1 + 2", 2: "0" * 8, 3: "0" * 9}, base, "a.txt")
  eos = base.tokenizer.eos_token_id
  assert num_cut == 1
  assert rows[0] == [*base.tokenizer.encode("1 + 2"), eos]
  assert rows[1] == [*base.tokenizer.encode("0" * 8), eos] and rows[2] == base.tokenizer.encode("0" * 9)


FILES = {
  "empty.txt": b"\n\n",
  "one.txt": b"1 + 2\n",
  "latin.txt": b"1\n\xe9\n",
  "foreign.txt": "1\nç\n".encode(),
  "broken.jsonl": b'{"text": "1"}\n{"text": "1"\n',
  "list.jsonl": b"[1]\n",
  "good.jsonl": b'{"text": "1"}\n',
  "number.jsonl": b'{"text": 1}\n',
  "blank.jsonl": b'{"text": " "}\n',
  "half.jsonl": b'{"text": "\\ud800"}\n',
}

CASES = {
  # name: (fields of the config, what the error must hold); {} is the folder
  "no data": ({"data.path": None}, ["config.data.path is missing"]),
  "file that is not there": ({"data.path": "{}/no.txt"}, ["{}/no.txt", "No such file"]),
  "empty file": ({"data.path": "{}/empty.txt"}, ["{}/empty.txt has no texts"]),
  "line that is no UTF-8": ({"data.path": "{}/latin.txt"}, ["{}/latin.txt, line 2", "utf-8"]),
  "line that is no JSON": ({"data.path": "{}/broken.jsonl"}, ["{}/broken.jsonl, line 2"]),
  "record that is no object": ({"data.path": "{}/list.jsonl"}, ["{}/list.jsonl, line 1", "object", "list"]),
  "missing field": ({"data.path": "{}/good.jsonl", "data.field": "story"}, ["line 1", "'story'", "text"]),
  "field that is no text": ({"data.path": "{}/number.jsonl"}, ["number.jsonl, line 1", "'text'", "int"]),
  "empty text": ({"data.path": "{}/blank.jsonl"}, ["blank.jsonl, line 1", "'text' is empty"]),
  "half a character": ({"data.path": "{}/half.jsonl"}, ["half.jsonl, line 1", "surrogate"]),
  "text without tokens": ({"data.path": "{}/foreign.txt"}, ["foreign.txt, line 2", "no tokens"]),
  "nothing left to train on": ({"data.path": "{}/one.txt"}, ["validation_share 0.2", "1 of 1"]),
  "share of all": ({"data.validation_share": 1.0}, ["config.data.validation_share is 1.0", "below 1"]),
  "warm-up too long": ({"train.warmup_steps": 6}, ["warmup_steps 6", "6 steps"]),
  "batch that does not divide": ({"train.micro_batch": 3}, ["batch_size 8", "micro_batch 3"]),
  "float16": ({"model.dtype": "float16"}, ["'float16'", "float32, bfloat16"]),
  "negative rate": ({"train.learning_rate": -1.0}, ["config.train.learning_rate is -1.0", "positive"]),
  "no seed": ({"seed": -1}, ["config.seed is -1", "negative"]),
  "model that is not there": ({"model.name": "{}/no"}, ["{}/no"]),
  "model without tokenizer": ({"model.name": "{}/mute"}, ["{}/mute", "has no tokenizer"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(case, folder):
  for name, content in FILES.items():
    (folder / name).write_bytes(content)
  save_pretrained(folder / "mute", dataclasses.replace(tiny_pretrained(n_layer=1), tokenizer=None))
  fields, named = CASES[case]
  config = smoke(folder)
  config.update_from_flattened_dict(
    {k: v.replace("{}", str(folder)) if isinstance(v, str) else v for k, v in fields.items()}
  )
  with pytest.raises(ValueError) as caught:
    finetune(config, folder / "refused")
  assert "\n" not in str(caught.value)
  for part in named:
    assert part.replace("{}", str(folder)) in str(caught.value)
  assert not (folder / "refused").exists()


COMMANDS = {
  # name: (arguments, what the error must hold; [] for no error)
  "no output": (["--config=configs/finetune.py:smoke", "--config.data.path={}/texts.txt"], ["--output is missing"]),
  "unknown variant": (["--config=configs/finetune.py:big", "--output={}/out"], ["'big'", "smoke, paper"]),
  "another program's": (
    ["--config=configs/pretrain_arith.py", "--output={}/out"],
    ["no config of a run", "data.field"],
  ),
  "output that exists": (["--output={}/base"], ["{}/base exists", "name another"]),
  "other seed": (["--output={}/tuned", "--config.seed=1"], ["tuned' holds another run: config.seed is 1 here"]),
  "output at a URL": (["--output=gs://bucket/out"], ["'gs://bucket/out' is a URL"]),
  "again": (["--output={}/tuned"], []),
}


def test_commands(folder, tuned):
  usual = ["--config=configs/finetune.py:smoke", f"--config.model.name={folder}/base"]
  usual += [f"--config.data.path={folder}/texts.txt", "--config.data.validation_share=0.2"]
  commands = []
  for arguments, _ in COMMANDS.values():
    arguments = [a.replace("{}", str(folder)) for a in arguments]
    commands.append(["gfn_jax.finetune", *(arguments if "--config=" in arguments[0] else [*usual, *arguments])])
  before = weights(tuned)
  *slips, again = run_commands(commands)
  for (code, _, stderr), (_, named) in zip(slips, COMMANDS.values()):
    assert_one_line(code, stderr, [part.replace("{}", str(folder)) for part in named])
  assert again == (0, f"{tuned}: finished already\n", "")
  assert weights(tuned) == before and not (folder / "out").exists()


def test_variants():
  paper = get_config("paper")
  assert (paper.train.batch_size, paper.train.micro_batch) == (64 * 32, 64) and paper.train.num_epochs == 20
  with pytest.raises(ValueError, match="'large' is unknown: choose from smoke, paper"):
    get_config("large")
