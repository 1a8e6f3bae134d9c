"""How fast an index goes out to Parquet shards and in again: 10,000 chunks, of an ingest with stub vectors."""

import tempfile
import time
from pathlib import Path

from benchmarks.ingest_memory import write_notes
from benchmarks.ingest_once import NAME, ingest, open_catalog
from benchmarks.report import Options, Row, median, settings, shown, spread
from benchmarks.stub_embedder import serving_vectors
from ingest import shards
from ingest.embed import load_embedder
from ingest.index_edge import EdgeIndex

PARAGRAPHS = 20_000


def run(options: Options) -> list[Row]:
    repetitions = 1 if options.quick else 3
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        work = Path(folder)
        write_notes(work / "documents", 200 if options.quick else PARAGRAPHS)
        with serving_vectors() as embedder:
            report = ingest(work / "home", work / "documents", load_embedder(embedder, settings())).report
        assert not report.failures, report.failures
        dumps = [_dump(work / "home", work / f"dump-{n}") for n in range(repetitions)]
        loads = [_load(work / "home", work / f"dump-{n}", work / f"loaded-{n}") for n in range(repetitions)]
        size = sum(file.stat().st_size for file in (work / "dump-0").iterdir()) / 2**20
    chunks = report.chunks.added
    out, into = [chunks / one for one in dumps], [chunks / one for one in loads]
    note = f"{chunks:,} chunks, {report.files.done:,} documents, {size:,.0f} MiB; runs: {spread(out, 0)}"
    return [
        shown("index dump", median(out), "chunks/s", note),
        shown("index load, into a new home", median(into), "chunks/s", f"runs: {spread(into, 0)}"),
    ]


def _dump(home: Path, target: Path) -> float:
    """-> seconds."""
    catalog = open_catalog(settings(home))
    index = EdgeIndex(home / "index")
    try:
        start = time.perf_counter()
        shards.dump(catalog, index, catalog.collection(NAME), target)
        return time.perf_counter() - start
    finally:
        index.close()
        catalog.engine.dispose()


def _load(dumped: Path, source: Path, home: Path) -> float:
    """-> seconds."""
    old = open_catalog(settings(dumped))
    collection = old.collection(NAME)
    old.engine.dispose()
    catalog = open_catalog(settings(home))
    catalog.put_collection(collection)
    index = EdgeIndex(home / "index")
    try:
        start = time.perf_counter()
        report = shards.load(catalog, index, source, collection, home=home)
        assert index.count(collection.index) == report.chunks
        return time.perf_counter() - start
    finally:
        index.close()
        catalog.engine.dispose()
