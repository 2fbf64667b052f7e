"""GFlowNet objectives against hand-computed arrays, double loops in float64, PyTorch's numbers and exact policies."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import losses
from gfn_jax.types import Acts
from testing import run_python, shared_folder

LAMBDAS = (1.0, 0.9, 0.5)
LOSSES = {"subtb": losses.subtb_loss, "tb": losses.tb_loss, "vargrad": losses.vargrad_loss, "db": losses.db_loss}


def subtb_by_pairs(log_pf, log_pterm, log_reward, terminable, subtb_lambda):
  """Numerator, denominator and the loss's gradients, pair by pair in float64."""
  log_pf, log_pterm, log_reward = (np.asarray(x, np.float64) for x in (log_pf, log_pterm, log_reward))
  numerator, denominator = 0.0, 0.0
  grad_pf, grad_pterm = np.zeros_like(log_pf), np.zeros_like(log_pterm)
  for row, stops in enumerate(terminable):
    for i, j in itertools.combinations(np.flatnonzero(stops), 2):
      weight = subtb_lambda ** (j - i - 1)
      difference = log_pf[row, i:j].sum() + (log_pterm[row, j] - log_pterm[row, i])
      difference -= log_reward[row, j] - log_reward[row, i]
      numerator += weight * difference**2
      denominator += weight
      grad_pf[row, i:j] += 2 * weight * difference
      grad_pterm[row, j] += 2 * weight * difference
      grad_pterm[row, i] -= 2 * weight * difference
  divisor = denominator or 1.0
  return numerator, denominator, grad_pf / divisor, grad_pterm / divisor


def random_batch(seed, rows, num_tokens, *, gaps=True, unspecified=np.nan):
  """float32 arrays of rows with random lengths and tool gaps; `unspecified` wherever an entry must not matter."""
  rng = np.random.default_rng(seed)
  log_pf = -rng.exponential(2.0, (rows, num_tokens))
  log_pterm = -rng.exponential(2.0, (rows, num_tokens + 1))
  log_reward = -rng.exponential(20.0, (rows, num_tokens + 1))
  length = rng.integers(0, num_tokens + 1, rows)
  length[0] = num_tokens
  prefixes = np.arange(num_tokens + 1)
  terminable = prefixes <= length[:, None]
  if gaps:
    terminable &= (rng.random(terminable.shape) < 0.7) | (prefixes == length[:, None]) | (prefixes == 0)
  log_pterm[~terminable] = unspecified
  log_reward[~terminable] = unspecified
  log_pf[prefixes[:-1] >= length[:, None]] = unspecified
  return *(x.astype(np.float32) for x in (log_pf, log_pterm, log_reward)), terminable


@functools.cache
def compiled_value_and_grad(loss, num_samples):
  known = {} if num_samples is None else {"num_samples": num_samples}
  return jax.jit(jax.value_and_grad(functools.partial(loss, **known), argnums=(0, 1, 2)))


def value_and_grads(loss, *arrays, num_samples=None, **options):
  """The loss and its gradients with respect to log_pf, log_pterm and log_reward; compiled once a shape."""
  value, grads = compiled_value_and_grad(loss, num_samples)(*arrays, **options)
  return float(value), *map(np.asarray, grads)


def assert_close(got, want, rtol):
  """Relative to the largest entry: sums of terms of both signs have no relative accuracy entry by entry."""
  np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max(initial=0.0))


# ---- subtb


def test_subtb_matches_pytorch():
  with np.load(shared_folder() / "golden/subtb/cases.npz") as file:
    golden = dict(file)
  cases = sorted({key.split("/")[0] for key in golden})
  assert len(cases) == 40
  for case in cases:
    of = {key.split("/")[1]: x for key, x in golden.items() if key.startswith(case + "/")}
    value, grad_pf, grad_pterm, _ = value_and_grads(
      losses.subtb_loss, of["log_pf"], of["log_pterm"], of["log_reward"], of["terminable"],
      subtb_lambda=float(of["subtb_lambda"]),
    )  # fmt: skip
    np.testing.assert_allclose(value, of["loss"], rtol=1e-5, err_msg=case)
    assert_close(grad_pf, of["grad_log_pf"], 1e-5)
    assert_close(grad_pterm, of["grad_log_pterm"], 1e-5)


