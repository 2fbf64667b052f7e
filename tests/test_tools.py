"""The calculator: what it evaluates, what calls it, and that nothing a policy writes can make it fail."""

import itertools
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from gfn_jax.tools import MAX_EXPRESSION_CHARS, Calculator, calculate, expression_before_equals
from testing import tiny_tokenizer

# ---- calculate


def by_characters(expression):
  """The rule read character by character: spaces, integer, spaces, operator, spaces, integer, spaces."""
  if len(expression) > 64:
    return None
  position = 0

  def spaces():
    nonlocal position
    while expression[position : position + 1] == " ":
      position += 1

  def integer():
    nonlocal position
    start = position
    position += expression[position : position + 1] == "-"
    digits = position
    while expression[position : position + 1] and expression[position] in "0123456789":
      position += 1
    return None if position == digits else expression[start:position]

  spaces()
  left = integer()
  spaces()
  operator = expression[position : position + 1]
  position += 1
  spaces()
  right = integer()
  spaces()
  if left is None or right is None or operator not in ("+", "-") or position != len(expression):
    return None
  left, right = int(left), int(right)
  return str(left + right if operator == "+" else left - right)


NEAR_MISSES = "0123456789+-= ,."
ALMOST = st.builds(
  "".join,
  st.tuples(
    st.sampled_from(["", " ", "  ", "(", "\t"]),
    st.integers(-(10**12), 10**12).map(str),
    st.sampled_from(["", " ", "\n", "\u00a0"]),
    st.sampled_from(["+", "-", "--", "+-", "*", "/", "**", "−", "", "e"]),
    st.sampled_from(["", " ", "  "]),
    st.integers(-(10**12), 10**12).map(str),
    st.sampled_from(["", " ", "\n", ")", " + 1", ".0", "\x00", "٣"]),
  ),
)


def variants(text):
  """The text, its beginnings, and what is left of it without one of its characters."""
  cuts = range(len(text))
  return {text, *(text[:i] for i in cuts), *(text[:i] + text[i + 1 :] for i in cuts)}


# Derandomised: a failure is the same for everyone. Each text comes with its variants, 100,000 different strings in all.
@pytest.mark.parametrize(
  "texts,num_texts,num_strings,num_answers",
  [
    (st.text(), 4_000, 20_000, 0),
    (st.text(alphabet=NEAR_MISSES, max_size=80), 6_000, 50_000, 1_000),
    (ALMOST, 3_000, 30_000, 1_000),
  ],
  ids=["any", "near misses", "almost"],
)
def test_any_text_has_the_right_result_or_none(texts, num_texts, num_strings, num_answers):
  seen, answered = set(), 0

  @settings(max_examples=num_texts, deadline=None, derandomize=True, database=None)
  @given(texts)
  def evaluate(text):
    nonlocal answered
    for variant in variants(text) - seen:
      result = calculate(variant)
      assert result == by_characters(variant), variant
      answered += result is not None
    seen.update(variants(text))

  evaluate()
  assert len(seen) >= num_strings and answered >= num_answers


def test_right_up_to_twelve_digits():
  rng = random.Random(0)
  edges = [sign * (10**d + shift) for d in range(12) for shift in (-1, 0, 1) for sign in (1, -1)] + [10**12 - 1]
  pairs = [*itertools.product(edges, repeat=2), *itertools.product(range(-60, 61), repeat=2)]
  sizes = [(rng.randint(1, 12), rng.randint(1, 12)) for _ in range(5000)]
  pairs += [tuple(rng.randrange(1 - 10**d, 10**d) for d in pair) for pair in sizes]
  for a, b in pairs:
    assert calculate(f"{a} + {b}") == str(a + b)
    assert calculate(f"{a} - {b}") == str(a - b)
    assert calculate(f" {a}-{b}") == str(a - b)


