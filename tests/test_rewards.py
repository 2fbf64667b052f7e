"""Prefix rewards: the reference's numbers, one forward pass a prefix, and the tree that saves them."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import policy, prefix_tree
from gfn_jax.data import pad_left, pad_right, query_table
from gfn_jax.flops import forward_flops, program_flops
from gfn_jax.models import load_pretrained, logits
from gfn_jax.prefix_tree import PADDING, PADDING_ON_CPU, bucket
from gfn_jax.rewards import Reward, RewardModel, prefix_log_rewards, whole_log_rewards
from gfn_jax.task import Task
from gfn_jax.types import Example
from testing import run_python, shared_folder, tiny_pretrained


def log_softmax(x, allowed=None):
  """In float64, over the allowed entries of the last axis."""
  x = np.asarray(x, np.float64)
  if allowed is not None:
    x = np.where(allowed, x, -np.inf)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def separate_passes(pretrained, context, prompt, tokens, lengths, target, allowed=None):
  """What the two passes must equal: a forward pass for each prefix of each row, [context, prompt, z_1:t, target].

  Returns:
    log p(z_1:t | context, prompt) and log p(target | context, prompt, z_1:t), float64 [B, S]; 0 past a row's length.
  """
  before = [*context, *prompt]
  places = [(row, t) for row, n in enumerate(lengths) for t in range(n + 1)]
  texts = [[*before, *tokens[row][:t], *target] for row, t in places]
  padded = np.zeros((len(texts), max(map(len, texts))), np.int32)  # on the right, where nothing looks
  for i, text in enumerate(texts):
    padded[i, : len(text)] = text
  scores = np.asarray(logits(pretrained, padded))
  log_p_prefix, log_p_target = np.zeros((2, len(lengths), np.shape(tokens)[1] + 1))
  for (row, t), text, score in zip(places, texts, scores):
    over_allowed, over_all = log_softmax(score, allowed), log_softmax(score)
    for i in range(len(before), len(text)):
      if i < len(before) + t:
        log_p_prefix[row, t] += over_allowed[i - 1, text[i]]
      else:
        log_p_target[row, t] += over_all[i - 1, text[i]]
  return log_p_prefix, log_p_target


# ---- The reference's numbers


@pytest.fixture(scope="module")
def golden():
  folder = shared_folder() / "golden" / "rewards"
  with np.load(folder / "cases.npz") as arrays:
    return load_pretrained(folder / "tiny_gpt2"), dict(arrays)


CASES = ("case00", "case01", "case02", "case03")


@pytest.mark.parametrize("case, vocabulary", (("case00", "allowed"), ("case03", "all")))
def test_golden(golden, case, vocabulary):
  pretrained, arrays = golden
  prompt, target, tokens = (arrays[f"{case}/{name}"].tolist() for name in ("prompt", "target", "tokens"))
  ours = prefix_log_rewards(
    pretrained, context=arrays["context"].tolist(), prompt=prompt, tokens=np.array([tokens]),
    lengths=np.array([len(tokens)]), target=target,
    allowed_tokens=arrays["allowed_tokens"] if vocabulary == "allowed" else None,
  )  # fmt: skip
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours[0], arrays[f"{case}/log_reward_{vocabulary}_tokens"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("vocabulary", ("all", "allowed"))
def test_golden_as_one_batch(golden, vocabulary):
  pretrained, arrays = golden
  fields = ("prompt", "target", "tokens")
  prompts, targets, tokens = ([arrays[f"{case}/{name}"].tolist() for case in CASES] for name in fields)
  tokens, inside = pad_right(tokens)
  length = inside.sum(1).astype(np.int32)
  terminable = np.arange(tokens.shape[1] + 1) <= length[:, None]
  allowed = arrays["allowed_tokens"] if vocabulary == "allowed" else None
  model = RewardModel(pretrained, context=arrays["context"].astype(np.int32), allowed_tokens=allowed)
  one_each = [x[:, None] for x in pad_right(targets)]
  log_p_prefix, log_p_target = model(*pad_left(prompts), tokens, length, terminable, *one_each)
  ours = log_p_prefix + log_p_target[..., 0]
  for case, row, n in zip(CASES, ours, length):
    theirs = arrays[f"{case}/log_reward_{vocabulary}_tokens"]
    np.testing.assert_allclose(row[: n + 1], theirs, rtol=0, atol=1e-4, err_msg=case)


# ---- One forward pass a prefix

CONTEXT, PROMPT, TARGET = [7, 3, 60, 11, 2], [21, 5, 33], [8, 44, 9, 30]
LENGTHS = [6, 0, 3, 6, 5, 1]


def ragged_samples(vocab_size, seed=0):
  """Samples that share prefixes, two of them equal, one empty; past a row's length stands what must not matter."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab_size, (len(LENGTHS), max(LENGTHS)))
  tokens[3] = tokens[0]
  tokens[4, :4] = tokens[0, :4]
  tokens[2, :2] = tokens[0, :2]
  return tokens, np.array(LENGTHS)