@pytest.mark.parametrize("subtb_lambda", LAMBDAS)
@pytest.mark.parametrize("seed,rows,num_tokens", [(0, 1, 1), (1, 5, 7), (2, 16, 30)])
def test_subtb_matches_the_double_loop(seed, rows, num_tokens, subtb_lambda):
  arrays = random_batch(seed, rows, num_tokens)
  value, grad_pf, grad_pterm, grad_reward = value_and_grads(losses.subtb_loss, *arrays, subtb_lambda=subtb_lambda)
  numerator, denominator, want_pf, want_pterm = subtb_by_pairs(*arrays, subtb_lambda)
  np.testing.assert_allclose(value, numerator / denominator, rtol=2e-6)
  assert_close(grad_pf, want_pf, 5e-6)
  assert_close(grad_pterm, want_pterm, 5e-6)
  assert not grad_reward.any()


def test_subtb_by_hand():
  # u = [1, 4, ?, 2]: differences 3 (gap 1), 1 (gap 3), -2 (gap 2).
  log_pf = np.array([[-1.0, -2.0, -0.5]], np.float32)
  log_pterm = np.array([[-1.0, -3.0, np.nan, -2.0]], np.float32)
  log_reward = np.array([[-2.0, -8.0, np.nan, -7.5]], np.float32)
  terminable = np.array([[True, True, False, True]])
  terms = losses.subtb_terms(log_pf, log_pterm, log_reward, terminable, subtb_lambda=0.5)
  np.testing.assert_allclose(terms, (9 + 0.25 * 1 + 0.5 * 4, 1 + 0.25 + 0.5), rtol=1e-6)


def test_a_prefix_that_cannot_stop_before_the_first_one_that_can():
  arrays = random_batch(3, 4, 9, gaps=False)
  arrays[3][:, :3] = False
  arrays[0][:, :2] = np.nan
  arrays[1][:, :3] = arrays[2][:, :3] = np.nan
  value, grad_pf, grad_pterm, _ = value_and_grads(losses.subtb_loss, *arrays, subtb_lambda=0.9)
  numerator, denominator, want_pf, want_pterm = subtb_by_pairs(*arrays, 0.9)
  np.testing.assert_allclose(value, numerator / denominator, rtol=2e-6)
  assert_close(grad_pf, want_pf, 5e-6)
  assert_close(grad_pterm, want_pterm, 5e-6)


def exact_policy(seed, vocab, depth, tool_answers=()):
  """Every complete string of a random tree under the policy that samples it in proportion to its reward.

  Letters in `tool_answers` are calls: they cannot be stopped at, and letter 0 is written after them.
  """
  rng = np.random.default_rng(seed)
  log_reward, flow = {}, {}

  def visit(prefix):
    calls = bool(prefix) and prefix[-1] in tool_answers and len(prefix) < depth
    log_reward[prefix] = np.nan if calls else rng.normal(-8.0, 3.0)
    below = [] if len(prefix) == depth else [(*prefix, a) for a in ((0,) if calls else range(vocab))]
    for child in below:
      visit(child)
    flow[prefix] = np.logaddexp.reduce([*([] if calls else [log_reward[prefix]]), *(flow[c] for c in below)])

  visit(())
  strings = [s for s in flow if not np.isnan(log_reward[s])]
  log_pf, log_pterm = np.zeros((len(strings), depth)), np.full((len(strings), depth + 1), np.nan)
  rewards, terminable = np.full_like(log_pterm, np.nan), np.zeros(log_pterm.shape, bool)
  for row, string in enumerate(strings):
    for t in range(len(string) + 1):
      state = string[:t]
      outgoing = flow[state]
      if t < len(string) and not np.isnan(log_reward[state]):
        log_pf[row, t] = flow[string[: t + 1]] - outgoing
      if not np.isnan(log_reward[state]):
        terminable[row, t] = True
        log_pterm[row, t], rewards[row, t] = log_reward[state] - outgoing, log_reward[state]
  return *(x.astype(np.float32) for x in (log_pf, log_pterm, rewards)), terminable, flow[()]


