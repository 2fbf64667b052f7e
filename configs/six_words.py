"""A task of one's own in code, whole: stories of exactly six words. A template for others.

    python -m gfn_jax.main --config=configs/six_words.py            # SmolLM2-135M-Instruct
    python -m gfn_jax.main --config=configs/six_words.py:smoke      # embedded LM, seconds

What a task must say: its examples, the vocabulary of Z and the token that ends it, and what is held out. All else it
inherits: here the reward is p_LM(Z | X) c(Z), and c(Z) asks for six words.
"""

from gfn_jax.config import base_config, smollm2
from gfn_jax.task import Task
from gfn_jax.types import Example

PROMPTS = ("A story about the sea:", "A story about a letter:", "A story about winter:", "A story about two brothers:")
HELD_OUT = ("A story about a lost key:", "A story about the moon:")


class SixWordsTask(Task):
  """Stories of six words."""

  name = "six_words"

  def __init__(self, config, tokenizer, vocab_size):
    super().__init__(tokenizer, vocab_size, config.model.name)
    self.examples = [Example(prompt, rationale=None, target="", answer="") for prompt in PROMPTS]
    self.stop_token_id = self.find_stop(".")
    for token in range(vocab_size):
      text = self.decode([token])
      self.allowed_tokens[token] = token == self.stop_token_id or text.replace(" ", "").isalpha()

  def log_constraint(self, example, tokens):
    """Two nats for each word too many or too few."""
    return -2.0 * abs(len(self.decode(tokens).split()) - 6)

  def is_right(self, example, tokens):
    return len(self.decode(tokens).split()) == 6

  def validation_examples(self, number):
    return {"": [Example(prompt, rationale=None, target="", answer="") for prompt in HELD_OUT][:number]}

  test_examples = validation_examples


def get_config(variant: str = ""):
  """ "" or "smoke"."""
  if variant not in ("", "smoke"):
    raise ValueError(f"config variant {variant!r} is unknown: choose from smoke")
  config = base_config()
  config.name, config.variant, config.task = "six_words", variant, "configs.six_words:SixWordsTask"
  config.model.name = "embedded/arith-2m" if variant else smollm2()
  config.lora.targets = ("q_proj", "v_proj")
  config.data.unseeded_weight, config.reward.num_demonstrations = 1.0, 0
  config.train.num_queries, config.train.num_steps, config.train.learning_rate = 4, 4 if variant else 200, 5e-4
  config.eval.num_validation, config.eval.num_test, config.eval.max_length = 2, 2, config.sampler.max_length
  config.eval.temperature, config.eval.evaluators = 1.0, ("texts",)
  return config
