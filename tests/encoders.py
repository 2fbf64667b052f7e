"""Tiny random text encoders as transformers writes them, and what PyTorch computes with them."""

import pathlib

import numpy as np
import pytest
import tokenizers
import transformers

_WORDS = "the a cat dog sat ran on mat hat of . , it was red blue ##s ##ed walk".split()
_SPECIAL = {
  "bert": {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
  },
  "roberta": {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
  },
}
SIZES = {
  "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
  "max_position_embeddings": 48, "type_vocab_size": 2,
}  # fmt: skip


def tiny_encoder_tokenizer(family: str):
  """WordPiece (bert) or byte-level BPE without merges (roberta), with the family's special tokens."""
  special = _SPECIAL[family]
  if family == "bert":
    vocab = {token: i for i, token in enumerate([*special.values(), *_WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  else:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special.values(), *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  cls, sep = special["cls_token"], special["sep_token"]
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{cls} $A {sep}", special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])]
  )
  return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **special)


def write_tiny_encoder(folder: pathlib.Path, family: str = "bert", **fields):
  """Writes config.json, weights and tokenizer; returns the transformers model, whose every parameter matters."""
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  tokenizer = tiny_encoder_tokenizer(family)
  sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "layer_norm_eps": 1e-5}
  model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **sizes | fields)).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.normal_(0.0, 0.3).add_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model


def torch_hidden_states(model, tokens, mask) -> list[np.ndarray]:
  """The embeddings and every layer's output, each [B, N, D]."""
  import torch

  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(np.asarray(tokens), dtype=torch.long),
      attention_mask=torch.tensor(np.asarray(mask), dtype=torch.long), output_hidden_states=True,
    )  # fmt: skip
  return [h.numpy() for h in out.hidden_states]