@pytest.mark.parametrize("tool_answers", [(), (2,)])
def test_every_loss_vanishes_at_the_exact_policy_and_only_there(tool_answers):
  *arrays, log_partition = exact_policy(0, vocab=3, depth=4, tool_answers=tool_answers)
  log_pf, log_pterm, log_reward, terminable = arrays
  rows = len(log_pf)
  options = {
    "subtb": {"subtb_lambda": 0.9},
    "tb": {"log_partition": np.full(rows, log_partition, np.float32)},
    "vargrad": {"num_samples": rows},
    "db": {},
  }
  assert set(options) == set(losses.LOSS_NAMES)
  for name, needs in options.items():
    numerator, denominator = losses.loss_terms(name, *arrays, **needs)
    assert denominator > 0
    assert numerator / denominator < 1e-10, name  # squares of float32 rounding of values near 10
    numerator, denominator = losses.loss_terms(name, log_pf, log_pterm, 1.1 * log_reward, terminable, **needs)
    assert numerator / denominator > 1e-2, name


def test_subtb_is_accurate_where_u_is_large_and_differences_are_small():
  rng = np.random.default_rng(0)
  rows, num_tokens = 8, 64
  log_pf = -rng.exponential(3.0, (rows, num_tokens)).astype(np.float32)
  log_pterm = -rng.exponential(3.0, (rows, num_tokens + 1)).astype(np.float32)
  flow = np.cumsum(np.pad(log_pf.astype(np.float64), ((0, 0), (1, 0))), axis=1) + log_pterm
  log_reward = (flow - 1e3 + 1e-2 * rng.standard_normal(flow.shape)).astype(np.float32)
  terminable = rng.random(flow.shape) < 0.8
  numerator, denominator, want_pf, _ = subtb_by_pairs(log_pf, log_pterm, log_reward, terminable, 0.9)
  assert 1e-5 < numerator / denominator < 1e-3  # differences of 1e-2, squared
  value, grad_pf, *_ = value_and_grads(losses.subtb_loss, log_pf, log_pterm, log_reward, terminable, subtb_lambda=0.9)
  np.testing.assert_allclose(value, numerator / denominator, rtol=1e-4)
  assert_close(grad_pf, want_pf, 1e-4)

  # What the bound is about: u itself in float32, squared differences taken exactly, is already worse than that.
  u = np.cumsum(np.pad(log_pf, ((0, 0), (1, 0))), axis=1, dtype=np.float32) - log_reward + log_pterm
  zeros = np.zeros_like
  plain, plain_weight, *_ = subtb_by_pairs(zeros(log_pf), u, zeros(u), terminable, 0.9)
  assert abs(plain / plain_weight / (numerator / denominator) - 1) > 1e-4


@pytest.mark.parametrize("name", losses.LOSS_NAMES)
def test_a_batch_without_a_pair_has_loss_and_gradients_zero(name):
  log_pf, log_pterm, log_reward, terminable = random_batch(0, 4, 6)
  if name in ("subtb", "db"):  # one terminable prefix at most
    terminable = np.arange(7) == np.array([[0], [3], [6], [9]])
  else:
    terminable = np.zeros_like(terminable)
  hidden = np.where(terminable, 0.0, np.nan).astype(np.float32)
  log_pterm, log_reward = np.nan_to_num(log_pterm) + hidden, np.nan_to_num(log_reward) + hidden
  needs = {"tb": {"log_partition": np.ones(4, np.float32)}, "vargrad": {"num_samples": 2}}.get(name, {})
  value, *grads = value_and_grads(LOSSES[name], log_pf, log_pterm, log_reward, terminable, **needs)
  assert value == 0.0
  for grad in grads:
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize("name", losses.LOSS_NAMES)
def test_unspecified_entries_change_nothing(name):
  nan, *others = (random_batch(5, 6, 8, unspecified=x) for x in (np.nan, 0.0, -99.0, np.inf))
  needs = {"tb": {"log_partition": np.ones(6, np.float32)}, "vargrad": {"num_samples": 3}}.get(name, {})
  want = value_and_grads(LOSSES[name], *nan, **needs)
  assert all(np.isfinite(x).all() for x in want) and want[0] > 0
  for arrays in others:
    jax.tree.map(np.testing.assert_array_equal, value_and_grads(LOSSES[name], *arrays, **needs), want)


