"""What a run would need: bytes on each device for a training step of a config, for a model that need not be there.

python -m gfn_jax.plan --config=configs/arith.py:paper --shape=gpt-j-6b --devices=1,4,8,32
python -m gfn_jax.plan --config=configs/arith.py:paper --config.model.name=DIR --devices=8 --model_parallel=4
python -m gfn_jax.plan --config=configs/arith.py:paper --devices=v5e-16     # what a step costs there, too (`costs`)

The step is compiled for so many CPU devices, ahead of time, from shapes alone: no weight is loaded or allocated.
"""

import dataclasses
import functools
import math
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections

from gfn_jax import cli, costs
from gfn_jax.config import base_config, num_micro_batches
from gfn_jax.layouts import Layout, make_layouts, split_note
from gfn_jax.models import Pretrained
from gfn_jax.models.architectures import ModelConfig, lora_targets, peft_names, read_config
from gfn_jax.models.decoder import init_params
from gfn_jax.models.hf import load_config
from gfn_jax.models.partition import tree_shardings
from gfn_jax.models.quantization import quantize
from gfn_jax.models.shapes import SHAPE_OF, SHAPES
from gfn_jax.parallel import DATA_AXIS, make_mesh, map_step
from gfn_jax.prefix_tree import PADDING, bin_size, build_trees, unlike_samples
from gfn_jax.step import make_optimizer, step_settings, train_step
from gfn_jax.train import initial_trained, starting_adapter
from gfn_jax.types import Acts, Batch, TrainState

ATTENTION = ("q", "k", "v", "qkv", "o")

# Nothing runs, so code need not be fast. A CPU multiplies bfloat16 in float32: with these passes it would cast the
# kernels of all layers before the loop over them (24 GB for GPT-J), without them it casts one layer's at a time.
_COMPILER_OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion",
}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device during a step.

  Attributes:
    params: of the frozen base.
    state: of the adapter and its optimiser, which a checkpoint holds.
    gradients: of the adapter; they stand among what the compiled step allocates.
    temporaries: what else it allocates at its peak.
  """

  params: int
  state: int
  gradients: int
  temporaries: int

  @property
  def total(self) -> int:
    return self.params + self.state + self.gradients + self.temporaries


def fitting_targets(config: ml_collections.ConfigDict, model: ModelConfig) -> tuple[str, ...]:
  """config.lora.targets; where they are the default and this family has other names, all attention projections.

  Raises:
    ValueError: targets that somebody chose, and that the model does not have.
  """
  targets = tuple(config.lora.targets)
  try:
    lora_targets(model, targets)
    return targets
  except ValueError:
    if targets != tuple(base_config().lora.targets):
      raise
    names = [name for projection, name in peft_names(model).items() if projection in ATTENTION]
    return tuple(n.removeprefix("self_attn.") for n in names)


def model_of(config: ml_collections.ConfigDict) -> ModelConfig:
  """The config's model; of those whose shape is known (`models.shapes`), no file is asked for."""
  name = config.model.name
  return read_config(SHAPES[SHAPE_OF[name]]) if name in SHAPE_OF else load_config(name, config.model.revision)


def abstract_params(model: ModelConfig, dtype: str, quantization: str | None) -> dict:
  """The base as shapes and dtypes."""
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), dtype))
  if quantization:
    quantized = jax.vmap(functools.partial(quantize, quantization=quantization))
    params["layers"] = {
      name: {k: jax.eval_shape(quantized, v) if k == "kernel" else v for k, v in leaves.items()}
      for name, leaves in params["layers"].items()
    }
  return params


def abstract_state(config: ml_collections.ConfigDict, model: ModelConfig) -> TrainState:
  """Adapter and optimiser as shapes and dtypes. A learned log_partition, 4 bytes a query, has a step's queries only."""

  def start():
    lora = starting_adapter(config, Pretrained(model, {}, None, config.model.name))
    trained = initial_trained(config, model, lora, config.train.num_queries)
    return TrainState(jnp.int32(0), trained, make_optimizer(config).init(trained))

  return jax.eval_shape(start)


