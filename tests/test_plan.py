"""`python -m gfn_jax.plan`: bytes by hand, the table, and what a user's slips get."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import arith
from gfn_jax import plan
from gfn_jax.models import save_pretrained
from gfn_jax.models.architectures import lora_targets, read_config
from gfn_jax.models.hf import load_config
from gfn_jax.models.shapes import SHAPE_OF, SHAPES
from testing import FAMILIES, assert_one_line, run_commands, run_python, tiny_hf_config, tiny_pretrained

SMOKE = ["gfn_jax.plan", "--config=configs/arith.py:smoke"]
TINY = [*SMOKE, "--config.model.name={}/tiny"]

RUNS = {
  "shape": [*TINY, "--config.model.dtype=bfloat16", "--config.lora.dropout=0.1", "--devices=4", "--prompt_tokens=8"],
  "slice": [*TINY, "--devices=2,v4-8", "--model_parallel=2", "--target_tokens=3"],
  "hosts": [*SMOKE, "--shape=gpt-j-6b", "--devices=v5e-16", "--config.train.num_queries=16"],
}

SLIPS = {
  # name: (arguments, what the line must hold)
  "no config": (["gfn_jax.plan"], ["--config is missing"]),
  "an unknown shape": ([*SMOKE, "--shape=gpt-5"], ["gpt-5", "gpt2-xl", "gpt-j-6b", "llama-3.1-8b"]),
  "no model there": ([*SMOKE, "--config.model.name={}/nothing"], ["{}/nothing"]),
  "no number": ([*TINY, "--devices=1,four"], ["--devices=1,four", "'four'", "number of devices"]),
  "no devices": ([*TINY, "--devices=0"], ["'0'", "number of devices"]),
  "no slice": ([*TINY, "--devices=1,v9-8"], ["--devices=1,v9-8", "'v9-8'", "v5e", "h100"]),
  "half a chip": ([*TINY, "--devices=v4-3"], ["--devices=v4-3", "TensorCores, 2 a chip"]),
  "more than a host": ([*TINY, "--devices=h100-16"], ["--devices=h100-16", "at most h100-8"]),
  "a slice for another method": (
    [*TINY, "--config.method=ppo", "--devices=v4-8"],
    ["--devices=v4-8", "'gfn'", "'ppo'", "--devices=4"],
  ),
  "an empty list": ([*TINY, "--devices="], ["--devices", "number of devices"]),
  "heads that do not divide": ([*TINY, "--devices=3", "--model_parallel=3"], ["4 heads", "3 devices", "1, 2"]),
  "devices that do not divide": ([*TINY, "--devices=4", "--model_parallel=3"], ["--model_parallel=3", "4 devices"]),
  "a split that is no number": ([*TINY, "--model_parallel=most"], ["--model_parallel=most", "auto"]),
  "a batch that does not divide": (
    [*TINY, "--devices=8", "--model_parallel=1"],
    ["config.train.num_queries 4", "8 devices"],
  ),
  "prompts of nothing": ([*TINY, "--prompt_tokens=0"], ["--prompt_tokens=0", "at least 1"]),
  "Z and a prompt beyond the context": (
    [*TINY, "--prompt_tokens=240"],
    ["--prompt_tokens=240", "24", "256 positions"],
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plan")
  tiny = tiny_pretrained(family="llama", vocab_size=72)
  save_pretrained(folder / "tiny", dataclasses.replace(tiny, tokenizer=None))
  (folder / "tiny" / "model.safetensors").write_bytes(b"no weights")  # which a plan does not read
  return folder


@pytest.fixture(scope="module")
def outcomes(folder):
  """name -> (exit code, stdout, stderr)."""
  named = RUNS | {name: arguments for name, (arguments, _) in SLIPS.items()}
  commands = [[a.replace("{}", str(folder)) for a in arguments] for arguments in named.values()]
  return dict(zip(named, run_commands(commands)))


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_gets_one_line(folder, outcomes, name):
  code, _, err = outcomes[name]
  assert_one_line(code, err, [part.replace("{}", str(folder)) for part in SLIPS[name][1]])


def test_a_table_is_printed_with_what_it_holds(folder, outcomes):
  code, out, err = outcomes["shape"]
  assert code == 0, err
  header, rule, row, *rest = out.splitlines()
  assert [len(line.split("|")) for line in (header, rule, row)] == [len(plan.HEADER) + 2] * 3
  cells = [cell.strip() for cell in row.split("|")]
  assert cells[1:4] == [f"{folder}/tiny", "4", "2 × 2"]
  text = "\n".join(rest)
  for part in ("4 queries", "× 4 samples", "prompts of 8 tokens", "Z of 24", "bfloat16", "remat none", "LoRA rank 16"):
    assert part in text
  # The config's out_proj is no name of Llama's.
  assert "q_proj, k_proj, v_proj, o_proj" in text
  assert "2 key-value heads" in text and "split over 2 devices" in text


def test_a_slice_has_a_second_table(folder, outcomes):
  code, out, err = outcomes["slice"]
  assert code == 0, err
  memory, notes, costs, sums, held = out.split("\n\n")
  assert [row.split("|")[2:4] for row in memory.splitlines()[2:]] == [[" 2 ", " 1 × 2 "], [" v4-8 ", " 2 × 2 "]]
  assert "prompts of 24 tokens" in notes
  header, rule, *rows = costs.splitlines()
  assert {len(row.split("|")) for row in (header, rule, *rows)} == {9}
  assert [row.split("|")[1].strip() for row in rows] == [
    "prefill", "decode", "reward trunk", "reward branch", "loss, forward + backward", "sum",
  ]  # fmt: skip
  assert "tiny on v4-8, 2 × 2" in sums and "trajectories a second" in sums
  for part in ("not measured", "40% of the chip's peak", "60% of its memory's", "105 tokens", "targets 3"):
    assert part in held


def test_a_model_is_split_within_a_host(outcomes):
  """v5e-16 is four hosts of four chips: no run splits a base over two of them."""
  code, out, err = outcomes["hosts"]
  assert code == 0, err
  assert out.splitlines()[2].split("|")[2:4] == [" v5e-16 ", " 4 × 4 "]
  assert "by --config.mesh.model, the second number" in out


def test_a_model_of_known_shape_needs_no_file():
  config = arith.get_config("paper")
  assert plan.model_of(config) == read_config(SHAPES["gpt-j-6b"])
  assert set(SHAPE_OF.values()) == set(SHAPES)


def test_shapes_are_the_public_models():
  """By their numbers of parameters, as their model cards tell them."""
  counts = {"gpt2-xl": 1_557_611_200, "gpt-j-6b": 6_050_882_784, "llama-3.1-8b": 8_030_261_248}
  assert counts.keys() == SHAPES.keys()
  for name, count in counts.items():
    params = plan.abstract_params(read_config(SHAPES[name]), "bfloat16", None)
    assert sum(x.size for x in jax.tree.leaves(params)) == count, name
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_attention_to_adapt(family):
  config, model = arith.get_config("paper"), read_config(tiny_hf_config(family))
  names = lora_targets(model, plan.fitting_targets(config, model))
  assert names == (("qkv", "o") if model.fused_qkv else ("q", "k", "v", "o"))
  config.lora.targets = ("layers",)  # chosen, not the default: a slip is told, not planned around
  with pytest.raises(ValueError, match="'layers' is no projection"):
    plan.fitting_targets(config, model)


def test_targets_that_fit_stay():
  config = arith.get_config("paper")
  config.lora.targets = ("fc_in",)
  assert plan.fitting_targets(config, read_config(tiny_hf_config("gptj"))) == ("fc_in",)


def tiny_config(**fields):
  config = arith.get_config("smoke")
  config.lora.targets, config.lora.rank = ("q_proj", "o_proj"), 4
  config.train.num_queries, config.train.micro_batch_queries = 4, 2
  config.update(fields)
  return config


def test_bytes_are_those_of_the_compiled_step():
  config, model = tiny_config(), read_config(tiny_hf_config("llama", vocab_size=72))
  compiled, params, state = plan.compile_step(config, plan.Layout("tiny", model, 1, 1), prompt_tokens=8)
  memory = plan.memory_of(compiled, params, state)
  weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 2 * 72 * 32 + 32
  assert memory.params == 4 * weights
  adapter = 4 * 2 * (2 * (32 * 4) + 2 * (4 * 32))
  assert memory.gradients == adapter
  # The step, and counts: of AdamW, of its schedule, and of the Adams that log_partition and a critic would have.
  assert memory.state == 3 * adapter + 4 * 5
  assert memory.total == memory.params + memory.state + memory.gradients + memory.temporaries
  batch = plan.abstract_batch(config, model, 1, 8)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
  analysis = compiled.memory_analysis()
  # The vocabulary's mask and the temperature are arguments too; not used are dropout's key, a tb loss's query_ids, Z's
  # tokens, which stand in its trees, and how many bins these fill.
  used = (params, state, batch.replace(query_ids=None, tokens=None, trees=batch.trees.replace(num_bins=None)))
  assert analysis.argument_size_in_bytes == size(used) + 72 + 4
  # Logits of a micro-batch alone: a backward pass needs them.
  assert memory.temporaries > 2 * config.sampler.num_samples * (config.sampler.max_length + 1) * 72 * 4


DEVICES = """
from configs import arith
import jax
from gfn_jax import plan
from gfn_jax.models.architectures import read_config
from gfn_jax.models.partition import tree_shardings
from gfn_jax.models.shapes import SHAPES
from gfn_jax.parallel import make_mesh

