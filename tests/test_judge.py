"""The judge, against a server that plays an OpenAI-compatible endpoint."""

import http.server
import json
import threading
import time

import pytest

from gfn_jax.evaluators.judge import ATTEMPTS, PROMPT, Judge, parse_rating


@pytest.mark.parametrize(
  "reply, rating",
  (
    ("4", 4), (" 4.5 ", 4.5), ("- Coherence: 3", 3), ("Coherence 2", 2), ("5/5", 5), ("3.", 3),
    ("", None), ("6", None), ("5.5", None), ("0", None), ("good", None), ("4 or 5", None), ("I give it 4", None),
    ("Coherence: 44", None),
  ),
)  # fmt: skip
def test_ratings_are_read_strictly(reply, rating):
  assert parse_rating(reply) == rating


@pytest.fixture
def endpoint(monkeypatch):
  """A server on loopback; `script` holds what it answers in turn: a text, a status, or a number of seconds to hang."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      server.requests.append((self.path, self.headers["Authorization"], body))
      answer = server.script.pop(0) if server.script else "3"
      if isinstance(answer, float):
        time.sleep(answer)
        answer = "3"
      status = answer if isinstance(answer, int) else 200
      content = {"error": {"message": "no"}}
      if status == 200:
        message = {"role": "assistant", "content": answer}
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                   "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
      data = json.dumps(content).encode()
      try:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)
      except BrokenPipeError:
        pass  # who asked has given up

    def log_message(self, *arguments):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.script, server.requests = [], []
  server.url = f"http://127.0.0.1:{server.server_port}/v1"
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  yield server
  server.shutdown()


def test_a_story_is_rated_with_the_papers_prompt(endpoint):
  endpoint.script = ["- Coherence: 4"]
  assert Judge(endpoint.url, "m").rate(["Once. Then."]) == [4.0]
  ((path, authorization, body),) = endpoint.requests
  assert path == "/v1/chat/completions" and authorization == "Bearer secret" and body["model"] == "m"
  assert body["messages"] == [{"role": "user", "content": PROMPT.format(story="Once. Then.")}]


def test_a_reply_without_a_rating_is_asked_again_and_then_missing(endpoint):
  endpoint.script = ["well", "4"]
  judge = Judge(endpoint.url, "m")
  assert judge.rate(["a"]) == [4.0]
  endpoint.script = ["well"] * ATTEMPTS
  assert judge.rate(["b"]) == [None] and len(endpoint.requests) == 2 + ATTEMPTS


@pytest.mark.parametrize("trouble", (429, 500))
def test_passing_trouble_is_waited_out(endpoint, trouble):
  endpoint.script = [trouble, "2"]
  assert Judge(endpoint.url, "m").rate(["a"]) == [2.0]


def test_a_hanging_endpoint_is_named(endpoint):
  endpoint.script = [1.5]
  with pytest.raises(ValueError, match=f"the judge at {endpoint.url} does not answer: APITimeoutError"):
    Judge(endpoint.url, "m", timeout=0.2, max_retries=0).rate(["a"])


def test_a_wrong_key_is_named_and_not_shown(endpoint):
  endpoint.script = [401]
  with pytest.raises(ValueError, match="refuses the key") as error:
    Judge(endpoint.url, "m").rate(["a"])
  assert "secret" not in str(error.value)


def test_a_missing_key_is_named(monkeypatch):
  monkeypatch.delenv("SOME_KEY", raising=False)
  with pytest.raises(ValueError, match="environment variable SOME_KEY"):
    Judge("http://127.0.0.1:1/v1", "m", api_key_env="SOME_KEY")


def test_no_rating_is_asked_for_twice(endpoint, tmp_path):
  cache = tmp_path / "ratings.jsonl"
  endpoint.script = ["4", "5"]
  assert sorted(Judge(endpoint.url, "m", cache=cache).rate(["a", "b"])) == [4.0, 5.0]
  cache.write_text(cache.read_text() + '{"request": "cut sho')  # a kill in mid-write
  again = Judge(endpoint.url, "m", cache=cache)
  assert sorted(again.rate(["a", "b"])) == [4.0, 5.0] and len(endpoint.requests) == 2
  Judge(endpoint.url, "other", cache=cache).rate(["a"])
  assert len(endpoint.requests) == 3
