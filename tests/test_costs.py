"""A step's work by phase against the programs that do it: their products, XLA's own count, and the sums in its HLO."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from configs import arith
from gfn_jax import costs, flops, plan, rewards, sampler
from gfn_jax.accelerators import ACCELERATORS, Accelerator
from gfn_jax.costs import Lengths, Work
from gfn_jax.layouts import Layout
from gfn_jax.models.architectures import read_config
from gfn_jax.models.decoder import causal_mask, hidden_states, init_params, output_logits
from gfn_jax.models.lora import init_lora
from gfn_jax.models.shapes import SHAPES
from gfn_jax.shards import shard_of, splits_vocabulary
from testing import FAMILIES, random_lora, run_python, tiny_hf_config, tiny_pretrained

LENGTHS = Lengths(prompt=8, context=12, target=5)
LOSS = "loss, forward + backward"

# Wide enough that products outweigh norms and softmax.
WIDE = {
  "gptj": {"n_embd": 128, "vocab_size": 512},
  "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 512},
}


def wide_model(family, **overrides):
  return read_config(tiny_hf_config(family, **WIDE[family] | overrides))


def wide_config(model):
  """Four queries, of which three are fresh, of four samples of 24 tokens, one micro-batch."""
  config = arith.get_config("smoke")
  config.lora.rank, config.train.micro_batch_queries = 8, 0
  config.lora.targets = plan.fitting_targets(config, model)
  return config


def shape(*size, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(size, dtype)


def programs(config, model):
  """name -> (function, its arguments as shapes, trips of its loop): one device's sampling and rewards."""
  p, c, y = LENGTHS.prompt, LENGTHS.context, LENGTHS.target
  q, n, t = 3, config.sampler.num_samples, config.sampler.max_length
  layers, heads, dim = model.num_layers, model.num_kv_heads, model.head_dim
  # A query is 8 + 4 * 24 nodes: two bins of 160 hold one each and half of a third. Each has 97 + 49 prefixes to score,
  # of which programs have 160.
  g, u, m = 2, 160, 160
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  lora_config = costs._Passes(config, Layout("wide", model, 1, 1)).lora
  lora = jax.eval_shape(lambda: init_lora(model, lora_config, jax.random.key(0)))
  key, vocabulary = jax.eval_shape(lambda: jax.random.key(0)), shape(model.vocab_size, dtype=bool)
  start = functools.partial(sampler.start, model, t)
  begin = (params, lora, None, key, shape(q, p), shape(q, p, dtype=bool), shape(q, n))
  prefix, state = jax.eval_shape(start, *begin)
  decode = functools.partial(sampler.decode_round, model, 0, 0, None, None, False, False, 1.0, ())
  context = sampler.KeyValues(*[shape(layers, heads, c, dim, dtype=jnp.float32)] * 2)
  trees = [shape(g, u)] * 3 + [shape(g, u, u, dtype=bool), shape(g, u, dtype=bool), shape(g, 1, m)]
  score = functools.partial(rewards._score_trees, model, None)
  target = [shape(g, 1, m, y), shape(g, 1, m, y, dtype=bool), shape()]
  return {
    "prefill": (start, begin, 1),
    "decode": (decode, (params, lora, vocabulary, vocabulary, prefix, shape(q, dtype=jnp.float32), state), t),
    "reward": (score, (params, None, context, None, *trees, *target), 1),
  }


def by_program(work):
  """FLOPs of each program by hand."""
  reward = work["reward trunk"].flops + work["reward branch"].flops
  return {"prefill": work["prefill"].flops, "decode": work["decode"].flops, "reward": reward}


@pytest.mark.parametrize("family", WIDE)
def test_sampling_and_reward_make_exactly_these_products(family):
  model = wide_model(family)
  config = wide_config(model)
  hand = by_program(costs.step_work(config, Layout("wide", model, 1, 1), LENGTHS))
  for name, (function, args, trips) in programs(config, model).items():
    assert hand[name] == flops.program_flops(function, *args, while_trips=(trips,)), name