for name, m in (("gpt2-xl", 1), ("gpt-j-6b", 8), ("llama-3.1-8b", 8)):
  model = read_config(SHAPES[name])
  mesh = make_mesh(jax.devices(), m)
  for quantization in (None, "int8"):
    params = plan.abstract_params(model, "bfloat16", quantization)
    print(plan.bytes_per_device(plan._placed(params, tree_shardings(model, mesh, params))))
"""


def test_a_device_holds_its_share_of_the_base():
  gpt2, gpt2_int8, gptj, gptj_int8, llama, llama_int8 = map(int, run_python(DEVICES, devices=8).split())
  assert gpt2 == 2 * 1_557_611_200  # 25 heads: whole
  d, vocab = 4096, 50_400
  whole = 28 * (2 * d + d) + 2 * d  # norms, and the bias of a sum
  layer = 4 * d * d + 8 * d * d + 4 * d
  assert gptj == 2 * (whole + (28 * layer + 2 * vocab * d + vocab) // 8)
  d, kv, mlp, vocab = 4096, 1024, 14_336, 128_256
  layer = 2 * d * d + 2 * d * kv + 3 * d * mlp
  assert llama == 2 * (65 * d + (32 * layer + 2 * vocab * d) // 8)
  # One byte a weight and a scale an output in place of two bytes. Scales of o and down, summed, are whole.
  scales = 32 * (2 * (d + 2 * kv + 2 * mlp) // 8 + 2 * 2 * d)
  assert llama_int8 == llama - 32 * layer // 8 + scales
  assert gpt2_int8 < 0.6 * gpt2 and gptj_int8 < 0.6 * gptj


def test_a_config_alone_is_read(folder):
  assert load_config(folder / "tiny") == read_config(tiny_hf_config("llama", vocab_size=72))
  with pytest.raises(ValueError, match="no config.json"):
    load_config(folder)


# 32 layers of width 1024: 444 million parameters, 0.89 GB in bfloat16, of which no device holds more than a quarter.
LARGE = """
import jax, jax.numpy as jnp, numpy as np
from configs import arith
from gfn_jax import plan
from gfn_jax.models.architectures import read_config
from gfn_jax.models.decoder import init_params
from gfn_jax.models.partition import tree_shardings
from gfn_jax.parallel import make_mesh
from gfn_jax.prefix_tree import build_trees
from gfn_jax.step import make_optimizer
from gfn_jax.train import initial_trained, starting_adapter
from gfn_jax.types import Batch, TrainState, terminable_prefixes
from gfn_jax.models import Pretrained