def abstract_batch(
  config: ml_collections.ConfigDict, model: ModelConfig, num_devices: int, prompt_tokens: int
) -> Batch:
  """A step's batch, of all `num_devices` that share it, as shapes and dtypes: the most that it can be, samples without
  common prefixes."""
  queries, t = config.train.num_queries, config.sampler.max_length
  samples = config.sampler.num_samples
  rows, shares = queries * samples, num_devices * num_micro_batches(config, num_devices)
  size = bin_size(prompt_tokens, samples, t, model.hidden_size, PADDING)
  trees = build_trees(*unlike_samples(queries, samples, prompt_tokens, t), size, shares)
  array = jax.ShapeDtypeStruct
  return Batch(
    query_ids=array((queries,), jnp.int32),
    tokens=array((rows, t), jnp.int32),
    length=array((rows,), jnp.int32),
    action_mask=array((rows, t), bool),
    terminable=array((rows, t + 1), bool),
    log_reward_untempered=array((rows, t + 1), jnp.float32),
    trees=jax.tree.map(lambda x: array(x.shape, x.dtype), trees),
    acts=Acts(array((rows, t + 1), bool), *[array((rows, t + 1), jnp.float32)] * 5)
    if config.method in ("ppo", "grpo")
    else None,
  )


def _placed(tree: Any, shardings: Any) -> Any:
  """Shapes with their shardings: one for each leaf, or one for all."""
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_per_device(tree: Any) -> int:
  """Of arrays, or of shapes with their shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def lower_step(
  config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, prompt_tokens: int
) -> tuple[jax.stages.Lowered, dict, TrainState]:
  """A run's training step on a mesh (data, model), lowered from shapes alone.

  Args:
    config: of the run; its lora.targets fit the model.
    model: the base.
    mesh: as `make_mesh` makes it.
    prompt_tokens: P.

  Returns:
    The lowered step, and its params and state as shapes with their shardings.
  """
  params = abstract_params(model, config.model.dtype, config.model.quantization)
  params = _placed(params, tree_shardings(model, mesh, params))
  state = abstract_state(config, model)
  state_shardings = tree_shardings(model, mesh, state)
  state = _placed(state, state_shardings)
  batch = abstract_batch(config, model, mesh.shape[DATA_AXIS], prompt_tokens)
  batch = _placed(batch, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
  allowed_tokens = jax.ShapeDtypeStruct((model.vocab_size,), bool)
  key = jax.eval_shape(lambda: jax.random.key(0))
  small = _placed((allowed_tokens, jax.ShapeDtypeStruct((), jnp.float32), key), NamedSharding(mesh, PartitionSpec()))
  settings = step_settings(config, model, stop_token_id=0, num_devices=mesh.shape[DATA_AXIS])
  step = map_step(functools.partial(train_step, settings, make_optimizer(config)), mesh, state_shardings)
  return step.lower(params, *small, state, batch), params, state


def compile_step(
  config: ml_collections.ConfigDict, layout: Layout, prompt_tokens: int
) -> tuple[jax.stages.Compiled, dict, TrainState]:
  """`lower_step` for the first devices that JAX has, compiled. Raises ValueError where it has too few."""
  devices = jax.devices()
  if len(devices) < layout.num_devices:
    raise ValueError(f"{layout.num_devices} devices are wanted, and JAX has {len(devices)}")
  mesh = make_mesh(devices[: layout.num_devices], layout.num_model)
  lowered, params, state = lower_step(config, layout.model, mesh, prompt_tokens)
  return lowered.compile(compiler_options=_COMPILER_OPTIONS), params, state


def memory_of(compiled: jax.stages.Compiled, params: dict, state: TrainState) -> Memory:
  """Bytes on each device: parameters and state by their shapes, the rest as XLA's compiler allocates it."""
  analysis = compiled.memory_analysis()
  gradients = bytes_per_device(state.trained)
  # Outputs beyond those that take the donated state's place.
  allocated = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return Memory(bytes_per_device(params), bytes_per_device(state), gradients, allocated - gradients)


HEADER = ("model", "devices", "data × model", "base, GB", "adapter, gradients, AdamW", "temporaries", "sum")