def test_terms_of_micro_batches_add_up():
  arrays = *random_batch(7, 32, 12), np.linspace(-1, 1, 32, dtype=np.float32)

  @functools.partial(jax.jit, static_argnames="name")
  def terms_and_grads(name, log_pf, log_pterm, log_reward, terminable, log_partition):
    needs = {"subtb_lambda": 0.9, "log_partition": log_partition, "num_samples": 4}

    def terms(x):
      return losses.loss_terms(name, x, log_pterm, log_reward, terminable, **needs)

    return jax.value_and_grad(terms, has_aux=True)(log_pf)

  def accumulated(name, parts):
    pieces = [terms_and_grads(name, *piece) for piece in zip(*(np.split(x, parts) for x in arrays))]
    denominator = sum(d for (_, d), _ in pieces)
    return sum(n for (n, _), _ in pieces) / denominator, np.concatenate([g for _, g in pieces]) / denominator

  for name in losses.LOSS_NAMES:
    (one, grad_one), (eight, grad_eight) = accumulated(name, 1), accumulated(name, 8)
    np.testing.assert_allclose(eight, one, rtol=1e-6, err_msg=name)
    assert_close(grad_eight, grad_one, 1e-6)


DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from gfn_jax import losses
import test_losses

assert jax.local_device_count() == 4
arrays = test_losses.random_batch(11, 16, 12)
theta = jnp.linspace(0.5, 1.5, 12)

def terms(theta, log_pf, log_pterm, log_reward, terminable):  # parameters that all rows share, as an adapter is
  return losses.subtb_terms(theta * log_pf, theta[0] * log_pterm, log_reward, terminable, subtb_lambda=0.9)

def step(theta, arrays):  # as train_step does: numerator, denominator and gradients are summed
  (numerator, denominator), grads = jax.value_and_grad(terms, has_aux=True)(theta, *arrays)
  numerator, denominator, grads = jax.lax.psum((numerator, denominator, grads), "data")
  return numerator / denominator, grads / denominator

def value(arrays):
  return losses.subtb_loss(*arrays, subtb_lambda=0.9, axis_name="data")

(n, d), g = jax.value_and_grad(terms, has_aux=True)(theta, *arrays)
want = n / d, g / d
split = [x.reshape(4, 4, *x.shape[1:]) for x in arrays]
by_pmap = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)(theta, split)
mesh = Mesh(np.array(jax.devices()), ("data",))
unchecked = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False))
plain = jax.jit(lambda a: losses.subtb_loss(*a, subtb_lambda=0.9))(arrays)
values = [jax.pmap(value, axis_name="data", out_axes=None)(split)]
for check in (True, False):
  values.append(jax.jit(jax.shard_map(value, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check))(arrays))
as_lists = lambda t: [np.asarray(x).tolist() for x in t]
print(json.dumps({"want": as_lists(want), "pmap": as_lists(by_pmap), "shard_map": as_lists(unchecked(theta, arrays)),
                  "plain": float(plain), "values": as_lists(values)}))