L, D, M, V, Q, N, P, T = 32, 1024, 2816, 16_000, 2, 4, 16, 24
model = read_config({
  "model_type": "llama", "hidden_size": D, "intermediate_size": M, "num_hidden_layers": L, "num_attention_heads": 16,
  "num_key_value_heads": 16, "vocab_size": V, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
  "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu",
})
config = arith.get_config("smoke")
config.model.dtype, config.model.remat = "bfloat16", "full"
config.lora.targets, config.lora.rank = ("q_proj", "v_proj"), 8
config.train.num_queries, config.train.micro_batch_queries, config.sampler.num_samples = Q, 1, N
config.sampler.max_length, config.train.warmup_steps = T, 0
compiled, params, state = plan.compile_step(config, plan.Layout("large", model, 4, 4), P)

mesh = make_mesh(jax.devices(), 4)
start = lambda: init_params(model, jax.random.key(0), "bfloat16")
params = jax.jit(start, out_shardings=tree_shardings(model, mesh, params))()
trained = initial_trained(config, model, starting_adapter(config, Pretrained(model, {}, None, "large")), Q)
state = TrainState(jnp.int32(0), trained, make_optimizer(config).init(trained))
state = jax.device_put(state, tree_shardings(model, mesh, state))
rng = np.random.default_rng(0)
tokens, length = rng.integers(0, V, (Q * N, T)).astype(np.int32), np.full(Q * N, T, np.int32)
chosen = np.ones((Q * N, T), bool)
prompts = list(rng.integers(0, V, (Q, P)).astype(np.int32))
batch = Batch(
  np.arange(Q, dtype=np.int32), tokens, length, chosen,
  terminable_prefixes(length, chosen), rng.normal(-200, 3, (Q * N, T + 1)).astype(np.float32),
  build_trees(prompts, tokens, length, 512, Q),
)
held = [sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards if s.device == d)
        for d in jax.devices()]
