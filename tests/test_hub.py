"""Where a model is found: folders, GGUF files, the package, the hub's cache, and a hub on loopback."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import socket
import threading
import urllib.parse

import pytest
import safetensors.numpy

from gfn_jax.models import save_pretrained
from gfn_jax.models.hub import find_model
from testing import run_python, tiny_pretrained

MAIN, TAGGED = "0" * 39 + "a", "0" * 39 + "b"  # commits


def error_of(name, **options):
  with pytest.raises(ValueError) as caught:
    find_model(name, **options)
  message = str(caught.value)
  assert "\n" not in message and len(message) < 1000 and repr(str(name)) in message
  return message


# Without a hub.


def test_local_names(tmp_path, monkeypatch):
  (tmp_path / "owner" / "model").mkdir(parents=True)
  (tmp_path / "a.gguf").write_bytes(b"GGUF")
  assert find_model(tmp_path / "owner" / "model") == tmp_path / "owner" / "model"
  assert find_model(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
  monkeypatch.chdir(tmp_path)
  assert find_model("owner/model") == pathlib.Path("owner/model")  # a folder goes before a hub id
  assert find_model("a.gguf") == pathlib.Path("a.gguf")
  (tmp_path / "model.safetensors").write_bytes(b"")
  assert "name its folder, or a .gguf file" in error_of(tmp_path / "model.safetensors")


def test_embedded_names():
  folder = find_model("embedded/arith-2m")
  assert (folder / "config.json").is_file() and folder.name == "arith-2m"
  for name in ("embedded/arith-3m", "embedded/", "embedded/../models", "embedded/arith-2m/", "embedded/arith-2m/.."):
    assert "choose from embedded/arith-2m" in error_of(name)


def test_models_in_other_packages(tmp_path, monkeypatch):
  for package, file in (("one_model", "a.gguf"), ("other_model", "model/model.safetensors"), ("no_model", "a.txt")):
    (tmp_path / package / file).parent.mkdir(parents=True)
    (tmp_path / package / file).write_bytes(b"")
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('no code of it is run')")
  monkeypatch.syspath_prepend(tmp_path)
  assert find_model("installed/one_model") == tmp_path / "one_model" / "a.gguf"
  assert find_model("installed/other_model") == tmp_path / "other_model" / "model"
  for name in ("installed/no_model", "installed/nothing_at_all", "installed/", "installed/os.path", "installed/../a"):
    assert "is installed" in error_of(name)


@pytest.mark.parametrize(
  "name",
  ("", "nope", "./nope", "../nope", "/nope/nope", "~/nope", "a/b/c", "a/b/c/d.gguf", "nope.gguf", "a/", "a/b/c.bin"),
)
def test_names_that_are_nothing(name):
  assert "no folder, no .gguf file, and no hub id (owner/name)" in error_of(name)


@pytest.mark.parametrize("name", ("ow ner/name", "owner/na--me", "owner/name.git", "-owner/name", "owner/" + "n" * 200))
def test_names_that_the_hub_cannot_have(name):
  assert "could not be fetched from the hub: " in error_of(name)


# The hub. huggingface_hub reads its environment when it is imported: each call is in a process of its own.

_CALLS = """
import json, pathlib
import gfn_jax.models.hub as hub

def call(name, revision, load):
  try:
    if load:
      from gfn_jax.models import load_pretrained
      pretrained = load_pretrained(name, revision=revision)
      return [pretrained.source, pretrained.config.hidden_size]
    found = hub.find_model(name, revision)
    return [str(found), sorted(p.name for p in found.iterdir()) if found.is_dir() else []]
  except ValueError as e:
    return str(e)

print("RESULTS" + json.dumps([call(*arguments) for arguments in json.loads(ARGUMENTS)]))
"""


def call_in_a_process(*calls):
  """`find_model(name, revision)`, or `load_pretrained` where `load`, of each (name, revision, load) -> [path, names of
  its files] or an error's text."""
  padded = [(*call, None, False)[:3] if len(call) == 1 else (*call, False)[:3] for call in calls]
  out = run_python(f"ARGUMENTS = {json.dumps(padded)!r}\n{_CALLS}")
  return json.loads(out.rpartition("RESULTS")[2])