"""


def test_one_device_equals_four():
  out = json.loads(run_python(DEVICES, devices=4).splitlines()[-1])
  for mode in ("pmap", "shard_map"):
    for got, want in zip(out[mode], out["want"]):
      assert_close(np.array(got), np.array(want), 1e-6)
  assert len(out["values"]) == 3
  np.testing.assert_allclose(out["values"], out["plain"], rtol=1e-6)


def test_memory_is_linear_in_length():
  def temporary_bytes(prefixes, rows=4):
    shapes = [jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (prefixes - 1, prefixes, prefixes)]
    grad = jax.grad(losses.subtb_loss, argnums=(0, 1))
    compiled = jax.jit(grad).lower(*shapes, jax.ShapeDtypeStruct((rows, prefixes), bool)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporary_bytes(s) for s in (1025, 2049, 4097)]
  assert sizes[0] >= 1025 * 4 * 4  # the backward pass must keep something: the analysis counts what it claims to
  assert sizes[1] / sizes[0] <= 2.2 and sizes[2] / sizes[1] <= 2.2, sizes


def test_half_precision_inputs_are_computed_in_float32():
  log_pf, log_pterm, log_reward, terminable = random_batch(13, 8, 30)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (log_pf, log_pterm, log_reward)]
  value = losses.subtb_loss(*half, terminable)
  assert value.dtype == jnp.float32
  numerator, denominator, *_ = subtb_by_pairs(*(np.asarray(x, np.float64) for x in half), terminable, 1.0)
  np.testing.assert_allclose(value, numerator / denominator, rtol=2e-6)


def test_double_precision_is_kept():
  arrays = random_batch(17, 8, 30)
  with jax.enable_x64(True):
    double = [jnp.asarray(x, jnp.float64) for x in arrays[:3]]
    value = losses.subtb_loss(*double, arrays[3], subtb_lambda=0.9)
    assert value.dtype == jnp.float64
    numerator, denominator, *_ = subtb_by_pairs(*arrays, 0.9)
    np.testing.assert_allclose(value, numerator / denominator, rtol=1e-12)


# ---- tb, vargrad, db


# Rows end at prefixes 2 and 1. log q: -1 - 2 - 3 = -6, -4 - 0.5 = -4.5. log R - log q: -5 + 6 = 1, -2.5 + 4.5 = 2.
HAND = (
  np.array([[-1.0, -2.0], [-4.0, np.nan]], np.float32),
  np.array([[-0.5, np.nan, -3.0], [-1.0, -0.5, np.nan]], np.float32),
  np.array([[-2.0, np.nan, -5.0], [-0.5, -2.5, np.nan]], np.float32),
  np.array([[True, False, True], [True, True, False]]),
)


def test_tb_by_hand():
  log_partition = np.array([2.0, 5.0], np.float32)
  np.testing.assert_allclose(losses.tb_loss(*HAND, log_partition), (1.0**2 + 3.0**2) / 2, rtol=1e-6)
  _, grad_pf, grad_pterm, grad_reward = value_and_grads(losses.tb_loss, *HAND, log_partition)
  np.testing.assert_allclose(grad_pf, [[1, 1], [3, 0]], rtol=1e-6)
  np.testing.assert_allclose(grad_pterm, [[0, 0, 1], [0, 3, 0]], rtol=1e-6)
  assert not grad_reward.any()
  grad_log_partition = jax.grad(losses.tb_loss, argnums=4)(*HAND, log_partition)
  np.testing.assert_allclose(grad_log_partition, [1, 3], rtol=1e-6)


def test_tb_leaves_out_rows_that_never_stop():
  terminable = HAND[3] & np.array([[True], [False]])
  value, *grads = value_and_grads(losses.tb_loss, *HAND[:3], terminable, np.array([2.0, np.nan], np.float32))
  np.testing.assert_allclose(value, 1.0, rtol=1e-6)
  assert all(np.isfinite(x).all() and not x[1].any() for x in grads)


def test_vargrad_by_hand():
  np.testing.assert_allclose(losses.vargrad_loss(*HAND, num_samples=2), 0.5**2, rtol=1e-6)  # 1 and 2 about 1.5
  assert losses.vargrad_loss(*HAND, num_samples=1) == 0.0
  with pytest.raises(ValueError, match="num_samples=3"):
    losses.vargrad_loss(*HAND, num_samples=3)


def test_vargrad_is_tb_with_the_groups_estimate():
  log_pf, log_pterm, log_reward, terminable = arrays = random_batch(19, 12, 10)
  end = terminable.shape[1] - 1 - np.argmax(terminable[:, ::-1], axis=1)
  last = np.arange(12), end
  log_ratio = log_reward[last] - log_pterm[last] - np.nansum(log_pf, axis=1)
  estimate = np.repeat(log_ratio.reshape(3, 4).mean(axis=1), 4).astype(np.float32)
  want = value_and_grads(losses.tb_loss, *arrays, estimate)
  got = value_and_grads(losses.vargrad_loss, *arrays, num_samples=4)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  for a, b in zip(got[1:], want[1:]):
    assert_close(a, b, 1e-6)


def test_db_by_hand():
  # Row 1: u = -0.5 + 2, then (over the gap) -3 - 3 + 5: -1 - 1.5. Row 2: -1 + 0.5, then -4 - 0.5 + 2.5: -2 + 0.5.
  np.testing.assert_allclose(losses.db_loss(*HAND), (2.5**2 + 1.5**2) / 2, rtol=1e-6)
  _, grad_pf, grad_pterm, grad_reward = value_and_grads(losses.db_loss, *HAND)
  np.testing.assert_allclose(grad_pf, [[-2.5, -2.5], [-1.5, 0]], rtol=1e-6)
  np.testing.assert_allclose(grad_pterm, [[2.5, 0, -2.5], [1.5, -1.5, 0]], rtol=1e-6)
  assert not grad_reward.any()


def test_db_is_subtb_with_lambda_zero_where_there_are_no_gaps():
  arrays = random_batch(23, 8, 12, gaps=False)
  want = value_and_grads(losses.subtb_loss, *arrays, subtb_lambda=0.0)
  for a, b in zip(value_and_grads(losses.db_loss, *arrays), want):
    assert_close(a, b, 1e-6)
  gaps = random_batch(23, 8, 12)
  assert abs(losses.db_loss(*gaps) / losses.subtb_loss(*gaps, subtb_lambda=0.0) - 1) > 1e-2


# ---- dispatch and checks


def test_loss_terms_is_each_objective():
  arrays = random_batch(29, 8, 5)
  log_partition = np.arange(8, dtype=np.float32)
  needs = {"subtb_lambda": 0.5, "log_partition": log_partition, "num_samples": 4}
  want = {
    "subtb": losses.subtb_loss(*arrays, subtb_lambda=0.5),
    "tb": losses.tb_loss(*arrays, log_partition),
    "vargrad": losses.vargrad_loss(*arrays, num_samples=4),
    "db": losses.db_loss(*arrays),
  }
  assert len({float(x) for x in want.values()}) == len(losses.LOSS_NAMES) == len(want)
  for name in losses.LOSS_NAMES:
    numerator, denominator = losses.loss_terms(name, *arrays, **needs)
    np.testing.assert_allclose(numerator / denominator, want[name], rtol=1e-7)


def test_loss_terms_names_what_is_wrong():
  arrays = random_batch(29, 8, 5)
  with pytest.raises(ValueError, match=r"'sub_tb'.*subtb, tb, vargrad, db"):
    losses.loss_terms("sub_tb", *arrays)
  with pytest.raises(ValueError, match="log_partition"):
    losses.loss_terms("tb", *arrays)
  with pytest.raises(ValueError, match="num_samples"):
    losses.loss_terms("vargrad", *arrays)


@pytest.mark.parametrize("loss", [losses.subtb_loss, losses.db_loss])
def test_prefixes_are_one_more_than_tokens(loss):
  log_pf, *rest = random_batch(31, 4, 5)
  with pytest.raises(AssertionError, match="shape"):
    loss(np.pad(log_pf, ((0, 0), (0, 1))), *rest)


def test_sft_by_hand():
  """-log q of the actions and the stop, over their number; what a tool wrote is neither."""
  log_pf = jnp.array([[-1.0, 0.0, -3.0], [-0.5, 9.0, 9.0]])
  log_pterm = jnp.array([[5.0, 5.0, 5.0, -0.25], [5.0, -2.0, jnp.nan, jnp.nan]])
  terminable = jnp.array([[True, False, True, True], [True, True, False, False]])
  action_mask = jnp.array([[True, False, True], [True, False, False]])
  numerator, denominator = losses.sft_terms(log_pf, log_pterm, terminable, action_mask)
  assert float(numerator) == pytest.approx(1 + 3 + 0.25 + 0.5 + 2)
  assert float(denominator) == 3 + 2


def test_sft_learns_from_nothing_else():
  """Gradients reach the demonstration's tokens and its own stop alone."""
  log_pf, log_pterm = jnp.full((1, 3), -1.0), jnp.full((1, 4), -1.0)
  terminable = jnp.array([[True, True, True, False]])
  action_mask = jnp.array([[True, True, False]])
  grads = jax.grad(lambda a, b: losses.sft_terms(a, b, terminable, action_mask)[0], argnums=(0, 1))(log_pf, log_pterm)
  assert grads[0].tolist() == [[-1, -1, 0]] and grads[1].tolist() == [[0, 0, -1, 0]]


