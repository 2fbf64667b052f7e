"""A user's JSON lines and the templates that make text of them."""

import json

import pytest

from gfn_jax.datasets import json_lines


def one_line(caught, *parts):
  message = str(caught.value)
  assert "\n" not in message, message
  for part in parts:
    assert str(part) in message, message


def test_records_are_read_whole_and_in_order(tmp_path):
  file = tmp_path / "data.jsonl"
  raw = [{"q": "a\u2028b", "a": "é", "id": 7}, {"a": "", "q": "{x}", "more": [1]}]
  text = "\r\n\n".join(json.dumps(r, ensure_ascii=False) for r in raw) + "\n  \n"
  for encoding in ("utf-8", "utf-8-sig"):
    file.write_bytes(text.encode(encoding))
    assert json_lines.read(file, ("q", "a")) == raw
  assert [n for n, _ in json_lines.read_objects(file)] == [1, 3]


GOOD = b'{"q": "x", "a": "y"}\n'


@pytest.mark.parametrize(
  "content, parts",
  (
    (b"", ["has no records"]),
    (b"\n  \n", ["has no records"]),
    (GOOD + b"\n{not json\n", ["line 3", "no JSON"]),
    (GOOD + b"[1]\n", ["line 2", "an object is needed, not list"]),
    (GOOD + b'{"q": "\xff", "a": "y"}\n', ["line 2", "no JSON", "utf-8"]),
    (GOOD + b"[" * 100_000 + b"\n", ["line 2", "no JSON"]),
    (GOOD + b'{"q": "x", "b": "y"}\n', ["line 2", "no field 'a'", "q, b"]),
    (b"{}", ["line 1", "no field 'q'", "none"]),
    (GOOD + GOOD + b'{"q": "x", "a": 5}\n', ["line 3", "'a' must be text, not int"]),
    (b'{"q": null, "a": "y"}', ["line 1", "'q' must be text, not NoneType"]),
    (b'{"q": "\\ud800", "a": "y"}', ["line 1", "'q'", "surrogate"]),
  ),
)
def test_bad_files_get_one_line(content, parts, tmp_path):
  file = tmp_path / "data.jsonl"
  file.write_bytes(content)
  with pytest.raises(ValueError) as caught:
    json_lines.read(file, ("q", "a"))
  one_line(caught, file, *parts)


def test_files_that_cannot_be_read(tmp_path):
  for path, why in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "directory")):
    with pytest.raises(ValueError) as caught:
      json_lines.read(path, ())
    one_line(caught, path, "cannot be read", why)


RECORD = {"question": "2 + {x}?", "answer": "4", "class": "c"}


@pytest.mark.parametrize(
  "template, text",
  (
    ("Question: {question}\nAnswer:", "Question: 2 + {x}?\nAnswer:"),
    ("{answer}{answer} {class}", "44 c"),
    ("{{question}} {{{answer}}}", "{question} {4}"),
    ("no field", "no field"),
    ("", ""),
  ),
)
def test_render(template, text):
  assert json_lines.render(template, RECORD) == text


def test_template_fields():
  assert json_lines.template_fields("{b} {{c}} {a}{b}") == ["b", "a", "b"]
  assert json_lines.template_fields("{{}}") == []


@pytest.mark.parametrize(
  "template, parts",
  (
    ("{queston}?", ["names 'queston'", "question, answer, class"]),
    ("{}", ["{}", "plain name"]),
    ("{0}", ["{0}", "plain name"]),
    ("{answer.__class__}", ["{answer.__class__}", "plain name"]),
    ("{answer[0]}", ["{answer[0]}", "plain name"]),
    ("{answer!r}", ["{answer!r}", "plain name"]),
    ("{answer:>{width}}", ["{answer:>{width}}", "plain name"]),
    ("{answer", ["{{ and }}"]),
    ("answer}", ["{{ and }}"]),
    ("a\n{", ["{{ and }}"]),
  ),
)
def test_bad_templates_get_one_line(template, parts):
  with pytest.raises(ValueError) as caught:
    json_lines.render(template, RECORD)
  one_line(caught, repr(template), *parts)


def test_a_record_without_fields():
  with pytest.raises(ValueError) as caught:
    json_lines.render("{a}", {})
  one_line(caught, "'{a}'", "no fields")
