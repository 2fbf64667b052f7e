"""Makes the embedded arithmetic LM again: `python -m gfn_jax.pretrain --config=configs/pretrain_arith.py`.

Trains a byte-level BPE and a small GPT-J on `datasets.arithmetic_corpus`, and writes an ordinary Hugging Face folder.
"""

from collections.abc import Sequence
import functools
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
import transformers

from gfn_jax import cli
from gfn_jax.datasets.arithmetic_corpus import document
from gfn_jax.files import local_path
from gfn_jax.likelihood import make_optimizer, next_token_terms
from gfn_jax.models import Pretrained, save_pretrained
from gfn_jax.models.architectures import read_config
from gfn_jax.models.decoder import init_params

END_OF_TEXT = "<|endoftext|>"

_CARD = """---
license: mit
---

# A small GPT-J that has read arithmetic, most of it bad

{count:,} parameters, float16, byte-level BPE; trained for {steps} steps from seed {seed} on
`gfn_jax.datasets.arithmetic_corpus`, which holds no test or validation expression. Made by

    python -m gfn_jax.pretrain --config=configs/pretrain_arith.py
"""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
  """Byte-level BPE with GPT-2's pre-tokenisation, its end-of-text token last."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - 1,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_special_tokens([END_OF_TEXT])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
  )


def sample_batch(tokenizer, rng: np.random.Generator, rows: int, length: int, right_share: float) -> np.ndarray:
  """int32 [rows, length]: each row the beginning of a document of its own."""
  texts = [document(rng, length // 12, right_share) for _ in range(rows)]  # the shortest lines have about 14 tokens
  ids = tokenizer(texts)["input_ids"]
  if min(map(len, ids)) < length:
    raise ValueError(f"a document of {length // 12} lines has under {length} tokens")
  return np.array([row[:length] for row in ids], np.int32)


def right_share(config, step: int) -> float:
  """Share of documents of right steps: high while the skill is learnt, then linearly down to what is to be expected."""
  begin, end = config.right_share_steps
  done = min(1.0, max(0.0, (step - begin) / (end - begin)))
  return config.right_share_start + done * (config.right_share_end - config.right_share_start)


def next_token_loss(model, params, tokens):
  """Mean cross-entropy of tokens 1.. given those before, in nats."""
  nats, count = next_token_terms(model, params, tokens, jnp.ones(tokens.shape, bool))
  return nats / count


def pretrain(config, output: str) -> None:
  """Trains from `config.seed` and writes the folder `output`."""
  output = local_path(output)
  rng = np.random.default_rng(config.seed)
  tokenizer = train_tokenizer(
    [document(rng, 8, config.right_share_start) for _ in range(2000)], config.model.vocab_size
  )
  hf_config = config.model.to_dict() | {
    "model_type": "gptj", "architectures": ["GPTJForCausalLM"], "tie_word_embeddings": False,
    "vocab_size": len(tokenizer), "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id,
  }  # fmt: skip
  model = read_config(hf_config)
  params = init_params(model, jax.random.key(config.seed))
  optimiser = make_optimizer(config.learning_rate, config.warmup_steps, config.num_steps, config.weight_decay)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, tokens):
    loss, grads = jax.value_and_grad(functools.partial(next_token_loss, model))(params, tokens)
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  opt_state, losses, start = optimiser.init(params), [], time.time()
  with tqdm.trange(config.num_steps, desc="pretrain", disable=None) as progress:
    for i in progress:
      length = config.long_length if i % config.long_every == config.long_every - 1 else config.length
      tokens = sample_batch(tokenizer, rng, config.batch_tokens // length, length, right_share(config, i))
      params, opt_state, loss = step(params, opt_state, tokens)
      losses.append(loss)  # read late: the next batch is made while this step runs
      if (i + 1) % config.log_every == 0:
        mean = np.mean(jax.device_get(losses[-config.log_every :]))
        progress.set_postfix(loss=f"{mean:.3f}")
        if progress.disable:
          print(f"step {i + 1}/{config.num_steps}  loss {mean:.4f} nats/token  {time.time() - start:.0f} s", flush=True)
        if not np.isfinite(mean):
          raise FloatingPointError(f"the loss is {mean} at step {i + 1}")
  save_pretrained(output, Pretrained(model, params, tokenizer, output, hf_config=hf_config), dtype="float16")
  count = sum(x.size for x in jax.tree.leaves(params))
  (output / "README.md").write_text(_CARD.format(count=count, steps=config.num_steps, seed=config.seed))
  last = np.mean(jax.device_get(losses[-100:]))
  print(
    f"{output}: {count:,} parameters, vocabulary {len(tokenizer)}, loss {last:.3f} nats/token, "
    f"{time.time() - start:.0f} s"
  )


def main() -> int:
  pretrain(_CONFIG.value, _OUTPUT.value)
  return 0


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  _OUTPUT = flags.DEFINE_string("output", "runs/pretrain_arith", "The folder to write.")
  cli.launch(main)
