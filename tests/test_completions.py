"""Texts in, texts out: `gfn_jax.sample`, and what a bare `import gfn_jax` gives."""

import dataclasses

import jax
import numpy as np
import pytest

import gfn_jax
from gfn_jax.data import pad_left
from gfn_jax.models import logits
from gfn_jax.sampler import Sampler
from gfn_jax.tools import Calculator
from testing import random_lora, run_python, tiny_pretrained

PROMPTS = ["Question: 6 - 0 =", "6 +", "The answer is"]


@pytest.fixture(scope="module")
def pretrained():
  return tiny_pretrained(seed=9)


def encode(pretrained, text):
  return pretrained.tokenizer.encode(text, add_special_tokens=False)


def test_a_bare_import_gives_the_library():
  code = """
import sys, warnings
warnings.simplefilter("error")
import gfn_jax
assert "jax" not in sys.modules  # a config that imports gfn_jax.config, or --version, does not wait for it
assert gfn_jax.tools.calculate("-8 + 8") == "0"
for f in (gfn_jax.sample, gfn_jax.losses.subtb_loss, gfn_jax.models.load_pretrained, gfn_jax.models.load_adapter,
          gfn_jax.rewards.prefix_log_rewards):
  assert callable(f), f
assert "tensorflow_datasets" not in sys.modules
import gfn_jax.completions, gfn_jax.sampler
assert gfn_jax.sample is gfn_jax.completions.sample
assert not hasattr(gfn_jax, "samples") and "sample" in dir(gfn_jax) and gfn_jax.__version__
try:
  gfn_jax.smaple
except AttributeError as e:
  assert "smaple" in str(e) and "sample" in str(e)
print("done")
"""
  assert run_python(code) == "done\n"


def test_texts_are_those_of_the_sampler(pretrained):
  lora = random_lora(pretrained)
  texts = gfn_jax.sample(pretrained, lora, PROMPTS, 4, temperature=0.7, max_length=6, min_length=2, seed=3)
  assert [len(t) for t in texts] == [4, 4, 4]
  vocab_size, eos = pretrained.config.vocab_size, pretrained.tokenizer.eos_token_id
  sampler = Sampler(
    pretrained.config, pretrained.params, allowed_tokens=np.ones(vocab_size, bool), stop_token_id=eos, max_length=6,
    min_length=2,
  )  # fmt: skip
  z = sampler(
    lora, *pad_left([encode(pretrained, p) for p in PROMPTS]), num_samples=4, temperature=np.full(3, 0.7),
    key=jax.random.key(3),
  )  # fmt: skip
  decoded = [pretrained.tokenizer.decode(row[:n]) for row, n in zip(z.tokens.tolist(), z.length)]
  assert [t for of_a_prompt in texts for t in of_a_prompt] == decoded
  assert len(set(decoded)) > 6

  again = gfn_jax.sample(pretrained, lora, PROMPTS, 4, temperature=0.7, max_length=6, min_length=2, seed=3)
  other = gfn_jax.sample(pretrained, lora, PROMPTS, 4, temperature=0.7, max_length=6, min_length=2, seed=4)
  assert again == texts != other
  assert gfn_jax.sample(pretrained, lora, [], 4, max_length=6, seed=3) == []


def test_greedy_text_is_the_argmax_of_the_logits(pretrained):
  (texts,) = gfn_jax.sample(pretrained, None, PROMPTS[:1], 2, temperature=0, max_length=5, seed=0)
  tokens = encode(pretrained, PROMPTS[0])
  for _ in range(5):
    best = int(np.asarray(logits(pretrained, np.array([tokens])))[0, -1].argmax())
    if best == pretrained.tokenizer.eos_token_id:
      break
    tokens.append(best)
  expected = pretrained.tokenizer.decode(tokens[len(encode(pretrained, PROMPTS[0])) :])
  assert texts == [expected] * 2
  filtered = gfn_jax.sample(pretrained, None, PROMPTS[:1], 2, top_k=9, top_p=1e-6, max_length=5, seed=1)
  assert filtered == [texts]  # the filters reach the sampler


