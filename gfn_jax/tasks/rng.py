"""Random numbers (paper section 2, Fig. 2): Z is an integer, drawn from a distribution that is known exactly.

X "The following is a random integer drawn uniformly between 0 and 100: ", Z "57", no Y: the frozen LM has no part in
the reward.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import math
import pathlib
from typing import Any

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

from gfn_jax.files import read_json
from gfn_jax.models import Lora, Pretrained
from gfn_jax.task import Task
from gfn_jax.types import Example, Queries

TARGETS = ("uniform", "poisson", "binomial", "geometric", "table")
_PROMPTS = {
  "uniform": "The following is a random integer drawn uniformly between {low} and {high}: ",  # the paper's
  "poisson": "The following is a random integer drawn from a Poisson distribution with rate {parameter:g}: ",
  "binomial": "The following is a random integer drawn from a binomial distribution with {high} trials and success "
  "probability {parameter:g}: ",
  "geometric": "The following is a random integer drawn from a geometric distribution with success probability "
  "{parameter:g}: ",
  "table": "The following is a random integer between {low} and {high}: ",
}


def log_target(target: str, low: int, high: int, parameter: float | None, table: str | None) -> dict[int, float]:
  """log p(n) in nats of every number with p(n) > 0, renormalised over low..high.

  Args:
    target: one of TARGETS.
    low, high: both included. A binomial has `high` trials.
    parameter: the rate of a Poisson, the success probability of a binomial or geometric (failures before it).
    table: a JSON file, an object of number -> weight.

  Raises:
    ValueError: a range, a parameter or a table that defines no distribution.
  """
  if target not in TARGETS:
    raise ValueError(f"config.rng.target {target!r} is unknown: choose from {', '.join(TARGETS)}")
  if low > high:
    raise ValueError(f"config.rng.low {low} is above config.rng.high {high}")
  if target in ("poisson", "binomial", "geometric"):
    if parameter is None or not 0 < parameter < (math.inf if target == "poisson" else 1):
      must = "be positive" if target == "poisson" else "lie between 0 and 1"
      raise ValueError(f"config.rng.parameter is {parameter}: for a {target} target it must {must}")
    if low < 0:
      raise ValueError(f"config.rng.low is {low}: a {target} target has no negative numbers")
  numbers = range(low, high + 1)
  if target == "uniform":
    scores = dict.fromkeys(numbers, 0.0)
  elif target == "poisson":
    scores = {n: n * math.log(parameter) - math.lgamma(n + 1) for n in numbers}
  elif target == "binomial":
    odds = math.log(parameter) - math.log1p(-parameter)
    scores = {n: n * odds - math.lgamma(n + 1) - math.lgamma(high - n + 1) for n in numbers}
  elif target == "geometric":
    scores = {n: n * math.log1p(-parameter) for n in numbers}
  else:
    scores = _read_table(table, low, high)
  values = np.array(list(scores.values()))
  log_sum = values.max() + math.log(np.exp(values - values.max()).sum())
  return {n: score - log_sum for n, score in scores.items()}


def _read_table(table: str | None, low: int, high: int) -> dict[int, float]:
  if table is None:
    raise ValueError("config.rng.table is missing: a table target needs a JSON file, an object of number -> weight")
  path = pathlib.Path(table)
  if not path.is_file():
    raise ValueError(f"config.rng.table {table!r} is no file")
  scores, raw = {}, read_json(path)
  for key, weight in raw.items():
    try:
      number, weight = int(key), float(weight)
    except (TypeError, ValueError):
      raise ValueError(f"{table}: {key!r}: {weight!r} is no number with a weight") from None
    if not low <= number <= high or not 0 <= weight < math.inf:
      raise ValueError(f"{table}: {key!r}: {weight:g}: numbers must lie in {low}..{high}, weights must not be negative")
    if weight:
      scores[number] = math.log(weight)
  if not scores:
    raise ValueError(f"{table} has no number with a weight above 0")
  return scores


def beginnings(numbers: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
  """The tokens that a number begins with: none, some, or all of it."""
  return {tokens[:t] for tokens in numbers for t in range(len(tokens) + 1)}


class NumberReward:
  """log p_target(n) where a prefix is a number, else -penalty times how many of its last tokens lead to none.

  The empty prefix costs as much as one wrong token, and so does a beginning that is no number.
  """

  def __init__(self, log_probs: dict[tuple[int, ...], float], penalty: float):
    """`log_probs`: tokens of a number -> log p, nats. `penalty`: nats a wrong token."""
    self._log_probs, self._penalty = log_probs, penalty
    self._beginnings = beginnings(log_probs)

  def _log_reward(self, tokens: tuple[int, ...]) -> float:
    if tokens in self._log_probs:
      return self._log_probs[tokens]
    wrong = 0
    while tokens not in self._beginnings:
      tokens, wrong = tokens[:-1], wrong + 1
    return -self._penalty * max(1, wrong)

  def __call__(
    self,
    queries: Queries,
    tokens: Int[np.ndarray, "B T"],
    length: Int[np.ndarray, "B"],
    wanted: Bool[np.ndarray, "B S"],
  ) -> Float[np.ndarray, "B S"]:
    """As `rewards.Reward`: log R in nats where `wanted`, 0 elsewhere."""
    del queries, length
    log_reward = np.zeros(wanted.shape, np.float32)
    for row, t in zip(*np.nonzero(wanted)):
      log_reward[row, t] = self._log_reward(tuple(tokens[row, :t].tolist()))
    return log_reward


class RngTask(Task):
  """Numbers of a range, each in the one way in which the tokenizer writes it behind the prompt.

  Attributes:
    prompt: X as text. log_probs: number -> log p_target, nats. number_tokens: number -> its tokens.
  """

  name = "rng"

  def __init__(self, config: Any, tokenizer: Any, vocab_size: int):
    """`config` is the run's. Raises ValueError for a target or a tokenizer that cannot serve."""
    super().__init__(tokenizer, vocab_size, config.model.name)
    c = config.rng
    self.log_probs = log_target(c.target, c.low, c.high, c.parameter, c.table)
    self.prompt = c.prompt or _PROMPTS[c.target].format(low=c.low, high=c.high, parameter=c.parameter)
    wholes = {n: super(RngTask, self).encode_prompt(f"{self.prompt}{n}") for n in self.log_probs}
    alone = super().encode_prompt(self.prompt)
    # Many tokenizers join a prompt's last space with the number: the prompt is what all the whole texts begin with.
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(alone, *wholes.values()))))
    self._prompt_tokens = alone[:shared]
    self.number_tokens = {n: tuple(w[shared:]) for n, w in wholes.items()}
    self._numbers = set(self.number_tokens.values())
    self.stop_token_id = self.find_stop(None)
    longest = max(map(len, self.number_tokens.values()))
    if longest > config.sampler.max_length:
      raise ValueError(
        f"config.sampler.max_length {config.sampler.max_length}: the longest number has {longest} tokens"
      )
    if len(self._numbers) < len(self.number_tokens) or () in self._numbers:
      raise ValueError(f"model {config.model.name!r} does not write the numbers {c.low}..{c.high} apart")
    # A token of V is wrong behind each beginning: all of these together have exp(-14), about 1e-6, of the target.
    wrong = vocab_size * len(beginnings(self._numbers))
    if c.penalty is not None and c.penalty < 0:
      raise ValueError(f"config.rng.penalty is {c.penalty:g}: must not be negative, since no number would be best")
    self._penalty = math.log(wrong) + 14 if c.penalty is None else c.penalty
    self._query = self.example_of(self.prompt)
    self.examples = [self._query]
    if config.method == "sft":
      if c.num_demonstrations < 1:
        raise ValueError(f"config.rng.num_demonstrations is {c.num_demonstrations}: must be positive")
      drawn = self._draw(c.num_demonstrations, 1.0, np.random.default_rng(config.data.seed))
      self.examples = [dataclasses.replace(self._query, rationale=str(n)) for n in drawn]
      self.num_seeded = len(self.examples)

  def encode_prompt(self, prompt: str) -> list[int]:
    return self._prompt_tokens if prompt == self.prompt else super().encode_prompt(prompt)

  def is_right(self, example: Example, tokens: Sequence[int]) -> bool:
    """Whether Z is a number of the support."""
    del example
    return tuple(tokens) in self._numbers

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    """The one prompt, `number` times: what is measured on it is a matter of samples."""
    return {"": [self._query] * number}

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    """The one prompt."""
    del number
    return {"": [self._query]}

  def rationale_tokens(self, example: Example, max_length: int) -> tuple[list[int], list[bool]]:
    """A number that supervised fine-tuning shows; none is longer than `max_length`."""
    del max_length
    tokens = self.number_tokens[int(example.rationale)]
    return list(tokens), [True] * len(tokens)

  def _draw(self, num_samples: int, reward_temperature: float, rng: np.random.Generator) -> list[int]:
    scores = np.array(list(self.log_probs.values())) / reward_temperature
    weights = np.exp(scores - scores.max())
    return rng.choice(list(self.log_probs), num_samples, p=weights / weights.sum()).tolist()

  def target_samples(
    self, example: Example, num_samples: int, reward_temperature: float, rng: np.random.Generator
  ) -> list[list[int]]:
    del example
    return [list(self.number_tokens[n]) for n in self._draw(num_samples, reward_temperature, rng)]

  def reward_text(self, config: Any) -> str:
    c = config.rng
    parameter = "" if c.parameter is None else f" with {c.parameter:g}"
    return f"the {c.target} distribution{parameter} over {c.low}..{c.high}"

  def make_reward(
    self, config: Any, pretrained: Pretrained, params: dict, lora: Lora | None, devices: Sequence[jax.Device]
  ) -> NumberReward:
    """No LM: the reward is known."""
    del config, pretrained, params, lora, devices
    return NumberReward({self.number_tokens[n]: p for n, p in self.log_probs.items()}, self._penalty)
