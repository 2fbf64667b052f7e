"""The judge against a server on this machine that plays /v1/chat/completions."""

from collections.abc import Callable
import contextlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import socket
import sys
import threading

import pytest

from gfn_jax.evaluators.judge import MAX_REPLIES, PROMPT, Judge, mean_rating, parse_rating
from testing import shared_folder

KEY = "sk-not-a-real-key-4711"
AT_ONCE = {"retry-after-ms": "1"}  # try again after a millisecond


def completion(content):
  message = {"role": "assistant", "content": content}
  choice = {"index": 0, "message": message, "finish_reason": "stop"}
  return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def story_in(body):
  """The story between the prompt's halves, as the server sees it."""
  before, after = PROMPT.split("{{Story}}")
  (message,) = body["messages"]
  assert message["role"] == "user"
  return message["content"].removeprefix(before).removesuffix(after)


@contextlib.contextmanager
def server(answer: Callable):
  """Yields (URL, requests so far). answer(body, number of the request) -> content, or (status, body, headers)."""
  seen, lock = [], threading.Lock()

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      with lock:
        seen.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
        number = len(seen)
      reply = answer(body, number)
      status, content, headers = reply if isinstance(reply, tuple) else (200, completion(reply), {})
      data = (content if isinstance(content, str) else json.dumps(content)).encode()
      with contextlib.suppress(OSError):  # the judge may have hung up
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
      pass

  httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield f"http://127.0.0.1:{httpd.server_port}/v1", seen
  finally:
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_the_prompt_is_the_papers_to_the_letter():
  text = (shared_folder() / "paper" / "hu2024_amortizing.txt").read_text(encoding="utf-8")
  start = text.index("You will be given a short story.")
  form = "Evaluation Form (scores ONLY):\n- Coherence:"
  printed = text[start : text.index(form, start)] + form
  page_end = "21\n\nPublished as a conference paper at ICLR 2024\n"  # stands amidst
  assert printed.count(page_end) == 1
  assert PROMPT.split() == printed.replace(page_end, "").split()  # but for how lines break


@pytest.mark.parametrize(
  "reply, rating",
  (
    ("4", 4), (" 4\n", 4), ("4.", 4), ("4.5", 4.5), ("4/5", 4), ("4 out of 5.", 4), ("- 3", 3), ("**2**", 2),
    ("5.0", 5), ("- Coherence: 4", 4), ("Coherence 1", 1), ("**Coherence:** 3.5/5", 3.5), ("coherence score: 2", 2),
    ("Coherence (1-5): 4", 4), ("4\n\nThe story has 5 sentences that follow.", 4),
    ("The story of 5 sentences flows, though the 4th is odd.\n\n- Coherence: 3\n", 3),
    ("Coherence: 2. It does not hold together, hence Coherence: 2/5.", 2),
    ("", None), ("I cannot rate this.", None), ("0", None), ("6", None), ("5.5", None), ("42", None), ("-4", None),
    ("4/10", None), ("4 out of 10", None), ("4-5", None), ("4 or 5", None), ("4,5", None), ("4th", None),
    ("80%", None), ("4.5.1", None), ("4/50", None), ("Coherence: 45", None), ("Coherence: -3", None),
    ("Coherence: 4/10", None), ("Coherence: 3-4", None), ("Coherence 1 to 5", None), ("1. Read the story.", None),
    ("Coherence:\n2. Assign a score.", None), ("There are 2 problems with this story.", None),
    ("Coherence: 4 at first, then Coherence: 2", None), ("4\nCoherence: 2", None), ("Incoherence: 4", None),
    ("four", None), ("٤", None), ("nan", None),
    ("<think>\nCoherence: 2? Or\nCoherence: 3\n</think>\n\n4", 4), ("<think>\nCoherence: 2", None),
    ("Coherence: 2</think>", None), ("Coherence 4/5.\nIt flows.", 4), ("Coherence 3 sentences of it lack.", None),
  ),
)  # fmt: skip
def test_a_rating_is_read_strictly(reply, rating):
  assert parse_rating(reply) == rating


def test_means_tell_what_is_missing():
  assert mean_rating([4, None, 1.5, 3.5]) == (3.0, 1)
  assert mean_rating([2.0]) == (2.0, 0)
  for nothing in ([], [None, None]):
    with pytest.raises(ValueError, match=f"none of {len(nothing)} stories has a rating"):
      mean_rating(nothing)


def test_stories_are_rated_in_order_with_the_prompt_of_the_paper(capsys):
  ratings = {"He ran.\nHe won.": "5", "A {{Story}} \\1 “b”.": "I would say:\n- Coherence: 2", "C.": "3.5"}
  with server(lambda body, _: ratings[story_in(body)]) as (url, seen):
    assert Judge(url + "/", "judge-1").rate([*ratings, "He ran.\nHe won."]) == [5, 2, 3.5, 5]
  assert len(seen) == 3  # equal texts are asked once
  for request in seen:
    assert request["path"] == "/v1/chat/completions" and request["key"] == f"Bearer {KEY}"
    settings = {k: v for k, v in request["body"].items() if k != "messages"}
    assert settings == {"model": "judge-1", "temperature": 1.0}
  text = next(r["body"]["messages"][0]["content"] for r in seen if "He ran" in str(r))
  assert text.startswith("You will be given a short story.\nYour task is to rate the story on one metric.\n")
  assert text.endswith("\nStory:\nHe ran.\nHe won.\nEvaluation Form (scores ONLY):\n- Coherence:")
  assert capsys.readouterr().out == ""


