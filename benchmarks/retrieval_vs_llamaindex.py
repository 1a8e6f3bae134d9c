"""Against LlamaIndex' stock retriever: the same abstracts, questions, float32 weights (all-MiniLM-L6-v2) and chunk size.

Quality is nDCG@10 of documents by their best chunk, time is one question after the other within the process, embedding
included. Ours answers by its defaults (dense and BM25, fused); the rows with reranking stand by themselves.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import corpus, minilm
from benchmarks.embedder_quality import ndcg
from benchmarks.ingest_once import open_catalog
from benchmarks.report import Options, Row, percentile, say, settings, shown, skipped
from deploy.environment import SetupError
from ingest.catalog import Catalog, Collection, now
from ingest.embed import index_fingerprint, load_counter, load_embedder
from ingest.index import Index, Point, chunk_payload, sparse_document
from ingest.index_edge import EdgeIndex
from ingest.schemas import Chunking, Retrieval
from service.retrieve import Retriever
from service.settings import ServiceSettings

NAME = "stock"
DEPTH = 30  # chunks, of which ten documents remain
DOCUMENTS, QUESTIONS = 1_500, 300
RERANKED = 60  # questions, at about a second each


class Side(NamedTuple):
    """By question: the documents found, best first; and what each question took."""

    found: dict[str, list[str]]
    milliseconds: list[float]

    def quality(self, asked: corpus.Questions) -> list[float]:
        return [ndcg(documents, asked.judged[key]) for key, documents in self.found.items()]


def run(options: Options) -> list[Row]:
    name = "nDCG@10 beside LlamaIndex"
    scifact = options.folder("scifact_train")
    if scifact is None:
        return [skipped(name, "it needs --data with scifact_train/")]
    if options.quick and not minilm.is_ready():
        return [skipped(name, "its environment is not made yet, which takes minutes: run it once without --quick")]
    try:
        models = minilm.prepare()
    except SetupError as error:
        return [skipped(name, str(error).splitlines()[0])]
    documents, asked = sample(scifact, 60 if options.quick else DOCUMENTS, 20 if options.quick else QUESTIONS)
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        say(f"LlamaIndex: {len(documents):,} documents")
        theirs, nodes = stock(models, documents, asked, Path(folder))
        say("ours")
        sides, chunks = ours(options, models, documents, asked, Path(folder))
    return rows(sides | {"LlamaIndex stock": theirs}, asked, f"{len(documents):,} documents", chunks, nodes)


def sample(scifact: Path, documents: int, questions: int) -> tuple[list[corpus.Abstract], corpus.Questions]:
    """The first questions, the documents judged for them, and as many others as are wanted."""
    everything, asked = corpus.abstracts(scifact), corpus.questions(scifact)
    keys = list(asked.judged)[:questions]
    wanted = frozenset().union(*(asked.judged[key] for key in keys))
    others = [one for one in everything if one.id not in wanted][: max(0, documents - len(wanted))]
    judged = {key: asked.judged[key] for key in keys}
    kept = [one for one in everything if one.id in wanted] + others
    return kept, corpus.Questions({key: asked.texts[key] for key in keys}, judged)


def stock(
    models: minilm.MiniLM, documents: Sequence[corpus.Abstract], asked: corpus.Questions, work: Path
) -> tuple[Side, int]:
    task = work / "task.json"
    content = {
        "documents": [(one.id, f"# {one.title}\n\n{one.text}") for one in documents],
        "queries": list(asked.texts.items()),
        "depth": DEPTH,
    }
    task.write_text(json.dumps(content))
    command = [models.python, minilm.HERE / "llamaindex_retriever.py", task, models.weights, work / "theirs"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Side({key: list(dict.fromkeys(ids)) for key, ids in found["found"].items()}, found["milliseconds"]), found[
        "points"
    ]


def ours(
    options: Options,
    models: minilm.MiniLM,
    documents: Sequence[corpus.Abstract],
    asked: corpus.Questions,
    work: Path,
) -> tuple[dict[str, Side], int]:
    """-> the sides by name, and how many chunks there are."""
    configured = settings(work / "ours")
    embedder = load_embedder(str(models.float32), configured)
    pieces = corpus.chunks(documents, load_counter(embedder.name, configured), Chunking())
    vectors = corpus.vectors([chunk.text for _, chunk in pieces], embedder, options.scratch)
    catalog, index = open_catalog(configured), EdgeIndex(configured.home / "index")
    try:
        collection = Collection(
            name=NAME, embedder=embedder.name, chunking=Chunking(), prompt="auto", created_at=now(),
            fingerprint=index_fingerprint(embedder, Chunking()),
        )  # fmt: skip
        catalog.put_collection(collection)
        index.create(collection.index, embedder.dimension)
        points = [
            Point(
                chunk.id, vector, sparse_document(chunk.text),
                chunk_payload(chunk, document, f"{document}.md", (), {}, embedder.fingerprint),
            )
            for (document, chunk), vector in zip(pieces, vectors, strict=True)
        ]  # fmt: skip
        index.upsert(collection.index, points)
        return _sides(catalog, index, collection, asked, options), len(points)
    finally:
        index.close()
        catalog.engine.dispose()


def _sides(
    catalog: Catalog, index: Index, collection: Collection, asked: corpus.Questions, options: Options
) -> dict[str, Side]:
    retriever = Retriever(catalog, index, settings(), ServiceSettings.model_fields["reranker"].default)

    def side(retrieval: Retrieval, count: int | None = None) -> Side:
        catalog.put_collection(collection.model_copy(update={"retrieval": retrieval}))
        texts = dict(list(asked.texts.items())[:count])
        return _timed(texts, lambda text: _documents(retriever, text))

    return {
        "graft": side(Retrieval()),
        "graft, dense alone": side(Retrieval(dense_weight=1.0)),
        "graft, reranked": side(Retrieval(rerank=True), 3 if options.quick else RERANKED),
    }


def _documents(retriever: Retriever, text: str) -> list[str]:
    hits = retriever.retrieve(text, NAME, {}, None, DEPTH).hits
    return list(dict.fromkeys(hit.document_id for hit in hits))


def _timed(texts: dict[str, str], ask: Callable[[str], list[str]]) -> Side:
    ask("warm up")
    found, milliseconds = {}, []
    for key, text in texts.items():
        start = time.perf_counter()
        found[key] = ask(text)
        milliseconds.append((time.perf_counter() - start) * 1000)
    return Side(found, milliseconds)


def rows(sides: dict[str, Side], asked: corpus.Questions, what: str, chunks: int, nodes: int) -> list[Row]:
    made = []
    for name, side in sides.items():
        held = f"{nodes:,} nodes" if name.startswith("LlamaIndex") else f"{chunks:,} chunks"
        quality = float(np.mean(side.quality(asked)))
        made.append(shown(f"nDCG@10, {name}", round(quality, 4), "", f"{len(side.found)} questions, {what}, {held}"))
        half, most = percentile(side.milliseconds, 50), percentile(side.milliseconds, 99)
        made.append(shown(f"one question, {name}, p50", half, "ms", f"p99 {most:.1f} ms"))
    return made
