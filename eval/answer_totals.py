"""The figures of a whole run of answers, from those of its cases. A mean is over the cases that have the score."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from eval.answer_metrics import abstention
from eval.schemas import AnswerCase


class Totals(NamedTuple):
    """`counts`: of `cases`, of those not evaluated at all (`errors`), of cases by score, of each blame. `latency_ms`: p50,
    p99 and mean of each stage. `tokens`: means.
    """

    metrics: dict[str, float]
    counts: dict[str, int]
    latency_ms: dict[str, dict[str, float]]
    tokens: dict[str, float]


def totals(cases: Sequence[AnswerCase]) -> Totals:
    evaluated = [one for one in cases if one.finish_reason != "error"]
    held = _gathered(one.scores for one in evaluated)
    metrics = {name: statistics.fmean(values) for name, values in held.items()}
    refusing = abstention([(one.case.answerable, one.refused) for one in evaluated])
    if refusing.f1 is not None:
        metrics["abstention_f1"] = refusing.f1
        held["abstention_f1"] = [0.0] * len(evaluated)
    blamed = Counter(one.blame for one in cases if one.blame)
    counts = {"cases": len(cases), "errors": len(cases) - len(evaluated)}
    counts |= {name: len(values) for name, values in held.items()} | {str(name): n for name, n in blamed.items()}
    times = _gathered(one.timings_ms for one in evaluated)
    if "first_token" in times:  # 0: nothing was generated
        times["first_token"] = [value for value in times["first_token"] if value > 0]
    return Totals(
        metrics=metrics,
        counts=counts,
        latency_ms={name: _spread(values) for name, values in times.items() if values},
        tokens={name: statistics.fmean(values) for name, values in _gathered(one.usage for one in evaluated).items()},
    )


def by_slice(cases: Sequence[AnswerCase], names: Sequence[str]) -> dict[tuple[str, str], dict[str, tuple[float, int]]]:
    """-> by (slice, value), by score: (mean, cases). A slice of one value, or with as many values as cases, says nothing."""
    found: dict[tuple[str, str], dict[str, tuple[float, int]]] = {}
    for key in dict.fromkeys(key for one in cases for key in one.case.slices):
        values = Counter(one.case.slices[key] for one in cases if key in one.case.slices)
        if not 1 < len(values) <= len(cases) // 2:
            continue
        for value in sorted(values, key=lambda value: (-values[value], value)):
            held = _gathered(one.scores for one in cases if one.case.slices.get(key) == value)
            found[key, value] = {
                name: (statistics.fmean(held[name]), len(held[name])) for name in names if name in held
            }
    return found


def _gathered(rows: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    held: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            held[name].append(value)
    return dict(held)


def _spread(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "mean": statistics.fmean(values)}
