"""`python -m gfn_jax.report` on made-up workdirs: means and deviations by hand, files, and what it refuses."""

import csv
import json
from math import log
import re
import shlex

from absl import flags
from ml_collections import config_flags
import pytest

from configs import arith, jsonl
from gfn_jax.config import flatten
from gfn_jax.plots.frontier import mean_points
from gfn_jax.report.__main__ import write_report
from gfn_jax.report.cells import Cell, group_runs
from gfn_jax.report.commands import command_of
from gfn_jax.report.over_optimisation import measure
from gfn_jax.report.runs import read_runs
from gfn_jax.report.section import markdown_table
from gfn_jax.results import label
from testing import assert_one_line, run_commands

PNG = b"\x89PNG"


def make_run(folder, results, *, task="arith", method="gfn", seed=0, samples=(), finished=True, **fields):
  """A workdir as `train` leaves it. `results` without their task; a field "a__b" is config.a.b."""
  folder.mkdir(parents=True)
  config = {"name": task, "variant": "", "task": task, "method": method, "seed": seed, "train.num_steps": 250}
  config |= {"train.log_every": 1, "loss.name": "subtb", "reward.temperature_end": 1.0, "data.num_seed_rationales": 50}
  config |= {"subj.num_labels": 10, "replay.seed_from": "inverse_prompt", "eval.num_votes": 10}
  config |= {k.replace("__", "."): v for k, v in fields.items()}
  record = {"config": config, "commit": "abc123", "devices": ["cpu:0"], "device_kinds": ["cpu"]}
  (folder / "config.json").write_text(json.dumps(record))
  found = {f"{task}/{k}": v for k, v in results.items()}
  if finished:
    (folder / "results.json").write_text(json.dumps(found | {"meta/seed": seed, "time/total_seconds": 1.0}))
  steps = [{"step": n, "loss": 1.0, "step_seconds": s} for n, s in ((1, 9.0), (2, 0.25), (3, 0.75))]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (*steps, {"step": 250, **found})))
  (folder / "samples.jsonl").write_text("".join(json.dumps({"step": 250, **s}) + "\n" for s in samples))
  return folder


def make_sweep(folder, config, name, runs):
  """`runs`: folder name -> overrides."""
  command = f"python -m launch.sweep --config={config} --name={name}"
  runs = {run: {"variant": "", "overrides": overrides} for run, overrides in runs.items()}
  record = {"config": config, "name": name, "command": command, "runs": runs}
  (folder / "sweep.json").write_text(json.dumps(record))
  return folder


def rationale(method, z, log_reward, right, x="Question: 6 - 0 - 4 = ? Answer:"):
  return {"method": method, "kind": "3", "X": x, "Z": z, "Y": ". The answer is 2.", "log_R": log_reward, "right": right}


RIGHT, REPEATED = "6 - 0 = 6, 6 - 4 = 2", "6 - 0 - 4"
PPO_SAMPLES = [rationale("ppo", REPEATED, -1.0, False)] * 2
GFN_SAMPLES = [rationale("gfn", RIGHT, -5.0, True), rationale("gfn", "6 - 0 = 6, 6 + 4 = 10", -7.0, False)]


@pytest.fixture
def table4(tmp_path):
  """A sweep with three seeds of gfn and two of ppo, one of which has not ended."""
  folder = tmp_path / "arith-table4"
  for seed, accuracy in enumerate((0.90, 0.94, 0.98)):
    results = {"gfn/accuracy/3": accuracy, "base/accuracy/3": 0.1 + 0.1 * seed, "base_7shot/accuracy/6": 0.5}
    make_run(folder / f"gfn{seed}", results, seed=seed, samples=GFN_SAMPLES)
  results = {"ppo/accuracy/3": 0.3, "base/accuracy/3": 0.1}
  make_run(folder / "ppo0", results, method="ppo", samples=PPO_SAMPLES)
  make_run(folder / "ppo1", {}, method="ppo", seed=1, finished=False)
  runs = {f"gfn{s}": {"method": "gfn", "seed": s} for s in range(3)} | {f"ppo{s}": {"method": "ppo"} for s in range(2)}
  return make_sweep(folder, "configs/arith.py", "table4", runs)


