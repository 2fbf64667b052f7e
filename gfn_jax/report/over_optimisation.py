"""Reward over-optimisation made visible (paper section 4.4, Table E.4): what a run's test samples are worth and why
they are wrong."""

from collections.abc import Mapping, Sequence

import numpy as np

from gfn_jax.report.mistakes import KINDS, kind_of_mistake
from gfn_jax.report.runs import Run


def measure(records: Sequence[Mapping]) -> dict[str, float]:
  """Means and counts of one method's records.

  Returns:
    log_reward (nats), right (a share), distinct (of each question's samples, the share that differ, meaned over
    questions; only where a question has several), samples, wrong, and the wrong ones by kind: counts.
  """
  wrong = [r for r in records if not r["right"]]
  kinds = [kind_of_mistake(r["X"], r["Z"]) for r in wrong]
  questions: dict[str, list[str]] = {}
  for r in records:
    questions.setdefault(r["X"], []).append(r["Z"])
  found = {
    "log_reward": float(np.mean([r["log_R"] for r in records])),
    "right": 1 - len(wrong) / len(records),
    "samples": float(len(records)),
    "wrong": float(len(wrong)),
    **{kind: float(kinds.count(kind)) for kind in KINDS},
  }
  several = [len(set(texts)) / len(texts) for texts in questions.values() if len(texts) > 1]
  return found | ({"distinct": float(np.mean(several))} if several else {})


def of_samples(run: Run) -> dict[str, float]:
  """`measure` of each method of a run's samples.jsonl, beside the run's results: "arith/gfn/right", ..."""
  methods: dict[str, list[dict]] = {}
  for r in run.samples:
    if "right" in r and "log_R" in r:
      methods.setdefault(r["method"], []).append(r)
  measured = {f"{run.task}/{m}/{k}": v for m, records in methods.items() for k, v in measure(records).items()}
  return dict(run.results) | measured
