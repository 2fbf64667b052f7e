"""How models are split over devices: which axes, what cannot be split, and the same numbers as on one device.

What needs several devices runs in a process of its own.
"""

import jax
from jax.sharding import PartitionSpec as P
import pytest

from gfn_jax.models.architectures import read_config
from gfn_jax.models.partition import check_split, largest_split, parameter_spec, tree_shardings
from gfn_jax.parallel import make_mesh
from testing import FAMILIES, random_lora, run_python, tiny_hf_config, tiny_pretrained


def tiny(family="llama", **fields):
  return read_config(tiny_hf_config(family, vocab_size=72, **fields))


@pytest.mark.parametrize(
  "path, spec",
  [
    ("embed.embedding", P("model", None)),
    ("head.kernel", P(None, "model")),
    ("head.bias", P("model")),
    ("position_embed.embedding", P()),
    ("final_norm.scale", P()),
    ("layers.attention_norm.scale", P()),
    ("layers.q_norm.scale", P()),
    ("layers.q.kernel", P(None, None, "model")),
    ("layers.qkv.bias", P(None, "model")),
    ("layers.gate.kernel", P(None, None, "model")),
    ("layers.o.kernel", P(None, "model", None)),
    ("layers.down.kernel", P(None, "model", None)),
    ("layers.down.bias", P()),  # added once, to the sum over the devices
    ("layers.v.lora_a", P()),
    ("layers.v.lora_b", P(None, None, "model")),
    ("layers.down.lora_a", P(None, "model", None)),
    ("layers.down.lora_b", P()),
    ("opt_state.0.mu.lora.params.layers.o.lora_a", P(None, "model", None)),
    ("step", P()),
  ],
)
def test_a_path_says_how_a_parameter_is_split(path, spec):
  assert parameter_spec(tiny(), 2, path) == spec


def test_every_large_parameter_of_every_family_is_split():
  """Nothing is forgotten: what is whole is a norm, a learned position or the bias of a sum."""
  for family in FAMILIES:
    pretrained = tiny_pretrained(family=family, vocab_size=72)
    for path, leaf in jax.tree_util.tree_leaves_with_path(pretrained.params):
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      spec = parameter_spec(pretrained.config, 2, name)
      whole = "norm" in name or name in ("layers.o.bias", "layers.down.bias", "position_embed.embedding")
      assert (spec == P()) == whole, f"{family} {name}"
      assert len(spec) in (0, leaf.ndim), f"{family} {name}"


@pytest.mark.parametrize(
  "fields, num_shards, named",
  [
    ({}, 3, ["4 heads", "3 devices", "choose from 1, 2"]),
    ({}, 4, ["2 key-value heads of a llama model", "4 devices", "choose from 1, 2"]),
    ({"intermediate_size": 45}, 2, ["45 MLP channels", "2 devices", "choose from 1"]),
    ({}, 0, ["0 devices"]),
  ],
)
def test_what_cannot_be_split_is_refused_by_name(fields, num_shards, named):
  with pytest.raises(ValueError) as e:
    check_split(tiny(**fields), num_shards)
  for part in named:
    assert part in str(e.value)


def test_the_largest_split_divides_heads_channels_and_devices():
  assert [largest_split(tiny(), n) for n in (1, 2, 3, 4, 8)] == [1, 2, 1, 2, 2]
  assert largest_split(tiny(intermediate_size=45), 8) == 1
  for n in (1, 2):
    check_split(tiny(), largest_split(tiny(), n))


def test_a_vocabulary_that_does_not_divide_is_whole():
  odd = read_config(tiny_hf_config("gptj", vocab_size=69))
  for path in ("embed.embedding", "head.kernel", "head.bias"):
    assert parameter_spec(odd, 2, path) == P()
    assert parameter_spec(odd, 3, path) != P()
  assert parameter_spec(odd, 2, "layers.q.kernel") != P()


def test_a_mesh_has_whole_groups():
  devices = jax.devices()[:1]
  assert dict(make_mesh(devices, 1).shape) == {"data": 1, "model": 1}
  for num_model in (0, 2):
    with pytest.raises(ValueError, match=f"1 devices cannot be split into groups of {num_model}"):
      make_mesh(devices, num_model)


def test_trees_of_parameters_are_found_by_their_paths():
  pretrained = tiny_pretrained(family="llama")
  mesh = make_mesh(jax.devices()[:1], 1)
  tree = {"mu": random_lora(pretrained), "count": jax.numpy.zeros(())}
  specs = tree_shardings(pretrained.config, mesh, tree)
  assert specs["mu"].params["layers"]["o"]["lora_a"].spec == P(None, "model", None)
  assert specs["count"].spec == P()


