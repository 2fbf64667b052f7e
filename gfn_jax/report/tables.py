"""The paper's tables as data: what makes their rows and columns, and the paper's numbers beside ours."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any

from gfn_jax.evaluators.posterior import METRICS as POSTERIOR_METRICS
from gfn_jax.report.mistakes import KINDS
from gfn_jax.report.over_optimisation import of_samples
from gfn_jax.report.runs import Run
from gfn_jax.results import label


@dataclasses.dataclass(frozen=True)
class Column:
  """A result: `key` is `<metric>[/<slice>]` of results.json, shown times `scale` in the format `digits`."""

  title: str
  key: str
  scale: float = 1.0
  digits: str = ".1f"


@dataclasses.dataclass(frozen=True)
class Row:
  """A method: `method` as result keys name it, "{slice}" in it standing for the column's slice.

  Attributes:
    where: config fields of the runs that it is made of.
    paper: the paper's cells, in the columns' order.
  """

  label: str
  method: str
  paper: tuple[str, ...] = ()
  where: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the paper.

  Attributes:
    rows: those that the paper has. Methods and settings beside them get rows of their own.
    varied: config fields in which runs of different rows, or columns, may differ; so may the method.
    in_columns: those of `varied` that the columns tell apart, as slices.
    policies_only: leaves out what the runs have not trained.
    baselines_vary: what they have not trained may depend on `varied`: it has a row a setting where it does.
    sliced: a metric whose further slices get columns of their own.
    measure: gives results that are not in results.json.
    borrows: the table whose GFlowNet runs belong here too, where there are any.
  """

  title: str
  task: str
  columns: tuple[Column, ...]
  rows: tuple[Row, ...] = ()
  varied: tuple[str, ...] = ()
  in_columns: tuple[str, ...] = ()
  policies_only: bool = False
  baselines_vary: bool = False
  sliced: str | None = None
  measure: Callable[[Run], Mapping[str, float]] | None = None
  borrows: str | None = None


def _shares(metric: str, *slices: str) -> tuple[Column, ...]:
  return tuple(Column(s, f"{metric}/{s}", scale=100) for s in slices)


def _seeded(number: int, *paper: str) -> Row:
  return Row(f"{number} seed rationales", "gfn", paper, {"data.num_seed_rationales": number})


def _ablated(label: str, seed_from: str, votes: int, *paper: str) -> Row:
  return Row(label, "gfn", paper, {"replay.seed_from": seed_from, "eval.num_votes": votes})


_OPERANDS = _shares("accuracy", "3", "4", "5")
_LABELS = _shares("accuracy", "10", "20", "50")
_FURTHER = (  # what a sweep of ours is after
  Column("Var(log R / T - log q), nats²", "log_ratio_variance"),
  Column("correlation of log R / T and log q", "log_reward_correlation", digits=".3f"),
  Column("seconds a step", "step_seconds", digits=".3g"),
)

