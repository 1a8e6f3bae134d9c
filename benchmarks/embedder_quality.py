"""What each embedder and runtime finds, and how fast it is: nDCG@10 on SciFact's training questions, dense, BM25 and fused.

Everything goes through the product's index and its fusion; a document scores as its best chunk. The fusion's weights were
chosen on these very questions, so the fused figures are upper bounds; the differences between runtimes are not.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import corpus, minilm
from benchmarks.report import Options, Row, median, say, settings, shown, skipped
from ingest.embed import Embedder, Vectors, load_counter, load_embedder
from ingest.index import Filter, Point, fuse, sparse_document, sparse_query
from ingest.index_edge import EdgeIndex
from ingest.runtime import RUNTIMES
from ingest.schemas import Chunk, Chunking, Retrieval

RETRIEVAL = Retrieval()
SLOW = 0.6  # of the same weights' faster runtime: what is slower is not worth an hour of embedding


class Found(NamedTuple):
    dense: float
    sparse: float
    fused: float


def run(options: Options) -> list[Row]:
    scifact = options.folder("scifact_train")
    if scifact is None:
        return [skipped("nDCG@10", "it needs --data with scifact_train/")]
    configured = settings(options.scratch)
    loaded = [load_embedder(configured.embedder, configured, runtime) for runtime in RUNTIMES]
    if minilm.is_ready():
        models = minilm.prepare()
        loaded.append(load_embedder(str(models.float32), configured))
        loaded.append(load_embedder(str(models.int8), configured, "onnxruntime"))
    embedders = [(_label(embedder), embedder) for embedder in loaded]
    documents = corpus.abstracts(scifact, 60 if options.quick else None)
    asked = corpus.questions(scifact)
    held = {one.id for one in documents}
    asked = corpus.Questions(asked.texts, {key: ids for key, ids in asked.judged.items() if ids <= held})
    rates = speeds(embedders, documents, options)
    made: dict[str, Vectors] = {}
    rows: list[Row] = []
    for label, embedder in embedders:
        fastest = max(rates[other] for other, same in embedders if same.fingerprint == embedder.fingerprint)
        rows.append(shown(f"speed, {label}", rates[label], "chunks/s", "in turn with the others"))
        if rates[label] < SLOW * fastest:
            rows.append(
                skipped(f"nDCG@10, {label}", f"{fastest / rates[label]:.1f} times slower, so it is never chosen here")
            )
            continue
        counter = load_counter(embedder.name, configured)
        pieces = corpus.chunks(documents, counter, Chunking())
        vectors = made[label] = corpus.vectors([chunk.text for _, chunk in pieces], embedder, options.scratch)
        texts = [asked.texts[key] for key in asked.judged]
        found = measure(pieces, vectors, asked, corpus.vectors(texts, embedder, options.scratch, queries=True))
        say(f"{label}: dense {found.dense:.4f}, BM25 {found.sparse:.4f}, fused {found.fused:.4f}")
        alike = _cosine(label, vectors, made)
        detail = f"{len(asked.judged)} questions, {len(documents):,} documents, {len(pieces):,} chunks{alike}"
        rows += [
            shown(f"nDCG@10, {label}: dense", round(found.dense, 4), "", detail),
            shown(f"nDCG@10, {label}: fused", round(found.fused, 4), "", f"BM25 alone {found.sparse:.4f}"),
        ]
    return rows


def measure(pieces: Sequence[tuple[str, Chunk]], vectors: Vectors, asked: corpus.Questions, queries: Vectors) -> Found:
    document_of = {chunk.id: document for document, chunk in pieces}
    scores: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        index = EdgeIndex(Path(folder))
        try:
            index.create("bench", vectors.shape[1])
            index.upsert(
                "bench",
                [
                    Point(chunk.id, vector, sparse_document(chunk.text), {"document_id": document})
                    for (document, chunk), vector in zip(pieces, vectors, strict=True)
                ],
            )
            for (key, relevant), query in zip(asked.judged.items(), queries, strict=True):
                sparse = sparse_query(asked.texts[key])
                candidates = index.search("bench", query, sparse, Filter(), RETRIEVAL.candidates)
                ranked = (candidates.dense, candidates.sparse, fuse(candidates, RETRIEVAL.dense_weight))
                dense, bm25, fused = (ndcg([document_of[id] for id, _ in one], relevant) for one in ranked)
                scores.append((dense, bm25, fused))
        finally:
            index.close()
    return Found(*(float(value) for value in np.mean(scores, axis=0)))


def ndcg(ranked: Sequence[str], relevant: frozenset[str], depth: int = 10) -> float:
    """Of documents by their best chunk, every judgement 1 (Järvelin and Kekäläinen, 2002)."""
    first = list(dict.fromkeys(ranked))[:depth]
    gained = sum(1 / math.log2(place + 2) for place, document in enumerate(first) if document in relevant)
    return gained / sum(1 / math.log2(place + 2) for place in range(min(depth, len(relevant))))


def speeds(
    embedders: Sequence[tuple[str, Embedder]], documents: Sequence[corpus.Abstract], options: Options
) -> dict[str, float]:
    """-> chunks/s, medians of turns; each with the first of its own chunks."""
    count, turns = (4, 1) if options.quick else (50, 5)
    configured = settings(options.scratch)
    documents = documents[:count]
    sides = [
        (
            label,
            embedder,
            [chunk.text for _, chunk in corpus.chunks(documents, load_counter(embedder.name, configured), Chunking())],
        )
        for label, embedder in embedders
    ]
    rates: dict[str, list[float]] = {label: [] for label, _ in embedders}
    for turn in range(turns + 1):
        for label, embedder, texts in sides:
            start = time.perf_counter()
            embedder.embed(texts)
            if turn:  # the first is for warming up
                rates[label].append(len(texts) / (time.perf_counter() - start))
    return {label: median(values) for label, values in rates.items()}


def _cosine(label: str, vectors: Vectors, made: dict[str, Vectors]) -> str:
    """To the same model's first, which is MiniLM's float32 for its int8."""
    first = next(name for name in made if name.split()[0] == label.split()[0])
    if first == label or made[first].shape != vectors.shape:
        return ""
    return f"; mean cosine to {first}: {float((made[first] * vectors).sum(axis=1).mean()):.4f}"


def _label(embedder: Embedder) -> str:
    folder = Path(embedder.name)
    model = f"all-MiniLM-L6-v2 {folder.name}" if folder.name in {"float32", "int8"} else folder.name
    return f"{model} on {embedder.runtime}"
