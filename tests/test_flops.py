"""FLOPs by hand against XLA's own count and against the traced program's products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfn_jax import flops, policy
from gfn_jax.models.decoder import causal_mask, hidden_states, output_logits
from testing import FAMILIES, random_lora, run_python, tiny_pretrained

ROWS, TOKENS, OUTPUTS = 3, 40, 5

# Wide enough that the products outweigh the norms and the softmax.
WIDE = {
  "gptj": {"n_embd": 128, "vocab_size": 500},
  "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 500},
}


def forward(config, unroll, params, lora, tokens):
  positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
  hidden, _ = hidden_states(config, params, lora, tokens, positions, causal_mask(TOKENS), unroll=unroll)
  return output_logits(config, params, hidden[:, -OUTPUTS:])


def xla_flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_makes_exactly_these_products(family):
  pretrained = tiny_pretrained(family=family)
  config, lora, tokens = pretrained.config, random_lora(pretrained), jnp.zeros((ROWS, TOKENS), jnp.int32)
  size = {"tokens": ROWS * TOKENS, "keys": TOKENS, "outputs": ROWS * OUTPUTS}
  for adapter in (None, lora):
    hand = flops.forward_flops(config, adapter and adapter.config, **size)
    call = functools.partial(forward, config, False)
    assert hand == flops.program_flops(call, pretrained.params, adapter, tokens)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", WIDE)
def test_a_forward_pass_is_what_xla_counts(family, adapted):
  pretrained = tiny_pretrained(family=family, **WIDE[family])
  lora = random_lora(pretrained) if adapted else None
  hand = flops.forward_flops(
    pretrained.config, lora and lora.config, tokens=ROWS * TOKENS, keys=TOKENS, outputs=ROWS * OUTPUTS
  )
  # XLA counts a loop's body once: the layers are written out for it.
  call = functools.partial(forward, pretrained.config, True)
  assert hand == pytest.approx(xla_flops(call, pretrained.params, lora, jnp.zeros((ROWS, TOKENS), jnp.int32)), rel=0.15)


@pytest.mark.parametrize("family", ["llama", pytest.param("gptj", marks=pytest.mark.slow)])
def test_a_gradient_is_what_xla_counts(family):
  pretrained = tiny_pretrained(family=family, **WIDE[family])
  model, length = pretrained.config, jnp.full(ROWS, TOKENS)
  lora = random_lora(pretrained)
  tokens, prompt = jnp.zeros((ROWS, TOKENS), jnp.int32), jnp.zeros((1, 1), jnp.int32)

  def loss(params, remat, lora):
    log_pf, log_pterm = policy.score(
      model, params, lora, prompt, prompt == 0, tokens, length, tokens == 0, stop_token_id=0,
      allowed_tokens=jnp.ones(model.vocab_size, bool), max_length=TOKENS + 1, remat=remat,
    )  # fmt: skip
    return (log_pf.sum() + log_pterm.sum()) ** 2

  gradient = jax.value_and_grad(loss, argnums=2)
  size = {"tokens": ROWS * TOKENS + 1, "keys": TOKENS + 1, "outputs": ROWS * (TOKENS + 1)}
  forward = flops.forward_flops(model, lora.config, **size)
  for remat in ("none", "dots", "full"):
    hand = forward + flops.backward_flops(model, lora.config, **size, remat=remat)
    call = functools.partial(gradient, pretrained.params, remat)
    assert hand == pytest.approx(flops.program_flops(call, lora), rel=0.15)
    if remat == "none":  # XLA may undo the others
      xla = xla_flops(lambda params, lora: gradient(params, "none", lora), pretrained.params, lora)
      assert hand == pytest.approx(xla, rel=0.15)


def test_loops_multiply():
  x = jnp.ones((8, 8))

  def loops(x):
    x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)
    x = jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x @ x, x)
    return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, x)

  product = 2 * 8**3
  assert flops.program_flops(loops, x) == (3 + 2 + 1) * product
  assert flops.program_flops(jax.jit(loops), x, while_trips=(10, 5)) == (3 + 20 + 5) * product
  # What is no array of JAX is known while tracing, as it is in the call.
  assert flops.program_flops(lambda x, n: x[: int(n)] @ x, jax.ShapeDtypeStruct(x.shape, x.dtype), np.int32(4)) == 512


def test_devices_multiply():
  code = """
import jax, jax.numpy as jnp
from gfn_jax.flops import program_flops
from gfn_jax.parallel import grouped, over_data
mapped = jax.pmap(
  lambda x, y: jax.lax.psum(x @ y, "data"), axis_name="data", in_axes=(0, None), out_axes=None,
  devices=jax.local_devices()[:2],
)
print(program_flops(mapped, jnp.ones((2, 8, 8)), jnp.ones((8, 8))))

groups = grouped(jax.local_devices(), 2)  # XLA shares a group's product between its devices
shared = over_data(lambda x, y: x @ y, (0, None), groups)
print(program_flops(shared, jnp.ones((2, 8, 8)), jnp.ones((8, 8))))
"""
  assert run_python(code, devices=4).split() == [str(2 * 2 * 8**3)] * 2


def test_a_decoding_step_reads_every_weight_and_the_keys_of_its_rows():
  pretrained = tiny_pretrained(family="llama")
  model, lora = pretrained.config, random_lora(pretrained, ("q_proj",), rank=4)
  kernels = sum(x.size for path, x in jax.tree.leaves_with_path(pretrained.params["layers"]) if "kernel" in str(path))
  cache = 2 * 2 * 2 * 8  # keys and values of 2 layers, 2 heads of 8
  head, adapter = 32 * model.vocab_size, 2 * 4 * (32 + 32)
  assert flops.decode_bytes(model, None, keys=7, itemsize=2) == 2 * (kernels + head + 7 * cache)
  assert (
    flops.decode_bytes(model, lora.config, keys=0, itemsize=2, kernel_itemsize=1) == kernels + 2 * head + 4 * adapter
  )