def table_row(layout: Layout, memory: Memory) -> str:
  """A row of the Markdown table, in GB."""
  sizes = (memory.params, memory.state + memory.gradients, memory.temporaries, memory.total)
  cells = (layout.name, layout.devices, layout.split, *(f"{x / 1e9:.2f}" for x in sizes))
  return f"| {' | '.join(cells)} |"


def notes(config: ml_collections.ConfigDict, targets: dict[str, tuple[str, ...]], prompt_tokens: int) -> str:
  """What the numbers hold, under the table."""
  t, sampler, model = config.train, config.sampler, config.model
  micro = f"{t.micro_batch_queries} a micro-batch" if t.micro_batch_queries else "no micro-batches"
  adapted = "; ".join(f"{', '.join(names)} of {name}" for name, names in targets.items())
  lines = [
    f"GB (1e9 bytes) on each device in a training step: {t.num_queries} queries ({micro}) × {sampler.num_samples} "
    f"samples over all devices, prompts of {prompt_tokens} tokens, Z of {sampler.max_length}; "
    f"{model.quantization or model.dtype} base, remat {model.remat}, LoRA rank {config.lora.rank} on {adapted}.",
    "data × model: a run splits its base so by --config.mesh.model, the second number; 1 by default.",
    "Base, adapter, gradients and AdamW's moments are counted from their shapes; temporaries are what else XLA's CPU "
    "compiler allocates.",
  ]
  if model.dtype != "float32":
    lines.append(
      f"To multiply in {model.dtype} the CPU casts a layer's kernels and activations to float32, which is among its "
      "temporaries and which a GPU or a TPU need not do; a TPU pads small axes to its tiles instead."
    )
  lines.append("Sampling and scoring run between the steps, with key-value caches of their own.")
  return "\n".join(lines)


def main() -> int:
  f, config = flags.FLAGS, _CONFIG.value
  cli.prepare_jax(config)
  models = {name: read_config(SHAPES[name]) for name in f.shape or ()} or {config.model.name: model_of(config)}
  config.lora.init_from = None  # an adapter of the same size
  layouts = make_layouts(models, config, f.devices, f.model_parallel, f.prompt_tokens)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(layout.num_devices for layout in layouts))

  lengths = costs.Lengths(f.prompt_tokens, f.context_tokens, f.target_tokens)
  print(f"| {' | '.join(HEADER)} |\n|---|{'---:|' * (len(HEADER) - 1)}", flush=True)
  targets = {name: fitting_targets(config, model) for name, model in models.items()}
  tables = []
  for layout in layouts:
    config.lora.targets = targets[layout.name]
    memory = memory_of(*compile_step(config, layout, f.prompt_tokens))
    print(table_row(layout, memory), flush=True)
    if layout.accelerator:
      tables += filter(None, (costs.cost_table(config, layout, lengths), costs.memory_note(layout, memory.total)))
  print(f"\n{notes(config, targets, f.prompt_tokens)}")
  for name, model in models.items():
    if f.model_parallel == "auto" and any(x.name == name and x.num_data > 1 for x in layouts):
      print(split_note(name, model))
  for text in (*tables, costs.notes(lengths)) if tables else ():
    print(f"\n{text}")
  return 0


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  flags.DEFINE_multi_enum(
    "shape", None, tuple(SHAPES), "A public model in place of config.model.name; can be repeated. No file is needed."
  )
  flags.DEFINE_list(
    "devices", ["1", "4", "8", "32"], "Numbers of devices or names of slices, as v5e-16: a row of the table each."
  )
  flags.DEFINE_string("model_parallel", "auto", "Over how many devices a model is split; auto: as many as possible.")
  defaults = costs.Lengths()
  flags.DEFINE_integer("prompt_tokens", defaults.prompt, "P, tokens of a prompt.")
  flags.DEFINE_integer("context_tokens", defaults.context, "Tokens before every prompt in the reward.", lower_bound=0)
  flags.DEFINE_integer("target_tokens", defaults.target, "Y, tokens of a target.", lower_bound=0)
  cli.launch(main)
