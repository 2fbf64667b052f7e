"""Arithmetic with a calculator (paper section 4.4): sample rationales Z in proportion to p_LM(Z Y | demonstrations, X).

    python -m gfn_jax.main --config=configs/arith.py                # embedded LM, minutes on a laptop CPU
    python -m gfn_jax.main --config=configs/arith.py:smoke          # seconds; what the tests run
    python -m gfn_jax.main --config=configs/arith.py:smollm2        # SmolLM2-135M-Instruct
    python -m gfn_jax.main --config=configs/arith.py:paper          # GPT-J 6B, the paper's Table E.2
    python -m gfn_jax.main --config=configs/arith.py:reference      # GPT-J 6B, the choices of the authors' code
    python -m launch.sweep --config=configs/arith.py --name=table4  # and others: sweep() below

Expected from the first, in the README's results: the base fails (paper, Table 4, told to think step by step: 10.2, 6.4
and 3.2%), the fine-tuned policy solves nearly all problems of 3, 4 and 5 operands.
"""

from gfn_jax.config import METHODS, SEEDS, base_config, grid, smollm2

VARIANTS = ("", "smoke", "smollm2", "paper", "reference")
TRIALS = {  # nine of each method
  "gfn": {"train.learning_rate": (2.5e-4, 5e-4, 1e-3), "reward.temperature_end": (0.8, 0.9, 1.0)},
  "sft": {"train.learning_rate": (1e-4, 5e-4, 2e-3), "train.num_steps": (50, 100, 250)},
  "ppo": {"train.learning_rate": (1e-4, 3e-4, 1e-3), "ppo.kl_coefficient": (0.2, 1.0, 5.0)},
  "grpo": {"train.learning_rate": (1e-4, 3e-4, 1e-3), "grpo.kl_coefficient": (0.04, 0.2, 1.0)},
}
SETTINGS = {  # of a method, at a variant
  "": {  # the best of those nine by accuracy; of the GFlowNet the default, one problem of 300 behind its best
    "sft": {"train.learning_rate": 5e-4, "train.num_steps": 50, "train.decay_steps": 50},
    "ppo": {"train.learning_rate": 3e-4, "ppo.kl_coefficient": 1.0},
    "grpo": {"train.learning_rate": 1e-3, "grpo.kl_coefficient": 0.04},
  },
  # Appendix E.2: ten epochs of 50 demonstrations, all of which its batch of 128 x 8 holds; PPO's are the defaults.
  "paper": {"sft": {"train.num_steps": 10, "train.warmup_steps": 1}},
}