LOAD = """
import dataclasses, sys, tempfile
import flax.traverse_util, jax, numpy as np
from gfn_jax.models import load_pretrained, logits, save_pretrained
from gfn_jax.models.architectures import read_config
from gfn_jax.models.partition import shardings, tree_shardings
from gfn_jax.parallel import make_mesh
from testing import FAMILIES, random_lora, tiny_pretrained, tokens_and_mask

mesh = make_mesh(jax.devices(), 2)
for family in FAMILIES:
  for vocab_size in (72, 69) if family == "gptj" else (72,):
    tiny = dataclasses.replace(tiny_pretrained(family=family, vocab_size=vocab_size), tokenizer=None)
    with tempfile.TemporaryDirectory() as folder:
      save_pretrained(folder, tiny)
      loaded = load_pretrained(folder, shardings=shardings(tiny.config, mesh))
    halves = 0
    for name, leaf in flax.traverse_util.flatten_dict(loaded.params, sep=".").items():
      shapes = {shard.data.shape for shard in leaf.addressable_shards}
      assert len(leaf.addressable_shards) == 4 and len(shapes) == 1, name
      (shape,) = shapes
      expected = list(leaf.shape)
      module, kind = name.split(".")[-2:]
      if kind == "kernel":
        expected[-2 if module in ("o", "down") else -1] //= 2
      elif kind == "bias" and module in ("q", "k", "v", "qkv", "gate", "up", "head"):
        expected[-1] //= 2
      elif name == "embed.embedding":
        expected[0] //= 2
      if vocab_size == 69 and module in ("embed", "head"):
        expected = leaf.shape
      assert shape == tuple(expected), (family, name, shape, expected)
      halves += shape != leaf.shape
    assert halves >= 5
    tokens, mask = tokens_and_mask(vocab_size)
    lora = random_lora(tiny)
    split = jax.device_put(lora, tree_shardings(tiny.config, mesh, lora))
    ours, theirs = (np.asarray(logits(*x)) for x in ((loaded, tokens, mask, split), (tiny, tokens, mask, lora)))
    np.testing.assert_allclose(ours[mask], theirs[mask], rtol=0, atol=1e-5 * np.abs(theirs[mask]).max())
    print(family)
"""


def test_each_shard_is_loaded_where_it_belongs_and_computes_the_same():
  out = run_python(LOAD, devices=4, timeout=900)
  assert set(out.split()) == set(FAMILIES)


STEP = """
import functools
import jax, jax.numpy as jnp, numpy as np
from configs import arith
from gfn_jax.models.partition import tree_shardings
from gfn_jax.parallel import make_mesh, map_step
from gfn_jax.prefix_tree import build_trees
from gfn_jax.step import make_optimizer, step_settings, train_step
from gfn_jax.types import Batch, TrainState, terminable_prefixes
from testing import random_lora, tiny_pretrained

config = arith.get_config("smoke")
config.train.num_queries, config.train.micro_batch_queries, config.sampler.num_samples = 4, 1, 2
config.sampler.max_length, config.train.learning_rate = 6, 1e-2
Q, N, P, T = 4, 2, 5, 6
rng = np.random.default_rng(0)
one_layer = "n_layer" if family in ("gpt2", "gptj") else "num_hidden_layers"  # half the time to compile
pretrained = tiny_pretrained(family=family, vocab_size=72, **{one_layer: 1})
model, stop = pretrained.config, 3
allowed = rng.random(72) < 0.5
allowed[stop] = True
length = rng.integers(0, T + 1, Q * N).astype(np.int32)
inside = np.arange(T) < length[:, None]
tokens = np.where(inside, rng.choice(np.flatnonzero(allowed), (Q * N, T)), 0).astype(np.int32)
prompts = [rng.integers(0, 72, n).astype(np.int32) for n in rng.integers(3, P + 1, Q)]
batch = Batch(
  np.arange(Q, dtype=np.int32), tokens, length, inside, terminable_prefixes(length, inside),
  rng.normal(-20, 3, (Q * N, T + 1)).astype(np.float32),
  build_trees(prompts, tokens, length, P + T, Q),
)
assert batch.trees.num_bins[0] > 1
optimizer = make_optimizer(config)

def two_steps(num_devices, num_model, remat="none", bin_by_bin=False):
  # (what the adapter gained, the moments of the optimiser, metrics) of two updates
  config.model.remat = remat
  mesh = make_mesh(jax.devices()[:num_devices], num_model)
  put = lambda tree: jax.device_put(tree, tree_shardings(model, mesh, tree))
  start = random_lora(pretrained)
  start = jax.tree.map(np.array, start)  # which no step can donate
  trained = {"lora": start}
  state = old = put(TrainState(jnp.int32(0), trained, optimizer.init(trained)))
  settings = step_settings(config, model, stop, num_devices // num_model, bin_by_bin)
  step = map_step(functools.partial(train_step, settings, optimizer), mesh, tree_shardings(model, mesh, state))
  args = put(pretrained.params), jnp.asarray(allowed), jnp.float32(1.3), jax.random.key(0)
  for _ in range(2):
    state, metrics = step(*args, state, batch)
  assert int(state.step) == 2
  assert old.trained["lora"].params["layers"]["down"]["lora_b"].is_deleted()  # the state was donated
  down = state.trained["lora"].params["layers"]["down"]["lora_a"]
  assert down.sharding.shard_shape(down.shape)[1] == down.shape[1] // num_model  # and came out split as it went in
  change = [np.asarray(new) - np.asarray(old) for new, old in zip(*map(jax.tree.leaves, (state.trained, trained)))]
  return change, [np.asarray(x) for x in jax.tree.leaves(state.opt_state)], {k: float(v) for k, v in metrics.items()}


def assert_same(ours, theirs):
  for mine, other in zip(ours[0] + ours[1], theirs[0] + theirs[1]):
    assert np.abs(other).max() > 0
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))
  for name, value in ours[2].items():
    np.testing.assert_allclose(value, theirs[2][name], rtol=1e-5, err_msg=name)
  assert ours[2]["loss"] > 0.01


one = two_steps(1, 1)
assert_same(two_steps(4, 2, remat="full", bin_by_bin=True), one)
assert_same(two_steps(2, 2), one)  # one share of the data alone
print("same")
"""


@pytest.mark.parametrize(
  "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_step_of_a_split_model_is_that_of_one_device(family):
  assert run_python(f"family = {family!r}\n{STEP}", devices=4, timeout=900) == "same\n"
