"""How fast a folder becomes searchable, against the embedder alone on the same chunks; and how fast an unchanged one is seen.

Both sides run in new processes, with the same runtime and threads, in turn; the job's time holds the start of its child.
"""

import hashlib
import json
import tempfile
import time
from pathlib import Path

from benchmarks import corpus
from benchmarks.ingest_once import Ingested, embed_alone, indexed_texts, ingest, open_catalog, open_collection
from benchmarks.report import Options, Row, at_least, median, say, settings, shown, skipped, spread
from ingest import sync
from ingest.catalog import Catalog, Document, now
from ingest.embed import Embedder, load_embedder
from ingest.index_edge import EdgeIndex
from ingest.pipeline import IngestJob
from ingest.schemas import document_id

RATIO, UNCHANGED = 0.85, 10_000


def run(options: Options) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as work:
        return [*end_to_end(options, Path(work) / "speed"), *unchanged(options, Path(work) / "unchanged")]


def end_to_end(options: Options, work: Path) -> list[Row]:
    scifact, covid = options.folder("scifact_train"), options.folder("covid_qa")
    if scifact is None or covid is None:
        return [skipped("ingest / embedder alone", "it needs --data with scifact_train/ and covid_qa/")]
    folder, one_line = work / "documents", work / "one"
    corpus.write_abstracts(folder, corpus.abstracts(scifact, 10 if options.quick else 150))
    corpus.write_papers(folder, corpus.papers(covid, 0 if options.quick else 8))
    if not options.quick:
        corpus.copy_examples(folder)
    one_line.mkdir()
    (one_line / "one.txt").write_text("One line, so that what is left is the start of the child.\n")
    configured = settings(options.scratch)
    embedder = load_embedder(configured.embedder, configured)

    repetitions = 1 if options.quick else 2
    starts = [ingest(work / f"home-one-{n}", one_line, embedder).report.seconds["total"] for n in range(repetitions)]
    jobs: list[Ingested] = []
    alone: list[float] = []
    file = work / "texts.json"
    for n in range(repetitions):
        jobs.append(ingest(work / f"home-{n}", folder, embedder))
        if n == 0:
            file.write_text(json.dumps(indexed_texts(work / "home-0")))
        alone.append(embed_alone(file, embedder).seconds)
        say(f"job {jobs[-1].report.seconds['total']:.1f} s, embedder alone {alone[-1]:.1f} s")
    return _speed_rows(embedder, jobs, alone, starts, len(list(folder.iterdir())))


def _speed_rows(
    embedder: Embedder, jobs: list[Ingested], alone: list[float], starts: list[float], files: int
) -> list[Row]:
    counts = {job.report.chunks.added for job in jobs}
    assert not jobs[0].report.failures, jobs[0].report.failures
    (chunks,) = counts
    totals = [job.report.seconds["total"] for job in jobs]
    ratios = [one / total for one, total in zip(alone, totals, strict=True)]
    name = f"{Path(embedder.name).name} on {embedder.runtime}"
    rows = [
        at_least("ingest / embedder alone, chunks/s", median(ratios), "", RATIO, f"each pair: {spread(ratios, 2)}"),
        shown(
            "ingest, parse to searchable",
            chunks / median(totals),
            "chunks/s",
            f"{files} files, {chunks:,} chunks; {name}",
        ),
        shown("embedder alone, same chunks", chunks / median(alone), "chunks/s", f"runs: {spread(alone)} s"),
        shown(
            "ingest of a file of one line",
            median(starts),
            "s",
            "what every job pays: its child's imports and model load",
        ),
    ]
    for stage in ("walk", "parse", "embed", "write", "total"):
        seconds = median([job.report.seconds[stage] for job in jobs])
        overlap = "" if stage == "total" else "overlaps the others"
        rows.append(shown(f"ingest, stage {stage}", seconds, "s", overlap))
    return rows


def unchanged(options: Options, work: Path) -> list[Row]:
    """The catalog's rows are written as an ingest leaves them, since embedding so many files would take an hour."""
    count, repetitions = (500, 2) if options.quick else (20_000, 5)
    folder, home = work / "documents", work / "home"
    for n in range(count):
        file = folder / f"{n // 200:03}" / f"note-{n:05}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Note {n}. The reading of gauge {n % 97} was {n * 7 % 1013}.\n")
    configured = settings(home)
    catalog = open_catalog(configured)
    index = EdgeIndex(home / "index")
    try:
        collection = open_collection(catalog, configured.embedder)
        index.create(collection.index, 384)
        catalog.put(_done(folder))
        rates = []
        for _ in range(repetitions):
            before = (_stamps(home), _rows(catalog, folder))
            start = time.perf_counter()
            job = IngestJob(
                catalog, index, configured, collection, folder, folder, runtime="onnxruntime", dimension=384
            )
            report = job.run()
            rates.append(count / (time.perf_counter() - start))
            assert report.files.unchanged == count, report
            assert set(report.seconds) == {"walk", "total"}, report
            assert not index.count(collection.index)
            assert (_stamps(home), _rows(catalog, folder)) == before
    finally:
        index.close()
        catalog.engine.dispose()
    note = f"{count:,} files; nothing parsed, embedded or written; runs: {spread(rates, 0)}"
    return [at_least("unchanged folder", median(rates), "files/s", UNCHANGED, note)]


def _done(folder: Path) -> list[Document]:
    return [
        Document(
            id=document_id("bench", file.uri, 0),
            collection="bench",
            uri=file.uri,
            first_uri=file.uri,
            path=file.path,
            size=file.size,
            mtime_ns=file.mtime_ns,
            content_hash=hashlib.sha256(Path(file.place).read_bytes()).hexdigest(),
            mime="text/plain",
            state="done",
            chunks=1,
            languages={"en": 1},
            indexed_at=now(),
        )
        for file in sync.walk(folder, folder).files
    ]


def _stamps(home: Path) -> dict[str, tuple[int, int]]:
    """-> size and time of every file that is written to on purpose; SQLite's shared memory moves on reading."""
    found = {str(file): file.stat() for file in home.rglob("*") if file.is_file() and not file.name.endswith("-shm")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def _rows(catalog: Catalog, folder: Path) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in catalog.stamps("bench", sync.uri_of(str(folder))).values()]
