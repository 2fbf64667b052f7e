"""Which demonstrations a supervised step learns from, and how they share their prompts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gfn_jax.collect import DemonstrationCollector
from gfn_jax.config import base_config
from gfn_jax.data import query_table
from gfn_jax.types import Example

MAX_LENGTH, KEY = 4, jax.random.key(0)


def make_collector(prompts, rows):
  """Demonstration i is the single token i, behind prompts[i]."""
  config = base_config()
  config.method, config.train.num_queries, config.sampler.num_samples = "sft", rows, 1
  config.sampler.max_length = MAX_LENGTH
  examples = [Example(p, str(i), "", "") for i, p in enumerate(prompts)]
  task = SimpleNamespace(
    examples=examples, num_seeded=len(examples), encode_prompt=lambda text: list(text.encode()),
    encode_after=lambda text: [], rationale_tokens=lambda e, n: ([int(e.rationale)], [True]),
  )  # fmt: skip
  pretrained = SimpleNamespace(config=SimpleNamespace(max_positions=64))
  sampler = SimpleNamespace(devices=[None])
  parts = SimpleNamespace(config=config, task=task, params={}, sampler=sampler, reward=None, pretrained=pretrained)
  collector = DemonstrationCollector(parts, query_table(examples, task, 64, MAX_LENGTH))
  collector.seed_replay()
  return collector


def rows_of(batch):
  """(prompt, demonstration) of each row."""
  texts = [bytes(t[m].tolist()).decode() for t, m in zip(batch.prompt_tokens, batch.prompt_mask)]
  together = len(batch.tokens) // len(texts)
  return [(texts[row // together], int(z[0])) for row, z in enumerate(batch.tokens)]


@pytest.mark.parametrize(
  "prompts, rows, num_prompts",
  (
    ("abcdefgh", 4, 4),  # a demonstration each
    ("aaaabbbbcccc", 32, 8),  # four together
    ("aaaabbbbccc", 24, 8),  # as many as every prompt has
    ("aaaabbbbccc", 32, 16),  # three do not divide the rows
    ("aaaabbbbcccc", 8, 8),  # of at least eight prompts
    ("aaaaabcc", 16, 16),  # one prompt has a single one
  ),
)
def test_demonstrations_of_a_prompt_are_drawn_together(prompts, rows, num_prompts):
  collector = make_collector(prompts, rows)
  for step in range(5):
    batch, _ = collector({}, step, KEY)
    assert len(batch.prompt_tokens) == num_prompts and len(batch.tokens) == rows
    found = rows_of(batch)
    assert all(prompts[z] == prompt for prompt, z in found)
    together = rows // num_prompts
    for begin in range(0, rows, together):
      assert len(set(found[begin : begin + together])) == together  # none twice behind one prompt
    again, _ = collector({}, step, KEY)
    np.testing.assert_array_equal(again.tokens, batch.tokens)


def test_every_demonstration_has_its_turn():
  collector = make_collector("aaaabbbb", 4)
  seen = {z for step in range(40) for _, z in rows_of(collector({}, step, KEY)[0])}
  assert seen == set(range(8))
