"""One ingest job in a process of its own: `python -m benchmarks.ingest_once HOME FOLDER EMBEDDER RUNTIME DIMENSION`.

Prints its report as JSON. With `--alone FILE EMBEDDER RUNTIME` it embeds the texts of a JSON file and does nothing else, in
the windows and at the niceness of the ingest child, and prints the seconds. With `--open HOME` it opens the index of a
finished job, searches it once, and prints what memory that takes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import Memory, Use, memory, watching
from benchmarks.report import settings
from ingest import db
from ingest.catalog import Catalog, Collection, now
from ingest.embed import Embedder, load_embedder
from ingest.index import Filter, sparse_query
from ingest.index_edge import EdgeIndex
from ingest.pipeline import IngestJob
from ingest.schemas import Chunking, Report
from ingest.settings import CHECKOUT, IngestSettings
from ingest.sync import Folder
from ingest.worker import WINDOW
from ingest.writer import Target

NAME = "bench"


class Alone(NamedTuple):
    seconds: float
    load_seconds: float  # of interpreter, imports and model


class Ingested(NamedTuple):
    """`used`: by `owner`, `child` (the embedder) and `parser`."""

    report: Report
    process_seconds: float  # from the start of the interpreter to its end
    used: dict[str, Use]


def ingest(home: Path, folder: Path, embedder: Embedder) -> Ingested:
    """Runs the job in a new process."""
    start = time.perf_counter()
    said, used = _run(str(home), str(folder), embedder.name, embedder.runtime, str(embedder.dimension))
    return Ingested(Report.model_validate_json(said), time.perf_counter() - start, used)


def embed_alone(file: Path, embedder: Embedder) -> Alone:
    """Embeds a JSON list of texts in a new process."""
    start = time.perf_counter()
    seconds = json.loads(_run("--alone", str(file), embedder.name, embedder.runtime)[0])
    return Alone(seconds, time.perf_counter() - start - seconds)


def index_memory(home: Path) -> Memory:
    """Of a new process that has opened the index of a finished job and searched it once."""
    return Memory(*json.loads(_run("--open", str(home))[0]))


def indexed_texts(home: Path) -> list[str]:
    """-> what was embedded in a finished job, document by document, in order."""
    configured = settings(home)
    catalog = Catalog(db.connect(configured.sqlalchemy_url()))
    index = EdgeIndex(home / "index")
    try:
        name = catalog.collection(NAME).index
        found = []
        for document in catalog.documents(NAME):
            payloads = index.payloads(name, sorted(index.ids(name, document.id)))
            found += [_searched(one) for one in sorted(payloads.values(), key=lambda one: int(one["ordinal"]))]
        return found
    finally:
        index.close()
        catalog.engine.dispose()


def open_collection(catalog: Catalog, embedder: str) -> Collection:
    """A collection named `bench`; its fingerprint is no real one, since nobody asks this home a question."""
    collection = Collection(
        name=NAME,
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


def make_job(
    catalog: Catalog, index: EdgeIndex, configured: IngestSettings, folder: Path, runtime: str, dimension: int
) -> IngestJob:
    """`folder` into the collection `bench`."""
    collection = catalog.collection(NAME)
    target = Target(index, collection.index, dimension, collection.fingerprint)
    return IngestJob(catalog, target, configured, collection, Folder(folder, folder), runtime=runtime)


def _searched(payload: dict[str, Any]) -> str:
    context, text = payload.get("context"), str(payload["text"])
    return f"{context}\n{text}" if context else text


def _run(*arguments: str) -> tuple[str, dict[str, Use]]:
    command = [sys.executable, "-m", "benchmarks.ingest_once", *arguments]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        with watching(process.pid) as watch:
            said, _ = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return said, watch.used()


def _main(home: Path, folder: Path, embedder: str, runtime: str, dimension: int) -> None:
    configured = settings(home)
    catalog = open_catalog(configured)
    index = EdgeIndex(home / "index")
    try:
        open_collection(catalog, embedder)
        print(make_job(catalog, index, configured, folder, runtime, dimension).run().model_dump_json())
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


def _open(home: Path) -> None:
    index = EdgeIndex(home / "index")
    try:
        index.search(index.names()[0], None, sparse_query("the oil of the pump"), Filter(), 10)
        print(json.dumps(memory(os.getpid())))
    finally:
        index.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--alone", texts, embedder, runtime]:
            _alone(Path(texts), embedder, runtime)
        case ["--open", home]:
            _open(Path(home))
        case [home, folder, embedder, runtime, dimension]:
            _main(Path(home), Path(folder), embedder, runtime, int(dimension))
