"""`/retrieve` over 100,000 chunks in the real service over HTTP: its time, its recall, its memory, and an ingest beside it.

5,000 and more chunks are real (SciFact's, cut and embedded by the product); the rest are those with noise: vectors turned
away a little, texts of as many words drawn from all the real ones, so that BM25 has its work too. The index is made once
in the scratch folder; every run works on a copy of it.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import corpus
from benchmarks.ingest_once import open_catalog
from benchmarks.load import Reply, open_loop
from benchmarks.report import Options, Row, at_least, at_most, median, percentile, say, settings, shown, skipped, spread
from benchmarks.service_process import Service, serving
from ingest.catalog import Collection, now
from ingest.embed import Embedder, Vectors, index_fingerprint, load_counter, load_embedder, unit
from ingest.index import Point, chunk_payload, sparse_document
from ingest.index_edge import EdgeIndex
from ingest.schemas import Chunk, Chunking, Retrieval, chunk_id, document_id
from ingest.settings import IngestSettings
from service.client import Client
from service.schemas import CollectionSettings, SearchRequest
from service.schemas_jobs import IngestRequest

BEYOND_MS, RECALL, BESIDE_INGEST = 25.0, 0.98, 3.0
NOISE = 0.6  # length of the noise beside a vector of length 1: cosine .86 to the real one
PER_DOCUMENT = 10
RATE = 10.0  # questions a second
NAME = "scale"


class Size(NamedTuple):
    chunks: int
    abstracts: int | None  # 2,600 are over 5,000 chunks
    seconds: float  # of each stretch of load
    turns: int  # idle and beside an ingest, in turn
    asked: int  # questions for recall


FULL, QUICK = Size(100_000, 2_600, 20.0, 3, 400), Size(2_000, 60, 3.0, 1, 20)


class Prepared(NamedTuple):
    """`home` holds the collection; `ids` and `vectors` are its points, in one order."""

    home: Path
    ids: list[str]
    vectors: Vectors
    real: int


def run(options: Options) -> list[Row]:
    scifact, covid = options.folder("scifact_train"), options.folder("covid_qa")
    if scifact is None or covid is None:
        return [skipped("/retrieve at 100,000 chunks", "it needs --data with scifact_train/ and covid_qa/")]
    size = QUICK if options.quick else FULL
    configured = settings(options.scratch)
    embedder = load_embedder(configured.embedder, configured)
    prepared = prepare(options, size, scifact, embedder, configured)
    asked = list(corpus.questions(scifact).texts.values())
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        work = Path(folder)
        papers = work / "papers"
        corpus.write_papers(papers, corpus.papers(covid))
        with serving(home_of(work / "empty", options), [papers]) as service:
            rows = _memory_rows("without a document", service)
        with (
            serving(home_of(work / "scale", options, prepared.home), [papers]) as service,
            Client(service.url) as client,
        ):
            rows += _recall(client, embedder, prepared, asked[: size.asked])
            rows += _load(service, client, papers, asked, size)
            rows += _memory_rows(f"at {len(prepared.ids):,} chunks, after this load", service)
    return rows


def prepare(options: Options, size: Size, scifact: Path, embedder: Embedder, configured: IngestSettings) -> Prepared:
    pieces = corpus.chunks(
        corpus.abstracts(scifact, size.abstracts), load_counter(embedder.name, configured), Chunking()
    )
    real = [chunk for _, chunk in pieces]
    assert options.quick or len(real) >= 5_000, len(real)
    base = corpus.vectors([chunk.text for chunk in real], embedder, options.scratch)
    vectors = extended(base, size.chunks)
    texts = extended_texts([chunk.text for chunk in real], size.chunks)
    documents = [document_id(NAME, f"bench:{n // PER_DOCUMENT}", 0) for n in range(size.chunks)]
    ids = [chunk_id(document, text, n) for n, (document, text) in enumerate(zip(documents, texts, strict=True))]
    key = hashlib.sha256("\0".join([embedder.fingerprint, str(size), str(NOISE), *ids[:: len(ids) // 100]]).encode())
    home = options.scratch / f"scale-{key.hexdigest()[:12]}"
    if not (home / "ready").exists():
        shutil.rmtree(home, ignore_errors=True)
        _fill(home, embedder, documents, ids, texts, vectors)
        (home / "ready").touch()
    return Prepared(home, ids, vectors, len(real))


def extended(base: Vectors, count: int) -> Vectors:
    """The real vectors first, then turned copies of them."""
    generator = np.random.default_rng(0)
    copies = base[np.arange(count - len(base)) % len(base)] if count > len(base) else base[:0]
    noise = generator.standard_normal(copies.shape, dtype=np.float32) * np.float32(NOISE / np.sqrt(base.shape[1]))
    return np.concatenate([base, unit(copies + noise)])[:count]


def extended_texts(base: Sequence[str], count: int) -> list[str]:
    """The real texts first, then as many words as theirs, each as often as in all of them."""
    generator = np.random.default_rng(0)
    words = np.asarray([word for text in base for word in text.split()], dtype=object)
    lengths = [len(base[n % len(base)].split()) for n in range(max(0, count - len(base)))]
    drawn = [" ".join(generator.choice(words, length)) for length in lengths]
    return [*base, *drawn][:count]


def _fill(
    home: Path, embedder: Embedder, documents: list[str], ids: list[str], texts: list[str], vectors: Vectors
) -> None:
    """By the product's own index; the catalog gets the collection alone, which is all that a search reads of it."""
    say(f"writing {len(ids):,} chunks")
    catalog = open_catalog(settings(home))
    collection = Collection(
        name=NAME,
        embedder=embedder.name,
        chunking=Chunking(),
        fingerprint=index_fingerprint(embedder, Chunking()),
        prompt="auto",
        created_at=now(),
    )
    catalog.put_collection(collection)
    catalog.engine.dispose()
    index = EdgeIndex(home / "index")
    try:
        index.create(collection.index, vectors.shape[1])
        for start in range(0, len(ids), 1000):
            part = range(start, min(start + 1000, len(ids)))
            index.upsert(
                collection.index,
                [_point(n, documents[n], ids[n], texts[n], vectors[n], embedder.fingerprint) for n in part],
            )
        index.flush(collection.index)
    finally:
        index.close()


