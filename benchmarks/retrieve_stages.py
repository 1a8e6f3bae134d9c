"""One question after the other over HTTP at 1,000, 10,000 and 100,000 chunks: time by stage, recall against exact search.

The chunks are those of `retrieve_scale`: real ones, then those with noise. Reranking stands in rows of its own.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import corpus
from benchmarks.report import Options, Row, percentile, say, settings, shown, skipped
from benchmarks.retrieve_scale import NAME, Prepared, Size, home_of, prepare
from benchmarks.service_process import serving
from ingest.embed import Embedder, load_embedder
from ingest.schemas import Retrieval
from service.client import Client
from service.schemas import CollectionSettings, SearchRequest

SIZES, QUICK = (1_000, 10_000, 100_000), (300, 1_000)
ASKED, RERANKED = 200, 30  # questions


class Asked(NamedTuple):
    """Milliseconds of each question: by stage as the service says, and in all as a client sees it; recall@10."""

    stages: dict[str, list[float]]
    total: list[float]
    recall: float


def run(options: Options) -> list[Row]:
    scifact = options.folder("scifact_train")
    if scifact is None:
        return [skipped("/retrieve by stage", "it needs --data with scifact_train/")]
    configured = settings(options.scratch)
    embedder = load_embedder(configured.embedder, configured)
    texts = list(corpus.questions(scifact).texts.values())
    rows = []
    for chunks in QUICK if options.quick else SIZES:
        size = Size(chunks, 60 if options.quick else 2_600, 0, 0, 0)
        prepared = prepare(options, size, scifact, embedder, configured)
        say(f"{chunks:,} chunks")
        with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
            home = home_of(Path(folder) / "home", options, prepared.home)
            with serving(home, [Path(folder)]) as service, Client(service.url) as client:
                count = 20 if options.quick else ASKED
                asked = {
                    "dense": _ask(client, Retrieval(dense_weight=1.0), texts[:count], embedder, prepared),
                    "fused": _ask(client, Retrieval(), texts[:count], embedder, prepared),
                    "reranked": _ask(client, Retrieval(rerank=True), texts[: min(count, RERANKED)], embedder, prepared),
                }
        rows += _rows(f"{chunks:,} chunks", asked)
    return rows


def _ask(client: Client, retrieval: Retrieval, texts: Sequence[str], embedder: Embedder, prepared: Prepared) -> Asked:
    """Recall is of the dense side's ten, so it means something for `dense` alone."""
    client.put_collection(NAME, CollectionSettings(retrieval=retrieval))
    client.retrieve(SearchRequest(question=texts[0], collection=NAME, top_k=10))  # opens the index and the models
    stages: dict[str, list[float]] = {}
    total, shares = [], []
    for text in texts:
        start = time.perf_counter()
        found = client.retrieve(SearchRequest(question=text, collection=NAME, top_k=10))
        total.append((time.perf_counter() - start) * 1000)
        for stage, milliseconds in found.timings_ms.items():
            stages.setdefault(stage, []).append(milliseconds)
        scores = prepared.vectors @ embedder.embed_query(text)
        exact = {prepared.ids[n] for n in np.argpartition(-scores, 10)[:10]}
        shares.append(len(exact & {hit.chunk_id for hit in found.hits}) / 10)
    return Asked(stages, total, float(np.mean(shares)))


def _rows(what: str, asked: dict[str, Asked]) -> list[Row]:
    rows = [shown(f"recall@10 of exact search, dense, {what}", asked["dense"].recall, "")]
    for name, one in asked.items():
        by_stage = ", ".join(
            f"{stage} {percentile(values, 50):.1f} / {percentile(values, 99):.1f}"
            for stage, values in one.stages.items()
            if stage in {"embed", "search", "rerank"} and any(values)
        )
        note = f"p99 {percentile(one.total, 99):.1f} ms; by stage, p50 / p99: {by_stage} ms; {len(one.total)} questions"
        rows.append(shown(f"/retrieve, {name}, {what}, p50", percentile(one.total, 50), "ms", note))
    return rows
