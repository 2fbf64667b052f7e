"""`python -m gfn_jax.benchmark`: every phase is there, what is counted by hand, and what a user's slips get."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import arith
from gfn_jax.benchmark import measure, sweep, tables, work
from gfn_jax.benchmark.stopwatch import CompileLog, Stopwatch, in_place_of
from gfn_jax.models import load_pretrained, logits, save_pretrained
from gfn_jax.sampler import RolloutState
from gfn_jax.types import Trajectory
from testing import assert_one_line, run_commands, tiny_pretrained

SMOKE = ["gfn_jax.benchmark", "--config=configs/arith.py:smoke"]

SLIPS = {
  # name: (arguments, what the line must hold)
  "no config": (["gfn_jax.benchmark"], ["--config is missing"]),
  "an unknown sweep": ([*SMOKE, "--sweep=width"], ["width", "length", "samples", "queries", "model_size"]),
  "no repeats": ([*SMOKE, "--repeats=0"], ["--repeats=0", "positive"]),
  "no folder": ([*SMOKE, "--output={}/nowhere/o.json"], ["{}/nowhere", "does not exist"]),
  "another method": ([*SMOKE, "--config.method=ppo"], ["config.method 'ppo'", "'gfn'"]),
  "a sweep that the config cannot follow": (
    [*SMOKE, "--sweep=queries", "--config.train.num_queries=0"],
    ["config.train.num_queries is 0", "positive"],
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def outcomes(folder):
  """name -> (exit code, stdout, stderr)."""
  named = {"smoke": [*SMOKE, "--repeats=1", f"--output={folder}/smoke.json"]}
  named |= {name: [a.replace("{}", str(folder)) for a in arguments] for name, (arguments, _) in SLIPS.items()}
  return dict(zip(named, run_commands(list(named.values()))))


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_gets_one_line(folder, outcomes, name):
  code, _, err = outcomes[name]
  assert_one_line(code, err, [part.replace("{}", str(folder)) for part in SLIPS[name][1]])


def test_every_phase_is_in_the_table(outcomes):
  code, out, err = outcomes["smoke"]
  assert code == 0, err
  lines = out.splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
  assert {len(row) for row in cells} == {len(tables.COLUMNS)}
  assert [row[0] for row in cells] == ["phase", "---", *measure.PHASES, "sum"]
  rows = dict((row[0], row) for row in cells)
  seconds = {name: float(rows[name][1]) for name in (*measure.PHASES, "sum")}
  assert seconds["sum"] == pytest.approx(sum(seconds[name] for name in measure.PHASES), abs=1e-3)
  for name in ("prefill", "decode", "reward", "loss and update"):
    assert seconds[name] > 0 and all(rows[name][2:8]), rows[name]
  assert all(rows["decode"][8:]) and not any(rows["host"][3:])
  text = "\n".join(lines[len(cells) :])
  for part in ("trajectories/s", "tokens/s", "trunk", "branches", "matmul", "copy", "Compiled", "Peak memory"):
    assert part in text
  assert "step 1/" in err and "step 1/" not in out  # the log does not get into the table


def test_the_json_says_the_same(folder, outcomes):
  del outcomes
  record = json.loads((folder / "smoke.json").read_text())
  phases = record["phases"]
  assert tuple(phases) == measure.PHASES
  rows = 4 * 4
  assert record["trajectories_per_second"] == pytest.approx(rows / record["step_seconds"])
  assert record["compiled_programs"] >= record["compiled_notable_programs"] and record["compile_seconds"] > 0
  assert 1e8 < record["peak_memory_bytes"] < 1e11 and record["peak_memory_of"] == "process"
  for name in ("prefill", "decode", "reward", "loss and update"):
    phase = phases[name]
    # What runs is padded; nothing that is counted by hand is missing from it, but for a first layer's gradients.
    assert 1 <= phase["flops_run"] / phase["flops_by_hand"] < 20
    assert phase["flops_per_second"] == pytest.approx(phase["flops_run"] / phase["seconds"])
    share = phase["flops_per_second"] / record["matmul_peak_flops_per_second"]
    assert phase["share_of_matmul_peak"] == pytest.approx(share)
  reward = phases["reward"]
  assert reward["flops_by_hand"] == pytest.approx(reward["flops_trunk"] + reward["flops_branches"])
  # A step of the loop reads every weight.
  assert phases["decode"]["bytes"] > 4 * record["parameters"]


def counted(lengths_and_befores):
  """Tokens, and pairs of a token and what it attends to, by a loop."""
  tokens = pairs = 0
  for length, before in lengths_and_befores:
    for t in range(length):
      tokens += 1
      pairs += before + t + 1
  return tokens, pairs


def test_prompts_and_samples_by_a_loop():
  prompt, length = np.array([3, 5], np.int32), np.array([0, 4, 6, 2], np.int32)
  one = work.prompts(prompt, before=10)
  assert (one.tokens, one.pairs) == counted([(3, 10), (5, 10)]) and one.outputs == 2
  rows = work.samples(np.repeat(prompt, 2), length, max_length=6)
  assert (rows.tokens, rows.pairs) == counted([(0, 3), (4, 3), (6, 5), (2, 5)])
  assert rows.outputs == 0 + 4 + 5 + 2  # after 6 tokens stopping is forced
  assert one + rows == work.Pass(one.tokens + rows.tokens, one.pairs + rows.pairs, one.outputs + rows.outputs)


def test_the_loss_counts_each_distinct_prefix_once():
  tokens = np.array([[1, 2, 3, 4], [1, 2, 5, 0], [7, 0, 0, 0], [7, 0, 0, 0]], np.int32)
  length = np.array([4, 3, 1, 0], np.int32)
  found = work.prefixes(np.array([3, 5]), tokens, length, max_length=4)
  # The first query's 1, 12, 123, 1234, 125, of which 1234 cannot go on; the second's 7.
  assert found == work.Pass(5 + 1, (4 + 5 + 6 + 7 + 6) + 6, 4 + 1)


def test_rewards_count_each_distinct_prefix_once():
  context, max_length = 7, 4
  prompts, targets = (2, 3), ((3, 2), (1, 0))
  tokens = np.array([[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 3, 0], [9, 9, 0, 0]], np.int32)
  length, chosen = np.array([3, 4, 3, 2], np.int32), np.ones((4, max_length), bool)
  chosen[1, 3] = False  # a tool's: stopping is not possible before it
  blank = np.zeros((4, max_length), np.float32)
  z = Trajectory(tokens, length, chosen, blank, np.zeros((4, max_length + 1), np.float32))
  trunk_tokens = trunk_pairs = branch_tokens = branch_pairs = 0
  for q in range(2):
    prefixes, ends = set(), set()
    for row in (2 * q, 2 * q + 1):
      for t in range(length[row] + 1):
        prefix = tuple(tokens[row, :t])
        prefixes.add(prefix)
        if t == length[row] or chosen[row, t]:
          ends.add(prefix)
    n, pairs = counted([(prompts[q], context)])
    trunk_tokens += n + len(prefixes - {()})
    trunk_pairs += pairs + sum(context + prompts[q] + len(p) for p in prefixes - {()})
    n, pairs = counted([(max(y - 1, 0), context + prompts[q] + len(p)) for p in ends for y in targets[q]])
    branch_tokens, branch_pairs = branch_tokens + n, branch_pairs + pairs
  trunk, branches = work.rewards(np.array(prompts), np.array(targets), z, context, z.terminable)
  assert (trunk.tokens, trunk.pairs, trunk.outputs) == (trunk_tokens, trunk_pairs, trunk_tokens - 5 + 2)
  assert (branches.tokens, branches.pairs, branches.outputs) == (branch_tokens, branch_pairs, branch_tokens)
  assert branch_tokens == (2 + 1) * 5  # four prefixes of three tokens, one that the tool ended; Y of one: none


def test_trips_of_a_decoding_round():
  # [1 device, 1 query, 4 rows] of at most 5 tokens: stops after 1 token, asks the tool after 3, had ended, is cut off.
  before, after = np.array([[[0, 0, 4, 3]]]), np.array([[[1, 3, 4, 5]]])
  state = RolloutState(*[None] * 11)
  state = state.replace(
    tokens=np.zeros((1, 1, 4, 5), int), length=after, waiting=np.array([[[False, True, False, False]]]),
    active=np.zeros((1, 1, 4), bool),
  )  # fmt: skip
  active = np.array([[[True, True, False, True]]])
  assert work.decode_trips([4], active, before, state) == (3,)
  # A stop takes a trip that writes nothing.
  stops = state.replace(length=np.array([[[3, 3, 4, 5]]]))
  assert work.decode_trips([4], active, before, stops) == (4,)
  # Too many rows wait: one that would go on has written a token a trip.
  on = state.replace(length=np.array([[[3, 3, 4, 3]]]), active=np.array([[[True, False, False, False]]]))
  assert work.decode_trips([4], active, before, on.replace(waiting=np.array([[[False, True, False, True]]]))) == (3,)


def test_trips_of_a_rounds_crowds():
  """[2 devices, 1 query, 64 rows]: crowds of 64, 32 and 8."""
  length = np.array([[[7] * 3 + [5] * 17 + [3] * 16 + [1] * 28], [[4] * 40 + [2] * 24]])
  none = np.zeros(length.shape, bool)
  state = RolloutState(*[None] * 11).replace(
    tokens=np.zeros((2, 1, 64, 7), int), length=length, waiting=length == 4, active=none
  )
  # Rows of the first device stop in the second, fourth and sixth trip, which leaves 36, 20 and 3. Of the second 40 wait
  # after four.
  trips = work.decode_trips([64, 32, 8], ~none, np.zeros_like(length), state)
  assert trips == ((4 + 4) / 2, (2 + 0) / 2, (1 + 0) / 2)


def test_a_stopwatch_counts_what_a_program_runs():
  watch, x = Stopwatch(), jnp.ones((4, 4))

  @functools.partial(jax.jit, donate_argnums=0)
  def program(x, n):
    return jax.lax.while_loop(lambda s: s[1] < n, lambda s: (s[0] @ s[0], s[1] + 1), (x @ x, 0))[0]

  out = watch("product", program, x, np.int32(3))
  assert out.shape == (4, 4)
  (call,) = watch.calls
  assert call.seconds > 0
  call.trips = (3.0,)
  assert watch.flops(call) == 4 * 2 * 4**3  # though x is gone


def test_timed_calls_leave_no_trace():
  class Part:
    def work(self):
      return "done"

  part = Part()
  with pytest.raises(RuntimeError), in_place_of(part, "work", lambda: "timed"):
    assert part.work() == "timed"
    raise RuntimeError
  assert part.work() == "done" and not vars(part)


def test_compilations_are_counted_while_they_are_watched():
  run = lambda n: jax.jit(lambda x: x * n)(np.ones(n)).block_until_ready()  # noqa: E731
  with CompileLog() as log:
    run(3)
    assert len(log.seconds) == 1 and log.seconds[0] > 0
  run(4)
  assert len(log.seconds) == 1


def test_steps_that_compile_are_made_again():
  made = iter([("a", True), ("b", False), ("c", True), ("d", False), ("e", False)])
  assert measure.clean(lambda: next(made), 2) == ["b", "d"]
  assert measure.clean(lambda: ("always", True), 2) == ["always"]  # better than nothing, and it ends


def phase(seconds, **numbers):
  return {"seconds": seconds, "flops_by_hand": 0.0, "flops_run": 0.0, **numbers}


def test_rates_are_medians_of_the_steps():
  steps = [
    {name: phase(0.0) for name in measure.PHASES} | {"decode": phase(s, flops_run=f, bytes=6.0)}
    for s, f in ((1.0, 10.0), (2.0, 80.0), (4.0, 80.0))
  ]
  decode = measure.median_phases(steps, matmul=40.0, copy=6.0)["decode"]
  assert decode["seconds"] == 2 and decode["flops_run"] == 80
  assert decode["flops_per_second"] == 20 and decode["share_of_matmul_peak"] == 0.5
  assert decode["bytes_per_second"] == 3 and decode["share_of_copy_peak"] == 0.5


def test_exponents_of_synthetic_costs():
  sizes = [8, 16, 32, 64]
  assert tables.exponent(sizes, [0.3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
  noise = np.random.default_rng(0).uniform(0.97, 1.03, 4)
  assert tables.exponent(sizes, [2.0 * n * e for n, e in zip(sizes, noise)]) == pytest.approx(1, abs=0.05)
  assert math.isnan(tables.exponent([8], [1.0])) and math.isnan(tables.exponent(sizes, [0.0] * 4))


def result(size, seconds):
  phases = {name: phase(seconds / 5) for name in measure.PHASES} | {"tool rounds": phase(0.0)}
  return {
    "size": size, "step_seconds": seconds, "phases": phases, "trajectories_per_second": 1.0, "peak_memory_bytes": 1e9,
  }  # fmt: skip


def test_a_sweep_has_a_row_a_size_and_exponents_under_it():
  results = [result(n, 0.01 * n**2) for n in (4, 8, 16)]
  fitted = tables.sweep_exponents(results)
  assert fitted["step"] == pytest.approx(2) and fitted["reward"] == pytest.approx(2) and "tool rounds" not in fitted
  head, _, *rows, _, last = tables.sweep_table("samples", results).splitlines()
  assert head.startswith("| samples | step, s |") and [r.split("|")[1].strip() for r in rows] == ["4", "8", "16"]
  assert "step 2.00" in last


@pytest.mark.parametrize("kind,sizes", [("length", [24, 48, 96]), ("samples", [4, 8, 16]), ("queries", [4, 8, 16])])
def test_a_sweep_grows_one_size(monkeypatch, tmp_path, kind, sizes):
  seen = []
  monkeypatch.setattr(sweep, "measure", lambda config, repeats: seen.append(config) or {"parameters": 1})
  config = arith.get_config("smoke")
  assert [r["size"] for r in sweep.sweep(config, kind, 1, tmp_path)] == sizes
  fields = [(c.sampler.max_length, c.sampler.num_samples, c.train.num_queries) for c in seen]
  assert fields == [tuple(n if k == kind else own for k, own in zip(sweep.SIZES, (24, 4, 4))) for n in sizes]
  assert config == arith.get_config("smoke")
  config.behavior.tempered = 2.0
  with pytest.raises(ValueError, match="config.behavior.tempered is 2.0"):
    next(sweep.sweep(config, kind, 1, tmp_path))


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_models_of_a_sweep_grow_in_width(monkeypatch, tmp_path, family):
  save_pretrained(tmp_path / "base", tiny_pretrained(family=family))
  config = arith.get_config("smoke")
  config.model.name = str(tmp_path / "base")
  seen = []

  def measured(config, repeats):
    pretrained = load_pretrained(config.model.name)
    assert np.isfinite(np.asarray(logits(pretrained, np.ones((1, 3), np.int32)))).all()
    seen.append(pretrained.config)
    return {"parameters": sum(x.size for x in jax.tree.leaves(pretrained.params))}

  monkeypatch.setattr(sweep, "measure", measured)
  sizes = [r["size"] for r in sweep.sweep(config, "model_size", 1, tmp_path)]
  assert [(c.hidden_size, c.num_heads, c.head_dim, c.num_layers) for c in seen] == [
    (32, 4, 8, 2), (64, 8, 8, 2), (128, 16, 8, 2),
  ]  # fmt: skip
  assert 2 * sizes[0] < sizes[1] < 4 * sizes[0]