@pytest.mark.parametrize(
  "expression,result",
  [
    ("-8 + 8", "0"),
    ("6 - 4", "2"),
    (" 6 - 0 ", "6"),
    ("0 - 5", "-5"),
    ("-0 + 0", "0"),
    ("007 + 1", "8"),
    ("3--4", "7"),
    ("3 + -4", "-1"),
    ("- 8 + 8", None),
    ("+8 + 8", None),
    ("3 + - 4", None),
    ("6 - 4 + 1", None),
    ("6", None),
    ("6 -", None),
    ("6 * 4", None),
    ("6.0 + 1", None),
    ("1e3 + 1", None),
    ("1_0 + 1", None),
    ("٣ + ٤", None),
    ("６ + 4", None),
    ("6 − 4", None),
    ("6 + 4\n", None),
    ("6\t+ 4", None),
    ("", None),
    ("__import__('os') + 1", None),
  ],
)
def test_exactly_two_integers_and_one_operator(expression, result):
  assert calculate(expression) == result


def test_more_than_64_characters_are_refused():
  assert MAX_EXPRESSION_CHARS == 64
  fits = "9" * 60 + " + 1"
  assert len(fits) == 64
  assert calculate(fits) == str(int("9" * 60) + 1)
  assert calculate(" " + fits) is None
  assert calculate(" " * 10_000_000 + "1 + 1") is None


# ---- the expression of a text


@pytest.mark.parametrize(
  "text,expression",
  [
    ("6 - 4 =", "6 - 4 "),
    (" 6 - 0 = 6, 6 - 4 =", " 6 - 4 "),
    ("6 - 0, 6 - 4=", " 6 - 4"),
    ("1 + 1 = 2 + 3 =", " 2 + 3 "),
    ("1 + 1 ==", ""),
    ("1, =", " "),
    ("=", ""),
  ],
)
def test_the_expression_follows_the_last_comma_or_equals(text, expression):
  assert expression_before_equals(text) == expression


# ---- Calculator on a small vocabulary

PIECES = [*"+-=,. ?0123456789", *(f" {d}" for d in range(10)), " +", " -", " =", "=.", "====", "=-", ".=", "-="]
VOCAB = {piece: i for i, piece in enumerate(PIECES)}
SPLIT = re.compile("|".join(map(re.escape, sorted(PIECES, key=len, reverse=True))))


def encode(text):
  return [VOCAB[piece] for piece in SPLIT.findall(text)]


def decode(tokens):
  return "".join(PIECES[t] for t in tokens)


@pytest.fixture(scope="module")
def calculator():
  return Calculator(encode, decode, len(PIECES))


def test_a_call_ends_in_one_equals(calculator):
  assert {PIECES[i] for i in np.flatnonzero(calculator.is_call)} == {"=", " =", ".=", "-="}
  assert calculator.is_call.shape == (len(PIECES),) and calculator.is_call.dtype == bool


def test_result_tokens_spell_the_results_of_training_size(calculator):
  assert {PIECES[i] for i in calculator.result_tokens} == {*(f" {d}" for d in range(10)), *map(str, range(10)), " -"}


@pytest.mark.parametrize(
  "text,result",
  [
    (" 6 - 4 =", " 2"),
    (" 6 - 4=", " 2"),
    ("6-4=", " 2"),
    (" 6 - 0 = 6, 6 - 9 =", " -3"),
    (" 99 + 1 =", " 100"),
    (" 6 - 4 + 1 =", ""),
    (" 6 =", ""),
    (" =", ""),
    (" 6 - 4 =.=", ""),  # the "=" inside "=." cuts the expression, and "." is none
    (" 6 - 4-=", ""),
  ],
)
def test_the_result_is_what_follows_the_call(calculator, text, result):
  tokens = encode(text)
  assert decode(tokens) == text and calculator.is_call[tokens[-1]]
  assert decode(calculator.respond(tokens)) == result
  assert calculator.respond(tokens) == tuple(encode("1 =" + result)[2:])  # asked again, from memory


