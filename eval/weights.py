"""Fusion weights for one collection, tuned on its own questions, and whether they would hold on others.

Both sides' candidates are fetched once a question; every setting is then fused here, by the code that the service fuses by.
Cross-fitting keeps the figure honest: the questions are cut into folds, and each is scored by the setting that was best on
the other folds. The setting that is proposed is picked by all questions, and only when the cross-fitted scores are
significantly better than those of the collection's present setting.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.collection import Placed
from eval.resample import Estimate, compared, estimate
from eval.retrieval_metrics import MEASURES, is_judged, scores
from eval.schemas import Case, Difference
from ingest.errors import InvalidError
from ingest.index import Candidates, ranked
from ingest.schemas import Frozen, Retrieval
from service.client import Client
from service.schemas import SearchRequest

Table = NDArray[np.float64]  # (settings, questions), the present setting first
Row = NDArray[np.float64]  # (questions,)
FETCHED = 100  # candidates of each side, at most: what one request gives
CHECKED, CHECKED_RANKS = 20, 10  # questions, and ranks of each, in which the service must agree with what is fused here
FEWEST = 50  # questions: with fewer there is nothing to tell settings apart by
SIGNIFICANT = 0.05
DENSE_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
RRF_WEIGHTS, RRF_KS = tuple(round(0.1 * step, 1) for step in range(1, 10)), (2, 10, 60)


class Fusion(Frozen):
    """The fields of `Retrieval` that are tuned."""

    fusion: Literal["weighted", "rrf"] = "weighted"
    dense_weight: float
    rrf_k: int = 60

    def __str__(self) -> str:
        if self.dense_weight in {0, 1}:
            return "dense alone" if self.dense_weight else "BM25 alone"
        k = f", k {self.rrf_k}" if self.fusion == "rrf" else ""
        return f"{self.fusion} {self.dense_weight:g}/{1 - self.dense_weight:.3g}{k}"


class Scored(Frozen):
    fusion: Fusion
    score: float  # the mean over all questions


class Weights(Frozen):
    """`best`: picked by all questions, so that its score flatters; `cross_fitted` does not. `against`: each setting by its
    name, beside the cross-fitted scores. `agreement`: share of questions whose order is the service's own.
    """

    collection: str
    dataset: str
    metric: str
    questions: int
    left_out: int  # without a relevant document
    unread: int  # of `questions`, those in a script that the embedder does not read: BM25 alone answers them
    candidates: int
    folds: int
    seed: int
    present: Scored
    best: Scored
    cross_fitted: Estimate
    by_fold: tuple[Fusion, ...]
    against: dict[str, Difference]
    agreement: float
    verdict: Literal["change", "keep"]
    settings: tuple[Scored, ...]


class Fetched(NamedTuple):
    """Of one question. `documents`: by chunk."""

    candidates: Candidates
    documents: Mapping[str, str]


def tune(
    client: Client,
    place: Placed,
    cases: Sequence[Case],
    dataset: str,
    metric: str = "ndcg@10",
    folds: int = 5,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Weights:
    """Raises InvalidError when there are too few questions."""
    if metric not in MEASURES:
        raise InvalidError(f"metric {metric!r}: there are {', '.join(MEASURES)}")
    judged = [case for case in cases if is_judged(case.relevant)]
    if len(judged) < max(FEWEST, 2 * folds) or folds < 2:
        raise InvalidError(
            f"{len(judged)} questions with a relevant document are too few to tune on in {folds} folds; "
            f"give at least {max(FEWEST, 2 * folds)}"
        )
    retrieval = place.retrieval or place.view.retrieval
    fetched = []
    for number, case in enumerate(judged, 1):
        fetched.append(fetch(client, place, retrieval, case.question))
        on_progress(number, len(judged))
    present = Fusion(fusion=retrieval.fusion, dense_weight=retrieval.dense_weight, rrf_k=retrieval.rrf_k)
    settings = list(dict.fromkeys([present, *candidates_of_fusion()]))
    relevant = [case.relevant for case in judged]
    table = np.array([score_all(fetched, relevant, setting, metric) for setting in settings])  # (settings, questions)
    held_out, chosen = cross_fit(table, folds, seed)
    means = table.mean(1)
    best = pick(table)
    others = {"the present setting": present, **named()}
    against = {
        name: compared(metric, [case.id for case in judged], table[settings.index(one)], held_out, seed)
        for name, one in others.items()
    }
    better = against["the present setting"]
    return Weights(
        collection=place.view.name,
        dataset=dataset,
        metric=metric,
        questions=len(judged),
        left_out=len(cases) - len(judged),
        unread=sum(not one.candidates.dense for one in fetched),
        candidates=min(retrieval.candidates, FETCHED),
        folds=folds,
        seed=seed,
        present=Scored(fusion=present, score=float(means[0])),
        best=Scored(fusion=settings[best], score=float(means[best])),
        cross_fitted=estimate(held_out, seed),
        by_fold=tuple(settings[one] for one in chosen),
        against=against,
        agreement=_agreement(client, place, retrieval, judged[:CHECKED], fetched),
        verdict="change" if better.difference > 0 and better.p < SIGNIFICANT and best else "keep",
        settings=tuple(Scored(fusion=one, score=float(mean)) for one, mean in zip(settings, means, strict=True)),
    )


def named() -> dict[str, Fusion]:
    return {
        "BM25 alone": Fusion(dense_weight=0),
        "dense alone": Fusion(dense_weight=1),
        "equal weights": Fusion(dense_weight=0.5),
        "RRF, equal weights, k 60": Fusion(fusion="rrf", dense_weight=0.5),
    }


def candidates_of_fusion() -> list[Fusion]:
    weighted = [Fusion(dense_weight=weight) for weight in DENSE_WEIGHTS]
    return weighted + [Fusion(fusion="rrf", dense_weight=weight, rrf_k=k) for k in RRF_KS for weight in RRF_WEIGHTS]


def fetch(client: Client, place: Placed, retrieval: Retrieval, question: str) -> Fetched:
    """Both sides' candidates, as many as the collection takes. A question that the embedder does not read has no dense side."""
    sides: list[list[tuple[str, float]]] = []
    documents: dict[str, str] = {}
    for weight in (1.0, 0.0):
        hits = client.retrieve(_request(place, retrieval, question, fusion="weighted", dense_weight=weight)).hits
        documents |= {hit.chunk_id: place.document(hit.path) for hit in hits}
        scored = ((hit.chunk_id, hit.dense_score if weight else hit.sparse_score) for hit in hits)
        sides.append([(chunk, score) for chunk, score in scored if score is not None])
    return Fetched(Candidates(*sides), documents)


