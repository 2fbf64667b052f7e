"""Sampled texts side by side: the paper's Tables B.1, C.3-C.8, D.5, and the rationales of E.4 and E.5."""

from collections.abc import Sequence

from gfn_jax.report.cells import Cell, Group, is_trained
from gfn_jax.report.mistakes import KINDS, MISSING_OPERAND, WRONG_OPERAND, WRONG_OPERATOR, kind_of_mistake
from gfn_jax.report.section import Section
from gfn_jax.results import label

NUM_PROMPTS, NUM_SAMPLES, NUM_MISTAKES, NUM_REASONS = 4, 2, 3, 7

PAPER_REASONS = {  # Table D.5: per cent
  "objective": (
    ("about a factual event", 11.45), ("describing a factual event", 10.23), ("based on a factual statement", 9.47),
    ("about a historical event", 8.77), ("about a movie review", 7.41), ("based on facts", 5.64),
    ("about a factual statement", 4.61),
  ),
  "subjective": (
    ("about a movie review", 26.21), ("about the movie experience", 26.17), ("about the movie", 7.60),
    ("describing a movie review", 3.44), ("about the movie review", 2.31), ("based on a fictional story", 2.30),
    ("describing the movie experience", 2.01),
  ),
}  # fmt: skip

PAPER_REWARDS = (  # Table E.4: question, rationale, log R in nats; each question first by PPO, then by the GFlowNet
  ("1 - 9 + 8", "PPO", "1 - 9 - 8", -13.17), ("1 - 9 + 8", "GFlowNet", "1 - 9 = -8, -8 + 8 = 0", -27.75),
  ("8 + 7 + 2 + 7", "PPO", "8 + 7 + 2 + 7", -2.39),
  ("8 + 7 + 2 + 7", "GFlowNet", "8 + 7 = 15, 15 + 2 = 17, 17 + 7 = 24", -11.72),
  ("7 - 5 + 8 - 0 - 6", "PPO", "7 - 5 +", -1.22),
  ("7 - 5 + 8 - 0 - 6", "GFlowNet", "7 - 5 = 2, 2 + 8 = 10, 10 - 0 = 10, 10 - 6 = 4", -7.99),
)  # fmt: skip

PAPER_MISTAKES = {  # Table E.5
  MISSING_OPERAND: ("7 + 3 + 4 - 9 + 9", "7 + 3 = 10, 10 - 9 = 1, 1 + 4 = 5"),
  WRONG_OPERAND: ("8 + 5 - 1 - 4 + 5", "8 + 5 = 13, 13 - 1 = 12, 12 + 4 = 16, 16 - 4 = 12"),
  WRONG_OPERATOR: ("0 + 5 - 6 - 1 - 6", "0 + 5 = 5, 5 - 6 = -1, -1 - 6 = -7, -7 + 1 = -6"),
}


def samples_by_method(groups: Sequence[Group], baselines: Sequence[str] | None = None) -> dict[str, list[dict]]:
  """Each method's records of the test, of the first seed that has any; those that are trained last."""
  found: dict[tuple[bool, str], list[dict]] = {}
  for group in groups:
    for run in group.runs:
      methods: dict[str, list[dict]] = {}
      for r in run.samples:
        methods.setdefault(r["method"], []).append(r)
      for method, records in methods.items():
        trained = is_trained(method, group)
        if not trained and baselines is not None and method not in baselines:
          continue
        found.setdefault((trained, _row(method, group)), records)
  return {name: found[trained, name] for trained, name in sorted(found, key=lambda k: k[0])}


def _row(method: str, group: Group) -> str:
  """A method as a row is called: with the group's settings where it has trained it."""
  settings = group.settings.items() if is_trained(method, group) else ()
  return label(method) + "".join(f", {f} = {v}" for f, v in settings)