@pytest.mark.parametrize("family", WIDE)
def test_sampling_and_reward_are_what_xla_counts(family):
  model = wide_model(family, **{"n_layer" if family == "gptj" else "num_hidden_layers": 1})  # XLA counts a loop once
  config = wide_config(model)
  hand = by_program(costs.step_work(config, Layout("wide", model, 1, 1), LENGTHS))
  for name, (function, args, trips) in programs(config, model).items():
    options = {"xla_backend_optimization_level": 0}
    xla = jax.jit(function).lower(*args).compile(compiler_options=options).cost_analysis()["flops"]
    assert hand[name] == pytest.approx(trips * xla, rel=0.15), name


@pytest.mark.parametrize("family", WIDE)
def test_the_loss_is_what_xla_counts(family):
  """Layers so few are written out in the step, but for those of the short prompts."""
  model = wide_model(family)
  config, layout = wide_config(model), Layout("wide", model, 1, 1)
  compiled, *_ = plan.compile_step(config, layout, LENGTHS.prompt)
  hand = costs.step_work(config, layout, LENGTHS)[LOSS]
  assert hand.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.15)
  assert (hand.model_sums, hand.data_sums) == (0, 0)


# Prints, of a compiled step on data 2 x model 2, FLOPs of a device and the bytes that it exchanges, by groups; of
# sampling and rewards on one group of two, the bytes.
SPLIT = """
import collections, json, math, re
import jax
from gfn_jax import plan
from gfn_jax.layouts import Layout
from gfn_jax.models.partition import tree_shardings
from gfn_jax.parallel import grouped, mesh_of, over_data
from test_costs import LENGTHS, WIDE, programs, wide_config, wide_model

SIZES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"

def computations(text):
  lines, name, found = text.splitlines(), None, {}
  for line in lines:
    if match := re.match(r"(ENTRY )?%?([\\w.-]+) .*{$", line):
      name = "ENTRY" if match[1] else match[2]
      found[name] = []
    elif name:
      found[name].append(line)
  return found

def exchanged(program, trips, name="ENTRY", times=1):
  total = collections.Counter()
  for line in program[name]:
    if match := re.search(rf" = (.*?) (?:{COLLECTIVES})(?:-start)?\\(", line):
      arrays = re.findall(r"(\\w+)\\[([\\d,]*)\\]", match[1])
      size = sum(SIZES[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays)
      total["data" if "{{0,2},{1,3}}" in line else "model"] += times * size
    if " while(" in line:
      known = re.search(r'known_trip_count":{"n":"(\\d+)"', line)
      of_loop = int(known[1]) if known else trips
      total += exchanged(program, trips, re.search(r"body=%?([\\w.-]+)", line)[1], times * of_loop)
    elif match := re.search(r" (?:call|fusion|conditional)\\(.*(?:to_apply|calls)=%?([\\w.-]+)", line):
      total += exchanged(program, trips, match[1], times)
  return total

def split(function, args, model):
  "The compiled program of a group, its arguments as shapes."
  group = grouped(jax.devices()[:2], 2)
  at = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  params, lora = (jax.tree.map(at, tree, tree_shardings(model, mesh_of(group), tree)) for tree in args[:2])
  own = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), args[4:])
  mapped = over_data(function, (None,) * 4 + (0,) * len(own), group)
  return mapped.lower(params, lora, *args[2:4], *own).compile()

found = {}
for family in WIDE:
  model = wide_model(family)
  compiled, *_ = plan.compile_step(wide_config(model), Layout("wide", model, 4, 2), LENGTHS.prompt)
  found[family] = {"flops": compiled.cost_analysis()["flops"]} | exchanged(computations(compiled.as_text()), 1)
  for name, (function, args, trips) in programs(wide_config(model), model).items():
    text = split(function, args, model).as_text()
    found[family][name] = exchanged(computations(text), trips).total()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_is_split_is_what_xla_makes_of_it():
  found = json.loads(run_python(SPLIT, devices=4))
  for family, xla in found.items():
    model = wide_model(family)
    hand = costs.step_work(wide_config(model), Layout("wide", model, 4, 2), LENGTHS)[LOSS]
    assert hand.flops == pytest.approx(xla["flops"], rel=0.15), family
    assert hand.model_sums == pytest.approx(xla["model"], rel=0.05), family
    assert hand.data_sums == pytest.approx(xla["data"], rel=0.01), family
    # Not counted are a few numbers a position, and to draw a token some for each root of the vocabulary.
    work = costs.step_work(wide_config(model), Layout("wide", model, 2, 2), LENGTHS)
    reward = work["reward trunk"] + work["reward branch"]
    for name, phase in {"prefill": work["prefill"], "decode": work["decode"], "reward": reward}.items():
      assert phase.model_sums == pytest.approx(xla[name], rel=0.1), (family, name)


def product_bytes(jaxpr):
  """Of operands and results of matrix products, loops run to their end."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
      total += sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    total += times * sum(product_bytes(inner) for inner in flops._inner(equation))
  return total


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_moves_the_operands_and_results_of_its_products(family):
  pretrained, n = tiny_pretrained(family=family), 6
  model, tokens = pretrained.config, jnp.zeros(n, jnp.int32)

  def forward(params, lora):
    hidden, _ = hidden_states(model, params, lora, tokens, jnp.arange(n), causal_mask(n))
    return output_logits(model, params, hidden[-2:])

  for lora in (None, random_lora(pretrained)):
    config = lora and lora.config
    moved = product_bytes(jax.make_jaxpr(forward)(pretrained.params, lora).jaxpr)
    hand = flops.activation_bytes(model, config, tokens=n, keys=n, outputs=2, itemsize=4)
    assert moved == hand + flops.decode_bytes(model, config, keys=0, itemsize=4)
  assert flops.adapter_bytes(model, config) == 4 * sum(x.size for x in jax.tree.leaves(lora.params))