def test_follow_writes_the_results_in(calculator):
  tokens, chosen = calculator.follow(encode(" 6 - 0 =, 6 - 19 ="), max_length=30)
  assert decode(tokens) == " 6 - 0 = 6, 6 - 19 = -13"
  written = [PIECES[t] for t, c in zip(tokens, chosen) if not c]
  assert written == [" 6", " -", "1", "3"]
  assert decode([t for t, c in zip(tokens, chosen) if c]) == " 6 - 0 =, 6 - 19 ="


@pytest.mark.parametrize("text", [" 6 =.", " 6 - 4====", " 6 - 4=- 2", " 6 - 4 + 1 = 3", " 6, 4"])
def test_follow_leaves_text_without_calls_alone(calculator, text):
  tokens = encode(text)
  assert calculator.follow(tokens, max_length=30) == (tokens, [True] * len(tokens))


def test_follow_uses_the_result_it_wrote(calculator):
  tokens, _ = calculator.follow(encode(" 6 - 4 = + 5 ="), max_length=30)
  assert decode(tokens) == " 6 - 4 = 2 + 5 = 7"


def test_follow_respects_max_length(calculator):
  tokens = encode(" 6 - 19 =")
  assert len(tokens) == 5
  whole = calculator.follow(tokens, max_length=8)
  assert decode(whole[0]) == " 6 - 19 = -13" and whole[1] == [True] * 5 + [False] * 3
  assert calculator.follow(tokens, max_length=7) == (tokens, [True] * 5)  # no room for all of the result: no call
  assert calculator.follow(tokens, max_length=5) == (tokens, [True] * 5)
  assert calculator.follow(tokens, max_length=4) is None
  assert calculator.follow([], max_length=0) == ([], [])


def test_a_tokenizer_without_a_call_is_refused():
  texts = ["0", "1", "=.", "===="]
  with pytest.raises(ValueError, match='ends in "="'):
    Calculator(encode, lambda tokens: "".join(texts[t] for t in tokens), len(texts))


def test_a_tokenizer_that_merges_the_result_is_refused():
  pieces = [*PIECES, " = 5"]
  split = re.compile("|".join(map(re.escape, sorted(pieces, key=len, reverse=True))))
  with pytest.raises(ValueError, match='merges "=" with the result in "1 = 5"'):
    Calculator(
      lambda text: [pieces.index(p) for p in split.findall(text)],
      lambda tokens: "".join(pieces[t] for t in tokens),
      len(pieces),
    )


@settings(max_examples=2_000, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=40), st.integers(0, 40))
def test_follow_takes_any_tokens(calculator, tokens, max_length):
  followed = calculator.follow(tokens, max_length)
  if followed is None:
    return
  out, chosen = followed
  assert len(out) == len(chosen) <= max_length
  assert [t for t, c in zip(out, chosen) if c] == tokens
  for i, (token, own) in enumerate(zip(out, chosen)):
    if not own and chosen[i - 1]:  # a result begins right after a call, and is the right one
      end = next((k for k in range(i, len(out)) if chosen[k]), len(out))
      expression = re.split("[,=]", decode(out[: i - 1]) + PIECES[out[i - 1]].rstrip("="))[-1]
      assert calculator.is_call[out[i - 1]] and token in calculator.result_tokens
      assert decode(out[i:end]).strip() == by_characters(expression)


def test_on_a_byte_pair_tokenizer():
  tokenizer = tiny_tokenizer()

  def spell(text):
    return tokenizer.encode(text, add_special_tokens=False)

  calculator = Calculator(spell, tokenizer.decode, len(tokenizer))
  tokens, chosen = calculator.follow(spell(" 6 - 0 =, 6 - 19 ="), max_length=40)
  assert tokenizer.decode(tokens) == " 6 - 0 = 6, 6 - 19 = -13"
  assert tokenizer.decode([t for t, c in zip(tokens, chosen) if c]) == " 6 - 0 =, 6 - 19 ="