def _point(n: int, document: str, identity: str, text: str, vector: Any, made_by: str) -> Point:
    chunk = Chunk(
        id=identity, ordinal=n % PER_DOCUMENT, text=text, start=0, end=len(text), page=None, heading=None, language="en"
    )
    payload = chunk_payload(chunk, document, f"bench/{n // 1000:03}/{n // PER_DOCUMENT}.md", (), {}, made_by)
    return Point(identity, vector, sparse_document(text), payload)


def home_of(home: Path, options: Options, filled: Path | None = None) -> Path:
    """A home of its own, which knows what the probe of the runtimes found, if it was needed."""
    if filled:
        shutil.copytree(filled, home, ignore=shutil.ignore_patterns("ready"))
    home.mkdir(exist_ok=True)
    probe = options.scratch / "embedder-probe.json"
    if probe.exists():
        shutil.copy(probe, home)
    return home


def _memory_rows(when: str, service: Service) -> list[Row]:
    time.sleep(2)
    memory = service.resident()
    note = (
        f"{memory['RssAnon']:,.0f} of its own, {memory['RssFile']:,.0f} of mapped files, which the system may take back"
    )
    return [shown(f"resident memory of the service, {when}", memory["VmRSS"], "MiB", note)]


def _recall(client: Client, embedder: Embedder, prepared: Prepared, asked: Sequence[str]) -> list[Row]:
    """Of the dense side alone, over HTTP, against all products in numpy."""
    client.put_collection(NAME, CollectionSettings(retrieval=Retrieval(dense_weight=1.0)))
    shares = []
    for question in asked:
        hits = client.retrieve(SearchRequest(question=question, collection=NAME, top_k=10)).hits
        scores = prepared.vectors @ embedder.embed_query(question)
        exact = {prepared.ids[n] for n in np.argpartition(-scores, 10)[:10]}
        shares.append(len(exact & {hit.chunk_id for hit in hits}) / 10)
    client.put_collection(NAME, CollectionSettings(retrieval=Retrieval()))
    note = f"{len(asked)} questions, {len(prepared.ids):,} chunks, {prepared.real:,} of them real"
    return [at_least("/retrieve, recall@10 of the dense side", float(np.mean(shares)), "", RECALL, note)]


