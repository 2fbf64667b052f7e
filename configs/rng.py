"""Random numbers (paper section 2, Fig. 2): an LM that draws integers as asked.

    python -m gfn_jax.main --config=configs/rng.py                  # SmolLM2-135M-Instruct, 0 to 100, uniform
    python -m gfn_jax.main --config=configs/rng.py:smoke            # embedded LM, 0 to 20; what the tests run
    python -m gfn_jax.main --config=configs/rng.py:paper            # instruct GPT-J 6B
    python -m launch.sweep --config=configs/rng.py --name=fig2

Other targets: --config.rng.target=poisson --config.rng.parameter=30, binomial, geometric, or a table of weights.

Expected from the first, in the README's results: the exact KL(q || target) falls from several nats to about 5e-5
(paper: 3.37 to 9.75e-5).
"""

import ml_collections

from gfn_jax.config import SEEDS, base_config, grid, smollm2

VARIANTS = ("", "smoke", "paper")


def get_config(variant: str = ""):
  """One of VARIANTS. Raises ValueError for another."""
  if variant not in VARIANTS:
    raise ValueError(f"config variant {variant!r} is unknown: choose from {', '.join(VARIANTS[1:])}")
  config = base_config()
  config.name, config.variant, config.task = "rng", variant, "rng"
  config.rng = ml_collections.ConfigDict({
    "low": 0,  # the paper's caption says 1-100, its text and prompt 0-100; both ends are included
    "high": 100,
    "target": "uniform",  # poisson, binomial, geometric, or table
    "parameter": ml_collections.config_dict.placeholder(float),
    "table": ml_collections.config_dict.placeholder(str),  # a JSON object of number -> weight
    "prompt": ml_collections.config_dict.placeholder(str),  # instead of the target's own
    "num_demonstrations": 1000,  # of method "sft": numbers drawn from the target
    # Nats a wrong token; by default so many that all wrong strings together have 1e-6 of the target.
    "penalty": ml_collections.config_dict.placeholder(float),
  })  # fmt: skip
  config.model.name = smollm2()
  # Adapters everywhere learn several times faster here than the paper's rank 512 on keys and values.
  config.lora.rank, config.lora.alpha = 64, 64.0
  config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  config.sampler.max_length, config.sampler.num_samples = 3, 24
  # Every pair of SubTB with the empty prefix goes through the logit of one improbable token, its stop: that slows this
  # task down, in which a prefix tells nothing that its number does not. Whole samples, by a log Z that is learned:
  # VarGrad's is that of 24 samples drawn alike, and does not compare what is replayed with the others.
  config.loss.name = "tb"
  # One prompt, four times a step: as it is, tempered, and twice from a buffer that keeps every number it has met.
  # Without the buffer the number 100, begun as 10 is, is soon never sampled again: it must be there from the start.
  # Tempering meets what is no number ("103"), which the policy itself samples too seldom to unlearn it; but each such
  # sample outweighs the numbers in the gradient: with temperatures up to 2 these were learned more slowly (README,
  # Results).
  config.train.num_queries, config.behavior.buffer, config.behavior.tempered = 4, 0.5, 0.25
  config.behavior.temperature_low, config.behavior.temperature_high = 1.0, 1.5
  # As many places as there are numbers: what is none leaves it.
  config.replay.capacity = config.rng.get_ref("high") - config.rng.get_ref("low") + 1
  config.replay.similarity = 0.0
  # Each number is at first met as the beginning of what goes on behind it, far too seldom as a sample: a run that finds
  # 100 alone would never learn of others.
  config.replay.prioritized, config.replay.better_prefixes = False, True
  config.replay.seed_from, config.replay.num_seed_samples = "samples", 1024
  config.data.unseeded_weight = 1.0
  config.train.num_steps = config.train.decay_steps = 500
  config.train.learning_rate, config.train.warmup_steps = 5e-4, 10
  config.checkpoint.every_steps = config.eval.every_steps = 50
  config.eval.num_validation = 4
  config.eval.evaluators, config.eval.test_evaluators = ("numbers",), ("histogram",)
  config.eval.num_votes = 4096  # of the histogram

  if variant == "smoke":
    config.model.name = "embedded/arith-2m"
    config.rng.high = 20
    config.lora.rank, config.lora.targets = 16, ("k_proj", "v_proj")
    config.sampler.num_samples, config.replay.num_seed_samples = 4, 64
    config.train.num_steps = config.train.decay_steps = 6
    config.train.warmup_steps = 1
    config.checkpoint.every_steps = config.eval.every_steps = 3
    config.eval.num_votes = 64

  if variant == "paper":
    config.model.name, config.model.dtype = "nlpcloud/instruct-gpt-j-fp16", "bfloat16"
    config.lora.rank, config.lora.alpha, config.lora.dropout = 512, 32.0, 0.1
    config.lora.targets = ("k_proj", "v_proj")
    config.sampler.max_length, config.loss.name = 5, "subtb"
    # The reference's: 8 x 8 samples a step, on-policy, 2,560 steps, linear decay.
    config.train.num_queries, config.sampler.num_samples = 8, 8
    config.behavior.buffer, config.behavior.tempered, config.replay.better_prefixes = 0.0, 0.0, False
    config.replay.seed_from = "nothing"
    config.train.num_steps = config.train.decay_steps = 2560
    config.eval.num_votes = 512_000
  # Follows --config.sampler.max_length; the sum makes it a reference of its own, which can be set apart.
  config.eval.max_length = config.sampler.get_ref("max_length") + 0
  return config


def sweep(name: str, variant: str = "") -> list[tuple[str, dict]]:
  """The variant and the fields of each run of a sweep. Raises ValueError for an unknown one."""
  del variant  # of this config, at which the fields are the same
  sweeps = {
    "fig2": [("", fields) for fields in grid({"method": ("gfn", "sft", "ppo"), "seed": SEEDS})],
  }
  if name not in sweeps:
    raise ValueError(f"sweep {name!r} is unknown: choose from {', '.join(sweeps)}")
  return sweeps[name]
