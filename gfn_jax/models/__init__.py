"""Pretrained causal LMs as pure functions (load, run, adapt, save), and encoders that measure texts."""

from gfn_jax.models.bert import Encoder, load_encoder, sentence_embeddings
from gfn_jax.models.hf import Pretrained, load_pretrained, logits, save_pretrained
from gfn_jax.models.lora import Lora, LoraConfig, init_lora, load_adapter, merge_lora, save_adapter

__all__ = [
  "Encoder", "Lora", "LoraConfig", "Pretrained", "init_lora", "load_adapter", "load_encoder", "load_pretrained",
  "logits", "merge_lora", "save_adapter", "save_pretrained", "sentence_embeddings",
]  # fmt: skip
