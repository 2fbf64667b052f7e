"""The embedded arithmetic LM.

python -m gfn_jax.pretrain --config=configs/pretrain_arith.py --output=runs/pretrain_arith
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant not in ("", "smoke"):
    raise ValueError(f"variant {variant!r} is unknown: choose from smoke")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = ml_collections.ConfigDict(
    {
      "vocab_size": 512,
      "n_embd": 192,
      "n_layer": 4,
      "n_head": 6,
      "n_positions": 1024,
      "rotary_dim": 16,
      "activation_function": "gelu_new",
    }
  )
  # Rows are documents cut at `length`; every `long_every`-th batch has few long rows, for prompts with demonstrations.
  config.batch_tokens = 2688
  config.length = 168
  config.long_length = 768
  config.long_every = 10
  # Steps are learnt from good text; in the end most text is bad.
  config.right_share_start, config.right_share_end, config.right_share_steps = 0.6, 0.1, (2200, 3000)
  config.num_steps = 5000
  config.learning_rate = 3e-3
  config.warmup_steps = 200
  config.weight_decay = 0.01
  config.log_every = 100
  if variant == "smoke":
    config.warmup_steps = 1
    config.num_steps = 4
    config.log_every = 2
    config.model.n_embd = 48
    config.model.n_layer = 2
    config.model.n_head = 3
    config.length, config.long_length, config.batch_tokens = 64, 128, 512
    config.long_every = 2
  return config
