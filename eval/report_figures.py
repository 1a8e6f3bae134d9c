"""The figures of a report: a run's means with their intervals, its slices, its latencies. Nothing here knows of HTML."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval import resample
from eval.schemas import AnswerCase, AnswersRun, Case, RetrievalCase, Run
from ingest.language import NAMES

WORST_SLICES = 15
HEADLINES = {
    "retrieval": ("ndcg@10", "recall@10", "recall@100", "mrr", "mrr@10", "map", "precision@10"),
    "answers": (
        "f1", "accuracy", "exact_match", "citation_precision", "citation_recall", "faithfulness", "abstained", "answered",
        "good", "contains", "rouge_l",
    ),
}  # fmt: skip
HEADLINE_COUNT = {"retrieval": 4, "answers": 6}
LABELS = {
    "map": "MAP", "f1": "Token F1", "rouge_l": "ROUGE-L", "contains": "Contains a gold answer", "good": "Good answers",
    "answered": "Answers when it can", "abstained": "Refuses when it should", "gold_citation": "Cites a gold document",
    "faithful_numbers": "Numbers found in the passages",
}  # fmt: skip
SLICE_TITLES = {"type": "Question type", "language": "Language", "document": "Document", "kind": "Kind of answer"}
LOWER_IS_BETTER = frozenset({"unsupported", "hallucination", "false_refusal", "false_answer"})

_WHOLE = ("total", "client")  # of the stages: all of them; and what the client waited

Scored = RetrievalCase | AnswerCase


class Estimate(NamedTuple):
    """A mean over `cases`, with its 95 % interval where there is one: not of one case, nor where all score alike."""

    value: float | None
    low: float | None
    high: float | None
    cases: int


class SliceRow(NamedTuple):
    name: str
    estimate: Estimate


class SliceTable(NamedTuple):
    """`total`: how many values the slice has; `rows` are the worst of them."""

    title: str
    rows: list[SliceRow]
    total: int
    without: int  # cases that do not say theirs


class Spread(NamedTuple):
    name: str
    p50: float
    p95: float
    p99: float
    cases: int


def scores(case: Scored) -> dict[str, float]:
    """-> what was evaluated of a case; a score that is no number was not."""
    held = case.metrics if isinstance(case, RetrievalCase) else case.scores
    return {name: value for name, value in held.items() if math.isfinite(value)}


def values(run: Run, metric: str) -> list[float]:
    return [held[metric] for held in map(scores, run.cases) if metric in held]


def metrics(run: Run) -> list[str]:
    """-> the run's metrics, headlines first, and those that no case could have."""
    names = dict.fromkeys([*run.metrics, *(name for case in run.cases for name in reasons(case))])
    first = [name for name in HEADLINES[run.kind] if name in names]
    return [*first, *(name for name in names if name not in first)]


def reasons(case: Scored) -> dict[str, str]:
    """-> why a score of the case is missing."""
    if isinstance(case, RetrievalCase):
        return {}
    lost = {name: "its value is no number" for name, value in case.scores.items() if not math.isfinite(value)}
    return {**lost, **case.not_evaluated}


def headlines(run: Run) -> list[str]:
    """-> the metrics to show large; the first is the run's main score, which most of the cases have."""
    count = {name: len(values(run, name)) for name in metrics(run) if math.isfinite(run.metrics.get(name, math.nan))}
    known = [name for name in HEADLINES[run.kind] if name in count] or list(count)
    if not known:
        return []
    main = max(known[:2], key=lambda name: count[name]) if run.kind == "answers" else known[0]
    return [main, *(name for name in known if name != main)][: HEADLINE_COUNT[run.kind]]


def label(metric: str) -> str:
    if metric in LABELS:
        return LABELS[metric]
    name = metric.replace("ndcg", "nDCG").replace("mrr", "MRR").replace("map@", "MAP@").replace("_", " ")
    return name if name.startswith("nDCG") else name[:1].upper() + name[1:]


def estimate(run: Run, metric: str) -> Estimate:
    held = values(run, metric)
    value = run.metrics.get(metric, math.nan)
    low, high = interval(held)
    if not math.isfinite(value):
        return Estimate(None, None, None, len(held))
    return Estimate(value, low, high, run.counts.get(metric, len(held)) if run.kind == "answers" else len(held))