def read_csv(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def row_of(markdown, name):
  """The cells of the first row of a report that begins with `name`."""
  (line, *_) = re.findall(rf"^\| {re.escape(name)} +\|(.*)\|$", markdown, re.MULTILINE)
  return [cell.strip() for cell in line.split("|")]


def test_cells_by_hand():
  three = Cell((90.0, 94.0, 98.0))
  assert (three.mean, three.deviation) == (94.0, 4.0)
  assert three.text(".1f") == "94.0 ± 4.0 (3)"
  assert Cell((0.00012345,)).text(".3g") == "0.000123 (1)"
  assert Cell().text(".1f") == "-" and Cell().mean is None and Cell((1.0,)).deviation is None


def test_a_sweep_and_a_single_run_make_one_table(table4, tmp_path):
  sft = make_run(tmp_path / "sft", {"sft/accuracy/3": 0.5, "sft/accuracy/4": 0.25}, method="sft")
  written = write_report([table4, sft], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert written[0] == tmp_path / "report" / "report.md"

  header = row_of(markdown, "")
  assert header == ["3", "paper", "4", "paper", "5", "paper", "6"]  # 6 operands stand in the results alone
  assert row_of(markdown, "GFlowNet fine-tuning")[:3] == ["94.0 ± 4.0 (3)", "95.2 ± 1.3", "-"]
  assert row_of(markdown, "PPO")[:2] == ["30.0 (1)", "30.6 ± 4.1"]
  assert row_of(markdown, "supervised fine-tuning")[:4] == ["50.0 (1)", "72.1 ± 1.3", "25.0 (1)", "19.6 ± 2.2"]
  # ppo's run has a base of seed 0 too: it is the same, and does not count twice.
  assert row_of(markdown, "no demonstrations")[:2] == ["20.0 ± 10.0 (3)", "-"]
  assert row_of(markdown, "base, told how to begin")[:2] == ["-", "10.2"]
  assert row_of(markdown, "base, 7 demonstrations") == ["-"] * 6 + ["50.0 ± 0.0 (3)"]
  assert row_of(markdown, "20 demonstrations") == ["-", "35.5 ± 1.9", "-", "21 ± 1.4", "-", "10.5 ± 0.9", "-"]
  assert f"Left out, since they have not ended: {table4 / 'ppo1'}." in markdown
  assert "    python -m launch.sweep --config=configs/arith.py --name=table4\n" in markdown
  assert f"--config=configs/arith.py --workdir={sft}" in markdown
  assert "5 runs; commit abc123; devices 1 x cpu." in markdown

  records = {(r["row"], r["column"]): r for r in read_csv(tmp_path / "report" / "table4.csv")}
  ours = records["GFlowNet fine-tuning", "3"]
  assert (float(ours["mean"]), float(ours["standard_deviation"]), ours["n"]) == (
    pytest.approx(94.0), pytest.approx(4.0), "3",
  )  # fmt: skip
  assert ours["paper"] == "95.2 ± 1.3"
  assert records["PPO", "4"] == {
    "row": "PPO", "column": "4", "mean": "", "standard_deviation": "", "n": "0", "paper": "13.7 ± 4.1",
  }  # fmt: skip


def test_what_the_reward_prefers_beside_what_is_right(table4, tmp_path):
  write_report([table4], tmp_path)
  markdown = (tmp_path / "report.md").read_text().split("## Table E.4 and E.5")[1]
  header = row_of(markdown, "")
  ours = dict(zip(header, row_of(markdown, "GFlowNet fine-tuning")))
  ppo = dict(zip(header, row_of(markdown, label("ppo"))))
  assert (ours["log R (nats)"], ours["right (%)"], ours["wrong operator"]) == (
    "-6.0 ± 0.0 (3)", "50.0 ± 0.0 (3)", "1 ± 0 (3)",
  )  # fmt: skip
  assert (ppo["log R (nats)"], ppo["right (%)"], ppo["other"], ppo["wrong"]) == (
    "-1.0 (1)", "0.0 (1)", "2 (1)", "2 (1)",
  )  # fmt: skip
  assert (ours["distinct of a question's (%)"], ppo["distinct of a question's (%)"]) == ("100.0 ± 0.0 (3)", "50.0 (1)")
  assert (tmp_path / "table4_rewards.png").read_bytes().startswith(PNG)
  assert (tmp_path / "table4_rewards.png").stat().st_size > 5000

  errors = read_csv(tmp_path / "table4_errors.csv")
  assert [r["error"] for r in errors if r["method"].startswith("paper")] == [
    "missing operand", "wrong operand", "wrong operator",
  ]  # fmt: skip
  assert [(r["error"], r["Z"]) for r in errors[3:]] == [
    ("wrong operator", "6 - 0 = 6, 6 + 4 = 10"), ("other", REPEATED),
  ]  # fmt: skip
  samples = read_csv(tmp_path / "table4_samples.csv")
  assert [(r["Z"], r["log_R"]) for r in samples] == [
    (RIGHT, "-5.0"), ("6 - 0 = 6, 6 + 4 = 10", "-7.0"), (REPEATED, "-1.0"),
  ]  # fmt: skip
  assert f"{RIGHT} (-5.0) <br> 6 - 0 = 6, 6 + 4 = 10 (-7.0) | {REPEATED} (-1.0)" in re.sub(" +", " ", markdown)
  assert "-13.17" in markdown.split("the paper's samples")[1]


def test_measures_by_hand():
  wrong = [rationale("gfn", "6 - 0 = 6", -2.0, False), rationale("gfn", "6 - 0 = 6, 6 - 1 = 5", -3.0, False)]
  other = [rationale("gfn", "1 + 1", -4.0, False, x="Question: 1 + 1 + 1 = ? Answer:")] * 2
  found = measure([*wrong, rationale("gfn", RIGHT, -1.0, True), *other])
  assert found == pytest.approx({
    "log_reward": -14 / 5, "right": 0.2, "distinct": (1 + 0.5) / 2, "samples": 5, "wrong": 4, "missing operand": 1,
    "wrong operand": 1, "wrong operator": 0, "other": 2,
  })  # fmt: skip


@pytest.mark.parametrize(
  ("field", "value"), (("loss__name", "tb"), ("train__num_steps", 500), ("eval__every_steps", 7), ("variant", "paper"))
)
def test_runs_of_different_settings_are_not_averaged(tmp_path, field, value):
  ours = make_run(tmp_path / "a", {"gfn/accuracy/3": 1.0}, eval__every_steps=50)
  theirs = make_run(tmp_path / "b", {"gfn/accuracy/3": 0.0}, seed=1, **{"eval__every_steps": 50} | {field: value})
  dotted = field.replace("__", ".")
  with pytest.raises(ValueError, match=f"{ours} and {theirs} cannot be averaged: config.{dotted} is .* and {value!r}"):
    write_report([ours, theirs], tmp_path / "report")
  assert not (tmp_path / "report").exists()


def test_a_field_that_changes_nothing_may_differ(tmp_path):
  folders = [make_run(tmp_path / str(n), {"gfn/accuracy/3": 1.0}, seed=n, train__log_every=n) for n in (1, 2)]
  (group,) = group_runs((), read_runs(folders)[0])
  assert [run.config["seed"] for run in group.runs] == [1, 2]


def test_a_seed_counts_once(tmp_path):
  a, b = (make_run(tmp_path / n, {"gfn/accuracy/3": 1.0}) for n in "ab")
  with pytest.raises(ValueError, match=f"{a} and {b} cannot be averaged: config.seed is 0 in both"):
    write_report([a, b], tmp_path / "report")
  assert len(read_runs([a, tmp_path / "b" / ".." / "a"])[0]) == 1


def test_a_run_that_goes_on_for_more_steps_has_not_ended(tmp_path):
  folder = make_run(tmp_path / "a", {"gfn/accuracy/3": 1.0})
  for steps, is_finished in ((249, False), (250, True)):
    (folder / "results.json").write_text(json.dumps({"arith/gfn/accuracy/3": 1.0, "meta/num_steps": steps}))
    assert bool(read_runs([folder])[0]) == is_finished


def test_a_run_of_a_sweep_that_is_named_twice_belongs_to_the_sweep(table4):
  for folders in ([table4, table4 / "gfn0"], [table4 / "gfn0", table4]):
    runs, unfinished = read_runs(folders)
    assert len(runs) == 4 and unfinished == [table4 / "ppo1"]
    assert {run.sweep for run in runs} == {"table4"}


REFUSED = {
  "no run": (["{}/empty"], None, "{}/empty is no run and no sweep"),
  "a missing folder": (["{}/missing"], None, "{}/missing is no run and no sweep"),
  "not ended": (["{}/open"], None, "no run has ended: {}/open is unfinished"),
  "an unknown table": (["{}/arith"], "table5", "--table=table5 is unknown: choose from table2, table3, table4,"),
  "another task's table": (["{}/arith"], "table2", "{}/arith is a run of task 'arith': table 'table2' is of 'infill'"),
  "a damaged config": (["{}/damaged"], None, "{}/damaged/config.json is damaged: it has no 'config'"),
  "a damaged sweep": (["{}/sweep"], None, "{}/sweep/sweep.json is damaged: it has no 'command'"),
  "nothing": ([], None, "name the runs to report"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_slips_get_one_line(case, tmp_path):
  folders, table, message = REFUSED[case]
  for name in ("empty", "damaged", "sweep"):
    (tmp_path / name).mkdir()
  make_run(tmp_path / "open", {}, finished=False)
  make_run(tmp_path / "arith", {"gfn/accuracy/3": 1.0})
  (tmp_path / "damaged" / "config.json").write_text("{}")
  (tmp_path / "damaged" / "results.json").write_text("{}")
  (tmp_path / "sweep" / "sweep.json").write_text('{"name": "table4", "runs": {}}')
  with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
    write_report([f.format(tmp_path) for f in folders], tmp_path / "report", table)


def test_the_command_line(tmp_path):
  a = make_run(tmp_path / "a", {"gfn/accuracy/3": 1.0})
  b = make_run(tmp_path / "b", {"gfn/accuracy/3": 1.0}, seed=1, loss__name="tb")
  output = f"--output={tmp_path}/report"
  refused, done = run_commands([["gfn_jax.report", str(a), str(b), output], ["gfn_jax.report", str(a), output]])
  assert_one_line(refused[0], refused[2], [str(a), str(b), "config.loss.name", "'subtb'", "'tb'"])
  assert (done[0], done[2]) == (0, "")
  assert done[1].splitlines()[:2] == [str(tmp_path / "report" / "report.md"), str(tmp_path / "report" / "table4.csv")]


def test_table_3_and_the_ablations_that_borrow_from_it(tmp_path):
  main, ablation = tmp_path / "table3", tmp_path / "table_d4"
  shares = [
    {"method": "gfn", "X": "(all)", "Y": "objective", "Z": z, "share": s} for z, s in ((" facts", 0.2), (" a | b", 0.1))
  ]
  for labels in (10, 50):
    for seed in (0, 1):
      results = {
        f"gfn/accuracy/{labels}": 0.7 + 0.1 * seed, f"gfn/accuracy/{labels}/round0": 0.0,
        f"gfn_sft/accuracy/{labels}": 0.75, f"{labels}_shot/accuracy/{labels}": 0.6,
        f"zero_shot/accuracy/{labels}": 0.5,
      }  # fmt: skip
      run = make_run(main / f"{labels}-{seed}", results, task="subj", seed=seed, subj__num_labels=labels)
      e_step = run / "round0" / "e"  # expectation-maximisation leaves its samples there
      e_step.mkdir(parents=True)
      (run / "samples.jsonl").rename(e_step / "samples.jsonl")
      lines = [s | {"step": 100, "share": s["share"] + 0.1 * seed} for s in shares] if labels == 50 else []
      (e_step / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))
  make_sweep(main, "configs/subj.py", "table3", {p.name: {} for p in main.iterdir()})
  for votes in (10, 1):
    results = {"gfn/accuracy/10": 0.6 + votes / 100, "zero_shot/accuracy/10": 0.5}
    make_run(ablation / str(votes), results, task="subj", eval__num_votes=votes, replay__seed_from="nothing")
  make_sweep(ablation, "configs/subj.py", "table_d4", {"10": {}, "1": {"eval.num_votes": 1}})

  write_report([main, ablation], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  table3, rest = markdown.split("## Table D.5")
  table_d5, table_d4 = rest.split("## Table D.4")
  assert row_of(table3, "GFlowNet fine-tuning")[::2] == ["75.0 ± 7.1 (2)", "-", "75.0 ± 7.1 (2)"]
  assert row_of(table3, "GFlowNet + supervised fine-tuning")[0] == "75.0 ± 0.0 (2)"
  assert row_of(table3, "few-shot")[::2] == ["60.0 ± 0.0 (2)", "-", "60.0 ± 0.0 (2)"]
  assert row_of(table_d4, "GFlowNet fine-tuning")[:2] == ["75.0 ± 7.1 (2)", "71.4 ± 1.8"]
  assert row_of(table_d4, "without seeding the buffer")[:2] == ["70.0 (1)", "64.7 ± 8.9"]
  assert row_of(table_d4, "without seeding or voting")[:2] == ["61.0 (1)", "63.9 ± 7.1"]
  assert "zero" not in table_d4
  assert "50 labels" in table_d5.splitlines()[0]
  assert row_of(table_d5, "objective") == ["facts", "25.0 ± 7.1 (2)", "about a factual event", "11.4"]
  assert "a \\| b" in table_d5 and "about the movie experience" in table_d5


def test_baselines_that_a_setting_changes_stand_apart(tmp_path):
  for number in (0, 3):
    results = {"gfn/accuracy/3": 0.5, "base/accuracy/3": 0.25, "base_3shot/accuracy/3": number / 10}
    make_run(tmp_path / str(number), results, eval__num_votes=number)
  make_sweep(tmp_path, "configs/arith.py", "votes", {str(n): {"eval.num_votes": n} for n in (0, 3)})
  write_report([tmp_path], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert row_of(markdown, f"{label('base_3shot')}, eval.num_votes = 0")[0] == "0.0 (1)"
  assert row_of(markdown, f"{label('base_3shot')}, eval.num_votes = 3")[0] == "30.0 (1)"
  assert row_of(markdown, label("base"))[0] == "25.0 (1)"


def test_fewer_seed_rationales(tmp_path):
  for number in (10, 5):
    make_run(tmp_path / str(number), {"gfn/accuracy/3": number / 100}, data__num_seed_rationales=number)
  write_report([tmp_path / "10", tmp_path / "5"], tmp_path / "report", "table_e3")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert row_of(markdown, "10 seed rationales")[:2] == ["10.0 (1)", "58.6"]
  assert row_of(markdown, "0 seed rationales")[:2] == ["-", "22.6"]
  assert row_of(markdown, "GFlowNet fine-tuning, data.num_seed_rationales = 5")[:2] == ["5.0 (1)", "-"]


def test_a_sweep_of_ones_own_has_a_row_a_setting(tmp_path):
  for name in ("subtb", "tb"):
    results = {"gfn/accuracy/3": 0.5, "gfn/log_ratio_variance": 2.0 if name == "tb" else 1.0, "base/accuracy/3": 0.25}
    samples = [rationale("gfn", "6 - 0 = 6, 6 + 4 = 10" if name == "tb" else REPEATED, -7.0, False)]
    make_run(tmp_path / name, results, loss__name=name, samples=samples)
  make_sweep(tmp_path, "configs/arith.py", "objectives", {n: {"loss.name": n, "seed": 0} for n in ("subtb", "tb")})
  write_report([tmp_path], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert "## objectives: arith" in markdown and "paper" not in row_of(markdown, "")
  assert row_of(markdown, "GFlowNet fine-tuning, loss.name = tb") == ["50.0 (1)", "-", "-", "2.0 (1)", "-", "0.75 (1)"]
  assert row_of(markdown, "base")[0] == "25.0 (1)"
  errors = [(r["method"], r["error"]) for r in read_csv(tmp_path / "report" / "objectives_errors.csv")]
  ours = label("gfn")
  assert errors[3:] == [(f"{ours}, loss.name = subtb", "other"), (f"{ours}, loss.name = tb", "wrong operator")]


def test_a_sweep_over_methods_alone_stands_beside_the_paper(tmp_path):
  for method in ("gfn", "ppo"):
    make_run(tmp_path / method, {f"{method}/accuracy/3": 0.5}, method=method)
  make_sweep(tmp_path, "configs/arith.py", "smoke", {m: {"method": m} for m in ("gfn", "ppo")})
  write_report([tmp_path], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert row_of(markdown, "PPO")[:2] == ["50.0 (1)", "30.6 ± 4.1"]
  assert row_of(markdown, "PPO")[-1] == "0.75 (1)" and row_of(markdown, "")[-1] == "seconds a step"
  assert "## smoke: arith" in markdown


def test_runs_of_other_settings_do_not(tmp_path):
  """Nor do validation problems, which the title names."""
  for method in ("gfn", "ppo"):
    make_run(tmp_path / method, {f"{method}/accuracy/3": 0.5}, method=method, eval__split="validation")
  fields = {m: {"method": m, "eval.split": "validation"} for m in ("gfn", "ppo")}
  make_sweep(tmp_path, "configs/arith.py", "misspecified", fields)
  write_report([tmp_path], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert "## misspecified: arith, validation problems" in markdown and "30.6" not in markdown.split("## ")[1]
  assert row_of(markdown, "PPO")[:2] == ["50.0 (1)", "-"]


def test_a_row_names_what_the_rows_of_its_method_differ_in(tmp_path):
  trials = {
    **{f"g{r}": ("gfn", {"train.learning_rate": r, "grpo.clip": 0.2}) for r in (0.1, 0.2)},
    **{f"q{c}": ("grpo", {"train.learning_rate": 0.1, "grpo.clip": c}) for c in (0.1, 0.2)},
    "s": ("sft", {"train.learning_rate": 0.1, "grpo.clip": 0.2}),
  }
  for name, (method, fields) in trials.items():
    samples = [rationale(method, REPEATED, -7.0, False)]
    fields = {f.replace(".", "__"): v for f, v in fields.items()}
    make_run(tmp_path / name, {f"{method}/accuracy/3": 0.5}, method=method, samples=samples, **fields)
  make_sweep(tmp_path, "configs/arith.py", "tuning", {n: fields | {"method": m} for n, (m, fields) in trials.items()})
  write_report([tmp_path], tmp_path / "report")
  rows = [r["row"] for r in read_csv(tmp_path / "report" / "tuning.csv") if r["column"] == "3"]
  assert rows == [
    "GFlowNet fine-tuning, train.learning_rate = 0.1", "GFlowNet fine-tuning, train.learning_rate = 0.2",
    "GRPO, grpo.clip = 0.1", "GRPO, grpo.clip = 0.2",
    "supervised fine-tuning, grpo.clip = 0.2, train.learning_rate = 0.1",
  ]  # fmt: skip
  assert {r["method"] for r in read_csv(tmp_path / "report" / "tuning_errors.csv")} >= set(rows)


def test_a_task_without_a_table_in_the_paper(tmp_path):
  make_run(tmp_path / "a", {"gfn/log_reward": -1.5, "gfn/distinct_share": 0.5}, task="jsonl")
  write_report([tmp_path / "a"], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert row_of(markdown, "GFlowNet fine-tuning")[:2] == ["-1.5 (1)", "0.5 (1)"]


@pytest.mark.parametrize("task", ["configs.six_words:SixWordsTask", "configs/six_words.py:SixWordsTask"])
def test_a_task_of_ones_own(task, tmp_path):
  """Its keys begin with its name, which config.task is not."""
  run = make_run(tmp_path / "a", {"gfn/right": 0.25}, task="six_words")
  record = json.loads((run / "config.json").read_text())
  record["config"]["task"] = task
  (run / "config.json").write_text(json.dumps(record))
  written = write_report([run], tmp_path / "report")
  assert row_of((tmp_path / "report" / "report.md").read_text(), "GFlowNet fine-tuning")[0] == "0.25 (1)"
  assert tmp_path / "report" / "six_words.csv" in written


def numbers(method, *probabilities):
  return [
    {"method": method, "X": "a number: ", "Z": str(n), "log_q": log(p), "log_R": log(0.5)}
    for n, p in enumerate(probabilities)
  ]


def test_figure_2(tmp_path):
  for seed in (0, 1):
    results = {"gfn/histogram/valid_share": 1.0, "gfn/kl_q_target": 0.01 * (1 + seed), "base/valid_mass": 0.5}
    samples = numbers("gfn", 0.4, 0.6) + numbers("base", 0.1, 0.2)
    make_run(tmp_path / str(seed), results, task="rng", seed=seed, samples=samples)
  write_report([tmp_path / "0", tmp_path / "1"], tmp_path / "report")
  assert (tmp_path / "report" / "fig2.png").read_bytes().startswith(PNG)
  assert (tmp_path / "report" / "fig2.png").stat().st_size > 5000
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert "![Figure 2: random numbers](fig2.png)" in markdown
  ours = dict(zip(row_of(markdown, ""), row_of(markdown, "GFlowNet fine-tuning")))
  assert ours["KL(q to target), nats, exact"] == "0.015 ± 0.00707 (2)"
  assert ours["valid samples (%)"] == "100.0 ± 0.0 (2)"


def test_figure_3(tmp_path):
  folders = []
  for temperature, seed, best in ((0.8, 0, -10.0), (0.8, 1, -12.0), (0.9, 0, -14.0)):
    results = {
      "gfn/max_log_likelihood": best, "gfn/diversity": 0.5, "base/max_log_likelihood": -20.0, "base/diversity": 0.8,
      "sampling_0.8/max_log_likelihood": -18.0, "sampling_0.8/diversity": 0.7, "greedy/max_log_likelihood": -15.0,
      "diverse_beam/max_log_likelihood": -13.0, "diverse_beam/diversity": 0.4,
    }  # fmt: skip
    samples = [{"method": m, "X": "It rains.", "Z": f" {m} wins", "log_R": best} for m in ("gfn", "base", "top_k_50")]
    folders.append(
      make_run(
        tmp_path / f"{temperature}-{seed}", results, task="next_sentence", seed=seed, samples=samples,
        reward__temperature_end=temperature,
      )
    )  # fmt: skip
  assert mean_points(folders)["gfn", 0.8] == (0.5, -11.0)
  assert mean_points(folders)["base", None] == pytest.approx((0.8, -20.0))
  write_report(folders, tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  assert row_of(markdown, "GFlowNet fine-tuning, reward.temperature_end = 0.8")[0] == "-11.00 ± 1.41 (2)"
  assert row_of(markdown, "base")[0] == "-20.00 ± 0.00 (2)"
  assert (tmp_path / "report" / "fig3.png").stat().st_size > 5000
  texts = markdown.split("## Table B.1")[1]
  assert "base wins" in texts and "top_k" not in texts
  assert "GFlowNet fine-tuning, reward.temperature_end = 0.9" in texts


def test_infills_side_by_side(tmp_path):
  for method in ("gfn", "sft"):
    results = {f"{method}/bleu4": 2.0, "base/bleu4": 1.0}
    story = {"X": "Beginning: A. B. C.", "Y": " E."}
    samples = [story | {"method": m, "Z": f" by {m}", "log_R": -3.0} for m in (method, "base")]
    make_run(tmp_path / method, results, task="infill", method=method, samples=samples)
  write_report([tmp_path / "gfn", tmp_path / "sft"], tmp_path / "report")
  markdown = (tmp_path / "report" / "report.md").read_text()
  texts = re.sub(" +", " ", markdown.split("## Tables C.3-C.8")[1])
  assert "| X … Y | base | GFlowNet fine-tuning | supervised fine-tuning |" in texts
  assert "| Beginning: A. B. C. … E. | by base (-3.0) | by gfn (-3.0) | by sft (-3.0) |" in texts


def test_the_command_of_a_single_run(tmp_path):
  config = json.loads(json.dumps(flatten(arith.get_config("smoke"))))
  config |= {"seed": 2, "lora.targets": ["q_proj", "v_proj"], "loss.name": "tb"}
  folder = make_run(tmp_path / "a run", {"gfn/accuracy/3": 1.0})
  (folder / "config.json").write_text(json.dumps({"config": config}))
  (run,), _ = read_runs([folder])
  assert command_of(run) == (
    f"python -m gfn_jax.main --config=configs/arith.py:smoke --workdir='{folder}' "
    """--config.lora.targets='("q_proj","v_proj")' --config.loss.name=tb --config.seed=2"""
  )
  config["name"] = "gone"
  (folder / "config.json").write_text(json.dumps({"config": config}))
  (run,), _ = read_runs([folder])
  assert command_of(run).endswith(f"  # and the fields that {folder}/config.json holds")


@pytest.mark.parametrize("words", ([], ["one"], ["two words", "it's", 'a "b" $HOME `ls` \\n !', "é🙂"]))
def test_a_command_gives_the_config_that_it_came_from(words, tmp_path):
  config = jsonl.get_config("smoke")
  config.jsonl.required_words, config.jsonl.prompt, config.data.path = tuple(words), "Say it's {a}:\n $1 ", "/a b/c"
  folder = make_run(tmp_path / "run", {"gfn/log_reward": 1.0}, task="jsonl")
  (folder / "config.json").write_text(json.dumps({"config": flatten(config)}))
  (run,), _ = read_runs([folder])
  argv = [a for a in shlex.split(command_of(run))[2:] if not a.startswith("--workdir")]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
  values(argv)
  assert flatten(values.config) == flatten(config)


def test_a_cell_stays_a_cell():
  assert markdown_table(["a|b", "c"], [["1\n2", "x"]]) == "| a\\|b | c   |\n|------|-----|\n| 1 2  | x   |"