def test_a_reply_without_a_rating_is_asked_again_and_then_missing(capsys):
  replies = {"a": ["Well.", "- Coherence: 4"], "b": ["No.", None, "6", "5"], "c": ["1"]}
  with server(lambda body, _: replies[story_in(body)].pop(0)) as (url, seen):
    judge = Judge(url, "m")
    assert judge.rate(["a", "b", "c"]) == [4, None, 1]
  assert [story_in(r["body"]) for r in seen].count("b") == MAX_REPLIES == 3 and len(seen) == 6
  assert capsys.readouterr().out == "judge m: 1 of 3 stories have no rating: no reply held one\n"
  assert judge.rate([]) == []


def test_a_story_that_a_filter_stops_is_missing():
  stopped = (400, {"error": {"message": "filtered", "code": "content_filter"}}, {})
  with server(lambda body, _: stopped if story_in(body) == "a" else "5") as (url, _):
    assert Judge(url, "m").rate(["a", "b"]) == [None, 5]


def test_a_full_or_failing_server_is_asked_again():
  statuses = [429, 500, 503]

  def answer(body, number):
    return (statuses.pop(0), {"error": {"message": "later"}}, AT_ONCE) if statuses else "4"

  with server(answer) as (url, seen):
    assert Judge(url, "m", max_retries=3).rate(["a"]) == [4]
  assert len(seen) == 4


def test_a_server_that_keeps_failing_stops_the_judge_which_keeps_what_was_paid(tmp_path):
  cache = tmp_path / "ratings.jsonl"
  broken = (500, {"error": {"message": f"out\nof memory, said {KEY}"}}, AT_ONCE)
  stories = [str(i) for i in range(20)]
  with server(lambda body, number: "4" if number <= 2 else broken) as (url, seen):
    with pytest.raises(ConnectionError, match=r"judge at http://.*/v1, model 'm': HTTP 500: .* said \*\*\*") as error:
      Judge(url, "m", max_retries=1, max_concurrency=1, cache=cache).rate(stories)
  assert "\n" not in str(error.value) and error.value.__suppress_context__
  assert len(seen) < 10  # the rest is called off, but for what had begun
  assert [json.loads(line)["story"] for line in cache.read_text().splitlines()] == ["0", "1"]


def test_what_is_under_way_when_another_fails_is_kept(tmp_path):
  cache, failed = tmp_path / "ratings.jsonl", threading.Event()

  def answer(body, number):
    if story_in(body) == "bad":
      failed.set()
      return 404, {"error": {"message": "no"}}, {}
    failed.wait(20)
    return "4"

  with server(answer) as (url, _), pytest.raises(ValueError, match="HTTP 404"):
    Judge(url, "m", max_concurrency=2, cache=cache).rate(["good", "bad"])
  assert json.loads(cache.read_text())["story"] == "good"


def test_a_hang_ends_at_the_timeout():
  done = threading.Event()
  with server(lambda body, _: (done.wait(20), "4")[1]) as (url, seen):
    with pytest.raises(TimeoutError, match=r"judge at http://.* does not answer within 0.2 s, in 2 tries"):
      Judge(url, "m", timeout=0.2, max_retries=1).rate(["a"])
    done.set()
  assert len(seen) == 2


def test_a_wrong_key_is_one_line_that_does_not_hold_it(monkeypatch):
  monkeypatch.setenv("MY_KEY", KEY[:-1])
  refusal = (401, {"error": {"message": f"Incorrect API key provided: {KEY[:-1]}."}}, {})
  with server(lambda body, _: refusal) as (url, seen):
    with pytest.raises(ValueError) as error:
      Judge(url, "m", "MY_KEY").rate(["a"])
  assert str(error.value) == f"the judge at {url} refuses the key in MY_KEY (HTTP 401)"
  assert error.value.__suppress_context__ and len(seen) == 1


@pytest.mark.parametrize(
  "answer, message",
  (
    ((404, {"error": {"message": "The model 'm' does not exist"}}, {}), "model 'm': HTTP 404: .*does not exist"),
    ((403, {"error": {"message": "Not in your country"}}, {}), "model 'm': HTTP 403: .*country"),
    ((400, "<html>no</html>", {"Content-Type": "text/html"}), "model 'm': HTTP 400"),
    ((200, "<html>Welcome</html>", {"Content-Type": "text/html"}), "chat completion: must its URL end in /v1"),
    ((200, '{"choices": [', {}), "does not answer with a chat completion"),
    ((200, {"choices": []}, {}), "does not answer with a chat completion"),
    ((200, [], {}), "does not answer with a chat completion"),
    ((200, {"object": "error", "message": "x"}, {}), "does not answer with a chat completion"),
    ((200, {"choices": [{"index": 0, "message": None}]}, {}), "does not answer with a chat completion"),
  ),
)
def test_what_is_no_completion_is_one_line(answer, message):
  with server(lambda body, _: answer) as (url, _):
    with pytest.raises(ValueError, match=message) as error:
      Judge(url, "m", max_retries=0).rate(["a"])
  assert "\n" not in str(error.value)


