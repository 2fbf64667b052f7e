"""Story infilling (paper section 4.2, Table 2): the fourth sentence of five, in proportion to p_LM(X Z Y).

    python -m gfn_jax.main --config=configs/infill.py            # SmolLM2-135M-Instruct, the stories that ship
    python -m gfn_jax.main --config=configs/infill.py:smoke      # embedded LM; what the tests run
    python -m gfn_jax.main --config=configs/infill.py:paper      # a GPT-2 Large fine-tuned on ROCStories, Table C.2
    python -m launch.sweep --config=configs/infill.py --name=table2

ROCStories is fetched by hand (https://cs.rochester.edu/nlp/rocstories/): --config.data.path=FOLDER with its CSVs. The
LM of `:paper` is made first, by `python -m gfn_jax.finetune --config=configs/finetune.py:paper` (see there);
--config.model.name is its folder.
--config.infill.reverse=True knows nothing of a story's beginning.
"""

import ml_collections

from gfn_jax.config import SEEDS, base_config, smollm2

VARIANTS = ("", "smoke", "paper")


def get_config(variant: str = ""):
  """One of VARIANTS. Raises ValueError for another."""
  if variant not in VARIANTS:
    raise ValueError(f"config variant {variant!r} is unknown: choose from {', '.join(VARIANTS[1:])}")
  config = base_config()
  config.name, config.variant, config.task = "infill", variant, "infill"
  unset = ml_collections.config_dict.placeholder
  config.infill = ml_collections.ConfigDict({
    "reverse": False,
    "num_train": unset(int),  # stories; by default the paper's 900 and 100, of those that ship 32 and 16
    "num_test": unset(int),
    "num_validation": 4,  # of the training stories
    "bertscore_model": unset(str),  # a BERT of a hub id or folder; None leaves BERTScore out
    "bertscore_layer": 17,
    "judge_url": unset(str),  # of an OpenAI-compatible endpoint; None leaves the judge out
    "judge_model": "gpt-4",
    "judge_cache": unset(str),  # a file of ratings made before
    "judge_samples": 10,  # infills a story that are judged
  })  # fmt: skip
  config.model.name, config.data.path = smollm2(), "embedded"
  config.lora.rank, config.lora.alpha = 64, 16.0
  config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
  config.sampler.min_length, config.sampler.max_length, config.sampler.num_samples = 5, 25, 16
  config.reward.num_demonstrations = 0
  config.reward.temperature_start, config.reward.temperature_end, config.reward.temperature_horizon = 1.1, 0.85, 100
  config.replay.capacity = 25
  config.train.learning_rate, config.train.num_steps, config.train.num_queries = 5e-4, 150, 4
  config.eval.num_validation, config.eval.num_test, config.eval.num_votes = 4, 100, 10
  config.eval.temperature, config.eval.max_length = 0.9, 25  # the text; Table 2's caption has 0.8
  config.eval.evaluators, config.eval.test_evaluators = ("texts",), ("infills",)  # a judge is paid once

  if variant == "smoke":
    config.model.name = "embedded/arith-2m"
    config.lora.rank, config.lora.targets = 8, ("q_proj", "v_proj")
    config.sampler.max_length = config.eval.max_length = 80  # its tokens are letters
    config.train.num_steps, config.train.warmup_steps, config.sampler.num_samples = 4, 1, 4
    config.checkpoint.every_steps = config.eval.every_steps = 2
    config.eval.num_validation, config.eval.num_test, config.eval.num_votes = 3, 3, 4

  if variant == "paper":
    config.model.name, config.model.dtype = "runs/gpt2-large-rocstories", "bfloat16"
    config.model.remat = "dots"
    config.lora.dropout, config.lora.targets = 0.1, ("c_attn", "c_proj", "c_fc")
    config.train.num_queries, config.train.micro_batch_queries, config.sampler.num_samples = 16, 1, 64
    config.train.learning_rate, config.train.num_steps = 1e-4, 1000
    # 900 to train on, and 50 more to validate on. The behaviour's temperature is drawn from (0.5, 2), as for the other
    # tasks; the paper anneals it from 2 to 0.5 here.
    config.infill.num_train, config.infill.num_test = 950, 100
    config.infill.num_validation, config.eval.num_validation = 50, 50
    config.eval.num_votes = 1024
  return config


def sweep(name: str, variant: str = "") -> list[tuple[str, dict]]:
  """The variant and the fields of each run of a sweep, at `variant` of this config.

  Raises:
    ValueError: there is no such sweep.
  """
  # Appendix C: at the paper's size ten epochs of 900 stories, 256 a step.
  settings = {"train.num_steps": 35, "sampler.num_samples": 16} if variant == "paper" else {}
  sweeps = {
    "table2": [
      ("", {"method": m, "seed": seed} | (settings if m == "sft" else {})) for m in ("gfn", "sft") for seed in SEEDS
    ],
  }
  if name not in sweeps:
    raise ValueError(f"sweep {name!r} is unknown: choose from {', '.join(sweeps)}")
  return sweeps[name]