def interval(held: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """-> the 95 % bootstrap interval of the mean; a point says nothing of cases that were not asked."""
    if len(set(held)) < 2:
        return None, None
    drawn = resample.estimate(held)
    return drawn.low, drawn.high


def slices(run: Run, metric: str) -> tuple[list[SliceTable], list[str]]:
    """-> a table for each slice, and in words those that have one value only."""
    labelled = [(_labels(one.case), scores(one).get(metric)) for one in run.cases]
    keys = {key for labels, _ in labelled for key in labels}
    tables, uniform = [], []
    order = {key: at for at, key in enumerate(SLICE_TITLES)}
    for key in sorted(keys, key=lambda key: (order.get(key, len(order)), key)):
        groups: dict[str, list[float]] = defaultdict(list)
        for labels, score in labelled:
            if key in labels and score is not None:
                groups[labels[key]].append(score)
        title = SLICE_TITLES.get(key, label(key))
        without = sum(key not in labels for labels, _ in labelled)
        if len(groups) == 1 and not without:
            uniform.append(f"{title}: {_value_name(key, next(iter(groups)))}")
        elif groups and not (key == "document" and max(map(len, groups.values())) < 2):
            tables.append(SliceTable(title, _rows(key, groups), len(groups), without))
    return tables, uniform


def _labels(case: Case) -> dict[str, str]:
    """A case with one relevant document is about that document, unless the data set says otherwise."""
    relevant = [document for document, grade in case.relevant.items() if grade >= 1]
    return {**({"document": relevant[0]} if len(relevant) == 1 else {}), **case.slices}


def _rows(key: str, groups: Mapping[str, list[float]]) -> list[SliceRow]:
    mean = {name: float(np.mean(held)) for name, held in groups.items()}
    many = len(groups) > WORST_SLICES
    order: Callable[[str], Any] = (
        (lambda n: (mean[n], -len(groups[n]), n)) if many else (lambda n: (-len(groups[n]), n))
    )
    rows = []
    for name in sorted(groups, key=order)[:WORST_SLICES]:
        low, high = interval(groups[name])
        rows.append(SliceRow(_value_name(key, name), Estimate(mean[name], low, high, len(groups[name]))))
    return rows


def _value_name(key: str, value: str) -> str:
    return f"{NAMES[value]} ({value})" if key == "language" and value in NAMES else value


def first_relevant(case: RetrievalCase) -> int | None:
    """-> its rank, from 1."""
    found = (rank for rank, one in enumerate(case.ranked, 1) if case.case.relevant.get(one.document, 0) >= 1)
    return next(found, None)


def timings(run: Run) -> list[Spread]:
    """-> milliseconds by stage, in the order of the cases' own, the total last."""
    return _spreads([case.timings_ms for case in run.cases])


def usage(run: AnswersRun) -> list[Spread]:
    return _spreads([{name: float(count) for name, count in case.usage.items()} for case in run.cases])


def _spreads(held: Sequence[Mapping[str, float]]) -> list[Spread]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for one in held:
        for name, value in one.items():
            if math.isfinite(value) and (name != "first_token" or value > 0):  # 0: nothing was generated
                by_name[name].append(value)
    names = sorted(by_name, key=lambda name: _WHOLE.index(name) if name in _WHOLE else -1)
    spreads = []
    for name in names:
        p50, p95, p99 = map(float, np.percentile(by_name[name], [50, 95, 99]))
        spreads.append(Spread(name, p50, p95, p99, len(by_name[name])))
    return spreads


def total_ms(run: Run) -> list[float]:
    """-> what each case took: as the client saw it, or its total, or the sum of its stages."""
    held = [case.timings_ms for case in run.cases if case.timings_ms]
    taken = [one.get("client", one.get("total", sum(one.values()))) for one in held]
    return [value for value in taken if math.isfinite(value)]


def blamed(run: AnswersRun) -> dict[str, int]:
    """-> how many cases each class has, the largest first."""
    counted = Counter(case.blame for case in run.cases if case.blame)
    return {
        name: run.counts.get(name, count) for name, count in sorted(counted.items(), key=lambda one: (-one[1], one[0]))
    }
