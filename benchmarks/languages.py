"""Which embedder serves English and Chinese: nDCG@10 of the bundled ones, dense, BM25 and fused, and what each costs.

SciFact's training questions, XQuAD in both languages, Chinese questions of XQuAD over its English paragraphs, and DRCD with
all Chinese paragraphs at hand as distractors. Everything goes through the product's index and fusion; a document scores as
its best chunk. The figure of a row is what a collection with the default settings gives: fused where the embedder reads the
question, else BM25 alone.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks import corpus
from benchmarks.embedder_quality import ndcg, speeds
from benchmarks.report import Options, Row, at_least, median, percentile, say, settings, shown, skipped
from ingest.chunk import split
from ingest.embed import Embedder, Vectors, load_counter, load_embedder
from ingest.index import Filter, Point, fuse, sparse_document, sparse_query
from ingest.index_edge import EdgeIndex
from ingest.language import reads
from ingest.parse import markdown_headings
from ingest.schemas import Chunk, Chunking, ParsedText, Retrieval, document_id
from ingest.settings import IngestSettings

EMBEDDERS = ("bge-small-en-v1.5", "multilingual-e5-small")
RETRIEVAL = Retrieval()
WEIGHTS = (0.3, 0.5, 0.7, 0.85)  # of the dense side
TIMED = 100  # questions


class Task(NamedTuple):
    """Questions of one set over the documents of `corpora`; document ids are unique among those."""

    name: str
    corpora: tuple[str, ...]
    asked: corpus.Questions
    bar: float | None = None


class Cut(NamedTuple):
    """A set's documents as an embedder's chunks."""

    pieces: list[tuple[str, Chunk]]
    vectors: Vectors


class Figures(NamedTuple):
    """Mean nDCG@10. `strangers`: by corpus, the share of questions whose best hit in the default's order is of it."""

    default: float
    dense: float
    sparse: float
    fused: tuple[float, ...]
    strangers: dict[str, float]


def run(options: Options) -> list[Row]:
    scifact, xquad, drcd = (options.folder(name) for name in ("scifact_train", "xquad", "drcd_dev"))
    if scifact is None or xquad is None or drcd is None:
        return [skipped("nDCG@10 by language", "it needs --data with scifact_train/, xquad/ and drcd_dev/")]
    documents, tasks = read(scifact, xquad, drcd, 20 if options.quick else None)
    configured = settings(options.scratch)
    held = [name for name in EMBEDDERS if (configured.models / name).is_dir()]
    rows: list[Row] = []
    for name in held:
        embedder = load_embedder(name, configured)
        cuts = {key: _cut(own, embedder, configured) for key, own in documents.items()}
        for task in tasks:
            rows.append(_row(task, embedder, measure(task, embedder, cuts, options.scratch)))
    return rows + _costs(held, configured, options)


def read(scifact: Path, xquad: Path, drcd: Path, count: int | None) -> tuple[dict[str, dict[str, str]], list[Task]]:
    """-> by corpus, the texts by document id; and the tasks. `count`: of each corpus only the first documents."""
    abstracts = {one.id: f"# {one.title}\n\n{one.text}" for one in corpus.abstracts(scifact, count)}
    english, asked_in_english = squad(xquad / "xquad.en.json", "xquad", count)
    chinese, asked_in_chinese = squad(xquad / "xquad.zh.json", "xquad", count)
    traditional, of_drcd = squad(drcd / "DRCD_dev.json", "drcd", count)
    found = corpus.questions(scifact)
    claims = corpus.Questions(found.texts, {key: ids for key, ids in found.judged.items() if ids <= abstracts.keys()})
    documents = {"XQuAD en": english, "XQuAD zh": chinese, "DRCD": traditional, "SciFact": abstracts}
    tasks = [
        Task("SciFact train", ("SciFact",), claims, 0.765),
        Task("XQuAD en", ("XQuAD en",), asked_in_english, 0.95),
        Task("XQuAD zh", ("XQuAD zh",), asked_in_chinese, 0.95),
        Task("XQuAD zh questions, en paragraphs", ("XQuAD en",), asked_in_chinese),
        Task("DRCD dev", ("DRCD",), of_drcd),
        Task("DRCD dev, XQuAD zh as distractors", ("DRCD", "XQuAD zh"), of_drcd),
        Task("XQuAD zh, DRCD as distractors", ("DRCD", "XQuAD zh"), asked_in_chinese),
    ]
    return documents, tasks


def squad(file: Path, name: str, count: int | None) -> tuple[dict[str, str], corpus.Questions]:
    """Paragraphs by place, so that those of parallel files have the same ids; each answers its own questions."""
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    paragraphs = [one for article in articles for one in article["paragraphs"]][:count]
    texts = {f"{name}-{place}": str(one["context"]) for place, one in enumerate(paragraphs)}
    asked = [(f"{name}-{place}", question) for place, one in enumerate(paragraphs) for question in one["qas"]]
    judged = {str(question["id"]): frozenset([document]) for document, question in asked}
    return texts, corpus.Questions({str(question["id"]): str(question["question"]) for _, question in asked}, judged)


