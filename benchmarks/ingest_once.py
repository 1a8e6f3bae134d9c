"""One ingest job in a process of its own: `python -m benchmarks.ingest_once HOME FOLDER EMBEDDER RUNTIME DIMENSION`.

Prints its report as JSON. With `--alone FILE EMBEDDER RUNTIME` it embeds the texts of a JSON file and does nothing else, in
the windows and at the niceness of the ingest child, and prints the seconds.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import settings
from ingest import db
from ingest.catalog import Catalog, Collection, now
from ingest.embed import Embedder, load_embedder
from ingest.index_edge import EdgeIndex
from ingest.pipeline import IngestJob
from ingest.schemas import Chunking, Report
from ingest.settings import CHECKOUT, IngestSettings
from ingest.worker import WINDOW


class Alone(NamedTuple):
    seconds: float
    load_seconds: float  # of interpreter, imports and model


class Ingested(NamedTuple):
    report: Report
    process_seconds: float  # from the start of the interpreter to its end


def ingest(home: Path, folder: Path, embedder: Embedder) -> Ingested:
    """Runs the job in a new process."""
    start = time.perf_counter()
    said = _run(str(home), str(folder), embedder.name, embedder.runtime, str(embedder.dimension))
    return Ingested(Report.model_validate_json(said), time.perf_counter() - start)


def embed_alone(file: Path, embedder: Embedder) -> Alone:
    """Embeds a JSON list of texts in a new process."""
    start = time.perf_counter()
    seconds = json.loads(_run("--alone", str(file), embedder.name, embedder.runtime))
    return Alone(seconds, time.perf_counter() - start - seconds)


def indexed_texts(home: Path) -> list[str]:
    """-> the chunks of a finished job, document by document, in order."""
    configured = settings(home)
    catalog = Catalog(db.connect(configured.sqlalchemy_url()))
    index = EdgeIndex(home / "index")
    try:
        name = catalog.collection("bench").index
        found = []
        for document in catalog.documents("bench"):
            payloads = index.payloads(name, sorted(index.ids(name, document.id)))
            found += [one["text"] for one in sorted(payloads.values(), key=lambda one: one["ordinal"])]
        return found
    finally:
        index.close()
        catalog.engine.dispose()


def open_collection(catalog: Catalog, embedder: str) -> Collection:
    """A collection named `bench`; its fingerprint is no real one, since nobody asks this home a question."""
    collection = Collection(
        name="bench",
        embedder=embedder,
        chunking=Chunking(),
        fingerprint="0" * 64,
        prompt="auto",
        created_at=now(),
    )
    catalog.put_collection(collection)
    return collection


def open_catalog(configured: IngestSettings) -> Catalog:
    configured.home.mkdir(parents=True, exist_ok=True)
    engine = db.connect(configured.sqlalchemy_url())
    db.migrate(engine)
    return Catalog(engine)


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.ingest_once", *arguments]
    done = subprocess.run(
        command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def _main(home: Path, folder: Path, embedder: str, runtime: str, dimension: int) -> None:
    configured = settings(home)
    catalog = open_catalog(configured)
    index = EdgeIndex(home / "index")
    try:
        collection = open_collection(catalog, embedder)
        job = IngestJob(catalog, index, configured, collection, folder, folder, runtime=runtime, dimension=dimension)
        print(job.run().model_dump_json())
    finally:
        index.close()


def _alone(file: Path, embedder: str, runtime: str) -> None:
    os.nice(19)
    chunks = json.loads(file.read_text())
    model = load_embedder(embedder, settings(), runtime)
    model.embed(chunks[:1])
    start = time.perf_counter()
    for at in range(0, len(chunks), WINDOW):
        model.embed(chunks[at : at + WINDOW])
    print(time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1] == "--alone":
        _alone(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