def get_config(variant: str = ""):
  """One of VARIANTS. Raises ValueError for another."""
  if variant not in VARIANTS:
    raise ValueError(f"config variant {variant!r} is unknown: choose from {', '.join(VARIANTS[1:])}")
  config = base_config()
  config.name, config.variant, config.task = "arith", variant, "arith"
  config.sampler.min_length, config.sampler.max_length = 5, 24
  # A small model needs a larger, decaying rate than GPT-J (at 2e-3 it forgets some of five operands, on which it is not
  # trained); milder tempering of the behaviour; little annealing below 1, at which the loss spikes; and more queries of
  # fewer samples.
  config.lora.alpha = 64.0
  config.train.num_queries, config.sampler.num_samples = 16, 8
  config.train.num_steps, config.train.learning_rate, config.train.decay_steps = 250, 5e-4, 250
  config.eval.every_steps, config.eval.shots = 50, (3,)
  config.behavior.temperature_high = 1.5
  config.reward.temperature_start, config.reward.temperature_end, config.reward.temperature_horizon = 1.1, 0.9, 100

  if variant == "smoke":
    config.train.num_steps = 4
    config.train.num_queries = 4
    config.sampler.num_samples = 4
    config.train.warmup_steps = 1
    # Queries with demonstrations alone: a query of each step is replayed, and shapes do not change.
    config.data.num_seed_rationales = 8
    config.data.unseeded_weight = 0.0
    config.checkpoint.every_steps = 2
    config.eval.every_steps = 2
    # One problem of each of three kinds, four samples each: three queries of a training step, so nothing new compiles.
    config.eval.num_validation = config.eval.num_test = 1
    config.eval.num_votes = 4
    config.eval.max_length = config.sampler.max_length

  if variant == "smollm2":
    config.model.name = smollm2()
    config.lora.rank, config.lora.alpha = 64, 64.0
    config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    config.train.learning_rate, config.train.num_steps, config.train.decay_steps = 5e-4, 200, 200
    config.train.num_queries, config.sampler.num_samples = 8, 8
    # Its digits are one token each, so that demonstrations take up to 31 tokens.
    config.sampler.max_length, config.eval.max_length = 32, 40
    config.eval.num_validation, config.eval.num_test, config.eval.every_steps = 4, 50, 50

  if variant in ("smollm2", "paper", "reference"):
    config.eval.zero_shot_cue = " Let us think step by step."
  if variant in ("paper", "reference"):
    config.model.name, config.model.dtype = "nlpcloud/instruct-gpt-j-fp16", "bfloat16"
    config.lora.rank, config.lora.alpha, config.lora.dropout = 64, 16.0, 0.1
    config.train.num_queries, config.train.micro_batch_queries, config.train.num_steps = 32, 1, 1000
    config.sampler.num_samples = 16
    config.train.learning_rate, config.train.decay_steps = 1e-4, 0
    # Table E.2's "P_F temperature 2 to 0.5" is the range of the tempered behaviour policy (section 3.3).
    config.behavior.temperature_low, config.behavior.temperature_high = 0.5, 2.0
    config.reward.temperature_end, config.reward.temperature_horizon = 0.5, 150
  # The paper's and the code's lengths count what the policy writes; ours also count the calculator's results, up to two
  # tokens for each of the three calls that four operands need (four calls for five, at the evaluation).
  if variant == "paper":
    config.sampler.max_length, config.eval.max_length = 20 + 6, 20 + 8  # Table E.2; the code has 18 and 21
  if variant == "reference":
    config.sampler.max_length, config.eval.max_length = 18 + 6, 21 + 8
    config.sampler.stop_at_eos = True
  return config


def sweep(name: str, variant: str = "") -> list[tuple[str, dict]]:
  """The variant and the fields of each run of a sweep, at `variant` of this config.

  Raises:
    ValueError: there is no such sweep.
  """
  settings = {m: {} for m in METHODS} | SETTINGS.get(variant, {})
  no_baselines = {"eval.baselines": False}
  on_validation = {"eval.split": "validation", "eval.num_test": 100, "eval.every_steps": 250} | no_baselines
  sweeps = {
    "smoke": [("smoke", fields) for fields in grid({"method": METHODS})],
    "tuning": [
      ("", {"method": m} | fields | {"train.decay_steps": fields.get("train.num_steps", 250)} | on_validation)
      for m in METHODS
      for fields in grid(TRIALS[m])
    ],
    # The base is the same beside every method.
    "table4": [
      ("", {"method": m, "seed": seed} | settings[m] | ({"eval.shots": (3, 5, 10, 20)} if m == "gfn" else no_baselines))
      for m in METHODS
      for seed in SEEDS
    ],
    "table_e3": [("", fields) for fields in grid({"data.num_seed_rationales": (0, 10, 25, 50), "seed": SEEDS})],
    "objectives": [("", fields) for fields in grid({"loss.name": ("subtb", "tb", "vargrad", "db"), "seed": SEEDS})],
    "staleness": [("", fields) for fields in grid({"train.max_staleness": (0, 1), "seed": SEEDS})],
    # Nothing shows the frozen LM how to reason: a repeated question is nearly as good to it as steps (Table E.4).
    "misspecified": [
      ("", fields | settings[fields["method"]])
      for fields in grid({"reward.num_demonstrations": (0,), "method": ("gfn", "ppo", "grpo"), "seed": SEEDS})
    ],
  }
  if name not in sweeps:
    raise ValueError(f"sweep {name!r} is unknown: choose from {', '.join(sweeps)}")
  return sweeps[name]