@pytest.mark.parametrize(
  "family, change",
  (
    ("gptj", {}),
    ("gptj", {"allowed_tokens": True}),
    ("gptj", {"context": [], "prompt": [21]}),
    ("gptj", {"target": [], "prompt": []}),
    ("gptj", {"target": [44]}),
    ("gpt2", {"allowed_tokens": True}),
    ("gpt2", {"target": [], "context": [], "allowed_tokens": True}),
  ),
  ids=lambda x: x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items()) or "usual",
)
def test_equals_a_forward_pass_for_each_prefix(family, change):
  pretrained = tiny_pretrained(seed=1, family=family)
  vocab_size = pretrained.config.vocab_size
  tokens, lengths = ragged_samples(vocab_size)
  case = {"context": CONTEXT, "prompt": PROMPT, "target": TARGET, "allowed_tokens": None} | change
  if case["allowed_tokens"]:
    # Half the vocabulary and what the samples hold; not the target, whose tokens are never renormalised.
    allowed = np.random.default_rng(2).random(vocab_size) < 0.5
    allowed[case["target"]] = False
    allowed[np.unique(tokens)] = True
    case["allowed_tokens"] = allowed
  ours = prefix_log_rewards(pretrained, tokens=tokens, lengths=lengths, **case)
  log_p_prefix, log_p_target = separate_passes(
    pretrained, case["context"], case["prompt"], tokens, lengths, case["target"], case["allowed_tokens"]
  )
  assert ours.shape == (len(tokens), tokens.shape[1] + 1) and ours.dtype == np.float32
  inside = np.arange(tokens.shape[1] + 1) <= lengths[:, None]
  np.testing.assert_allclose(ours[inside], (log_p_prefix + log_p_target)[inside], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(ours[0], ours[3])


def test_something_must_stand_before_z():
  with pytest.raises(ValueError, match="context and prompt are both empty"):
    prefix_log_rewards(
      tiny_pretrained(), context=[], prompt=[], tokens=np.zeros((1, 2), int), lengths=np.array([2]), target=TARGET
    )


def test_no_sample_has_a_token():
  pretrained = tiny_pretrained()
  ours = prefix_log_rewards(
    pretrained, context=[], prompt=PROMPT, tokens=np.full((2, 3), 5), lengths=np.zeros(2, int), target=TARGET
  )
  _, log_p_target = separate_passes(pretrained, [], PROMPT, [[]], [0], TARGET)
  np.testing.assert_allclose(ours[:, 0], log_p_target[0, 0], rtol=0, atol=1e-4)


# ---- Several queries

QUERIES = (  # (prompt, target)
  ([21, 5, 33, 4, 17], [8, 44]),
  ([3], [9, 30, 30, 1, 62]),
  ([40, 2, 66], [12]),
)


def query_batch(vocab_size, num_samples, num_tokens=4, seed=3):
  """Arguments of `RewardModel.__call__`: left-padded prompts, a ragged target each, some prefixes that cannot stop."""
  rng = np.random.default_rng(seed)
  rows = len(QUERIES) * num_samples
  tokens = rng.choice(rng.choice(vocab_size, 6, replace=False), (rows, num_tokens)).astype(np.int32)
  length = rng.integers(0, num_tokens + 1, rows).astype(np.int32)
  terminable = (np.arange(num_tokens + 1) <= length[:, None]) & (rng.random((rows, num_tokens + 1)) < 0.7)
  prompts, targets = zip(*QUERIES)
  return *pad_left(prompts), tokens, length, terminable, *(x[:, None] for x in pad_right(targets))


def one_by_one(pretrained, context, batch, allowed=None):
  """`separate_passes` for each query of a `query_batch`, 0 where a prefix cannot stop."""
  _, _, tokens, length, terminable, _, _ = batch
  num_samples = len(tokens) // len(QUERIES)
  expected = np.zeros((2, *terminable.shape))
  for q, (prompt, target) in enumerate(QUERIES):
    rows = slice(q * num_samples, (q + 1) * num_samples)
    expected[:, rows] = separate_passes(pretrained, context, prompt, tokens[rows], length[rows], target, allowed)
  return np.where(terminable, expected, 0.0)


def scored(model, batch):
  """What a `RewardModel` says of a `query_batch`, as `one_by_one` does."""
  log_p_prefix, log_p_target = model(*batch)
  return np.stack([log_p_prefix, log_p_target[..., 0]])


@functools.cache
def several_queries(family):
  """(model, allowed tokens, batch, expected)."""
  pretrained = tiny_pretrained(seed=4, family=family)
  batch = query_batch(pretrained.config.vocab_size, num_samples=40)
  assert (~batch[4]).any(axis=1).any() and (batch[3] == 0).any()  # the batch holds what it is meant to
  allowed = np.random.default_rng(5).random(pretrained.config.vocab_size) < 0.6
  allowed[np.unique(batch[2])] = True
  return pretrained, allowed, batch, one_by_one(pretrained, CONTEXT, batch, allowed)


@pytest.mark.parametrize(
  "family, min_nodes, padding",
  (
    ("gptj", 192, PADDING_ON_CPU),
    ("gptj", 192, PADDING),
    ("gptj", 12, PADDING_ON_CPU),
    ("gptj", 40, dataclasses.replace(PADDING_ON_CPU, tokens_of_call=20_000)),
    ("gpt2", 40, dataclasses.replace(PADDING, tokens_of_call=300)),
  ),
)
def test_several_queries(family, min_nodes, padding, monkeypatch):
  monkeypatch.setattr(prefix_tree, "MIN_NODES", min_nodes)
  pretrained, allowed, batch, expected = several_queries(family)
  model = RewardModel(pretrained, context=np.array(CONTEXT, np.int32), allowed_tokens=allowed)
  assert model._padding == PADDING_ON_CPU
  model._padding = padding
  ours = scored(model, batch)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(ours[:, ~batch[4]], 0.0)


def calls_of(model, monkeypatch):
  """What `score_trees` is called with from here on."""
  calls, score = [], model.score_trees
  monkeypatch.setattr(model, "score_trees", lambda *arrays: calls.append(arrays) or score(*arrays))
  return calls


def test_a_call_holds_few_tokens(monkeypatch):
  """Bins of 32 nodes, the longest prompt's four times: 60 branch tokens a call are one bin, 20,000 are all of them."""
  pretrained = tiny_pretrained(seed=4)
  batch = query_batch(pretrained.config.vocab_size, num_samples=30)
  expected = one_by_one(pretrained, [], batch)
  monkeypatch.setattr(prefix_tree, "MIN_NODES", 32)
  model = RewardModel(pretrained, context=np.zeros(0, np.int32))
  calls = calls_of(model, monkeypatch)
  for most in (60, 20_000):
    model._padding = dataclasses.replace(PADDING, tokens_of_call=most)
    np.testing.assert_allclose(scored(model, batch), expected, rtol=0, atol=1e-4)
  *single, whole = [trunk.shape for trunk, *_ in calls]
  assert len(single) > 2 and single == [(1, 1, 32)] * len(single)
  assert whole == (1, bucket(len(single)), 32)
  # Short targets first, each call as wide as its longest, and with as many branches as its fullest bin.
  *widths, widest = [target.shape[-1] for *_, target, _, _ in calls]
  assert widths == sorted(widths) and widths[0] == 1 and widths[-1] == widest == 5
  *branches, most = [target.shape[3] for *_, target, _, _ in calls]
  assert len(set(branches)) > 1 and max(branches) == most
  assert {target.shape[2] for *_, target, _, _ in calls} == {1}


@pytest.mark.parametrize("tokens_of_call", (1, 20_000))
def test_branches_go_block_by_block_as_far_as_there_are_any(tokens_of_call, monkeypatch):
  pretrained = tiny_pretrained(seed=4)
  batch = query_batch(pretrained.config.vocab_size, num_samples=30)
  expected = one_by_one(pretrained, [], batch)
  monkeypatch.setattr(prefix_tree, "MIN_NODES", 32)
  monkeypatch.setattr(prefix_tree, "BLOCK_TOKENS", 16)
  model = RewardModel(pretrained, context=np.zeros(0, np.int32))
  model._padding = dataclasses.replace(PADDING_ON_CPU, tokens_of_call=tokens_of_call)
  calls = calls_of(model, monkeypatch)
  np.testing.assert_allclose(scored(model, batch), expected, rtol=0, atol=1e-4)
  assert len(calls) > 2 if tokens_of_call == 1 else len(calls) == 1
  for arrays in list(calls):
    bins, *_, targets, mask, num_blocks = arrays
    blocks, of_block, width = targets.shape[2:]
    assert of_block == max(1, 16 // max(1, width - 1)) and 32 <= blocks * of_block < 32 + of_block
    used = mask.any(-1).any(-1).any((0, 1))  # the blocks in which there is a target
    assert used[num_blocks - 1] and not used[num_blocks:].any()
    for all_blocks, fewer in zip(model.score_trees(*arrays), model.score_trees(*arrays[:-1], num_blocks - 1)):
      np.testing.assert_array_equal(fewer[:, :, : num_blocks - 1], all_blocks[:, :, : num_blocks - 1])
      np.testing.assert_array_equal(fewer[:, :, num_blocks - 1 :], 0.0)  # not computed
      assert np.any(all_blocks[:, :, num_blocks - 1])
    # A block is so many FLOPs, of each trip of the loop.
    tokens = bins.shape[1] * of_block * (width - 1)
    block = forward_flops(pretrained.config, None, tokens=tokens, keys=32 + width - 1, outputs=tokens)
    none, one, three = (program_flops(model.score_trees, *arrays, while_trips=(n,)) for n in (0, 1, 3))
    assert (one - none, three - none) == (block, 3 * block)
  assert len({int(num_blocks) for *_, num_blocks in calls}) > 1 or tokens_of_call > 1


def test_no_queries():
  """As a process has them whose share of a step's queries is none."""
  _, _, tokens, length, terminable, target, target_mask = query_batch(72, num_samples=2)
  model = RewardModel(tiny_pretrained(), context=np.zeros(0, np.int32))
  nothing = np.zeros((0, 5), np.int32)
  found = model._score_queries(
    2, nothing, nothing.astype(bool), tokens[:0], length[:0], terminable[:0], target[:0], target_mask[:0]
  )
  assert [x.shape for x in found] == [(0, 5), (0, 5, 1)]


def test_nothing_to_score():
  pretrained = tiny_pretrained()
  batch = list(query_batch(pretrained.config.vocab_size, num_samples=2))
  batch[4] = np.zeros_like(batch[4])
  for part in RewardModel(pretrained, context=np.zeros(0, np.int32))(*batch):
    np.testing.assert_array_equal(part, 0.0)


def test_padding_may_reach_beyond_the_last_position():
  """A short target is padded to the longest, behind a prompt that leaves no positions for it: learned ones run out."""
  pretrained = tiny_pretrained(seed=6, family="gpt2", n_positions=11)
  batch = query_batch(pretrained.config.vocab_size, num_samples=3)
  assert max(len(p) + len(t) for p, t in QUERIES) + 4 == 11 < 5 + 5 + 4
  expected = one_by_one(pretrained, [], batch)
  model = RewardModel(pretrained, context=np.zeros(0, np.int32))
  np.testing.assert_allclose(scored(model, batch), expected, rtol=0, atol=1e-4)


# ---- The general form


class Letters(Task):
  """A task whose tokens are numbers in a text: "3 14"."""

  start_tokens = ()

  def __init__(self):
    pass

  def encode(self, text):
    return [int(t) for t in text.split()]

  encode_after = encode


EXAMPLES = (  # X of policy and reward, Y, rivals
  Example("21 5", None, "8 44", "", reward_prompt="33 4 17", rivals=("9 44", "1")),
  Example("3", None, "", ""),
  Example("40 2 66", None, "12", "", rivals=("7 7 7",)),
)


def general_case():
  """(model, queries, tokens, length, wanted); the queries differ in targets and rivals."""
  pretrained = tiny_pretrained(seed=4)
  queries = query_table(EXAMPLES, Letters(), 64, 4)
  _, _, tokens, length, wanted, _, _ = query_batch(pretrained.config.vocab_size, num_samples=5)
  return pretrained, queries, tokens, length, wanted


def separate(pretrained, examples, tokens, length, context=(), stop=None, allowed=None):
  """log p(z), log p(Y | z) by separate forward passes, [B, S] each, for (X, Y) texts; `stop` ends a Z without Y."""
  n = len(tokens) // len(examples)
  found = np.zeros((2, len(tokens), tokens.shape[1] + 1))
  for q, (prompt, target) in enumerate(examples):
    rows = slice(q * n, (q + 1) * n)
    read = Letters().encode
    ends = read(target) or ([] if stop is None else [stop])
    parts = separate_passes(pretrained, list(context), read(prompt), tokens[rows], length[rows], ends, allowed)
    if not target:  # the stop is text: it belongs to Z
      parts = np.stack([parts[0] + parts[1], np.zeros_like(parts[0])])
    found[:, rows] = parts
  return found


def test_the_general_form_against_separate_passes(monkeypatch):
  """alpha log p(z | X) + log p(Y | X, z) + beta log p(z) + log c(z) - penalty, term by term."""
  monkeypatch.setattr(prefix_tree, "BLOCK_TOKENS", 8)  # a prefix's three targets may stand in two blocks
  pretrained, queries, tokens, length, wanted = general_case()
  stop, alpha, beta = 11, 0.7, -0.4
  none = np.zeros(0, np.int32)
  model = RewardModel(pretrained, context=none, stop_token_id=stop)
  constraint = lambda example, z: -0.5 * len(z) - (2.0 if example.target else 0.0)  # noqa: E731
  reward = Reward(
    model, alpha=alpha, beta=beta, prior=RewardModel(pretrained, context=none, stop_token_id=stop), prior_tokens=[2],
    rival_penalty=50.0, log_constraint=constraint,
  )  # fmt: skip
  found = reward(queries, tokens, length, wanted)

  xs = [e.reward_prompt or e.prompt for e in EXAMPLES]
  of = lambda targets: separate(pretrained, list(zip(xs, targets)), tokens, length, stop=stop)  # noqa: E731
  log_p_z, log_p_y = of([e.target for e in EXAMPLES])
  alone, _ = separate(pretrained, [("2", e.target) for e in EXAMPLES], tokens, length, stop=stop)
  expected = alpha * log_p_z + log_p_y + beta * alone
  n = len(tokens) // 3
  beaten = np.zeros(wanted.shape, bool)
  for r in range(2):
    targets = [e.rivals[r] if r < len(e.rivals) else "" for e in EXAMPLES]
    rival = of(targets)[1]
    for q, target in enumerate(targets):
      if target:
        beaten[q * n : (q + 1) * n] |= rival[q * n : (q + 1) * n] > log_p_y[q * n : (q + 1) * n]
  assert beaten[wanted].any() and not beaten[wanted].all()
  expected -= 50.0 * beaten
  for row, t in np.ndindex(*wanted.shape):
    expected[row, t] += -0.5 * t - (2.0 if EXAMPLES[row // n].target else 0.0)
  np.testing.assert_allclose(found, np.where(wanted, expected, 0.0), rtol=0, atol=2e-4)


def test_a_stop_that_is_text_is_renormalised_with_z():
  """So that the untouched policy is exact at T = 1: log R = log q for every Z, whatever the allowed vocabulary."""
  pretrained, queries, tokens, length, _ = general_case()
  allowed = np.random.default_rng(5).random(pretrained.config.vocab_size) < 0.6
  allowed[[*np.unique(tokens), 11]] = True
  model = RewardModel(pretrained, context=np.zeros(0, np.int32), stop_token_id=11, allowed_tokens=allowed)
  query = queries[[1]]
  found = whole_log_rewards(Reward(model), query, tokens, length)
  mask = np.arange(tokens.shape[1]) < length[:, None]
  log_pf, log_pterm = policy.score(
    pretrained.config, pretrained.params, None,
    *map(jnp.asarray, (query.prompt_tokens, query.prompt_mask, tokens, length, mask)),
    allowed_tokens=jnp.asarray(allowed), stop_token_id=11, max_length=tokens.shape[1] + 1,
  )  # fmt: skip
  log_q = np.asarray(log_pf).sum(-1) + np.take_along_axis(np.asarray(log_pterm), length[:, None], axis=1)[:, 0]
  np.testing.assert_allclose(found, log_q, rtol=0, atol=1e-4)


def test_beta_needs_a_prior():
  model = RewardModel(tiny_pretrained(), context=np.zeros(0, np.int32))
  with pytest.raises(ValueError, match="beta -0.5: log p"):
    Reward(model, beta=-0.5)


ON_FOUR_DEVICES = """
import json
import jax, numpy as np
from gfn_jax import prefix_tree
from gfn_jax.rewards import RewardModel
from test_rewards import CONTEXT, query_batch, scored
from testing import tiny_pretrained

assert jax.local_device_count() == 4
prefix_tree.MIN_NODES, prefix_tree.BLOCK_TOKENS = 32, 16  # several bins, of several blocks
pretrained = tiny_pretrained(seed=4)
batch = query_batch(pretrained.config.vocab_size, num_samples=15)
model = RewardModel(pretrained, context=np.array(CONTEXT, np.int32), devices=jax.local_devices())
score_trees, used = model.score_trees, []


def seen(*arrays):
  used.append(arrays[-2].any((-1, -2)).sum((1, 2)).tolist())  # blocks of each device that hold a target
  return score_trees(*arrays)


model.score_trees = seen
found = scored(model, batch).tolist()
assert any(len(set(blocks)) > 1 and max(blocks) > 1 for blocks in used), used
print(json.dumps(found))
"""


def test_four_devices_give_the_numbers_of_one():
  four = json.loads(run_python(ON_FOUR_DEVICES, devices=4).splitlines()[-1])
  pretrained = tiny_pretrained(seed=4)
  batch = query_batch(pretrained.config.vocab_size, num_samples=15)
  one = scored(RewardModel(pretrained, context=np.array(CONTEXT, np.int32)), batch)
  np.testing.assert_allclose(np.array(four), one, rtol=0, atol=1e-5)
