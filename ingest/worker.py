"""The ingest child: parses, splits and embeds, niced, so that the owner of the index only writes.

`main` runs in it and speaks pickled messages over a socket. It asks for work with `Need`, and sends
for each document a `Begin`, its `Rows`, and an `End`, or one `Failed`. A parser of its own (a grandchild) reads the files,
under limits on time and memory: what dies there costs one file. A cancel kills the whole process group.
"""

import ctypes
import hashlib
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from ingest.embed import TokenCounter, load_counter, load_embedder
from ingest.errors import DocumentError, GraftError
from ingest.schemas import Chunk, Chunking, ParsedText, SparseVector
from ingest.settings import IngestSettings

WINDOW = 192  # chunks embedded in one go, sorted by length: memory is bounded by it, however long a document is
AHEAD = 32  # files that the parser may be ahead of the embedder: enough for a window of small ones


class Assignment(NamedTuple):
    """What one job needs to know; sent once."""

    settings: IngestSettings
    embedder: str
    runtime: str
    chunking: Chunking
    root: str


class Work(NamedTuple):
    """`known`: chunks that the index holds of this document already; they are not embedded again."""

    document_id: str
    place: str
    known: frozenset[str]


class Need(NamedTuple):
    files: int


class Begin(NamedTuple):
    document_id: str
    parsed: ParsedText
    content_hash: str
    parse_seconds: float


class Row(NamedTuple):
    chunk: Chunk
    dense: NDArray[np.float32] | None  # None: known, its payload alone is written
    sparse: SparseVector | None


class Rows(NamedTuple):
    document_id: str
    rows: list[Row]
    embed_seconds: float


class End(NamedTuple):
    document_id: str


class Failed(NamedTuple):
    document_id: str
    stage: str
    reason: str
    skipped: bool


class Broken(NamedTuple):
    """The job cannot go on."""

    reason: str


Message = Need | Begin | Rows | End | Failed | Broken


def main(descriptor: int) -> None:
    """Ends when there is no more work, or with its parent."""
    die_with_parent()
    os.nice(19)
    with Connection(descriptor) as connection:
        try:
            assignment: Assignment = connection.recv()
            _run(connection, assignment)
        except (ConnectionError, EOFError):
            return  # the owner is gone; the next job finishes the folder
        except GraftError as error:
            connection.send(Broken(str(error)))


def _run(connection: Connection, assignment: Assignment) -> None:
    with _parser(assignment) as pool:
        pool.schedule(os.getpid)  # starts the parser: it loads while the embedder does
        embedder = load_embedder(assignment.embedder, assignment.settings, assignment.runtime)
        window: list[tuple[str, Any]] = []
        fresh = 0
        for event in _events(connection, pool, assignment):
            window.append(event)
            fresh += event[0] == "fresh"
            if fresh >= WINDOW:
                _emit(connection, window, embedder)
                window, fresh = [], 0
        _emit(connection, window, embedder)


def _events(connection: Connection, pool: ProcessPool, assignment: Assignment) -> Iterator[tuple[str, Any]]:
    """-> ("begin", Begin), then ("fresh"|"known", (document id, chunk)) for each chunk, ("end", End); or ("failed", Failed)."""
    ahead: deque[tuple[Work, ProcessFuture[tuple[Begin, list[Chunk]]]]] = deque()
    more = True
    while True:
        while more and len(ahead) <= AHEAD // 2:  # in batches: each costs the owner a transaction
            connection.send(Need(AHEAD - len(ahead)))
            works: list[Work] = connection.recv()
            more = bool(works)
            limit = assignment.settings.parse_seconds
            ahead.extend(
                (work, pool.schedule(parse_and_split, args=[work, assignment], timeout=limit)) for work in works
            )
        if not ahead:
            return
        work, future = ahead.popleft()
        try:
            begin, chunks = future.result()
        except DocumentError as error:
            skipped = type(error).__name__ == "UnreadableTypeError"
            yield "failed", Failed(work.document_id, error.stage, error.reason, skipped)
        except FutureTimeoutError:
            reason = f"reading it took over INGEST_PARSE_SECONDS ({assignment.settings.parse_seconds:g} s)"
            yield "failed", Failed(work.document_id, "parse", reason, False)
        except ProcessExpired:
            limit_mb = assignment.settings.parse_memory_mb
            reason = f"the parser died on it: it crashed, or took over INGEST_PARSE_MEMORY_MB ({limit_mb} MiB)"
            yield "failed", Failed(work.document_id, "parse", reason, False)
        except Exception as error:  # a parser's own bug costs its one file
            yield "failed", Failed(work.document_id, "parse", f"{type(error).__name__}: {error}"[:300], False)
        else:
            yield "begin", begin
            for chunk in chunks:
                yield "known" if chunk.id in work.known else "fresh", (work.document_id, chunk)
            yield "end", End(work.document_id)


def _emit(connection: Connection, window: list[tuple[str, Any]], embedder: Any) -> None:
    """Embeds what is fresh in the window and sends all of it on, in order."""
    from ingest.index import sparse_document

    start = time.perf_counter()
    fresh = [chunk.text for kind, (_, chunk) in _chunks(window) if kind == "fresh"]
    vectors = iter(embedder.embed(fresh) if fresh else ())
    seconds = time.perf_counter() - start
    batch: list[Row] = []
    owner = ""
    for kind, payload in window:
        if kind in {"fresh", "known"}:
            owner, chunk = payload
            new = kind == "fresh"
            batch.append(Row(chunk, next(vectors) if new else None, sparse_document(chunk.text) if new else None))
            continue
        if batch:
            connection.send(Rows(owner, batch, seconds))
            batch, seconds = [], 0.0
        connection.send(payload)
    if batch:
        connection.send(Rows(owner, batch, seconds))


def _chunks(window: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    return (event for event in window if event[0] in {"fresh", "known"})


# in the parser


def parse_and_split(work: Work, assignment: Assignment) -> tuple[Begin, list[Chunk]]:
    """Raises DocumentError."""
    try:
        return _parse_and_split(work, assignment)
    except MemoryError:  # what filled the memory is still held: the next file gets a fresh parser
        os._exit(1)


def _parse_and_split(work: Work, assignment: Assignment) -> tuple[Begin, list[Chunk]]:
    from ingest.chunk import split
    from ingest.parse import parse
    from ingest.sync import read

    start = time.perf_counter()
    settings = assignment.settings
    data = read(work.place, assignment.root, settings.max_file_mb * 2**20)
    parsed = parse(data, work.place, settings.max_text_chars)
    counter = _counter(assignment)
    chunks = split(work.document_id, parsed, assignment.chunking, counter.ids, counter.max_tokens)
    if not chunks:
        raise DocumentError("chunk", "no text was found in it")
    digest = hashlib.sha256(data).hexdigest()
    return Begin(work.document_id, parsed, digest, time.perf_counter() - start), chunks


_counters: dict[str, TokenCounter] = {}  # the parser's own, loaded once


def _counter(assignment: Assignment) -> TokenCounter:
    if assignment.embedder not in _counters:
        _counters[assignment.embedder] = load_counter(assignment.embedder, assignment.settings)
    return _counters[assignment.embedder]


def _parser(assignment: Assignment) -> ProcessPool:
    limit = assignment.settings.parse_memory_mb * 2**20
    return ProcessPool(max_workers=1, initializer=_enter_parser, initargs=[limit], context=get_context("spawn"))


def _enter_parser(memory: int) -> None:
    """`memory`: bytes of address space beyond what the loaded libraries take."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it is gone (Linux: prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
