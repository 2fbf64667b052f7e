"""The import rule (modules import only from layers below their own), read from the syntax trees."""

import ast
import builtins
import pathlib
import symtable
import sys

import pytest

from testing import REPOSITORY

# Lowest first. Modules of one line may not import each other, except inside the packages below.
LAYERS = (
  ("types", "version", "files", "named", "distributed", "accelerators"),
  ("draws", "tools", "prefix_tree", "losses", "replay", "advantages"),
  ("models",),
  ("policy", "likelihood", "parallel", "flops", "shards"),
  ("sampler", "rewards"),
  ("beam_search",),
  ("task",),
  ("datasets",),
  ("tasks",),
  ("data",),
  ("completions", "texts"),
  ("preemption", "checkpoint", "metrics", "profiler"),
  ("evaluators",),
  ("experiment",),
  ("config",),
  ("workdir", "collect", "selection", "layouts"),
  ("on_policy", "step", "costs"),
  ("results",),
  ("plots",),
  ("train",),
  ("em",),
  ("cli",),
  ("benchmark", "evaluate", "export", "finetune", "generate", "plan", "pretrain", "report"),
  ("main",),
)

# The same inside packages.
PACKAGES = {
  "models": (
    ("rotary", "quantization", "text", "shapes"),
    ("architectures",),
    ("hub", "weights", "gguf_families", "gguf_file", "gguf_tokenizer"),
    ("gguf", "lora", "partition"),
    ("decoder",),
    ("prefix", "hf"),
    ("bert",),
    ("__init__",),
  ),
  "plots": (("figure",), ("curves", "frontier", "numbers"), ("__init__",)),
  "datasets": (
    ("__init__",),
    ("expressions", "sentences", "sources", "prepared"),
    ("json_lines",),
    ("arithmetic", "arithmetic_corpus", "subj", "roc_stories", "openwebtext_prompts"),
  ),
  "tasks": (("arith", "infill", "jsonl", "next_sentence", "rng", "subj"), ("__init__",)),
  "evaluators": (
    ("__init__",),
    ("bertscore", "diversity", "judge", "kept", "overlap", "records"),
    ("evaluator",),
    ("scoring",),
    ("accuracy", "infills", "labels", "numbers", "posterior", "sentences", "texts"),
    ("suite",),
  ),
  "benchmark": (
    ("__init__",),
    ("work", "peaks", "stopwatch"),
    ("measure",),
    ("sweep", "tables"),
    ("__main__",),
  ),
  "report": (
    ("__init__",),
    ("mistakes", "runs", "section"),
    ("over_optimisation",),
    ("tables",),
    ("cells",),
    ("commands", "figures", "scores", "texts"),
    ("__main__",),
  ),
}

BOTTOM = ("losses", "replay", "tools", "prefix_tree")  # users take them as they are


def module_name(path: pathlib.Path) -> str:
  """gfn_jax/models/hf.py -> "models.hf"; a package's own file -> "models.__init__"."""
  return ".".join(path.relative_to(REPOSITORY / "gfn_jax").with_suffix("").parts)


MODULES = {module_name(p): p for p in sorted((REPOSITORY / "gfn_jax").rglob("*.py")) if p.parent.name != "configs"}


def exists(name: str) -> bool:
  return name in MODULES or f"{name}.__init__" in MODULES


def imports_in(tree: ast.AST) -> set[str]:
  """What of gfn_jax a syntax tree imports, without its leading "gfn_jax."; not under `if TYPE_CHECKING`."""
  found = set()
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
      found |= imports_in(ast.Module(node.orelse, []))
      continue
    if isinstance(node, ast.Import):
      names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
      # "from gfn_jax import data" and "from gfn_jax.datasets import arithmetic" import modules, other names do not.
      names = [f"{node.module}.{a.name}" for a in node.names]
      names = [n if exists(n.removeprefix("gfn_jax.")) else node.module for n in names]
    else:
      found |= imports_in(node)
      continue
    found |= {n.removeprefix("gfn_jax.") for n in names if n.startswith("gfn_jax.")}
  return found


def imports_of(path: pathlib.Path) -> set[str]:
  return imports_in(ast.parse(path.read_text(), str(path)))


def level(layers, name: str) -> int:
  found = [i for i, layer in enumerate(layers) if name in layer]
  assert found, f"{name} stands in no layer of tests/test_layers.py: say where it belongs"
  return found[0]


def violations(module: str, imports: set[str]) -> list[str]:
  """Imports of `module` that do not go downwards."""
  package, _, inside = module.partition(".")
  wrong = []
  for name in imports:
    other, _, other_inside = name.partition(".")
    if other == package and inside:
      ranks = PACKAGES[package]
      if level(ranks, other_inside or "__init__") >= level(ranks, inside):
        wrong.append(name)
    elif level(LAYERS, other) >= level(LAYERS, package):
      wrong.append(name)
  return wrong


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_a_module_imports_only_from_layers_below_its_own(module):
  imports = imports_of(MODULES[module])
  assert not (wrong := violations(module, imports)), f"{module} imports {', '.join(wrong)}"
  package, _, inside = module.partition(".")
  level(LAYERS, package)
  if inside:
    level(PACKAGES[package], inside)


@pytest.mark.parametrize("module", BOTTOM)
def test_the_bottom_imports_nothing_of_the_package_but_types(module):
  assert imports_of(MODULES[module]) <= {"types"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("evaluators.")])
def test_evaluators_do_not_know_the_config_module(module):
  assert "config" not in imports_of(MODULES[module])


def test_configs_import_the_config_module_alone():
  for path in sorted((REPOSITORY / "configs").glob("*.py")):
    tree = ast.parse(path.read_text())
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imports |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = {"gfn_jax.config", "ml_collections"}
    if path.name == "six_words.py":  # the example of a task in code
      allowed |= {"gfn_jax.task", "gfn_jax.types"}
    imports = {i for i in imports if i.partition(".")[0] not in sys.stdlib_module_names}
    assert imports <= allowed, f"{path.name} imports {imports - allowed}"


def test_the_rule_sees_what_it_should_see():
  tree = ast.parse(
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from gfn_jax.train import train\nelse:\n"
    "  import gfn_jax.tools\n"
    "import jax\ndef f():\n  from gfn_jax import data, losses\nfrom gfn_jax.models.hf import logits\n"
  )
  assert imports_in(tree) == {"tools", "data", "losses", "models.hf"}
  assert violations("losses", {"types", "train"}) == ["train"]
  assert violations("sampler", {"rewards"}) == ["rewards"]
  assert violations("models.lora", {"models.architectures", "models"}) == ["models"]


def undefined_names(code: str) -> set[str]:
  """Globals that functions read and no line of the module sets. Linters cannot tell them from names of dimensions."""
  top = symtable.symtable(code, "module", "exec")
  known = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()} | set(dir(builtins))

  def read(scope):
    own = {s.get_name() for s in scope.get_symbols() if s.is_referenced() and s.is_global()}
    return own.union(*map(read, scope.get_children()))

  return read(top) - known - {"__file__", "__name__"}


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_defined(module):
  assert not undefined_names(MODULES[module].read_text())


def test_an_undefined_name_is_seen():
  assert undefined_names("import os\nA = 1\ndef f(x: 'B S'):\n  def g(): return x, os, A, len, MISSING") == {"MISSING"}


def test_files_stay_small_and_have_names():
  lines = lambda name: len(MODULES[name].read_text().splitlines())  # noqa: E731
  assert lines("main") < 80
  assert lines("train") < 350
  assert not [p for p in MODULES.values() if p.stem.endswith("utils")]