def test_nobody_listens():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match=rf"judge at {url} cannot be reached: .*refused"):
      Judge(url, "m", max_retries=0).rate(["a"])


def test_requests_run_side_by_side_up_to_the_bound():
  together, active, most = threading.Barrier(3, timeout=20), [], []

  def answer(body, number):
    active.append(number)
    most.append(len(active))
    together.wait()  # passes when three are here
    active.remove(number)
    return "3"

  with server(answer) as (url, _):
    assert Judge(url, "m", max_concurrency=3).rate([str(i) for i in range(9)]) == [3] * 9
  assert max(most) == 3


def test_no_rating_is_paid_twice(tmp_path):
  cache = tmp_path / "ratings.jsonl"
  replies = {"a": "4", "b": "Hm.", "ü\n": "2.5"}
  with server(lambda body, _: replies[story_in(body)]) as (url, seen):
    judge = Judge(url, "m", cache=cache)
    assert judge.rate(["a", "b"]) == [4, None]
    assert judge.rate(["b", "a"]) == [None, 4] and len(seen) == 1 + MAX_REPLIES
    with cache.open("a") as file:
      file.write('{"request": "12')  # killed while writing
    again = Judge(url + "/", "m", cache=cache)
    assert again.rate(["a", "b", "ü\n"]) == [4, None, 2.5] and len(seen) == 2 + MAX_REPLIES
    assert Judge(url, "m", cache=cache).rate(["ü\n"]) == [2.5] and len(seen) == 2 + MAX_REPLIES
    # Another model, another request.
    assert Judge(url, "n", cache=cache).rate(["a"]) == [4] and len(seen) == 3 + MAX_REPLIES
  records = [json.loads(line) for line in cache.read_text().splitlines()]
  told = sorted((r["story"], r["model"], r["rating"], r["replies"]) for r in records)
  assert told == [
    ("a", "m", 4, ["4"]), ("a", "n", 4, ["4"]), ("b", "m", None, ["Hm."] * 3), ("ü\n", "m", 2.5, ["2.5"]),
  ]  # fmt: skip
  assert KEY not in cache.read_text()


@pytest.mark.parametrize(
  "line", ('{"rating": 4}', '{"request": "1", "rating": 6}', "[1]", "x", '{"request": [], "rating": 1}', "")
)
def test_a_damaged_cache_is_named(tmp_path, line):
  cache = tmp_path / "ratings.jsonl"
  cache.write_text('{"request": "0", "rating": null}\n' + line + '\n{"request": "2", "rating": 4}\n')
  with pytest.raises(ValueError, match=r"ratings.jsonl, line 2: is no record of a rating"):
    Judge("http://127.0.0.1/v1", "m", cache=cache)


def test_a_cache_that_cannot_be_written_is_known_first(tmp_path):
  with pytest.raises(OSError, match="absent"):
    Judge("http://127.0.0.1/v1", "m", cache=tmp_path / "absent" / "ratings.jsonl")


@pytest.mark.parametrize(
  "options, message",
  (
    ({"base_url": "api.openai.com/v1"}, "judge's URL 'api.openai.com/v1': must be as 'https://api.openai.com/v1'"),
    ({"base_url": "https:///v1"}, "judge's URL 'https:///v1'"),
    ({"base_url": "http://host:port/v1"}, "judge's URL 'http://host:port/v1'"),
    ({"base_url": "https://me:secret@host/v1"}, "judge's URL 'host/v1': .* without user and password"),
    ({"api_key_env": "NO_SUCH_KEY"}, "judge's key is missing: set the environment variable NO_SUCH_KEY"),
    ({"api_key_env": "TWO_LINES"}, "judge's key, in the environment variable TWO_LINES, must be one line of ASCII"),
    ({"max_concurrency": 0}, "max_concurrency 0"),
    ({"max_retries": -1}, "max_retries -1"),
    ({"timeout": 0.0}, "timeout 0"),
  ),
)
def test_bad_settings(options, message, monkeypatch):
  monkeypatch.setenv("TWO_LINES", "secret\nand more")
  with pytest.raises(ValueError, match=message) as error:
    Judge(**{"base_url": "http://127.0.0.1/v1", "model": "m"} | options)
  assert "secret" not in str(error.value)


def test_stories_must_be_a_list():
  with pytest.raises(ValueError, match="stories is the text 'He ran.': must be a list of texts"):
    Judge("http://127.0.0.1/v1", "m").rate("He ran.")


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "openai", None)
  with pytest.raises(ValueError, match=r"needs the openai package: pip install 'gfn_jax\[judge\]'"):
    Judge("http://127.0.0.1/v1", "m")
