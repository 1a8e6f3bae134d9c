"""From which score of the best hit on a collection's questions are answered: a threshold, chosen and tested on other folds.

The score is the one that the service compares with the threshold (`service.answer`): of the hits that an answer is made from
the highest of the cross-encoder's scores, else of the cosines. Questions that the documents do not answer are those of the
file with "answerable": false. Where it has none, each question stands for one itself, asked of the collection without its
relevant documents: a stand-in, for the rest of their subject is still there, and some may be answered elsewhere in it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.collection import Placed
from eval.resample import Estimate
from eval.schemas import Case
from ingest.errors import InvalidError
from ingest.schemas import Frozen, Hit
from service.client import Client
from service.look_up import best_score
from service.schemas import SearchRequest

Scores = NDArray[np.float64]
FEWEST = 20  # questions of each kind
DEEP = 100  # hits that are looked at for a question without its relevant documents
DRAWS = 2_000
USELESS = 0.6  # an AUC that may be below this gives no threshold
RuleName = Literal["balanced", "precision", "false_refusals"]


class Rule(NamedTuple):
    """What a threshold is chosen by: the highest balanced accuracy; the lowest whose answers are of answerable questions in
    at least `value` of the cases; the highest that refuses at most `value` of the answerable ones.
    """

    name: RuleName = "balanced"
    value: float = 0.0


BALANCED = Rule()


class Rates(Frozen):
    """`precision`: share of the questions answered that are answerable; it hangs on how many of them the file has."""

    balanced_accuracy: Estimate
    false_refusals: Estimate
    false_answers: Estimate
    precision: Estimate


class Calibration(Frozen):
    """`held_out`: each question judged by the threshold of the other folds. `present`: by the collection's own, if any."""

    collection: str
    score: Literal["cross-encoder", "cosine"]
    answerable: int
    unanswerable: int
    made: bool  # the unanswerable ones: questions without their relevant documents
    left_out: int  # no hit has such a score: the embedder does not read the question
    nothing_found: int  # always refused, whatever the threshold
    rule: RuleName
    rule_value: float
    folds: int
    seed: int
    auc: Estimate
    threshold: float | None  # on all questions; null when none is proposed
    why_not: str = ""
    by_fold: tuple[float, ...]
    held_out: Rates
    present_threshold: float | None
    present: Rates | None


class _Asked(NamedTuple):
    """Scores of the questions that have one. `pairs`: both are of the same questions, in the same order."""

    answerable: Scores
    unanswerable: Scores
    pairs: bool
    reranked: bool
    left_out: int
    nothing_found: int


