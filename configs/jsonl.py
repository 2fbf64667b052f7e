"""A user's own records: a JSON object a line, and templates that make X, Y and Z of its fields (paper section 3.1).

    python -m gfn_jax.main --config=configs/jsonl.py --config.data.path=mine.jsonl \\
        --config.jsonl.prompt="Question: {question} Answer:" --config.jsonl.target=". So it is {answer}."
    python -m gfn_jax.main --config=configs/jsonl.py:smoke          # embedded LM and records; what the tests run

The paper's general forms, each on the records that ship with the package unless --config.data.path names others:

    tempered      p(Z|X)^(1/T)                  a continuation, sharper than sampling at temperature T token by token
    contrastive   p(Z|X) p(Z)^beta, beta < 0    what X makes likely, and not what is likely anyway
    infilling     p(X Z Y)                      the middle between a beginning and an ending
    reverse       p(Z Y)                        what may have come before Y
    constrained   p(Z|X) c(Z)                   a continuation with some words and without others
"""

import ml_collections

from gfn_jax.config import base_config, smollm2

VARIANTS = ("", "tempered", "contrastive", "infilling", "reverse", "constrained", "smoke")


def get_config(variant: str = ""):
  """One of VARIANTS. Raises ValueError for another."""
  if variant not in VARIANTS:
    raise ValueError(f"config variant {variant!r} is unknown: choose from {', '.join(VARIANTS[1:])}")
  config = base_config()
  config.name, config.variant, config.task = "jsonl", variant, "jsonl"
  unset = lambda: ml_collections.config_dict.placeholder(str)  # noqa: E731
  config.jsonl = ml_collections.ConfigDict({
    # Templates over a record's fields. Leading spaces are the template's own.
    "prompt": "{X}",  # what the policy reads
    "reward_prompt": unset(),  # what the reward reads, where that differs; "" for nothing
    "target": "",  # Y: its first token ends Z. Without a Y the stop token ends the text, and is scored with it
    "rationale": unset(),  # a demonstration Z, of the records that have its fields
    "answer": unset(),  # what a right Z reads as
    "stop": unset(),  # a text of one token; by default the end of text. A target has its own
    "allowed_characters": unset(),  # Z is written in these alone; by default in the whole vocabulary
    # log c(Z): a penalty for each required word that is missing, each forbidden one that is there ...
    "required_words": (),
    "forbidden_words": (),
    "penalty": 10.0,  # nats
    "constraint": unset(),  # ... or module:function or file.py:function, (example, text of Z) -> log c, nats
    "held_out_share": 0.1,  # of the records, half to validate and half to test on; with data.test_path all to validate
  })  # fmt: skip
  config.model.name = smollm2()
  config.lora.rank, config.lora.alpha = 64, 64.0
  config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
  config.sampler.max_length, config.eval.max_length = 24, 24
  config.reward.num_demonstrations = 0
  config.data.unseeded_weight = 1.0
  config.train.learning_rate, config.train.num_steps, config.train.decay_steps = 5e-4, 200, 200
  config.train.num_queries, config.sampler.num_samples = 8, 8
  config.eval.num_validation, config.eval.num_test, config.eval.num_votes = 24, 100, 8
  config.eval.temperature, config.eval.evaluators = 1.0, ("texts",)

  if variant not in ("", "smoke"):
    config.data.path, config.jsonl.stop = "embedded", "."
    config.jsonl.prompt = "{beginning}"
  if variant == "tempered":
    config.reward.temperature_end, config.reward.temperature_horizon = 0.8, 100
  if variant == "contrastive":
    config.reward.beta = -0.5
  if variant in ("infilling", "smoke"):
    config.data.path = "embedded"
    config.jsonl.prompt = "Beginning: {beginning}\n End: {ending}\n Middle:"
    config.jsonl.reward_prompt, config.jsonl.target = "{beginning}", ". {ending}"
    config.jsonl.rationale = " {middle}"
  if variant == "reverse":
    config.jsonl.prompt = "End: {ending}\n What came before:"
    config.jsonl.reward_prompt, config.jsonl.target = "", ". {ending}"
  if variant == "constrained":
    config.jsonl.required_words, config.jsonl.forbidden_words = ("home",), ("not", "never")

  if variant == "smoke":
    config.model.name = "embedded/arith-2m"
    config.lora.rank, config.lora.alpha, config.lora.targets = 8, 8.0, ("q_proj", "v_proj")
    config.sampler.max_length, config.eval.max_length = 40, 40  # its tokens are letters
    config.train.num_steps = config.train.decay_steps = 4
    config.train.warmup_steps, config.train.num_queries, config.sampler.num_samples = 1, 4, 4
    config.checkpoint.every_steps = config.eval.every_steps = 2
    config.eval.num_validation, config.eval.num_test, config.eval.num_votes = 3, 3, 4
  return config
