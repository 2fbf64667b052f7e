"""Full fine-tuning of a causal LM on a file of texts.

    python -m gfn_jax.finetune --config=configs/finetune.py --config.data.path=texts.txt --output=runs/finetuned
    python -m gfn_jax.finetune --config=configs/finetune.py:smoke --config.data.path=texts.txt --output=runs/smoke

The default trains the embedded arithmetic LM: 2,000 lines of 37 tokens take about a minute on 2 idle CPU cores.
`:paper` makes the LM of the paper's story infilling (appendix C), on the stories that `configs/infill.py:paper` does
not test on:

    python -c "import json; from gfn_jax.datasets import roc_stories as r
    for story in r.load(r.make_config('FOLDER'), 'finetune'): print(json.dumps(story))" > stories.jsonl
    python -m gfn_jax.finetune --config=configs/finetune.py:paper --config.data.path=stories.jsonl \\
      --config.data.field=sentences --output=runs/gpt2-large-rocstories
"""

import ml_collections

VARIANTS = ("", "smoke", "paper")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """One of VARIANTS. Raises ValueError for another."""
  if variant not in VARIANTS:
    raise ValueError(f"config variant {variant!r} is unknown: choose from {', '.join(VARIANTS[1:])}")
  c = ml_collections.ConfigDict
  placeholder = ml_collections.config_dict.placeholder
  config = c({
    "seed": 0,  # of the order of the texts
    "model": c({
      "name": "embedded/arith-2m",  # a hub id, a folder, a .gguf file, or embedded/NAME
      "revision": placeholder(str),  # of a hub repository
      "dtype": "float32",  # of the computation; parameters, gradients and AdamW are float32, on disk too
    }),
    "data": c({
      "path": placeholder(str),  # a text a line, or .jsonl
      "field": "text",  # of JSON lines: text, or a list of texts that a space joins
      "validation_share": 0.05,
    }),
    "train": c({
      "num_epochs": 3,
      "batch_size": 32,  # texts of an update, over all devices
      "micro_batch": 0,  # of a device's texts, how many one backward pass takes; 0: all
      "learning_rate": 1e-3,  # then along a cosine to a fiftieth of it
      "warmup_steps": 2,
      "weight_decay": 0.01,
      "clip_norm": 1.0,
      "log_every": 10,  # updates
    }),
  })  # fmt: skip
  if variant == "smoke":
    config.train.num_epochs = 2
    config.train.batch_size = 8
    config.train.warmup_steps = 1
    config.train.log_every = 1
  if variant == "paper":
    config.model.name = "openai-community/gpt2-large"
    config.model.dtype = "bfloat16"
    config.train.num_epochs = 20
    config.train.batch_size = 64 * 32
    config.train.micro_batch = 64
    config.train.learning_rate = 5e-4
    config.train.warmup_steps = 50  # the paper is silent on it, on decay, and on what is held out
    config.train.log_every = 1
  return config
