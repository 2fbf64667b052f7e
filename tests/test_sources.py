"""Data files of the package and of the hub, whose cache is a folder made here."""

import json

import pytest

from gfn_jax.datasets import sources
from testing import run_python

COMMIT = "0" * 39 + "a"
_CODE = """
from gfn_jax.datasets import openwebtext_prompts, sources, subj

def call(f, *arguments, **options):
  try:
    return f(*arguments, **options)
  except ValueError as e:
    return str(e)

found = [call(lambda: subj.load(subj.make_config("SetFit/subj"), split, DIR)) for split in ("train", "test")]
source = "owner/texts/deep/prompts.txt"
found.append(call(
  lambda: openwebtext_prompts.read_prompts(
    openwebtext_prompts.make_config(source, num_train=2, num_validation=0, num_test=0)
  )
))
found.append(call(subj.make_config, "owner/nothing"))
found.append(call(sources.hub_file, "owner/texts", "other.txt"))
import json
print("RESULTS" + json.dumps(found))
"""


def test_embedded_data_is_whole():
  assert {p.name for p in sources.embedded("").iterdir()} == {
    "README.md", "prompts.txt", "records.jsonl", "stories", "subj",
  }  # fmt: skip
  assert "CC0" in sources.embedded("README.md").read_text()


@pytest.mark.parametrize(
  "text, is_one",
  (
    ("SetFit/subj", True), ("owner/na.me", True), ("subj", False), ("", False), ("a/b/c", False), ("/a", False),
    ("a/", False), ("./a", False), ("../a", False), ("~/a", False),
  ),
)  # fmt: skip
def test_hub_ids(text, is_one):
  assert sources.is_hub_id(text) == is_one


def test_the_hubs_cache_serves_offline(tmp_path, monkeypatch):
  def cache(repository, files):
    folder = tmp_path / "home" / "hub" / f"datasets--{repository.replace('/', '--')}"
    for name, content in files.items():
      file = folder / "snapshots" / COMMIT / name
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)

  lines = {s: json.dumps({"text": f"{s} .", "label": i}) + "\n" for i, s in enumerate(("train", "test"))}
  cache("SetFit/subj", {f"{s}.jsonl": line for s, line in lines.items()})
  cache("owner/texts", {"deep/prompts.txt": "One. \nTwo. \n"})
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  out = run_python(f"DIR = {str(tmp_path / 'tfds')!r}\n{_CODE}")
  train, test, prompts, nothing, other = json.loads(out.rpartition("RESULTS")[2])
  assert train == [{"text": "train .", "label": "objective"}]
  assert test == [{"text": "test .", "label": "subjective"}]
  assert prompts == ["One.", "Two."]
  for message, name in ((nothing, "owner/nothing/train.jsonl"), (other, "owner/texts/other.txt")):
    assert isinstance(message, str) and "\n" not in message
    for part in ("config.data.path", name, "HF_HUB_OFFLINE is set", "HF_HOME", str(tmp_path), "or name a folder"):
      assert part in message