TABLES = {
  "table2": Table(
    "Table 2: story infilling", "infill",
    (
      Column("BERTScore", "bertscore", digits=".3f"), Column("BLEU-4 (%)", "bleu4"), Column("GLEU-4 (%)", "gleu4"),
      Column("coherence (1-5), GPT4Eval", "coherence"), Column("log R (nats)", "log_reward"),
    ),
    (
      Row("prompting", "base", ("0.081 ± 0.009", "1.3 ± 0.5", "3.2 ± 0.1", "2.4")),
      Row("supervised fine-tuning", "sft", ("0.094 ± 0.007", "1.6 ± 0.8", "3.7 ± 0.4", "2.7")),
      Row("GFlowNet fine-tuning", "gfn", ("0.184 ± 0.004", "2.1 ± 0.2", "4.2 ± 0.7", "3.4")),
    ),
  ),
  "table3": Table(
    "Table 3: subjectivity, test accuracy (%) by number of labels", "subj", _LABELS,
    (
      Row("zero-shot", "zero_shot", ("51.7", "51.7", "51.7")),
      Row("few-shot", "{slice}_shot", ("61.3 ± 6.2", "61.8 ± 5.4", "65.8 ± 10.5")),
      Row("supervised fine-tuning", "sft", ("64.3 ± 2.8", "69.1 ± 0.8", "89.7 ± 0.4")),
      Row("GFlowNet fine-tuning", "gfn", ("71.4 ± 1.8", "81.1 ± 0.4", "87.7 ± 2.2")),
      Row("GFlowNet + supervised fine-tuning", "gfn_sft", ("75.2 ± 1.8", "78.7 ± 1.6", "89.9 ± 0.2")),
    ),
    varied=("subj.num_labels",), in_columns=("subj.num_labels",), sliced="accuracy",
  ),
  "table4": Table(
    "Table 4: arithmetic, test accuracy (%) by number of operands (5: out of distribution)", "arith", _OPERANDS,
    (
      Row("no demonstrations", "base"),
      Row(label("base_zero_shot"), "base_zero_shot", ("10.2", "6.4", "3.2")),
      Row("3 demonstrations", "base_3shot", ("15.8 ± 3.1", "11 ± 1.7", "5.4 ± 0.2")),
      Row("5 demonstrations", "base_5shot", ("20.4 ± 10.4", "17.6 ± 0.6", "6.6 ± 1.1")),
      Row("10 demonstrations", "base_10shot", ("26.5 ± 1.4", "15.2 ± 1.7", "8.9 ± 1.9")),
      Row("20 demonstrations", "base_20shot", ("35.5 ± 1.9", "21 ± 1.4", "10.5 ± 0.9")),
      Row("supervised fine-tuning", "sft", ("72.1 ± 1.3", "19.6 ± 2.2", "12.8 ± 5.7")),
      Row("PPO", "ppo", ("30.6 ± 4.1", "13.7 ± 4.1", "5.6 ± 3.1")),
      Row("GFlowNet fine-tuning", "gfn", ("95.2 ± 1.3", "75.4 ± 2.9", "40.7 ± 9.1")),
    ),
    sliced="accuracy",
  ),
  "table_d4": Table(
    "Table D.4: subjectivity, ablations, test accuracy (%) by number of labels", "subj", _LABELS,
    (
      _ablated("GFlowNet fine-tuning", "inverse_prompt", 10, "71.4 ± 1.8", "81.1 ± 0.4", "87.7 ± 2.2"),
      _ablated("without seeding the buffer", "nothing", 10, "64.7 ± 8.9", "68.7 ± 1.7", "77.0 ± 5.5"),
      _ablated("without seeding or voting", "nothing", 1, "63.9 ± 7.1", "65.9 ± 2.4", "75.4 ± 3.3"),
    ),
    varied=("subj.num_labels", "replay.seed_from", "eval.num_votes"), in_columns=("subj.num_labels",),
    policies_only=True, sliced="accuracy", borrows="table3",
  ),
  "table_e3": Table(
    "Table E.3: arithmetic, test accuracy (%) by number of operands, from fewer seed rationales", "arith", _OPERANDS,
    (
      _seeded(0, "22.6", "5.8", "3.4"), _seeded(10, "58.6", "52.3", "20.2"), _seeded(25, "48.8", "56.8", "24.6"),
      _seeded(50, "95.2", "75.4", "40.7"),
    ),
    varied=("data.num_seed_rationales",), policies_only=True, sliced="accuracy",
  ),
  "table_e4": Table(
    "Table E.4 and E.5: what the reward prefers, beside what is right, of the test samples on record", "arith",
    (
      Column("log R (nats)", "log_reward"), Column("right (%)", "right", scale=100),
      Column("distinct of a question's (%)", "distinct", scale=100),
      Column("distinct of a query's, at temperature 1", "distinct_samples"),
      Column("samples", "samples", digits=".4g"), Column("wrong", "wrong", digits=".4g"),
      *(Column(kind, kind, digits=".4g") for kind in KINDS),
    ),
    measure=of_samples,
  ),
  "fig2": Table(
    "Figure 2: random numbers", "rng",
    (
      Column("valid samples (%)", "histogram/valid_share", scale=100),
      Column("KL(samples to target), nats", "histogram/kl_q_target", digits=".3g"),
      Column("valid mass (%), exact", "valid_mass", scale=100),
      Column("KL(q to target), nats, exact", "kl_q_target", digits=".3g"),
      Column("total variation, exact", "total_variation", digits=".3f"),
    ),
    (
      Row("base", "base", ("50.5", "3.37")), Row("PPO", "ppo", ("95.8",)),
      Row("GFlowNet fine-tuning", "gfn", ("100", "9.75e-5")),
    ),
  ),
  "fig3": Table(
    "Figure 3: next sentences, likelihood and diversity", "next_sentence",
    (
      Column("max. log-likelihood (nats)", "max_log_likelihood", digits=".2f"),
      Column("log-likelihood of a sample (nats)", "log_likelihood", digits=".2f"),
      Column("diversity", "diversity", digits=".3f"),
    ),
    varied=("reward.temperature_end",),
  ),
}  # fmt: skip

MAIN = {"arith": "table4", "infill": "table2", "next_sentence": "fig3", "rng": "fig2", "subj": "table3"}


def table_of(name: str, runs: Sequence[Run]) -> Table:
  """The table of that name; for another name the main columns of the runs' task, a row a setting of the sweep.

  Where the sweep sets nothing but the method, the rows are the main table's, with the paper's numbers.

  Raises:
    ValueError: the runs are of several tasks, or of another than the table's.
  """
  for run in runs:
    wanted = TABLES[name].task if name in TABLES else runs[0].task
    if run.task != wanted:
      raise ValueError(f"{run.folder} is a run of task {run.task!r}: table {name!r} is of {wanted!r}")
  if name in TABLES:
    return TABLES[name]
  task, on = runs[0].task, {run.config.get("eval.split", "test") for run in runs}
  title = f"{name}: {task}" + (f", {', '.join(sorted(on))} problems" if on != {"test"} else "")
  swept = {"variant", *(f for run in runs for f in run.varied)} - {"method"}
  varied = tuple(sorted(f for f in swept if len({json.dumps(run.config.get(f)) for run in runs}) > 1))
  if task in MAIN:
    main = TABLES[MAIN[task]]
    if not any(run.varied for run in runs) or {f for run in runs for f in run.varied} == {"method"}:
      return dataclasses.replace(main, title=title, columns=main.columns + _FURTHER)
    varied = tuple(dict.fromkeys(varied + main.in_columns))
  else:
    metrics = dict.fromkeys(k.split("/", 2)[2] for run in runs for k in run.results)
    further = (*POSTERIOR_METRICS, *(c.key for c in _FURTHER))
    main = Table("", task, tuple(Column(m, m, digits=".4g") for m in metrics if m not in further))
  return dataclasses.replace(
    main, title=title, columns=main.columns + _FURTHER, rows=(), varied=varied, baselines_vary=True
  )
