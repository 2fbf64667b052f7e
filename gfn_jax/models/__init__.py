"""Pretrained causal LMs as pure functions: load, run, adapt, save."""

from gfn_jax.models.hf import Pretrained, load_pretrained, logits, save_pretrained
from gfn_jax.models.lora import Lora, LoraConfig, init_lora, load_adapter, merge_lora, save_adapter

__all__ = [
  "Lora", "LoraConfig", "Pretrained", "init_lora", "load_adapter", "load_pretrained", "logits", "merge_lora",
  "save_adapter", "save_pretrained",
]  # fmt: skip