def make_acts(rng, shape):
  draw = lambda: jnp.asarray(rng.normal(size=shape))  # noqa: E731
  return Acts(jnp.asarray(rng.random(shape) < 0.7), draw(), draw(), draw(), draw(), draw())


def test_ppo_is_the_double_loop_of_its_definition():
  rng = np.random.default_rng(0)
  acts, log_prob, value = make_acts(rng, (4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
  numerator, denominator = losses.ppo_terms(log_prob, value, acts, clip=0.2, value_clip=0.3)
  total = 0.0
  for at in zip(*np.nonzero(acts.mask)):
    ratio, advantage = np.exp(log_prob[at] - acts.log_prob[at]), acts.advantage[at]
    policy = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    near = min(max(value[at], acts.value[at] - 0.3), acts.value[at] + 0.3)
    target = acts.value_target[at]
    total += policy + 0.5 * max((value[at] - target) ** 2, (near - target) ** 2)
  np.testing.assert_allclose(numerator, total, rtol=1e-5)
  assert denominator == acts.mask.sum()


def test_grpo_is_the_double_loop_of_its_definition():
  rng = np.random.default_rng(1)
  acts, log_prob = make_acts(rng, (4, 6)), rng.normal(size=(4, 6))
  acts = acts.replace(mask=acts.mask & (np.arange(4) != 2)[:, None])  # a row without an act counts nowhere
  numerator, denominator = losses.grpo_terms(log_prob, acts, clip=0.2, kl_coefficient=0.04)
  total = 0.0
  for row in (0, 1, 3):
    terms = []
    for t in np.flatnonzero(acts.mask[row]):
      ratio, advantage = np.exp(log_prob[row, t] - acts.log_prob[row, t]), acts.advantage[row, t]
      rest = acts.log_reference[row, t] - log_prob[row, t]
      terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) + 0.04 * (np.exp(rest) - rest - 1))
    total += np.mean(terms)
  np.testing.assert_allclose(numerator, total, rtol=1e-5)
  assert denominator == 3


