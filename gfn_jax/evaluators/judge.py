"""The coherence of stories as a language model rates it (paper, appendix C), over an OpenAI-compatible endpoint."""

from collections.abc import Sequence
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import threading

# The paper's prompt, to the letter.
PROMPT = """You will be given a short story.
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
{story}
Evaluation Form (scores ONLY):
- Coherence:"""

# A rating stands alone, or behind its name, or over 5: "4", "- Coherence: 4", "4/5".
_RATING = re.compile(r"(?:-?\s*coherence\s*:?\s*)?([1-5](?:\.\d+)?)(?:\s*/\s*5)?\s*\.?\s*", re.IGNORECASE)
ATTEMPTS = 3  # of a request whose replies hold no rating
CONCURRENCY = 4


def parse_rating(reply: str) -> float | None:
  """The rating from 1 to 5 that a reply consists of; None where it is anything else."""
  match = _RATING.fullmatch(reply.strip())
  rating = None if match is None else float(match.group(1))
  return rating if rating is not None and rating <= 5 else None


class Judge:
  """Asks a model to rate stories.

  Args:
    base_url: of the endpoint, as "https://api.openai.com/v1". model: its name there.
    api_key_env: the environment variable with the key; the key itself is never shown.
    cache: a JSON-lines file of ratings made before: none is asked, or paid, twice.
    timeout: seconds a request. max_retries: of a request that the endpoint could not serve.

  Raises:
    ValueError: the package openai or the key is missing.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key_env: str = "OPENAI_API_KEY",
    cache: str | os.PathLike | None = None,
    timeout: float = 60.0,
    max_retries: int = 4,
  ):
    try:
      import openai
    except ImportError:
      raise ValueError("the judge needs the package openai: pip install 'gfn_jax[judge]'") from None
    if not os.environ.get(api_key_env):
      raise ValueError(f"the judge needs a key in the environment variable {api_key_env} (any text, if it asks none)")
    self._openai, self._model, self._url = openai, model, base_url
    self._client = openai.OpenAI(
      base_url=base_url, api_key=os.environ[api_key_env], timeout=timeout, max_retries=max_retries
    )
    self._cache = None if cache is None else pathlib.Path(cache)
    self._known: dict[str, float] = {}
    self._lock = threading.Lock()
    if self._cache is not None and self._cache.exists():
      for line in self._cache.read_text(encoding="utf-8").splitlines():
        try:
          record = json.loads(line)
          self._known[record["request"]] = record["rating"]
        except (ValueError, KeyError, TypeError):
          continue  # a line that a kill cut short

  def rate(self, stories: Sequence[str]) -> list[float | None]:
    """A rating from 1 to 5 for each story; None where no reply of ATTEMPTS held one.

    Raises:
      ValueError: the endpoint refuses the key, or cannot be reached.
    """
    with concurrent.futures.ThreadPoolExecutor(CONCURRENCY) as pool:
      return list(pool.map(self._rate, stories))

  def _rate(self, story: str) -> float | None:
    prompt = PROMPT.format(story=story)
    request = hashlib.sha256(f"{self._model}\n{prompt}".encode()).hexdigest()
    if request in self._known:
      return self._known[request]
    for _ in range(ATTEMPTS):
      try:
        reply = self._client.chat.completions.create(model=self._model, messages=[{"role": "user", "content": prompt}])
      except self._openai.AuthenticationError:
        raise ValueError(f"the judge at {self._url} refuses the key") from None
      except self._openai.APIError as e:
        raise ValueError(f"the judge at {self._url} does not answer: {type(e).__name__}") from None
      rating = parse_rating(reply.choices[0].message.content or "")
      if rating is not None:
        self._remember(request, rating)
        return rating
    return None

  def _remember(self, request: str, rating: float) -> None:
    with self._lock:
      self._known[request] = rating
      if self._cache is not None:
        with self._cache.open("a", encoding="utf-8") as file:
          file.write(json.dumps({"request": request, "rating": rating}) + "\n")