def test_snapshot_in_the_cache_is_found_offline(tmp_path, monkeypatch):
  repository = tmp_path / "hub" / "models--owner--name"
  snapshot = repository / "snapshots" / MAIN
  save_pretrained(snapshot, dataclasses.replace(tiny_pretrained(), tokenizer=None))
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text(MAIN)
  (repository / "refs" / "v1").write_text(TAGGED)  # known, and not there
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  found, by_commit, loaded, tag, other = call_in_a_process(
    ("owner/name",), ("owner/name", MAIN), ("owner/name", None, True), ("owner/name", "v1"), ("owner/other",)
  )
  assert found == by_commit == [str(snapshot), ["config.json", "model.safetensors"]]
  assert loaded == ["owner/name", 32]
  for error, name in ((tag, "owner/name"), (other, "owner/other")):
    assert "\n" not in error and f"'{name}'" in error and "HF_HUB_OFFLINE is set" in error and str(tmp_path) in error


class _Hub(http.server.BaseHTTPRequestHandler):
  """What huggingface_hub asks a hub for: the commit of a revision, its tree, and files."""

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self._answer(with_body=False)

  def do_GET(self):
    self._answer(with_body=True)

  def _send(self, status, body=b"", with_body=True, **headers):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    if with_body:
      self.wfile.write(body)

  def _json(self, value):
    self._send(200, json.dumps(value).encode(), Content_Type="application/json")

  def _answer(self, with_body):
    server = self.server
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
    server.requests.append((self.command, path, self.headers.get("Authorization")))
    for repository, (commits, files) in server.repositories.items():
      if path.startswith(f"api/models/{repository}/revision/"):
        revision = path.rsplit("/", 1)[1]
        if revision not in commits:
          return self._send(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return self._json({"id": repository, "sha": commits[revision], "siblings": [{"rfilename": n} for n in files]})
      if path.startswith(f"api/models/{repository}/tree/"):
        return self._json(
          [{"type": "file", "path": n, "size": len(x), "oid": hashlib.sha1(x).hexdigest()} for n, x in files.items()]
        )
      if path.startswith(f"{repository}/resolve/"):
        commit, name = path.removeprefix(f"{repository}/resolve/").split("/", 1)
        commit = commits.get(commit, commit)
        if repository == "owner/gated":
          return self._send(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
        if name not in files:
          return self._send(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        body = files[name]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self._send(200, body, with_body, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="none")
    return self._send(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")


@contextlib.contextmanager
def serving(repositories):
  """The hub on a port of this machine; yields it. `repositories`: name -> ({revision: commit}, {path: bytes})."""
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
    server.repositories, server.requests = repositories, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


CALLS = {
  "single": ("owner/single", None, True),
  "revision": ("owner/single", "v1.0", False),
  "commit": ("owner/single", TAGGED, False),
  "sharded": ("owner/sharded", None, True),
  "flax": ("owner/flax", None, False),
  "pickled": ("owner/pickled", None, False),
  "gguf": ("owner/gguf/model-q8_0.gguf", None, False),
  "no such gguf": ("owner/gguf/model-q2.gguf", None, False),
  "no such revision": ("owner/single", "v9", False),
  "no such repository": ("owner/nothing", None, False),
  "gated": ("owner/gated", None, False),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  """(results by the name of the call, every request (method, path, authorization))."""
  folder = tmp_path_factory.mktemp("hub")
  save_pretrained(folder / "model", dataclasses.replace(tiny_pretrained(), tokenizer=None))
  config, weights = ((folder / "model" / n).read_bytes() for n in ("config.json", "model.safetensors"))
  others = {
    "pytorch_model.bin": b"never", "pytorch_model.bin.index.json": b"{}", "model.pt": b"never", "tf_model.h5": b"never",
    "onnx/config.json": b"never", "onnx/model.safetensors": b"never", "original/consolidated.00.pth": b"never",
    "1_Pooling/config.json": b"{ }", "2_Dense/config.json": b"never", "1_Dense/model.safetensors": b"never",
    "modeling_evil.py": b"never", ".gitattributes": b"never", "README.md": b"---\nlicense: mit\n---\n",
  }  # fmt: skip
  tensors = safetensors.numpy.load(weights)
  names = sorted(tensors)
  weight_map = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
  shards = {
    file: safetensors.numpy.save({n: tensors[n] for n in names if weight_map[n] == file})
    for file in sorted(set(weight_map.values()))
  }
  index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
  commits = {"main": MAIN, "v1.0": TAGGED, MAIN: MAIN, TAGGED: TAGGED}
  flax_model = {"flax_model.msgpack": b"x"}
  repositories = {
    "owner/single": (commits, others | flax_model | {"config.json": config, "model.safetensors": weights}),
    "owner/sharded": (commits, others | flax_model | index | shards | {"config.json": config}),
    "owner/flax": (commits, others | flax_model | {"config.json": config}),
    "owner/pickled": (commits, others | {"config.json": config}),
    "owner/gguf": (commits, {"model-q8_0.gguf": b"GGUF", "model-q4_0.gguf": b"GGUF"}),
    "owner/gated": (commits, {"config.json": config, "model.safetensors": weights}),
  }
  with pytest.MonkeyPatch.context() as patch, serving(repositories) as server:
    patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("HF_HOME", str(folder / "home"))
    patch.setenv("HF_TOKEN", "hf_secret")
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("no_proxy", "127.0.0.1")
    results = call_in_a_process(*CALLS.values())
    return dict(zip(CALLS, results)), list(server.requests)


def fetched(requests, repository):
  """The files whose bytes were asked for."""
  resolved = f"{repository}/resolve/"
  return {p.removeprefix(resolved).split("/", 1)[1] for m, p, _ in requests if m == "GET" and p.startswith(resolved)}


def test_a_repository_of_the_hub_is_loaded(hub):
  results, requests = hub
  assert results["single"] == ["owner/single", 32] and results["sharded"] == ["owner/sharded", 32]
  assert ("GET", "api/models/owner/single/revision/main", "Bearer hf_secret") in requests
  assert {authorization for _, path, authorization in requests if "owner/" in path} == {"Bearer hf_secret"}


def test_only_what_is_needed_is_fetched(hub):
  _, requests = hub
  assert fetched(requests, "owner/single") == {
    "README.md", "config.json", "1_Pooling/config.json", "pytorch_model.bin.index.json", "model.safetensors",
  }  # fmt: skip
  assert {n for n in fetched(requests, "owner/sharded") if "model" in n} == {
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "pytorch_model.bin.index.json",
  }  # fmt: skip
  assert "flax_model.msgpack" in fetched(requests, "owner/flax")
  assert fetched(requests, "owner/gguf") == {"model-q8_0.gguf"}


def test_the_revision_is_the_one_asked_for(hub):
  results, requests = hub
  assert ("GET", "api/models/owner/single/revision/v1.0", "Bearer hf_secret") in requests
  for name in ("revision", "commit"):
    path, files = results[name]
    assert pathlib.Path(path).name == TAGGED and "model.safetensors" in files
  assert pathlib.Path(results["gguf"][0]).name == "model-q8_0.gguf"


@pytest.mark.parametrize(
  ("name", "parts"),
  (
    ("pickled", ("'owner/pickled'", "neither model.safetensors nor flax_model.msgpack", "pickle runs code")),
    ("no such gguf", ("'owner/gguf'", "no file 'model-q2.gguf'")),
    ("no such revision", ("'owner/single'", "no revision 'v9'")),
    ("no such repository", ("'owner/nothing'", "no repository of that name", "HF_TOKEN")),
    ("gated", ("'owner/gated'", "licence must be accepted", "HF_TOKEN")),
  ),
)
def test_what_the_hub_refuses_is_one_line(hub, name, parts):
  message = hub[0][name]
  assert isinstance(message, str) and "\n" not in message
  for part in parts:
    assert part in message


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))  # and never listens
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (error,) = call_in_a_process(("owner/name",))
  assert "\n" not in error and "'owner/name'" in error and str(tmp_path) in error
  assert "the hub cannot be reached" in error and "fetch it where there is a network, or name a folder" in error