memory = plan.memory_of(compiled, params, state)
args = jax.device_put((jnp.ones(V, bool), jnp.float32(1), jax.random.key(0)), jax.NamedSharding(mesh, jax.P()))
batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
losses = []
for _ in range(3):
  state, metrics = compiled(params, *args, state, batch)
  losses.append(float(metrics["loss"]))
print(*losses, *held)
print(memory.params, memory.state, memory.gradients, memory.temporaries)
"""


@pytest.mark.slow
def test_a_base_larger_than_a_devices_share_trains_within_the_bytes_that_are_predicted():
  """A quarter of the weights, the adapter's state, and by hand what the backward pass keeps."""
  *lines, sizes = run_python(LARGE, devices=4, timeout=1800).splitlines()
  losses, held = [float(x) for x in lines[-1].split()[:3]], [int(x) for x in lines[-1].split()[3:]]
  params, state, gradients, temporaries = map(int, sizes.split())
  assert losses[0] > losses[1] > losses[2]

  num_layers, d, mlp, vocab, nodes = 32, 1024, 2816, 16_000, 16 + 4 * 24
  kernels = 4 * d * d + 3 * d * mlp
  split, whole = num_layers * kernels + 2 * vocab * d, (2 * num_layers + 1) * d  # the norms are whole
  assert held == [params] * 4 == [2 * (split // 4 + whole)] * 4
  assert params < 2 * (split + whole) / 3.9
  kept = 2 * num_layers * nodes * d  # between layers, in bfloat16: remat keeps nothing else
  logits = 3 * 4 * nodes * vocab // 4  # float32: themselves, their log-softmax, its gradient
  cast = 4 * (kernels + vocab * d) // 4  # a CPU multiplies in float32: a layer's share and the head's
  assert temporaries == pytest.approx(kept + logits + cast, rel=0.2)
  predicted = params + state + gradients + kept + logits + cast
  assert params + state + gradients + temporaries == pytest.approx(predicted, rel=0.1)
