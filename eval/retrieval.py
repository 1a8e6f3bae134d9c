"""A data set's questions asked of its collection, and the documents found scored against its judgements."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

from eval.collection import Placed
from eval.retrieval_metrics import is_judged, means, percentiles, scores
from eval.schemas import Case, DataSet, Ranked, RetrievalCase, RetrievalRun, RunFacts
from ingest.errors import InvalidError
from ingest.runtime import processor
from service.client import Client
from service.schemas import SearchRequest

DEPTH = 100  # documents that are asked for
KEPT = 10  # of them, with their text


class _Found(NamedTuple):
    ranked: tuple[Ranked, ...]
    timings_ms: dict[str, float]  # "client", and the service's stages


def run_retrieval(
    client: Client,
    dataset: DataSet,
    placed: Placed,
    *,
    name: str = "retrieval",
    configuration: Mapping[str, Any] | None = None,
    threads: int = 4,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> RetrievalRun:
    """Each case with a relevant document is asked; a document ranks by its best chunk. `threads`: questions at once, which
    the latencies are told with. `configuration` is added to that of the collection. Raises InvalidError when there is nothing
    to score, and what the service says.
    """
    cases = [one for one in dataset.cases if is_judged(one.relevant)]
    if not cases:
        raise InvalidError(f"no question of {dataset.name!r} has a relevant document, so there is nothing to measure")
    start, created_at = time.monotonic(), datetime.now(UTC)
    _ask(client, placed, cases[0])  # loads the models, which is no part of a latency
    found = _asked(client, placed, cases, threads, on_progress)
    each = scores([one.relevant for one in cases], [[one.document for one in got.ranked] for got in found])
    asked = {"top_k": DEPTH, "threads": threads}
    return RetrievalRun(
        facts=RunFacts(
            name=name,
            dataset=dataset.name,
            created_at=created_at,
            configuration={**placed.settings(), **asked, **(configuration or {})},
            machine=processor(),
            seconds=round(time.monotonic() - start, 3),
        ),
        metrics=means(each),
        counts={
            "cases": len(cases),
            "left_out": len(dataset.cases) - len(cases),
            "documents": placed.view.documents,
            "documents_left_out": len(placed.left_out),
        },
        latency_ms=percentiles([one.timings_ms for one in found]),
        cases=tuple(
            RetrievalCase(case=case, ranked=got.ranked, metrics=scored, timings_ms=got.timings_ms)
            for case, got, scored in zip(cases, found, each, strict=True)
        ),
    )


def _asked(
    client: Client, placed: Placed, cases: Sequence[Case], threads: int, tell: Callable[[int, int], None]
) -> list[_Found]:
    """In the order of the cases. The first error ends it."""
    pool, found = ThreadPoolExecutor(threads, "asking"), list[_Found]()
    try:
        for one in pool.map(lambda case: _ask(client, placed, case), cases):
            found.append(one)
            tell(len(found), len(cases))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _ask(client: Client, placed: Placed, case: Case) -> _Found:
    fields: dict[str, Any] = {"retrieval": placed.retrieval} if placed.retrieval else {}
    fields |= {"index": placed.other_index} if placed.other_index else {}
    request = SearchRequest(
        question=case.question, collection=placed.view.name, group_by="document", top_k=DEPTH, **fields
    )
    start = time.perf_counter()
    got = client.retrieve(request)
    client_ms = round((time.perf_counter() - start) * 1000, 3)
    ranked = tuple(
        Ranked(document=placed.document(hit.path), score=hit.score, text=hit.text if at < KEPT else "")
        for at, hit in enumerate(got.hits)
    )
    return _Found(ranked, {"client": client_ms, **got.timings_ms})
