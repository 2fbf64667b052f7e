"""What every task is: where X, Z and Y come from, how they are tokenised, what Z is rewarded for, how it is checked."""

from collections.abc import Sequence
import itertools
import operator
from typing import Any, ClassVar, SupportsIndex

import numpy as np

from gfn_jax.models import Lora, Pretrained
from gfn_jax.models.text import TextCodec
from gfn_jax.parallel import Devices
from gfn_jax.rewards import Reward, RewardModel
from gfn_jax.sampler import Sampler
from gfn_jax.types import Example


class Task(TextCodec):
  """A base with what most tasks share; a task sets the attributes and overrides what differs.

  Attributes:
    name: the first part of its result keys.
    examples: training queries; the first `num_seeded` have demonstrations.
    allowed_tokens: bool [V], the vocabulary of Z, stop token included.
    stop_token_id: ends Z. It is Y's first token, or the end of the text where there is no Y.
    tool: as in `Sampler`; None for none.
    demonstrations: what a prompt may show: Examples with a Z or a label.
    reads_test_path: whether config.data.test_path may name its test problems.
    has_m_step: whether supervised fine-tuning on it can learn from config.em.rationales_path.
  """

  name: ClassVar[str] = ""
  reads_test_path: ClassVar[bool] = False
  has_m_step: ClassVar[bool] = False
  tool: Any = None
  num_seeded = 0
  examples: Sequence[Example] = ()
  demonstrations: Sequence[Example] = ()
  allowed_tokens: np.ndarray
  stop_token_id: int

  def __init__(self, tokenizer: Any, vocab_size: int, source: str):
    """`source` names the model in errors. Raises ValueError where there is no tokenizer."""
    if tokenizer is None:
      raise ValueError(
        f"model {source!r} has no tokenizer: {f'the {self.name} task' if self.name else 'text'} needs one"
      )
    super().__init__(tokenizer)
    self.allowed_tokens = np.ones(vocab_size, bool)

  def find_stop(self, stop: str | SupportsIndex | None) -> int:
    """The token of a text of one token, or a token id; None is the tokenizer's end of text.

    Raises:
      ValueError: there is no such token.
    """
    vocab_size = len(self.allowed_tokens)
    if stop is None:
      stop = self._tokenizer.eos_token_id
      if stop is None:
        raise ValueError("the tokenizer has no end-of-text token: name a stop token")
    if isinstance(stop, str):
      ids = self.encode_after(stop)
      if len(ids) != 1 or self.decode(ids).strip() != stop.strip():  # some tokenizers drop what they do not know
        raise ValueError(f"stop {stop!r} must be one token: to this tokenizer it is {[self.decode([i]) for i in ids]}")
      return ids[0]
    try:
      token = operator.index(stop)
    except TypeError:
      raise ValueError(f"stop token {stop!r}: must be a text of one token, or a token id") from None
    if not 0 <= token < vocab_size:
      raise ValueError(f"stop token {token}: must be a token id from 0 to {vocab_size - 1}")
    return token

  def stop_of_targets(self, at_eos: bool = False) -> int:
    """The first token of the examples' targets, which ends Z: where Y would begin, as a pretrained LM knows.

    Args:
      at_eos: the end of text in its place (config.sampler.stop_at_eos): a policy must learn to write it there.

    Raises:
      ValueError: a target is empty, or begins with another token than the first one, or with none of the tokenizer's;
        one line that names its record. There is no end of text.
    """
    if at_eos:
      return self.find_stop(None)
    stop = None
    for e in self.examples:
      tokens = self.encode_after(e.target)
      begin = self.decode(tokens[:1])
      where = f"the target {e.target[:40]!r} of {e.prompt[:200]!r}"
      known = tokens and tokens[0] != self._tokenizer.unk_token_id
      # What one token reads as may lack its space, or be a part of a character.
      if not known or not e.target.lstrip(" ").startswith(begin.lstrip(" ").rstrip("\ufffd")):
        raise ValueError(f"{where} begins with no token of the tokenizer's: Z would have no stop token")
      if tokens[0] != (stop := tokens[0] if stop is None else stop):
        other = self.decode([stop])
        raise ValueError(f"{where} begins with {begin!r}, others with {other!r}: Z would have no one stop token")
    if stop is None:
      raise ValueError(f"the {self.name} task has no training examples")
    return stop

  def encode_prompt(self, prompt: str) -> list[int]:
    """A prompt as policy and reward read it, `start_tokens` before it."""
    return [*self.start_tokens, *self.encode(prompt)]

  def beginning(self) -> list[int]:
    """What stands before a text of which nothing is given: `start_tokens`, or the end of the text before."""
    eos = self._tokenizer.eos_token_id
    return list(self.start_tokens) or ([] if eos is None else [eos])

  def shown(self, number: int, seed: int | None = None) -> list[Example]:
    """The first demonstrations; with a seed as many in a random order, as a baseline's prompts are drawn.

    Raises:
      ValueError: there are not as many.
    """
    if number > len(self.demonstrations):
      raise ValueError(
        f"{number} demonstrations (config.reward.num_demonstrations, config.eval.shots): the {self.name} task has "
        f"{len(self.demonstrations)}"
      )
    if seed is None:
      return list(self.demonstrations[:number])
    order = np.random.default_rng(seed).permutation(len(self.demonstrations))
    return [self.demonstrations[i] for i in order[:number]]

  def context_tokens(self, num_demonstrations: int, seed: int | None = None) -> list[int]:
    """What the reward, and a base with demonstrations, read before a prompt; [] for nothing. `seed`: as of `shown`."""
    del num_demonstrations, seed
    return []

  def rationale_tokens(self, example: Example, max_length: int) -> tuple[list[int], list[bool]] | None:
    """A demonstration's Z as the rollout would have written it: (tokens, action_mask); None if too long.

    Tokenised as part of the whole text and cut, so that its first token carries its leading space.

    Raises:
      ValueError: the tokenizer merges prompt and Z, or Z leaves the vocabulary.
    """
    prompt = self.encode(example.prompt)
    whole = self.encode(f"{example.prompt}{self._written(example.rationale)}")
    if whole[: len(prompt)] != prompt:
      raise ValueError(f"the tokenizer merges the end of {example.prompt!r} with the rationale that follows")
    z = whole[len(prompt) :]
    if not self.allowed_tokens[z].all() or self.stop_token_id in z:
      raise ValueError(f"the rationale {example.rationale!r} of {example.prompt!r} leaves the vocabulary of Z")
    if self.tool is not None:
      return self.tool.follow(z, max_length)
    return (z, [True] * len(z)) if len(z) <= max_length else None

  def _written(self, rationale: str) -> str:
    """A demonstration as the policy writes it behind the prompt."""
    return f" {rationale}"

  def inverse_prompt(self, example: Example) -> str:
    """A prompt that tells the answer, behind which the base writes rationales (paper, appendix D)."""
    raise ValueError(f"config.replay.seed_from 'inverse_prompt': the {self.name} task has no inverse prompt")

  def first_words(self, tokens: Sequence[int]) -> list[int]:
    """What of a text stands before the first token that is no word, number or space."""
    return list(itertools.takewhile(lambda t: (self.decode([t]).strip(" ") or "a").isalnum(), tokens))

  def example_of(self, prompt: str) -> Example:
    """The example that a user's prompt makes. Raises ValueError for a prompt that is none of the task's."""
    return Example(prompt, rationale=None, target="", answer="")

  def is_right(self, example: Example, tokens: Sequence[int]) -> bool | None:
    """Whether one Z gives the example's answer; None where there is no right and wrong."""
    del example, tokens
    return None

  def validation_examples(self, number: int) -> dict[str, list[Example]]:
    """Kind -> held-out examples, `number` of each kind, for the evaluations of training."""
    raise NotImplementedError

  def test_examples(self, number: int) -> dict[str, list[Example]]:
    """Kind -> test examples, `number` of each kind, or all of config.data.test_path."""
    raise NotImplementedError

  def target_samples(
    self, example: Example, num_samples: int, reward_temperature: float, rng: np.random.Generator
  ) -> list[list[int]] | None:
    """Tokens of exact samples in proportion to R^(1/T), where the task can draw them; None where not."""
    del example, num_samples, reward_temperature, rng
    return None

  def make_sampler(self, pretrained: Pretrained, *, params: dict | None = None, **settings: Any) -> Sampler:
    """A sampler of Z. `settings`: max_length and whatever else `Sampler` takes; `params`: those on the devices."""
    return Sampler(
      pretrained.config, pretrained.params if params is None else params, allowed_tokens=self.allowed_tokens,
      stop_token_id=self.stop_token_id, tool=self.tool, num_replaced=len(self.start_tokens), **settings,
    )  # fmt: skip

  def make_reward(self, config: Any, pretrained: Pretrained, params: dict, lora: Lora | None, devices: Devices) -> Any:
    """The reward: called as `rewards.Reward` is.

    Args:
      config: of the run. params: those on the `devices`. lora: of the LM that rewards; None for the base as it is.
    """
    r = config.reward
    shared = {
      "params": params, "lora": lora, "stop_token_id": self.stop_token_id, "devices": devices,
      "allowed_tokens": self.allowed_tokens if r.renormalize else None,
    }  # fmt: skip
    model = RewardModel(
      pretrained, context=np.array(self.context_tokens(r.num_demonstrations), np.int32),
      num_replaced=len(self.start_tokens), **shared,
    )  # fmt: skip
    prior = RewardModel(pretrained, context=np.zeros(0, np.int32), **shared) if r.beta else None
    return Reward(
      model, alpha=r.alpha, beta=r.beta, prior=prior, prior_tokens=self.beginning(),
      rival_penalty=r.rival_penalty, log_constraint=self.log_constraint,
    )  # fmt: skip

  def reward_text(self, config: Any) -> str:
    """R in words, for an adapter's card."""
    r = config.reward
    shown = f"{r.num_demonstrations} demonstrations, " if self.context_tokens(r.num_demonstrations) else ""
    power = f"^{r.alpha:g}" if r.alpha != 1 else ""
    text = f"p_LM(Z | {shown}X){power}"
    text += f" p_LM(Y | {shown}X, Z)" if any(e.target for e in self.examples) else ""
    text += f" p_LM(Z)^{r.beta:g}" if r.beta else ""
    text += " c(Z), the task's constraint" if self.log_constraint is not None else ""
    text += f", less {r.rival_penalty:g} nats where a wrong Y is likelier than Y" if r.rival_penalty else ""
    return text + (f"; p_LM is the base with the adapter {r.adapter}" if r.adapter else "")

  log_constraint: Any = None  # as in `rewards.Reward`
