"""What tests share: a tiny model with its tokenizer, the reference numbers, and a Python in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from gfn_jax.models import Lora, LoraConfig, Pretrained, init_lora
from gfn_jax.models.architectures import lora_targets, read_config
from gfn_jax.models.decoder import init_params

# Seconds of compilation for milliseconds of computation would be a bad trade.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

_ALPHABET = "0123456789+-=,. ?:" + "".join(sorted(set("QuestionAnswerTheansweris")))
_WORDS = (" -", " +", " =", *(f" {d}" for d in range(10)), "Question", "Answer", " The", " answer", " is")


def shared_folder() -> pathlib.Path:
  """The folder of reference numbers beside the repository (or $GFN_JAX_SHARED); without it the test is skipped."""
  folder = pathlib.Path(os.environ.get("GFN_JAX_SHARED", REPOSITORY.parent / "shared"))
  if not (folder / "golden").is_dir():
    pytest.skip(f"no reference numbers in {folder}; GFN_JAX_SHARED names their folder")
  return folder


def run_python(code: str, devices: int | None = None, timeout: float = 300, cwd: Any = None) -> str:
  """Runs a snippet in a fresh interpreter that can import the package and these helpers.

  Args:
    code: Python source.
    devices: how many CPU devices JAX is to see; None leaves it at one.
    timeout: seconds.
    cwd: working directory; the repository if None.

  Returns:
    Its stdout. A snippet that fails fails the test, with its stderr in the message.
  """
  paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "JAX_PLATFORMS": "cpu"}
  if devices is not None:
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILATION}"
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, cwd=cwd or REPOSITORY, capture_output=True, text=True, timeout=timeout
  )
  assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
  return done.stdout


# Most of a process's time goes into imports: made once, then a fork runs each command line as `python -m` would.
_FORKS = """
import json, os, runpy, sys, tempfile
import gfn_jax.evaluate, gfn_jax.generate, gfn_jax.pretrain, gfn_jax.train, tensorflow_datasets, transformers
for module in ("gfn_jax.main", "gfn_jax.evaluate", "gfn_jax.generate", "gfn_jax.pretrain"):
  sys.modules.pop(module, None)
