"""Next sentences (paper section 4.1, Fig. 3): sample in proportion to p_LM(Z | X)^(1/T), one sentence behind a prompt.

    python -m gfn_jax.main --config=configs/next_sentence.py          # SmolLM2-135M-Instruct, OpenWebText from the hub
    python -m gfn_jax.main --config=configs/next_sentence.py:smoke    # embedded LM and prompts; what the tests run
    python -m gfn_jax.main --config=configs/next_sentence.py:paper    # GPT-2 XL, T = 0.875 of Table B.1
    python -m launch.sweep --config=configs/next_sentence.py --name=fig3

T is --config.reward.temperature_end (Fig. 3 sweeps 0.8 to 0.95). Prompts of one's own, one a line:
--config.data.path=prompts.txt --config.next_sentence.kind=prompts. Diversity is measured with --config.eval.encoder, a
sentence encoder of BERT's type (hub id or folder).
"""

import ml_collections

from gfn_jax.config import SEEDS, base_config, grid, minilm, smollm2

VARIANTS = ("", "smoke", "paper")


def get_config(variant: str = ""):
  """One of VARIANTS. Raises ValueError for another."""
  if variant not in VARIANTS:
    raise ValueError(f"config variant {variant!r} is unknown: choose from {', '.join(VARIANTS[1:])}")
  config = base_config()
  config.name, config.variant, config.task = "next_sentence", variant, "next_sentence"
  unset = ml_collections.config_dict.placeholder
  config.next_sentence = ml_collections.ConfigDict({
    "kind": "documents",  # what a text of data.path is: a document to cut a prompt from, or ready "prompts"
    "num_train": unset(int),  # by default the paper's 950 and 50 prompts, and 200 for the test
    "num_validation": unset(int),
    "num_test": unset(int),
    # Other ways to decode the base, for Fig. 3.
    "sampling_temperatures": (0.9, 0.8, 0.7, 0.6),
    "top_k": (50,),
    "top_p": (0.95, 0.8),
    "beam_compute": (1, 5),  # beams for each sample that the policy draws
    "diversity_penalty": 1.0,
  })  # fmt: skip
  config.model.name = smollm2()
  config.data.path = "Skylion007/openwebtext/plain_text/train-00000-of-00080.parquet"
  config.lora.rank, config.lora.alpha = 64, 16.0
  config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  config.sampler.min_length, config.sampler.max_length, config.sampler.num_samples = 1, 30, 8
  config.reward.num_demonstrations = 0
  config.reward.temperature_start, config.reward.temperature_end, config.reward.temperature_horizon = 1.0, 0.875, 100
  config.behavior.buffer, config.behavior.tempered = 0.25, 0.5
  config.replay.seed_from, config.data.unseeded_weight = "nothing", 1.0
  config.train.learning_rate, config.train.num_steps, config.train.num_queries = 5e-4, 200, 8
  config.train.decay_steps = 200
  config.eval.num_validation, config.eval.num_test, config.eval.num_votes = 24, 200, 8
  config.eval.temperature, config.eval.max_length, config.eval.encoder = 1.0, 30, minilm()
  config.eval.evaluators = ("sentences",)

  if variant == "smoke":
    config.model.name, config.data.path, config.next_sentence.kind = "embedded/arith-2m", "embedded", "prompts"
    config.lora.rank, config.lora.targets = 8, ("q_proj", "v_proj")
    config.sampler.max_length = config.eval.max_length = 24
    config.train.num_steps = config.train.decay_steps = 4
    config.train.warmup_steps, config.train.num_queries, config.sampler.num_samples = 1, 4, 4
    config.checkpoint.every_steps = config.eval.every_steps = 2
    config.reward.temperature_horizon = 2
    config.eval.num_validation, config.eval.num_test, config.eval.num_votes, config.eval.encoder = 3, 3, 4, None
    config.next_sentence.sampling_temperatures, config.next_sentence.top_p = (0.8,), (0.9,)
    config.next_sentence.beam_compute = (1,)

  if variant == "paper":
    config.model.name, config.model.dtype = "openai-community/gpt2-xl", "bfloat16"
    config.model.remat = "dots"
    config.lora.dropout, config.lora.targets = 0.1, ("c_attn", "c_proj", "c_fc")
    config.train.num_queries, config.train.micro_batch_queries, config.sampler.num_samples = 32, 1, 8
    config.train.learning_rate, config.train.num_steps, config.train.decay_steps = 1e-4, 1000, 0
    config.reward.temperature_horizon = 750  # the reference's; the paper is silent
    config.eval.num_validation = 50
  return config


def sweep(name: str, variant: str = "") -> list[tuple[str, dict]]:
  """The variant and the fields of each run of a sweep. Raises ValueError for an unknown one."""
  del variant  # of this config, at which the fields are the same
  sweeps = {
    "fig3": [("", fields) for fields in grid({"reward.temperature_end": (0.8, 0.85, 0.875, 0.9, 0.95), "seed": SEEDS})],
  }
  if name not in sweeps:
    raise ValueError(f"sweep {name!r} is unknown: choose from {', '.join(sweeps)}")
  return sweeps[name]
