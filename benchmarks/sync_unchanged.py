"""How fast a folder is seen in which nothing changed: 100,000 small files in nested folders, 100 a folder.

The catalog's rows are written as an ingest leaves them, since embedding so many files would take hours.
"""

import hashlib
import tempfile
import time
from pathlib import Path

from sqlalchemy import insert

from benchmarks.ingest_once import NAME, make_job, open_catalog, open_collection
from benchmarks.report import Options, Row, at_least, median, say, settings, shown, spread
from ingest import sync
from ingest.catalog import Catalog, Document, documents, now
from ingest.index_edge import EdgeIndex
from ingest.schemas import document_id

RATE = 10_000
FILES, PER_FOLDER, FOLDERS_PER_FOLDER = 100_000, 100, 32


def run(options: Options) -> list[Row]:
    count, repetitions = (500, 2) if options.quick else (FILES, 3)
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        return measure(Path(folder), count, repetitions)


def measure(work: Path, count: int, repetitions: int) -> list[Row]:
    folder, home = work / "documents", work / "home"
    write_notes(folder, count)
    say(f"{count:,} files are written")
    configured = settings(home)
    catalog = open_catalog(configured)
    index = EdgeIndex(home / "index")
    try:
        collection = open_collection(catalog, configured.embedder)
        index.create(collection.index, 384)
        put_done(catalog, folder)
        seconds, walks = [], []
        for _ in range(repetitions):
            before = (_stamps(home), _rows(catalog, folder))
            start = time.perf_counter()
            report = make_job(catalog, index, configured, folder, "onnxruntime", 384).run()
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            sync.walk(folder, folder)
            walks.append(time.perf_counter() - start)
            assert report.files.unchanged == count, report
            assert set(report.seconds) == {"walk", "total"}, report
            assert not index.count(collection.index)
            assert (_stamps(home), _rows(catalog, folder)) == before
    finally:
        index.close()
        catalog.engine.dispose()
    rates = [count / one for one in seconds]
    note = f"{count:,} files; nothing parsed, embedded or written; runs: {spread(rates, 0)}"
    return [
        at_least("unchanged folder", median(rates), "files/s", RATE, note),
        shown("unchanged folder, its walk alone", median(walks), "s", f"of {median(seconds):.2f} s"),
    ]


def write_notes(folder: Path, count: int) -> None:
    for n in range(count):
        place = n // PER_FOLDER
        file = folder / f"{place // FOLDERS_PER_FOLDER:03}" / f"{place % FOLDERS_PER_FOLDER:02}" / f"note-{n:06}.txt"
        if n % PER_FOLDER == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Note {n}. The reading of gauge {n % 97} was {n * 7 % 1013}.\n")


def put_done(catalog: Catalog, folder: Path) -> None:
    """Every file as a document that was read."""
    with catalog.engine.begin() as connection:
        rows = [_done(file).model_dump() for file in sync.walk(folder, folder).files]
        connection.execute(insert(documents), rows)


def _done(file: sync.File) -> Document:
    return Document(
        id=document_id(NAME, file.uri, 0),
        collection=NAME,
        uri=file.uri,
        first_uri=file.uri,
        path=file.path,
        size=file.size,
        stamp=file.stamp,
        content_hash=hashlib.sha256(Path(file.place).read_bytes()).hexdigest(),
        mime="text/plain",
        state="done",
        chunks=1,
        languages={"en": 1},
        indexed_at=now(),
    )


def _stamps(home: Path) -> dict[str, tuple[int, int]]:
    """-> size and time of every file that is written to on purpose; SQLite's shared memory moves on reading."""
    found = {str(file): file.stat() for file in home.rglob("*") if file.is_file() and not file.name.endswith("-shm")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def _rows(catalog: Catalog, folder: Path) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in catalog.stamps(NAME, [sync.uri_of(str(folder))]).values()]
