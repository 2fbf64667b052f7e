"""Trees small enough to enumerate: every Z that a policy can write, and its exact probability."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gfn_jax import policy
from gfn_jax.types import Trajectory

STOP, LEFT, RIGHT, CALL = 0, 11, 30, 52  # token ids of the tiny model
ALPHABET = (LEFT, RIGHT, CALL)


class FakeTool:
  """Answers a call by what stands before it: one token after LEFT, three after RIGHT, and otherwise none.

  The answers are written with tokens that the policy may choose too, a call among them.
  """

  def __init__(self, vocab_size: int):
    self.is_call = np.arange(vocab_size) == CALL

  def respond(self, tokens: Sequence[int]) -> tuple[int, ...]:
    assert tokens[-1] == CALL
    return {LEFT: (RIGHT,), RIGHT: (LEFT, CALL, RIGHT)}.get(tokens[-2] if len(tokens) > 1 else None, ())


def allowed_tokens(vocab_size: int) -> np.ndarray:
  """bool [V]: the alphabet and the stop token."""
  return np.isin(np.arange(vocab_size), (STOP, *ALPHABET))


def every_z(max_length: int, tool: FakeTool | None = None) -> Trajectory:
  """All Z over the alphabet that can stop, the empty one first: with a tool, those that hold its answers.

  log_pf and log_pterm are zeros.
  """
  found = []

  def visit(tokens, chosen):
    found.append((tokens, chosen))
    if len(tokens) == max_length:
      return
    for token in ALPHABET:
      longer, mask = (*tokens, token), (*chosen, True)
      if tool is not None and tool.is_call[token]:
        result = tool.respond(longer)
        if len(longer) + len(result) <= max_length:
          longer, mask = longer + result, mask + (False,) * len(result)
      visit(longer, mask)

  visit((), ())
  tokens, action_mask = np.zeros((len(found), max_length), np.int32), np.zeros((len(found), max_length), bool)
  for row, (z, chosen) in enumerate(found):
    tokens[row, : len(z)], action_mask[row, : len(z)] = z, chosen
  length = np.array([len(z) for z, _ in found], np.int32)
  return Trajectory(tokens, length, action_mask, np.zeros(tokens.shape), np.zeros((len(found), max_length + 1)))


def strings(z: Trajectory) -> list[tuple[int, ...]]:
  """Each row as a tuple of its tokens."""
  return [tuple(row[:n]) for row, n in zip(np.asarray(z.tokens).tolist(), np.asarray(z.length).tolist())]


@functools.partial(jax.jit, static_argnames=("config", "max_length"))
def _score(config, params, lora, prompt, tokens, length, action_mask, max_length):
  allowed = jnp.asarray(allowed_tokens(config.vocab_size))
  return policy.score(
    config, params, lora, prompt, jnp.ones(prompt.shape, bool), tokens, length, action_mask,
    allowed_tokens=allowed, stop_token_id=STOP, max_length=max_length,
  )  # fmt: skip


def scored(pretrained, lora, prompt: Sequence[int], z: Trajectory) -> Trajectory:
  """`z` with the log_pf and log_pterm of the policy behind one prompt."""
  log_pf, log_pterm = _score(
    pretrained.config, pretrained.params, lora, jnp.asarray([prompt]), jnp.asarray(z.tokens), jnp.asarray(z.length),
    jnp.asarray(z.action_mask), z.tokens.shape[1],
  )  # fmt: skip
  return z.replace(log_pf=np.asarray(log_pf, np.float64), log_pterm=np.asarray(log_pterm, np.float64))


def filtered(weights: dict[int, float], top_k: int | None, top_p: float | None) -> dict[int, float]:
  """The `top_k` heaviest, and of those the fewest that hold `top_p` of their weight."""
  ranked = sorted(weights.items(), key=lambda item: -item[1])[:top_k]
  if top_p is not None:
    shares = np.cumsum([w for _, w in ranked]) / sum(w for _, w in ranked)
    ranked = ranked[: int(np.argmax(shares >= top_p)) + 1]
  return dict(ranked)


def behaviour_probabilities(
  z: Trajectory, temperature: float = 1.0, min_length: int = 0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
  """How often each Z of a scored `every_z` is sampled.

  Each choice is tempered, filtered and renormalised; there is no stop before min_length.

  Returns:
    float64 [number of Z].
  """
  max_length = z.tokens.shape[1]
  choices = {}  # prefix -> token -> weight
  for row, string in enumerate(strings(z)):
    for t, token in enumerate(string):
      if z.action_mask[row, t]:
        choices.setdefault(string[:t], {})[token] = np.exp(z.log_pf[row, t] / temperature)
    if min_length <= len(string) < max_length:
      choices.setdefault(string, {})[STOP] = np.exp(z.log_pterm[row, len(string)] / temperature)
  choices = {prefix: filtered(weights, top_k, top_p) for prefix, weights in choices.items()}
  probabilities = np.zeros(len(z.length))
  for row, string in enumerate(strings(z)):
    steps = [(string[:t], token) for t, token in enumerate(string) if z.action_mask[row, t]]
    if len(string) < max_length:
      steps.append((string, STOP))
    probabilities[row] = np.prod([choices[s].get(token, 0.0) / sum(choices[s].values()) for s, token in steps])
  return probabilities


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
  """Half the L1 distance of two distributions."""
  return 0.5 * float(np.abs(p - q).sum())