def side_by_side(
  name: str, title: str, groups: Sequence[Group], baselines: Sequence[str] | None = None
) -> Section | None:
  """Some prompts with what each method writes there, and log R of it in nats; None where no run has samples.

  Args:
    baselines: those that are shown beside what the runs have trained; by default all.
  """
  methods = {m: [r for r in rs if "log_R" in r] for m, rs in samples_by_method(groups, baselines).items()}
  methods = {m: rs for m, rs in methods.items() if rs}
  prompts = dict.fromkeys((r["X"], r.get("Y", "")) for rs in methods.values() for r in rs)
  kinds = {(r["X"], r.get("Y", "")): r.get("kind") for rs in methods.values() for r in rs}
  rows, records = [], []
  for x, y in _spread(list(prompts), kinds):
    row = [f"{x} … {y}" if y else x]
    for method, found in methods.items():
      mine = list({r["Z"]: r for r in found if (r["X"], r.get("Y", "")) == (x, y)}.values())[:NUM_SAMPLES]
      row.append(" <br> ".join(f"{r['Z'].strip()} ({r['log_R']:.1f})" for r in mine) or "-")
      records += [[x, y, method, r["Z"], r["log_R"], r.get("right", "")] for r in mine]
    rows.append(row)
  if not rows:
    return None
  note = "In brackets log R, nats. Samples of each method's first seed."
  header = ("X … Y", *methods)
  return Section(name, title, header, rows, ("X", "Y", "method", "Z", "log_R", "right"), records, note)


def _spread(prompts, kinds):
  """NUM_PROMPTS prompts, of every kind in turn."""
  queues: dict[str | None, list] = {}
  for p in prompts:
    queues.setdefault(kinds[p], []).append(p)
  turns = max(map(len, queues.values()), default=0)
  return [queue[i] for i in range(turns) for queue in queues.values() if i < len(queue)][:NUM_PROMPTS]


def top_reasons(name: str, groups: Sequence[Group]) -> Section | None:
  """Table D.5: the reasons that lead to each label most often, with their shares, of the policies trained on most
  labels. A share is meaned over the seeds that list the reason."""
  listed = [
    (group, [r for run in group.runs for r in run.samples if r["method"] == group.method and "share" in r])
    for group in groups
  ]
  listed = [(g, rs) for g, rs in listed if rs]
  if not listed:
    return None
  group, found = max(listed, key=lambda pair: pair[0].values.get("subj.num_labels", 0))
  rows, records = [], []
  for answer in dict.fromkeys([*PAPER_REASONS, *(r["Y"] for r in found)]):
    shares: dict[str, list[float]] = {}
    for r in (r for r in found if r["Y"] == answer):
      shares.setdefault(r["Z"].strip(), []).append(100 * r["share"])
    ours = sorted(shares.items(), key=lambda item: -sum(item[1]))[:NUM_REASONS]
    theirs = PAPER_REASONS.get(answer, ())
    for i in range(max(len(ours), len(theirs))):
      reason, values = ours[i] if i < len(ours) else ("", ())
      paper_reason, paper_share = theirs[i] if i < len(theirs) else ("", "")
      cell = Cell(tuple(values))
      paper_text = f"{paper_share:.1f}" if theirs[i:] else "-"
      rows.append([answer, reason or "-", cell.text(".1f"), paper_reason or "-", paper_text])
      records.append([answer, i + 1, reason, cell.mean, cell.deviation, len(values), paper_reason, paper_share])
  return Section(
    name, f"Table D.5: reasons that lead to a label most often, {group.values['subj.num_labels']} labels", rows=rows,
    header=("label", "This review is", "share (%)", "paper (50 labels)", "share (%)"),
    csv_header=("label", "rank", "reason", "mean", "standard_deviation", "n", "paper_reason", "paper"),
    csv_rows=records,
  )  # fmt: skip


def paper_rewards(name: str) -> Section:
  """The paper's own examples of Table E.4."""
  header = ("X", "method", "Z", "log R (nats)")
  rows = [(x, method, z, f"{log_reward:.2f}") for x, method, z, log_reward in PAPER_REWARDS]
  return Section(name, "Table E.4: the paper's samples", header, rows, header, rows, of_paper=True)


def mistakes(name: str, groups: Sequence[Group]) -> Section | None:
  """Table E.5: wrong rationales by their kind of error, of all seeds; the paper's are the GFlowNet's."""
  found: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
  for group in groups:
    for run in group.runs:
      for r in run.samples:
        if r.get("right") is False and is_trained(r["method"], group):
          key = _row(r["method"], group), kind_of_mistake(r["X"], r["Z"])
          found.setdefault(key, {})[r["X"], r["Z"].strip()] = None
  rows = [("paper, GFlowNet fine-tuning", kind, *PAPER_MISTAKES[kind]) for kind in KINDS if kind in PAPER_MISTAKES]
  for (row, kind), texts in sorted(found.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1]))):
    rows += [(row, kind, x, z) for x, z in list(texts)[:NUM_MISTAKES]]
  if not found:
    return None
  header = ("method", "error", "X", "Z")
  return Section(name, "Table E.5: errors of wrong rationales", header, rows, header, rows)
