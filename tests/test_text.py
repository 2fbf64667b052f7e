"""Where a text stands decides its tokens, for tokenizers that put a space before what stands alone."""

import dataclasses

import tokenizers
import transformers

from gfn_jax.completions import FreeText
from gfn_jax.models.text import TextCodec
from testing import tiny_pretrained, tiny_tokenizer


def sentencepiece_tokenizer():
  """As Llama 2's: "▁" before every text, and a beginning of sequence before that."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", ".", "T", "a", "6", "▁T", "▁.", "▁6"]
  merges = [("▁", "T"), ("▁", "."), ("▁", "6")]
  bpe = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
  inner = tokenizers.Tokenizer(bpe)
  inner.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  inner.decoder = tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    tokenizers.decoders.Strip(" ", 1, 0),
  ])  # fmt: skip
  inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_a_continuation_is_tokenised_as_in_running_text():
  tokenizer = sentencepiece_tokenizer()
  codec = TextCodec(tokenizer)
  token = tokenizer.convert_tokens_to_ids
  assert codec.start_tokens == [token("<s>")]
  assert codec.encode("Ta.") == token(["▁T", "a", "."])
  assert codec.encode(".") == [token("▁.")] and codec.encode_after(".") == [token(".")]
  assert codec.encode_after(" Ta.") == token(["▁T", "a", "."])
  assert codec.decode(token(["▁T", "a", "."])) == " Ta." and codec.decode([token(".")]) == "."
  assert codec.decode([]) == ""


def test_byte_level_tokens_do_not_depend_on_where_they_stand():
  codec = TextCodec(tiny_tokenizer())
  assert codec.start_tokens == []
  for text in (". The answer is 2.", " 6 - 0 = 6", "6"):
    assert codec.encode_after(text) == codec.encode(text)
    assert codec.decode(codec.encode(text)) == text


def test_a_stop_is_the_token_of_running_text():
  pretrained = dataclasses.replace(tiny_pretrained(vocab_size=300), tokenizer=sentencepiece_tokenizer())
  task = FreeText(pretrained, stop=".")
  assert task.stop_token_id == pretrained.tokenizer.convert_tokens_to_ids(".")
