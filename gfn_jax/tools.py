"""The calculator: what the policy may ask for by writing "=" (paper section 4.4; Cobbe et al., 2021).

It evaluates two-term expressions only, so that planning stays the policy's work. Everything here is host-side Python;
the sampler calls it between jitted rounds, and demonstrations pass through the same code.
"""

from collections.abc import Callable, Sequence
import re

import numpy as np

MAX_EXPRESSION_CHARS = 64

_OPERAND = r"(-?[0-9]+)"
_TWO_TERMS = re.compile(rf" *{_OPERAND} *([+-]) *{_OPERAND} *")


def calculate(expression: str) -> str | None:
  """Evaluates `expression` if it is exactly two integers and one operator, as in "-8 + 8".

  Args:
    expression: text; longer than 64 characters it is refused unread, so the work is bounded.

  Returns:
    The result as a decimal integer, or None where the text is anything else.
  """
  if len(expression) > MAX_EXPRESSION_CHARS:
    return None
  match = _TWO_TERMS.fullmatch(expression)
  if match is None:
    return None
  left, operator, right = match.groups()
  return str(int(left) + int(right) if operator == "+" else int(left) - int(right))


def expression_before_equals(text: str) -> str:
  """The expression a text that ends in "=" asks about: what follows the previous "," or "="."""
  body = text[:-1]
  return body[max(body.rfind(","), body.rfind("=")) + 1 :]


class Calculator:
  """Answers a call token with the tokens of its result.

  A call is a token that ends in "=" and holds exactly one: real vocabularies have "=.", "=-" and "====" too.

  Attributes:
    is_call: bool [V], which tokens call.
    result_tokens: the tokens that results of training size can hold; they belong to the allowed vocabulary.
  """

  def __init__(self, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], vocab_size: int):
    """Args: `encode` text -> token ids without special tokens; `decode` its inverse; `vocab_size` V.

    Raises:
      ValueError: the tokenizer has no call token, or writes "1 = 5" in a way that does not begin with "1 =".
    """
    self._encode, self._decode = encode, decode
    texts = [decode([i]) for i in range(vocab_size)]
    self.is_call = np.array([t.endswith("=") and t.count("=") == 1 for t in texts])
    if not self.is_call.any():
      raise ValueError('the calculator needs a token that ends in "=": this tokenizer has none')
    self._lead = tuple(encode("1 ="))
    self._cache: dict[str, tuple[int, ...]] = {}
    self.result_tokens = sorted({t for r in range(-99, 100) for t in self._tokens_of(str(r))})

  def _tokens_of(self, result: str) -> tuple[int, ...]:
    ids = tuple(self._encode("1 = " + result))
    if ids[: len(self._lead)] != self._lead:
      raise ValueError(f'the tokenizer merges "=" with the result in "1 = {result}": results cannot be appended')
    return ids[len(self._lead) :]

  def respond(self, tokens: Sequence[int]) -> tuple[int, ...]:
    """The result's tokens for a Z whose last token is a call; () where the expression is not two terms."""
    expression = expression_before_equals(self._decode(tokens).rstrip())
    if expression not in self._cache:
      result = calculate(expression)
      self._cache[expression] = () if result is None else self._tokens_of(result)
    return self._cache[expression]

  def follow(self, tokens: Sequence[int], max_length: int) -> tuple[list[int], list[bool]] | None:
    """Writes the results into a demonstration that leaves them out, as a rollout would have.

    Args:
      tokens: chosen tokens of Z, without results ("6 - 0 =, 6 - 4 =").
      max_length: the longest Z, in tokens.

    Returns:
      (tokens, action_mask) with the results in and False where the calculator wrote; None if that is too long.
    """
    out, chosen = [], []
    for token in tokens:
      out.append(token)
      chosen.append(True)
      if self.is_call[token]:
        result = self.respond(out)
        if len(out) + len(result) <= max_length:  # DESIGN 4: a call whose result would not fit is not made
          out.extend(result)
          chosen.extend([False] * len(result))
    return (out, chosen) if len(out) <= max_length else None