def order(one: Fetched, fusion: Fusion) -> list[str]:
    """Chunks, best first."""
    retrieval = Retrieval(**fusion.model_dump())
    return [chunk for chunk, _ in ranked(one.candidates, retrieval, bool(one.candidates.dense))]


def score_all(fetched: Sequence[Fetched], relevant: Sequence[Mapping[str, int]], fusion: Fusion, metric: str) -> Row:
    """-> of each question its score; a document stands where its best chunk does."""
    at = metric.partition("@")[2]
    depth = int(at) if at else FETCHED
    orders = [list(dict.fromkeys(one.documents[chunk] for chunk in order(one, fusion)))[:depth] for one in fetched]
    return np.array([one[metric] for one in scores(relevant, orders, [metric])])


def cross_fit(table: Table, folds: int, seed: int) -> tuple[Row, list[int]]:
    """-> each question's score under the setting that is picked by the other folds, and that setting by fold."""
    shuffled = np.random.default_rng(seed).permutation(table.shape[1])
    held_out, chosen = np.empty(table.shape[1]), []
    for fold in np.array_split(shuffled, folds):
        others = np.setdiff1d(shuffled, fold)
        chosen.append(pick(table[:, others]))
        held_out[fold] = table[chosen[-1], fold]
    return held_out, chosen


def pick(table: Table) -> int:
    """-> the best setting; the first, which is the present one, unless the best exceeds it by more than a standard error of
    the paired difference (the one-standard-error rule of Breiman et al., 1984): many settings on few questions are noise.
    """
    best = int(table.mean(1).argmax())
    gain = table[best] - table[0]
    return best if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)) else 0


def _request(place: Placed, retrieval: Retrieval, question: str, **changes: object) -> SearchRequest:
    """Without what comes after fusion."""
    count = min(retrieval.candidates, FETCHED)
    plain = {"candidates": count, "rerank": False, "mmr": None, "neighbours": 0}
    asked = retrieval.model_copy(update={**plain, **changes})
    return SearchRequest(question=question, collection=place.view.name, top_k=count, retrieval=asked)


def _agreement(
    client: Client, place: Placed, retrieval: Retrieval, cases: Sequence[Case], fetched: Sequence[Fetched]
) -> float:
    present = Fusion(fusion=retrieval.fusion, dense_weight=retrieval.dense_weight, rrf_k=retrieval.rrf_k)
    same = 0
    for case, one in zip(cases, fetched, strict=False):
        hits = client.retrieve(_request(place, retrieval, case.question)).hits
        same += [hit.chunk_id for hit in hits[:CHECKED_RANKS]] == order(one, present)[:CHECKED_RANKS]
    return same / len(cases)