def _load(service: Service, client: Client, papers: Path, asked: Sequence[str], size: Size) -> list[Row]:
    bodies = [{"question": question, "collection": NAME} for question in asked]
    url = f"{service.url}/retrieve"
    open_loop(url, bodies, RATE, min(5.0, size.seconds))  # to warm up
    idle: list[list[Reply]] = []
    beside: list[list[Reply]] = []
    written = 0
    for turn in range(size.turns):
        say(f"turn {turn + 1} of {size.turns}: idle, then beside an ingest, {size.seconds:g} s each")
        idle.append(open_loop(url, bodies, RATE, size.seconds))
        job = client.ingest(IngestRequest(path=str(papers), collection=NAME))
        while (now_at := client.job(job.job_id)).progress.chunks == 0 and now_at.state in {"queued", "running"}:
            time.sleep(0.1)
        beside.append(open_loop(url, bodies, RATE, size.seconds))
        last = client.job(job.job_id)
        assert last.state == "running", f"the ingest was over too early: {last.state}"
        written += last.progress.chunks
        client.cancel(job.job_id)
        client.wait(job.job_id)
        time.sleep(1)
    return _load_rows(idle, beside, written)


def _load_rows(idle: list[list[Reply]], beside: list[list[Reply]], written: int) -> list[Row]:
    everything = [reply for part in (*idle, *beside) for reply in part]
    failed = sum(reply.body is None for reply in everything)
    idle_all, beside_all = [one for part in idle for one in part], [one for part in beside for one in part]
    beyond = [reply.milliseconds - reply.body["timings_ms"]["embed"] for reply in idle_all if reply.body]
    embed = [reply.body["timings_ms"]["embed"] for reply in idle_all if reply.body]
    busy = [reply.milliseconds - reply.body["timings_ms"]["embed"] for reply in beside_all if reply.body]
    idle_p99s = [percentile([one.milliseconds for one in part], 99) for part in idle]
    beside_p99s = [percentile([one.milliseconds for one in part], 99) for part in beside]
    ratios = [after / before for before, after in zip(idle_p99s, beside_p99s, strict=True)]
    how = f"{len(idle_all):,} questions, {RATE:g} a second, open loop, as a client sees it; {failed} failed"
    return [
        at_most("/retrieve beyond the query's embedding, p99", percentile(beyond, 99), "ms", BEYOND_MS, how),
        shown("/retrieve beyond the query's embedding, p50", percentile(beyond, 50), "ms"),
        shown("the query's embedding, p99", percentile(embed, 99), "ms", f"p50 {percentile(embed, 50):.1f} ms"),
        shown("/retrieve in all, idle, p99", percentile([one.milliseconds for one in idle_all], 99), "ms",
              f"p50 {percentile([one.milliseconds for one in idle_all], 50):.1f} ms; turns {spread(idle_p99s)}"),
        shown("/retrieve in all, beside an ingest, p99", percentile([one.milliseconds for one in beside_all], 99), "ms",
              f"p50 {percentile([one.milliseconds for one in beside_all], 50):.1f} ms; turns {spread(beside_p99s)}; "
              f"{written:,} chunks written meanwhile"),
        at_most("p99 beside an ingest / idle p99", median(ratios), "times", BESIDE_INGEST, f"turns {spread(ratios, 2)}"),
        shown("/retrieve beyond the embedding, beside an ingest, p99", percentile(busy, 99), "ms"),
    ]  # fmt: skip