def test_a_shard_has_its_part_of_heads_channels_and_vocabulary():
  llama = read_config(SHAPES["llama-3.1-8b"])
  shard = shard_of(llama, 8)
  assert shard.projections() == {
    "q": (4096, 512), "k": (4096, 128), "v": (4096, 128), "o": (512, 4096), "gate": (4096, 1792), "up": (4096, 1792),
    "down": (1792, 4096),
  }  # fmt: skip
  assert shard.vocab_size == 16_032
  gpt2 = read_config(SHAPES["gpt2-xl"])
  assert not splits_vocabulary(gpt2, 5) and shard_of(gpt2, 5).vocab_size == 50_257


CHIP = Accelerator(flops=1000.0, memory=50e9, memory_bandwidth=200.0, interconnect=10.0, max_chips=8)


def test_seconds_come_from_peak_rates_and_efficiencies(monkeypatch):
  layout = Layout("tiny", wide_model("gptj"), 8, 4, "made-8", CHIP)
  assert costs.compute_seconds(Work(flops=400.0, bytes=12.0), layout) == pytest.approx(1.0)  # 40% of 1000 a second
  assert costs.compute_seconds(Work(flops=400.0, bytes=240.0), layout) == pytest.approx(2.0)  # 60% of 200
  # Rings of 4 send 3/2 of 8 bytes, of 2 as many as there are: 12 + 6 bytes at 60% of 10 a second.
  assert costs.communication_seconds(Work(model_sums=8.0, data_sums=6.0), layout) == pytest.approx(3.0)
  monkeypatch.setattr(costs, "MATMUL_EFFICIENCY", 0.2)
  monkeypatch.setattr(costs, "BANDWIDTH_EFFICIENCY", 0.3)
  assert costs.compute_seconds(Work(flops=400.0, bytes=12.0), layout) == pytest.approx(2.0)
  assert costs.compute_seconds(Work(bytes=240.0), layout) == pytest.approx(4.0)
  assert costs.communication_seconds(Work(model_sums=8.0, data_sums=6.0), layout) == pytest.approx(6.0)