results = []
for argv in json.loads(COMMANDS):
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
      code = 99
      try:
        module, sys.argv[1:] = argv[0], argv[1:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
      except SystemExit as e:
        code = 0 if e.code is None else e.code
      except BaseException:
        import traceback
        traceback.print_exc()
      finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    out.seek(0), err.seek(0)
    results.append([os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode()])
print("RESULTS" + json.dumps(results))
"""


def run_commands(commands: list[list[str]]) -> list[tuple[int, str, str]]:
  """Runs ["gfn_jax.main", "--config=...", ...] and the like; (exit code, stdout, stderr) of each."""
  out = run_python(f"COMMANDS = {json.dumps(commands)!r}\n{_FORKS}", timeout=1200)
  return [tuple(result) for result in json.loads(out.rpartition("RESULTS")[2])]


def assert_one_line(code: int, stderr: str, named: list[str]):
  """Exit code 2; one line on stderr that names the value."""
  assert code == 2, stderr
  lines = stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), stderr
  assert "Traceback" not in stderr
  for part in named:
    assert part in lines[0]


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """A byte-level BPE with GPT-2's pre-tokenisation and 69 tokens, in which " -", " 6" and " =" are one token each.

  It spells arithmetic, "Question:", "Answer:" and "The answer is"; it drops any other character.
  """
  # Byte-level BPE writes a space as Ġ.
  vocab, merges = ["<|endoftext|>", *_ALPHABET.replace(" ", "Ġ")], []
  for word in (w.replace(" ", "Ġ") for w in _WORDS):
    for end in range(2, len(word) + 1):
      if word[:end] not in vocab:
        vocab.append(word[:end])
        merges.append((word[: end - 1], word[end - 1]))
  bpe = tokenizers.models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges)
  tokenizer = tokenizers.Tokenizer(bpe)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
  )


_GPT = {
  "n_embd": 32,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 256,
  "activation_function": "gelu_new",
  "attn_pdrop": 0.0,
  "embd_pdrop": 0.0,
  "resid_pdrop": 0.0,
}
_MODERN = {
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 48,
  "max_position_embeddings": 256,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-5,
  "rope_theta": 1000.0,
  "tie_word_embeddings": False,
}
_OWN_NAMES = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta")  # that GPT-NeoX lacks or calls otherwise
_FAMILY_FIELDS = {
  "gptj": _GPT | {"architectures": ["GPTJForCausalLM"], "rotary_dim": 4, "tie_word_embeddings": False},
  "gpt2": _GPT | {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True},
  "gpt_neox": {k: v for k, v in _MODERN.items() if k not in _OWN_NAMES}
  | {"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "layer_norm_eps": 1e-5}
  | {"rotary_pct": 0.5, "rotary_emb_base": 1000},
  "llama": _MODERN | {"architectures": ["LlamaForCausalLM"]},
  "mistral": _MODERN | {"architectures": ["MistralForCausalLM"], "sliding_window": 5},
  "qwen2": {k: v for k, v in _MODERN.items() if k != "head_dim"}
  | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
  "qwen3": _MODERN | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
  "gemma": _MODERN
  | {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
}
FAMILIES = tuple(_FAMILY_FIELDS)


def tiny_hf_config(family: str = "gptj", **overrides) -> dict:
  """config.json's fields of a model with 2 layers, 32 channels, 4 heads of 8, and the tiny tokenizer's vocabulary."""
  shared = {"model_type": family, "vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 0}
  return shared | _FAMILY_FIELDS[family] | overrides


def tiny_pretrained(seed: int = 0, family: str = "gptj", **overrides) -> Pretrained:
  """A random model in which every parameter matters: kernels and biases of std 0.3, logits of about unit scale.

  Args:
    seed: of its parameters.
    family: one of `FAMILIES`.
    **overrides: fields of config.json, as `n_layer=3`.
  """
  hf_config = tiny_hf_config(family, **overrides)
  config = read_config(hf_config)
  rng = np.random.default_rng(seed)
  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
  scale = 0.0 if config.norm == "rms_plus_one" else 1.0
  params = {
    path: jnp.asarray(0.3 * rng.standard_normal(leaf.shape) + scale * (path[-1] == "scale"), jnp.float32)
    for path, leaf in sorted(shapes.items())
  }
  params = flax.traverse_util.unflatten_dict(params)
  return Pretrained(config, params, tiny_tokenizer(), f"tiny/{family}", hf_config=hf_config)


def random_lora(pretrained: Pretrained, targets: tuple[str, ...] = (), rank: int = 4, seed: int = 0, **options) -> Lora:
  """An adapter that changes the model: B is random too.

  Args:
    pretrained: the model it adapts.
    targets: Hugging Face module names ("q_proj"); () for every projection.
    rank: r.
    seed: of A and B.
    **options: further fields of `LoraConfig`; alpha is 8 unless given.
  """
  model = pretrained.config
  names = lora_targets(model, targets) if targets else tuple(model.projections())
  config = LoraConfig(**{"rank": rank, "alpha": 8.0, "targets": names} | options)
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: init_lora(model, config, jax.random.key(0)).params)
  params = jax.tree.map(lambda x: jnp.asarray(0.15 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return Lora(params, config)


def assert_logits(ours, theirs, mask=None, atol=2e-4):
  """Compares logits [B, N, V] where mask [B, N] is True (None: everywhere)."""
  keep = np.ones(np.shape(theirs)[:2], bool) if mask is None else np.asarray(mask, bool)
  np.testing.assert_allclose(np.asarray(ours)[keep], np.asarray(theirs)[keep], rtol=0, atol=atol)


def torch_model(hf_config, seed=0):
  """A transformers model whose every parameter is random and matters."""
  torch = pytest.importorskip("torch")
  import transformers

  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(**hf_config)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      is_scale = (".ln_" in name or "norm" in name) and name.endswith("weight")
      parameter.normal_(0.0, 0.3).add_(1.0 if is_scale and hf_config["model_type"] != "gemma" else 0.0)
  return model


def torch_logits(model, tokens, mask=None):
  """A transformers model's logits [B, N, V]; positions count the tokens that mask [B, N] keeps."""
  import torch

  mask = torch.ones(tokens.shape, dtype=torch.long) if mask is None else torch.tensor(mask, dtype=torch.long)
  positions = (mask.cumsum(-1) - 1).clamp(min=0)
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens), attention_mask=mask, position_ids=positions).logits.numpy()


def tokens_and_mask(vocab_size, shape=(3, 13), seed=0):
  """Random tokens; left pads in all rows but the first."""
  tokens = np.random.default_rng(seed).integers(0, vocab_size, shape)
  pads = 4 * np.arange(shape[0])[:, None]
  return tokens, np.arange(shape[1]) >= pads


def damage_checkpoint(checkpoint):
  """Cuts every file of a checkpoint's state in half, as a full disk would."""
  files = [p for p in (checkpoint / "state").rglob("*") if p.is_file() and p.stat().st_size > 1]
  assert files
  for file in files:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