def calibrate(
    client: Client,
    place: Placed,
    cases: Sequence[Case],
    rule: Rule = BALANCED,
    folds: int = 5,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Calibration:
    """Raises InvalidError when there are too few questions."""
    if not 2 <= folds <= FEWEST:
        raise InvalidError(f"{folds} folds: 2 to {FEWEST} can be made")
    asked = _ask_all(client, place, cases, on_progress)
    if min(len(asked.answerable), len(asked.unanswerable)) < FEWEST:
        raise InvalidError(
            f"{len(asked.answerable)} answerable and {len(asked.unanswerable)} unanswerable questions have a score; at least "
            f'{FEWEST} of each are needed: add questions, with "answerable": false for those that the documents do not answer'
        )
    right, wrong, chosen = _cross_validated(asked, rule, folds, seed)
    auc = _interval(lambda a, u: area(a, u), asked.answerable, asked.unanswerable, asked.pairs, seed)
    held_out = _rates(right, wrong, asked.pairs, seed)
    present = place.view.threshold
    why_not = ""
    if auc.low < USELESS:
        why_not = f"the scores hardly tell the two kinds apart (AUC {auc.value:.3f}, from {auc.low:.3f})"
    elif held_out.balanced_accuracy.low <= 0.5:
        why_not = "on held-out questions it is not better than chance"
    return Calibration(
        collection=place.view.name,
        score="cross-encoder" if asked.reranked else "cosine",
        answerable=len(asked.answerable),
        unanswerable=len(asked.unanswerable),
        made=asked.pairs,
        left_out=asked.left_out,
        nothing_found=asked.nothing_found,
        rule=rule.name,
        rule_value=rule.value,
        folds=folds,
        seed=seed,
        auc=auc,
        threshold=None if why_not else choose(asked.answerable, asked.unanswerable, rule),
        why_not=why_not,
        by_fold=tuple(chosen),
        held_out=held_out,
        present_threshold=present,
        present=None
        if present is None
        else _rates(asked.answerable >= present, asked.unanswerable >= present, asked.pairs, seed),
    )


def choose(answerable: Scores, unanswerable: Scores, rule: Rule) -> float:
    """-> the threshold; halfway between two scores, so that rounding changes no decision."""
    scores = np.unique(np.concatenate([answerable, unanswerable]))
    between = (scores[1:] + scores[:-1]) / 2
    thresholds = np.concatenate([[scores[0] - 1e-6], between])
    answered = 1 - np.searchsorted(np.sort(answerable), thresholds) / len(answerable)
    wrongly = 1 - np.searchsorted(np.sort(unanswerable), thresholds) / len(unanswerable)
    if rule.name == "balanced":
        place = int(np.argmax(answered - wrongly))
    elif rule.name == "false_refusals":
        place = int(np.flatnonzero(answered >= 1 - rule.value)[-1])
    else:
        right = answered * len(answerable)
        precision = right / (right + wrongly * len(unanswerable))
        enough = np.flatnonzero(precision >= rule.value)
        place = int(enough[0]) if len(enough) else int(np.argmax(precision))
    return float(thresholds[place])


def area(answerable: Scores, unanswerable: Scores) -> float:
    """ROC AUC: how often an answerable question scores above an unanswerable one, ties counted half."""
    ordered = np.sort(unanswerable)
    below = np.searchsorted(ordered, answerable, "left") + np.searchsorted(ordered, answerable, "right")
    return float(below.mean() / 2 / len(ordered))


def _ask_all(client: Client, place: Placed, cases: Sequence[Case], on_progress: Callable[[int, int], None]) -> _Asked:
    made = all(case.answerable for case in cases)
    if made and not any(case.relevant for case in cases):
        raise InvalidError(
            'no question is marked with "answerable": false, and none names its relevant documents, without which it could '
            'stand for an unanswerable one: mark some, or add "relevant"'
        )
    if made:
        cases = [case for case in cases if case.relevant]
    scores: dict[bool, list[float]] = {True: [], False: []}
    left_out, nothing, reranked = 0, 0, False
    for number, case in enumerate(cases, 1):
        hits = _hits(client, place, case.question, None)
        several: list[tuple[bool, Sequence[Hit]]] = [(case.answerable, hits)]
        if made:
            others = [one for one in _hits(client, place, case.question, DEEP) if not _is_relevant(place, case, one)]
            several.append((False, others[: place.view.retrieval.top_k]))
        found = [(kind, best_score(some, place.view.retrieval.rerank)) for kind, some in several]
        reranked = reranked or any(hit.rerank_score is not None for hit in hits)
        if not all(some for _, some in several):
            nothing += 1
        elif any(score is None for _, score in found):
            left_out += 1
        else:
            for kind, score in found:
                scores[kind].append(score or 0.0)
        on_progress(number, len(cases))
    return _Asked(np.array(scores[True]), np.array(scores[False]), made, reranked, left_out, nothing)


def _hits(client: Client, place: Placed, question: str, top_k: int | None) -> tuple[Hit, ...]:
    fields: dict[str, Any] = {"question": question, "collection": place.view.name}
    if top_k is not None:
        fields["top_k"] = top_k
    return client.retrieve(SearchRequest(**fields)).hits


def _is_relevant(place: Placed, case: Case, hit: Hit) -> bool:
    return case.relevant.get(place.document(hit.path), 0) > 0


def _cross_validated(
    asked: _Asked, rule: Rule, folds: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], list[float]]:
    """-> which answerable and which unanswerable questions are answered, by the threshold of the other folds."""
    random = np.random.default_rng(seed)
    of_answerable = random.permutation(len(asked.answerable)) % folds
    of_unanswerable = of_answerable if asked.pairs else random.permutation(len(asked.unanswerable)) % folds
    right, wrong = np.zeros(len(asked.answerable), bool), np.zeros(len(asked.unanswerable), bool)
    chosen = []
    for fold in range(folds):
        inside, among = of_answerable == fold, of_unanswerable == fold
        threshold = choose(asked.answerable[~inside], asked.unanswerable[~among], rule)
        right[inside] = asked.answerable[inside] >= threshold
        wrong[among] = asked.unanswerable[among] >= threshold
        chosen.append(threshold)
    return right, wrong, chosen


def _rates(right: NDArray[np.bool_], wrong: NDArray[np.bool_], pairs: bool, seed: int) -> Rates:
    """Of the questions answered, among the answerable and the unanswerable ones."""

    def precision(of_right: Scores, of_wrong: Scores) -> float:
        return float(of_right.sum() / max(of_right.sum() + of_wrong.sum(), 1))

    def made(rate: Callable[[Scores, Scores], float]) -> Estimate:
        return _interval(rate, right.astype(np.float64), wrong.astype(np.float64), pairs, seed)

    return Rates(
        balanced_accuracy=made(lambda of_right, of_wrong: float(of_right.mean() + 1 - of_wrong.mean()) / 2),
        false_refusals=made(lambda of_right, _: float(1 - of_right.mean())),
        false_answers=made(lambda _, of_wrong: float(of_wrong.mean())),
        precision=made(precision),
    )


def _interval(
    rate: Callable[[Scores, Scores], float], answerable: Scores, unanswerable: Scores, pairs: bool, seed: int
) -> Estimate:
    """Resampled within each kind, or by question where both are of the same ones."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        picks = random.integers(0, len(answerable), len(answerable))
        others = picks if pairs else random.integers(0, len(unanswerable), len(unanswerable))
        drawn.append(rate(answerable[picks], unanswerable[others]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value=rate(answerable, unanswerable), low=float(low), high=float(high))