def cells(table):
  lines = [line for line in table.splitlines() if line.startswith("|")]
  return {row[1].strip(): [float(x) for x in row[2:-1]] for row in (line.split("|") for line in lines[2:])}


def test_the_table_adds_up():
  model = read_config(SHAPES["gpt-j-6b"])
  config = arith.get_config("paper")
  layout = Layout("GPT-J", model, 16, 4, "v5e-16", ACCELERATORS["v5e"])
  table = costs.cost_table(config, layout, Lengths())
  rows = cells(table)
  total = rows.pop("sum")
  assert list(rows) == ["prefill", "decode", "reward trunk", "reward branch", LOSS]
  assert total == pytest.approx([sum(column) for column in zip(*rows.values())], abs=0.003)
  # Six billion parameters: 2 FLOPs each for a token forward, 4 with the gradient; 512 samples of 26 tokens, 4 devices.
  assert rows[LOSS][0] == pytest.approx(4 * 6.05e9 * 32 * (16 * 26 + 24) / 16 / 1e12, rel=0.1)
  # 26 trips that read 12.1 GB of weights and 1.2 of keys and values, a quarter on each device; operands on top.
  assert 1 < rows["decode"][1] / (26 * (12.1 + 1.2) / 4) < 1.2
  seconds = total[2] + total[5]
  assert f"{seconds:.2f} s a step and {512 / seconds:.3g} trajectories a second" in table


def test_work_follows_the_config():
  model = read_config(SHAPES["gpt-j-6b"])
  config, layout = arith.get_config("paper"), Layout("GPT-J", model, 8, 2)
  base = costs.step_work(config, layout, Lengths())
  config.model.remat = "full"
  full = costs.step_work(config, layout, Lengths())
  assert 1.3 < full[LOSS].flops / base[LOSS].flops < 1.5 and full[LOSS].model_sums > base[LOSS].model_sums
  assert full["decode"] == base["decode"]
  config.model.remat, config.model.quantization = "none", "int8"
  int8 = costs.step_work(config, layout, Lengths())
  assert int8["decode"].flops == base["decode"].flops and int8["decode"].bytes < 0.65 * base["decode"].bytes
  config.model.quantization, config.train.micro_batch_queries = None, 0  # one pass over the weights for all queries
  one = costs.step_work(config, layout, Lengths())
  assert one[LOSS].flops == pytest.approx(base[LOSS].flops, rel=0.2) and one[LOSS].bytes < base[LOSS].bytes
  config.loss.num_prefixes = 4  # of up to 27, and of distinct prefixes fewer
  some = costs.step_work(config, layout, Lengths())
  assert some["reward trunk"].flops <= one["reward trunk"].flops  # bins need not be cut for their branches
  nodes = config.sampler.num_samples * config.sampler.max_length
  share = some["reward branch"].flops / one["reward branch"].flops
  assert share == pytest.approx(4 * config.sampler.num_samples / (nodes + 1), rel=0.2)  # bins are not quite full
  config.loss.num_prefixes, config.loss.name = None, "vargrad"
  whole = costs.step_work(config, layout, Lengths())
  assert whole["reward branch"].flops == pytest.approx(some["reward branch"].flops / 4, rel=0.2)
  config.loss.name = "subtb"
  config.behavior.buffer, config.behavior.tempered = 1.0, 0.0  # all is replayed
  replayed = costs.step_work(config, layout, Lengths())
  assert replayed["reward trunk"] == Work() and replayed[LOSS] == one[LOSS]
  config = arith.get_config("paper")
  no_target = costs.step_work(config, layout, Lengths(target=1))
  assert no_target["reward branch"] == Work()


def test_a_step_that_does_not_fit_is_told():
  layout = Layout("GPT-J", read_config(SHAPES["gpt-j-6b"]), 16, 2, "v5e-16", ACCELERATORS["v5e"])
  assert costs.memory_note(layout, 15.9e9) is None
  note = costs.memory_note(layout, 19.6e9)
  assert note == "GPT-J does not fit v5e-16 as 8 × 2: a step takes 19.60 GB of a chip's 16.00."