@pytest.mark.parametrize("loss", ("ppo", "grpo"))
def test_policy_gradients_start_as_reinforce(loss):
  # Before the first update the ratio is 1: the gradient is that of -A log q, meant over the acts.
  rng = np.random.default_rng(2)
  acts = make_acts(rng, (3, 5))
  acts = acts.replace(mask=jnp.ones((3, 5), bool), log_reference=acts.log_prob)

  def value(log_prob):
    if loss == "ppo":
      numerator, denominator = losses.ppo_terms(log_prob, acts.value, acts, clip=0.2, value_clip=0.2)
    else:
      numerator, denominator = losses.grpo_terms(log_prob, acts, clip=0.2, kl_coefficient=0.04)
    return numerator / denominator

  np.testing.assert_allclose(jax.grad(value)(jnp.asarray(acts.log_prob)), -acts.advantage / 15, rtol=1e-4)


def test_acts_are_the_next_token_and_at_the_end_the_stop():
  log_pf, log_pterm = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
  found = losses.act_log_probs(log_pf, log_pterm, np.array([1, 2]), 0)
  np.testing.assert_array_equal(found[0, :2], [1, 20])
  np.testing.assert_array_equal(found[1], [3, 4, 60])


def test_acts_of_a_sampler_that_may_not_stop_yet():
  """Four choices of three tokens and the stop, which is closed: the three share all."""
  q = np.array([0.1, 0.2, 0.3, 0.4])  # the last is the stop
  log_pf, log_pterm = np.log([[q[0], q[1]]]), np.log([[q[3], q[3], q[3]]])
  found = losses.act_log_probs(log_pf, log_pterm, np.array([2]), 1)
  np.testing.assert_allclose(found, np.log([[0.1 / 0.6, 0.2, 0.4]]), rtol=1e-6)


def test_a_certain_stop_that_is_closed_leaves_finite_gradients():
  gradient = jax.grad(lambda stop: losses.act_log_probs(jnp.full((1, 1), -20.0), stop, jnp.array([1]), 1).sum())
  assert np.isfinite(gradient(jnp.zeros((1, 2)))).all()
