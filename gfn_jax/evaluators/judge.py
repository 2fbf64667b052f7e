"""A language model as judge of stories: the coherence rating of the paper's appendix C, after G-Eval.

Any endpoint that speaks OpenAI's chat completions will do: OpenAI's own, or a local vLLM, llama.cpp or Ollama.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import hashlib
import json
import os
import pathlib
import re
import threading
from typing import Any
from urllib.parse import urlsplit

from gfn_jax.files import write_text

# The paper's, to the letter: its second example does lack a colon, and does break off in the middle of a sentence.
PROMPT = """\
You will be given a short story.
Your task is to rate the story on one metric.
Please make sure you read and understand these instructions
carefully. Please keep this document open while reviewing,
and refer to it as needed.
Evaluation Criteria:
Coherence (1-5) - the collective quality of all sentences.
The story should be well-structured and well-organized.
The story should not just be a heap of related information,
but should build from sentence to a coherent narrative.
The story should also be realistic and all the sentences
when put together should make sense.
Evaluation Steps:
1. Read the story carefully. Check if the story is coherent
and all the sentences follow a logical order.
2. Assign a score for coherence on a scale of 1 to 5,
where 1 is the lowest and 5 is the highest based on the
Evaluation Criteria. If there are grammatical errors
or logical inconsistencies,
simply assign a lower score and do not elaborate on the reasoning.
Example:
Randy had recently separated from his wife.
He felt very lonely and sad all the time.
He considered trying to patch things up with Vera, his ex-wife.
He decided to get a puppy instead.
His decision made him happy and he no longer felt sad.
- Coherence: 5
Randy had recently separated from his wife.
He felt very lonely and sad all the time.
He considered trying to patch things up with Vera, his ex-wife.
Eventually Randy missed Vera very much and developedWhile making
memories with
His decision made him happy and he no longer felt sad.
- Coherence 1
Story:
{{Story}}
Evaluation Form (scores ONLY):
- Coherence:"""

LOWEST, HIGHEST = 1, 5
MAX_REPLIES = 3  # to one story, until one holds a rating
TEMPERATURE = 1.0  # G-Eval's, and the only one that reasoning models take; at 0 asking again would be of no use

# "4", "4.5", "4/5" or "4 out of 5", but neither the 4 of "4/10" and "4-5" nor that of "42", "4.x" and "4th".
_OF_FIVE = r"(?: *+(?:/|out of) *+5(?!\.?[0-9]))?+"
_NUMBER = rf"([0-9]++(?:\.[0-9]++)?+){_OF_FIVE}(?![\w%]|\.\w|,[0-9]| *+(?:/|-|–|to\b|or\b|out of) *+[0-9])"
# "Coherence: 4" anywhere, "Coherence 4" where the line ends: not "Coherence 3 sentences lack".
_NAME = r"\bcoherence(?: ++(?:score|rating)\b)?+(?: *+\(1-5\))?+(?=[ \t*_]*+(?:[:=]|[0-9./ \t*_]++$))"
_LABELLED = re.compile(rf"{_NAME}[ \t*_:=]*+{_NUMBER}", re.IGNORECASE | re.MULTILINE)
_FIRST_LINE = re.compile(rf"\s*+(?:- ++)?+[*_]*+{_NUMBER}[*_.]*+[ \t\r]*+(?:\n|\Z)")


def parse_rating(reply: str) -> float | None:
  """The rating that a judge's reply holds, from 1 to 5, or None.

  It stands behind the word "Coherence", with any text around, or alone on the first line, where the prompt's form asks
  for it. Nothing is guessed: other numbers, numbers out of range and ratings that contradict each other are no rating.
  What a model thinks aloud, up to </think>, is no part of its reply.
  """
  reply = reply.rpartition("</think>")[2]
  if "<think>" in reply:  # and was cut off
    return None
  first_line = _FIRST_LINE.match(reply)
  found = {float(n) for n in _LABELLED.findall(reply) + ([first_line[1]] if first_line else [])}
  rating = found.pop() if len(found) == 1 else None
  return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def mean_rating(ratings: Sequence[float | None]) -> tuple[float, int]:
  """The mean over the ratings that there are, and how many are missing: to be told together.

  With as many samples of each story, this is the paper's mean over samples and then over stories.

  Raises:
    ValueError: there is no rating.
  """
  given = [r for r in ratings if r is not None]
  if not given:
    raise ValueError(f"none of {len(ratings)} stories has a rating")
  return sum(given) / len(given), len(ratings) - len(given)


class Judge:
  """Asks a model for the coherence of stories.

  A text is judged once: equal texts share a rating. With a cache file this holds over processes, so that an evaluation
  that was killed goes on where it was. Texts without a rating are kept in it too, with the replies that they got.

  Args:
    base_url: of the endpoint, what stands before /chat/completions: "https://api.openai.com/v1".
    model: as the endpoint calls it.
    api_key_env: the environment variable that holds the key; any text where the endpoint asks for none. The key goes
      to the endpoint alone: no message and no file has it.
    cache: a JSON-lines file, a record {"request", "model", "story", "rating", "replies"} a text; None keeps nothing.
    max_concurrency: requests under way at a time.
    max_retries: of a request that met a full or failing server, with the openai package's growing pauses.
    timeout: seconds until a request without an answer counts as failed.

  Raises:
    ValueError: the openai package, the key or the URL is missing or malformed, or the cache is damaged; named.
    OSError: the cache cannot be written.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    api_key_env: str = "OPENAI_API_KEY",
    *,
    cache: str | os.PathLike | None = None,
    max_concurrency: int = 8,
    max_retries: int = 5,
    timeout: float = 60.0,
  ):
    try:
      import openai
    except ImportError:
      raise ValueError("the judge needs the openai package: pip install 'gfn_jax[judge]'") from None
    if max_concurrency < 1 or max_retries < 0 or timeout <= 0:
      raise ValueError(
        f"max_concurrency {max_concurrency}, max_retries {max_retries}, timeout {timeout:g}: must be at least 1, at "
        "least 0 and above 0"
      )
    self._url, self._model, self._key_env = _checked_url(base_url), model, api_key_env
    self._key = os.environ.get(api_key_env, "").strip()
    if not self._key:
      raise ValueError(
        f"the judge's key is missing: set the environment variable {api_key_env} (any text where none is asked for)"
      )
    if not (self._key.isascii() and self._key.isprintable()):  # the client's error would show it
      raise ValueError(f"the judge's key, in the environment variable {api_key_env}, must be one line of ASCII")
    self._max_concurrency, self._max_retries, self._timeout = max_concurrency, max_retries, timeout
    # No max_tokens: reasoning models refuse it, and one that thinks aloud would never come to its rating.
    self._settings = {"model": model, "temperature": TEMPERATURE}
    self._cache = None if cache is None else pathlib.Path(cache)
    self._known = {} if self._cache is None else _read_cache(self._cache)
    self._lock = threading.Lock()
    self._openai = openai
    self._client = openai.OpenAI(base_url=self._url, api_key=self._key, timeout=timeout, max_retries=max_retries)

  def rate(self, stories: Sequence[str]) -> list[float | None]:
    """The rating of each story, from 1 to 5; None for one that got none in MAX_REPLIES replies.

    How many those are is printed.

    Args:
      stories: whole, infill included; a sentence a line, as in the prompt's own examples.

    Raises:
      ValueError: the endpoint refuses the key or the request, or is none; in one line.
      OSError: it cannot be reached, keeps failing, or does not answer in time. Ratings that came before are kept.
    """
    if isinstance(stories, str):
      raise ValueError(f"stories is the text {stories[:60]!r}: must be a list of texts")
    keys = [self._request_hash(s) for s in stories]
    pending = {k: s for k, s in zip(keys, stories) if k not in self._known}
    pool = ThreadPoolExecutor(self._max_concurrency)
    try:
      for done in as_completed([pool.submit(self._rate_one, k, s) for k, s in pending.items()]):
        done.result()
    finally:  # after a failure too: what is under way is paid, and kept
      pool.shutdown(cancel_futures=True)
    ratings = [self._known[k] for k in keys]
    if missing := ratings.count(None):
      print(f"judge {self._model}: {missing} of {len(ratings)} stories have no rating: no reply held one", flush=True)
    return ratings

  def _request(self, story: str) -> dict[str, Any]:
    return {**self._settings, "messages": [{"role": "user", "content": PROMPT.replace("{{Story}}", story)}]}

  def _request_hash(self, story: str) -> str:
    text = json.dumps({"url": self._url, **self._request(story)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def _rate_one(self, key: str, story: str) -> None:
    rating, replies = None, []
    while rating is None and len(replies) < MAX_REPLIES:
      replies.append(self._ask(story))
      rating = parse_rating(replies[-1])
    record = {"request": key, "model": self._model, "story": story, "rating": rating, "replies": replies}
    with self._lock:
      self._known[key] = rating
      if self._cache is not None:
        with self._cache.open("a", encoding="utf-8") as file:
          file.write(json.dumps(record) + "\n")

  def _ask(self, story: str) -> str:
    """The model's reply; what goes wrong becomes one line without the key."""
    openai, where = self._openai, f"the judge at {self._url}"
    try:
      completion = self._client.chat.completions.create(**self._request(story))
    except openai.AuthenticationError as e:
      # Not what the server says: it may quote a part of the key.
      raise ValueError(f"{where} refuses the key in {self._key_env} (HTTP {e.status_code})") from None
    except openai.APITimeoutError:
      tries = f"in {self._max_retries + 1} tries"
      raise TimeoutError(f"{where} does not answer within {self._timeout:g} s, {tries}") from None
    except openai.APIConnectionError as e:
      raise ConnectionError(f"{where} cannot be reached: {self._clean(e.__cause__ or e)}") from None
    except openai.APIStatusError as e:
      if e.code == "content_filter":  # Azure's, of one story: it has no rating
        return ""
      passing = e.status_code == 429 or e.status_code >= 500  # as opposed to the user's slip
      error = ConnectionError if passing else ValueError
      raise error(f"{where}, model {self._model!r}: HTTP {e.status_code}: {self._clean(e.message)}") from None
    except (openai.OpenAIError, ValueError):  # such as what is no JSON
      completion = None
    choices = getattr(completion, "choices", None)
    message = choices[0].message if choices else None
    if message is None:
      raise ValueError(f"{where} does not answer with a chat completion: must its URL end in /v1?")
    return message.content or ""

  def _clean(self, error: object) -> str:
    """An error of the server's as one line of bounded length, without the key."""
    return " ".join(str(error).replace(self._key, "***").split())[:300]


def _checked_url(base_url: str) -> str:
  try:
    url = urlsplit(base_url)
    right = url.scheme in ("http", "https") and url.hostname and url.username is None and url.port != 0
  except ValueError:  # a port that is no number
    right = False
  if not right:
    shown = base_url.rpartition("@")[2]  # what stands before it may be a password
    raise ValueError(f"the judge's URL {shown!r}: must be as 'https://api.openai.com/v1', without user and password")
  return base_url.rstrip("/")


def _read_cache(path: pathlib.Path) -> dict[str, float | None]:
  """Ratings by the hash of their request. A last line that was cut off, by a kill, is dropped from the file."""
  path.open("a").close()  # that it cannot be written is to be known before anything is paid
  whole, newline, rest = path.read_text(encoding="utf-8").rpartition("\n")
  if rest:
    write_text(path, whole + newline)
  ratings = {}
  for number, line in enumerate(whole.split("\n") if newline else [], 1):
    try:
      record = json.loads(line)
      key, rating = record["request"], record["rating"]
      right = isinstance(key, str) and (rating is None or LOWEST <= rating <= HIGHEST)
    except (ValueError, KeyError, TypeError):
      right = False
    if not right:
      raise ValueError(f"{path}, line {number}: is no record of a rating")
    ratings[key] = rating
  return ratings