def test_stop_vocabulary_and_tool(pretrained):
  words = [encode(pretrained, w)[0] for w in (" 6", " -", " =", ".")]
  allowed = np.isin(np.arange(pretrained.config.vocab_size), words)
  tool = Calculator(lambda t: encode(pretrained, t), pretrained.tokenizer.decode, pretrained.config.vocab_size)
  options = {"allowed_tokens": allowed, "tool": tool, "temperature": 9.0, "max_length": 6, "min_length": 4}
  (texts,) = gfn_jax.sample(pretrained, None, ["6 - 6 ="], 800, stop=".", seed=0, **options)
  assert set("".join(texts)) <= set(" 6-=0")  # the stop is no part of a text; only the tool wrote "0"
  assert any(t.startswith(" 6 - 6 = 0") for t in texts)
  assert [texts] == gfn_jax.sample(pretrained, None, ["6 - 6 ="], 800, stop=words[-1], seed=0, **options)


@pytest.mark.parametrize(
  "options, message",
  (
    ({"stop": "Question:"}, r"stop 'Question:' must be one token: to this tokenizer it is \['Question', ':'\]"),
    ({"stop": "!"}, r"stop '!' must be one token: to this tokenizer it is \[\]"),
    ({"stop": "6!"}, r"stop '6!' must be one token"),  # this tokenizer drops "!"
    ({"stop": 69}, "stop token 69: must be a token id from 0 to 68"),
    ({"stop": -1}, "stop token -1: must be a token id from 0 to 68"),
    ({"allowed_tokens": np.ones(68, bool)}, r"allowed_tokens has shape \(68,\): must be \(69,\)"),
    ({"allowed_tokens": np.arange(69) > 0}, "stop token 0 is not among the allowed tokens"),
    ({"prompts": "6 -"}, "prompts is the text '6 -': must be a list of texts"),
    ({"prompts": ["6 -", ""]}, "prompt '' has no tokens"),
    ({"max_length": 255}, r"prompt '6 -' has 2 tokens: with 255 more it exceeds the model's 256 positions"),
    ({"max_length": -1}, "min_length 0 and max_length -1"),
    ({"min_length": 6}, "min_length 6 and max_length 5"),
    ({"num_samples": 0}, "num_samples 0: must be at least 1"),
    ({"temperature": -1.0}, "temperature -1"),
    ({"top_k": -2}, "top_k -2"),
    ({"top_p": 1.01}, "top_p 1.01"),
  ),
)
def test_bad_input(pretrained, options, message):
  options = {"prompts": ["6 -"], "num_samples": 1, "max_length": 5, "seed": 0} | options
  with pytest.raises(ValueError, match=message) as error:
    gfn_jax.sample(pretrained, None, **options)
  assert "\n" not in str(error.value)


def test_a_stop_of_another_type():
  """In a process without the tests' check of annotations, which would come first."""
  out = run_python("""
import gfn_jax
from testing import tiny_pretrained
for stop in (1.5, [1]):
  try:
    gfn_jax.sample(tiny_pretrained(), None, ["6"], 1, max_length=5, stop=stop, seed=0)
  except ValueError as e:
    print(e)
""")
  rule = "must be a text of one token, or a token id"
  assert out.splitlines() == [f"stop token 1.5: {rule}", f"stop token [1]: {rule}"]


def test_a_model_without_tokenizer_or_end_of_text(pretrained):
  with pytest.raises(ValueError, match="'tiny/gptj' has no tokenizer"):
    gfn_jax.sample(dataclasses.replace(pretrained, tokenizer=None), None, ["6"], 1, max_length=5, seed=0)
  endless = tiny_pretrained()
  endless.tokenizer.eos_token = None
  with pytest.raises(ValueError, match="no end-of-text token: name a stop token"):
    gfn_jax.sample(endless, None, ["6"], 1, max_length=5, seed=0)
