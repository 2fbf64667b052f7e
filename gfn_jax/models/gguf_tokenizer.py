"""A fast tokenizer from a GGUF file's tokenizer.ggml.* fields, which llama.cpp's own code would interpret."""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types; special are the first two
_NORMAL = 1
_SPECIAL = ("bos", "eos", "unknown", "padding")
_TRANSFORMERS_NAMES = dict(zip(_SPECIAL, ("bos_token", "eos_token", "unk_token", "pad_token")))

_SPLIT = (  # of Llama 3 and Qwen 2, which differ in how many digits may stand together
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> Any:
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(digits: str) -> Any:
  split = pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated")
  return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre -> how text is cut before bytes are merged.
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
  "default": _byte_level,
  "gpt-2": _byte_level,
  "llama-bpe": lambda: _split("{1,3}"),
  "olmo": _byte_level,
  "qwen2": lambda: _split(""),
  "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
}


def _bytes_bpe(fields: Mapping[str, Any], vocab: dict[str, int], types: list[int], unknown: str | None, path) -> Any:
  """GPT-2's BPE over bytes."""
  pre = fields.get("pre")
  if pre not in _PRE_TOKENIZERS:
    choices = ", ".join(_PRE_TOKENIZERS)
    raise ValueError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported: choose one of {choices}")
  if "merges" not in fields:
    raise ValueError(f"{path} lacks the metadata tokenizer.ggml.merges")
  merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
  for merge in merges:
    if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
      raise ValueError(f"{path} is damaged: the tokens do not spell {' '.join(merge)!r} of tokenizer.ggml.merges")
  # Llama 3 has words in its vocabulary that its merges do not reach.
  tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  if pre == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  return tokenizer


def _pieces_bpe(fields: Mapping[str, Any], vocab: dict[str, int], types: list[int], unknown: str | None, path) -> Any:
  """SentencePiece's BPE: of all neighbours, those merge first whose union has the highest score."""
  if "scores" not in fields:
    raise ValueError(f"{path} lacks the metadata tokenizer.ggml.scores")
  scores, merges = fields["scores"], []
  for piece, i in vocab.items():
    if types[i] == _NORMAL:
      halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
      merges += [(-scores[i], i, vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
  pairs = [(a, b) for *_, a, b in sorted(merges)]
  tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
  prefix = fields.get("add_space_prefix", True)
  tokenizer.normalizer = normalizers.Sequence(
    [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", left=1)] if prefix else []),
    ]
  )
  return tokenizer


def _as_gemma_publishes(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Gemma's merges follow the order of its pieces, not their scores, and its runs of spaces are pieces like others,
  which llama.cpp's converter spells with spaces and sets apart."""
  blank = [" " in token and not token.strip(" ") for token in fields["tokens"]]
  return {
    "tokens": [token.replace(" ", "▁") if b else token for token, b in zip(fields["tokens"], blank)],
    "token_type": [_NORMAL if b else kind for kind, b in zip(fields["token_type"], blank)],
    "scores": [-i for i in range(len(blank))],
  }


# tokenizer.ggml.model -> (its builder, options at these values only)
_MODELS = {
  "gpt2": (_bytes_bpe, {"add_space_prefix": False, "remove_extra_whitespaces": False}),
  "llama": (_pieces_bpe, {"remove_extra_whitespaces": False}),
}


def build_tokenizer(metadata: Mapping[str, Any], path: pathlib.Path) -> Any:
  """The file's tokenizer as a transformers.PreTrainedTokenizerFast, or None where it has none.

  Args:
    metadata: the file's.
    path: the file, for messages.

  Raises:
    ValueError: a kind of tokenizer or an option that is not supported, or a missing field; named.
  """
  fields = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
  model = fields.get("model", "none")
  if model in ("none", "no_vocab"):
    return None
  if model not in _MODELS:
    raise ValueError(f"{path}: tokenizer.ggml.model {model!r} is not supported: choose one of {', '.join(_MODELS)}")
  build, required = _MODELS[model]
  for option, value in required.items():
    if fields.get(option, value) != value:
      raise ValueError(f"{path}: option tokenizer.ggml.{option}={fields[option]!r} is not supported: must be {value}")
  for key in ("tokens", "token_type"):
    if key not in fields:
      raise ValueError(f"{path} lacks the metadata tokenizer.ggml.{key}")
  if metadata["general.architecture"] == "gemma":
    fields |= _as_gemma_publishes(fields)
  tokens = fields["tokens"]
  vocab = {token: i for i, token in enumerate(tokens)}
  types = [int(t) for t in fields["token_type"]]
  if not len(vocab) == len(types) == len(tokens):
    raise ValueError(f"{path} is damaged: {len(tokens)} tokens, {len(vocab)} distinct, {len(types)} token types")
  special = {}
  for name in _SPECIAL:
    i = fields.get(f"{name}_token_id")
    if i is not None and not 0 <= i < len(tokens):
      raise ValueError(f"{path} is damaged: tokenizer.ggml.{name}_token_id={i} is none of {len(tokens)} tokens")
    special[name] = None if i is None else tokens[i]
  tokenizer = build(fields, vocab, types, special["unknown"], path)
  marked = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
  tokenizer.add_tokens(
    [AddedToken(t, special=marked[k], normalized=False) for t, k in zip(tokens, types) if k in marked]
  )
  import transformers  # seconds to import

  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    # Llama's tokenizers begin every text with <s> unless they are told not to.
    add_bos_token=fields.get("add_bos_token", model == "llama" or fields.get("pre") == "llama-bpe"),
    add_eos_token=fields.get("add_eos_token", False),
    chat_template=metadata.get("tokenizer.chat_template"),
    clean_up_tokenization_spaces=False,  # BPE loses spaces before punctuation to what BERT wanted
    **{_TRANSFORMERS_NAMES[name]: token for name, token in special.items() if token is not None},
  )
