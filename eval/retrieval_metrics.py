"""Rankings against judgements, as trec_eval scores them (through ir-measures): per case, and means."""

from collections.abc import Mapping, Sequence

import numpy as np

MEASURES = {
    "ndcg@10": "nDCG@10",
    "map": "AP",
    "mrr": "RR",
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "recall@20": "R@20",
    "recall@100": "R@100",
    "precision@1": "P@1",
    "precision@5": "P@5",
    "precision@10": "P@10",
}


def is_judged(relevant: Mapping[str, int]) -> bool:
    """Whether there is anything to find; trec_eval leaves a query without a relevant document out."""
    return any(grade > 0 for grade in relevant.values())


def scores(
    relevant: Sequence[Mapping[str, int]], ranked: Sequence[Sequence[str]], names: Sequence[str] = tuple(MEASURES)
) -> list[dict[str, float]]:
    """-> of each case its metrics. `relevant`: grade by document; `ranked`: documents, best first, none twice.

    A grade of 1 and more is relevant, and the gain of nDCG is the grade itself. The order is taken as it is, so ties are
    broken as the service broke them; a case with nothing found scores 0.
    """
    import ir_measures

    measures = {ir_measures.parse_measure(MEASURES[name]): name for name in names}
    # numbers stand for the ids, which may hold any character
    numbers = [{document: str(at) for at, document in enumerate(dict.fromkeys([*has, *got]))}
               for has, got in zip(relevant, ranked, strict=True)]  # fmt: skip
    qrels = {
        str(at): {number[document]: grade for document, grade in has.items()}
        for at, (has, number) in enumerate(zip(relevant, numbers, strict=True))
    }
    run = {
        str(at): {number[document]: float(len(got) - rank) for rank, document in enumerate(got)}
        for at, (got, number) in enumerate(zip(ranked, numbers, strict=True))
    }
    found: list[dict[str, float]] = [dict.fromkeys(names, 0.0) for _ in relevant]
    for one in ir_measures.iter_calc(list(measures), qrels, run):
        found[int(one.query_id)][measures[one.measure]] = float(one.value)
    return found


def means(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric, over the cases that have it."""
    names = dict.fromkeys(name for one in each for name in one)
    return {name: float(np.mean([one[name] for one in each if name in one])) for name in names}


def percentiles(each: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """-> p50 and p99 of each time, in ms."""
    names = dict.fromkeys(name for one in each for name in one)
    found = {}
    for name in names:
        p50, p99 = np.percentile([one[name] for one in each if name in one], [50, 99])
        found[name] = {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
    return found