def measure(task: Task, embedder: Embedder, cuts: dict[str, Cut], scratch: Path) -> Figures:
    pieces = [piece for name in task.corpora for piece in cuts[name].pieces]
    document_of = {chunk.id: document for document, chunk in pieces}
    vectors = np.concatenate([cuts[name].vectors for name in task.corpora])
    corpus_of = {document: name for name in task.corpora for document, _ in cuts[name].pieces}
    queries = corpus.vectors([task.asked.texts[key] for key in task.asked.judged], embedder, scratch, queries=True)
    scores: list[tuple[float, ...]] = []
    first = dict.fromkeys(task.corpora, 0)
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        index = _filled(Path(folder), pieces, vectors)
        try:
            for (key, relevant), query in zip(task.asked.judged.items(), queries, strict=True):
                rankings = _rankings(index, task.asked.texts[key], query, embedder.languages, document_of)
                scores.append(tuple(ndcg(ranking, relevant) for ranking in rankings))
                for best in rankings[0][:1]:
                    first[corpus_of[best]] += 1
        finally:
            index.close()
    default, dense, sparse, *fused = (float(value) for value in np.mean(scores, axis=0))
    shares = {name: number / len(scores) for name, number in first.items()}
    return Figures(default, dense, sparse, tuple(fused), shares)


def _rankings(
    index: EdgeIndex,
    question: str,
    query: NDArray[np.float32],
    languages: tuple[str, ...],
    document_of: dict[str, str],
) -> list[list[str]]:
    """-> documents, best first: by the default, dense, BM25, and by each of WEIGHTS."""
    found = index.search("bench", query, sparse_query(question), Filter(), RETRIEVAL.candidates)
    weight = RETRIEVAL.dense_weight if reads(languages, question) else 0.0
    orders = [fuse(found, weight), found.dense, found.sparse, *(fuse(found, one) for one in WEIGHTS)]
    return [list(dict.fromkeys(document_of[chunk] for chunk, _ in order)) for order in orders]


def _filled(folder: Path, pieces: Sequence[tuple[str, Chunk]], vectors: Vectors) -> EdgeIndex:
    index = EdgeIndex(folder)
    index.create("bench", vectors.shape[1])
    points = [
        Point(chunk.id, vector, sparse_document(chunk.text), {"document_id": document})
        for (document, chunk), vector in zip(pieces, vectors, strict=True)
    ]
    index.upsert("bench", points)
    return index


def _cut(documents: dict[str, str], embedder: Embedder, configured: IngestSettings) -> Cut:
    """A text that begins with a heading is cut as Markdown."""
    counter = load_counter(embedder.name, configured)
    pieces = []
    for identity, text in documents.items():
        is_markdown = text.startswith("# ")
        parsed = ParsedText(
            text=text,
            mime="text/markdown" if is_markdown else "text/plain",
            headings=markdown_headings(text) if is_markdown else (),
        )
        chunks = split(document_id("bench", identity, 0), parsed, Chunking(), counter)
        pieces += [(identity, chunk) for chunk in chunks]
    return Cut(pieces, corpus.vectors([chunk.text for _, chunk in pieces], embedder, configured.home))


def _row(task: Task, embedder: Embedder, found: Figures) -> Row:
    name = f"nDCG@10, {task.name}: {embedder.name}"
    say(f"{name} {found}")
    fused = ", ".join(f"{weight:g}: {value:.3f}" for weight, value in zip(WEIGHTS, found.fused, strict=True))
    note = f"dense {found.dense:.3f}, BM25 {found.sparse:.3f}, fused by dense weight {fused}"
    if len(found.strangers) > 1:
        shares = ", ".join(f"{100 * share:.0f} % {corpus_name}" for corpus_name, share in found.strangers.items())
        note += f"; best hits: {shares}"
    if task.bar is None:
        return shown(name, round(found.default, 4), "", note)
    return at_least(name, round(found.default, 4), "", task.bar, note)


def _costs(names: Sequence[str], configured: IngestSettings, options: Options) -> list[Row]:
    """Speed in turns, so that a busy machine slows all of them alike."""
    scifact = options.folder("scifact_train")
    assert scifact is not None
    loaded = [load_embedder(name, configured) for name in names]
    rates = speeds([(one.name, one) for one in loaded], corpus.abstracts(scifact, 50), options)
    alone = [load_embedder(name, configured, threads=1) for name in names]  # as the service asks
    texts = list(corpus.questions(scifact).texts.values())[: 5 if options.quick else TIMED]
    times: dict[str, list[float]] = {one.name: [] for one in alone}
    for text in texts:
        for one in alone:
            start = time.perf_counter()
            one.embed_query(text)
            times[one.name].append(1000 * (time.perf_counter() - start))
    rows: list[Row] = []
    for one in loaded:
        size = sum(file.stat().st_size for file in (configured.models / one.name).iterdir()) / 1e6
        asked = f"one thread, {len(texts)} questions in turn, p99 {percentile(times[one.name], 99):.1f} ms"
        rows += [
            shown(f"speed: {one.name}", rates[one.name], "chunks/s", f"{one.runtime}, SciFact, in turns"),
            shown(f"one question: {one.name}", median(times[one.name]), "ms", asked),
            shown(f"memory: {one.name}", _in_a_child(one.name, configured), "MB", "resident, added by loading it"),
            shown(f"on disk: {one.name}", size, "MB"),
        ]
    return rows


def _in_a_child(name: str, configured: IngestSettings) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(resident, name, configured).result()


def resident(name: str, configured: IngestSettings) -> float:
    """-> MB that loading an embedder and asking it one question add, in a process that has loaded none."""
    import onnxruntime  # noqa: F401  # the libraries themselves are not counted
    import openvino  # noqa: F401

    before = psutil.Process().memory_info().rss
    embedder = load_embedder(name, configured, threads=1)
    embedder.embed_query("How large is it?")
    return (psutil.Process().memory_info().rss - before) / 1e6
