"""The ingest child: unpacks, parses, splits and embeds, niced, so that the owner of the index only writes.

`main` runs in it and speaks pickled messages over a socket. First it answers each `Unpack` with `Unpacked`; told to
`Start`, it asks for work with `Need`, and sends for each document a `Begin`, its `Rows`, and an `End`, or one `Failed`. A
parser of its own (a grandchild) reads the files, under limits on time and memory: what dies there costs one file. A cancel
kills the whole process group.
"""

import ctypes
import hashlib
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from ingest.embed import Embedder, TokenCounter, Vectors, load_counter, load_embedder
from ingest.errors import DocumentError, GraftError, UnreadableTypeError
from ingest.schemas import Chunk, Chunking, ParsedText, SparseVector
from ingest.settings import IngestSettings

if TYPE_CHECKING:
    from ingest.archive import Expanded

WINDOW = 192  # chunks embedded in one go, sorted by length: memory is bounded by it, however long a document is
FIRST_WINDOW = 24  # it doubles up to WINDOW, so that the first documents are found soon
AHEAD = 32  # files that the parser may be ahead of the embedder: enough for a window of small ones


class Assignment(NamedTuple):
    """What one job needs to know; sent once."""

    settings: IngestSettings
    embedder: str
    runtime: str
    chunking: Chunking
    urls: tuple[str, ...] = ()  # below which remote files may be read


class Unpack(NamedTuple):
    """An archive at `place`, below `root` unless remote, into the folder `into`."""

    place: str
    root: str
    into: str


class Unpacked(NamedTuple):
    """`expanded` None: it could not be opened, for `reason`."""

    expanded: "Expanded | None"
    reason: str = ""


class Start(NamedTuple):
    pass


class Work(NamedTuple):
    """`known`: chunks that the index holds of this document already; they are not embedded again.

    `parsed`: a kept text, which is split without reading the file.
    """

    document_id: str
    place: str
    root: str
    known: frozenset[str]
    parsed: ParsedText | None = None
    name: str = ""  # that tells its format, where `place` does not
    path: str = ""  # of the document, for its chunks' headers


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


class Alive(NamedTuple):
    """A document takes long to be split by meaning; it goes on."""


class Broken(NamedTuple):
    """The job cannot go on."""

    reason: str


Message = Unpacked | Need | Begin | Rows | End | Failed | Alive | Broken
Parsed = tuple[Begin, list[Chunk] | None]  # None: its chunks are for the embedder to decide


def main(descriptor: int) -> None:
    """Ends when there is no more work, or with its parent."""
    die_with_parent()
    os.nice(19)
    with Connection(descriptor) as connection:
        try:
            assignment: Assignment = connection.recv()
            _run(connection, assignment)
        except Exception as error:
            said = str(error) if isinstance(error, GraftError) else f"the ingest child failed: {error!r}"[:500]
            with suppress(OSError):  # the owner may be gone; the next job finishes the folder
                connection.send(Broken(said))


def _run(connection: Connection, assignment: Assignment) -> None:
    with _parser(assignment) as pool:
        pool.schedule(os.getpid)  # starts the parser: it loads while the embedder does
        while isinstance(asked := connection.recv(), Unpack):
            connection.send(_unpacked(pool, asked, assignment))
        embedder = load_embedder(assignment.embedder, assignment.settings, assignment.runtime)
        window: list[tuple[str, Any]] = []
        fresh, size = 0, FIRST_WINDOW
        for event in _events(connection, pool, assignment, embedder):
            window.append(event)
            fresh += event[0] == "fresh"
            if fresh >= size:
                _emit(connection, window, embedder)
                window, fresh, size = [], 0, min(2 * size, WINDOW)
        _emit(connection, window, embedder)


def _unpacked(pool: ProcessPool, asked: Unpack, assignment: Assignment) -> Unpacked:
    settings = assignment.settings
    future = pool.schedule(unpack, args=[asked, settings, assignment.urls], timeout=settings.parse_seconds)
    try:
        return Unpacked(future.result())
    except Exception as error:  # whatever an archive does costs that archive
        return Unpacked(None, _failure(error, settings)[1])


def _events(
    connection: Connection, pool: ProcessPool, assignment: Assignment, embedder: Embedder
) -> Iterator[tuple[str, Any]]:
    """-> ("begin", Begin), then ("fresh"|"known", (document id, chunk)) for each chunk, ("end", End); or ("failed", Failed)."""
    ahead: deque[tuple[Work, ProcessFuture[Parsed]]] = deque()
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
            if chunks is None:
                chunks = _split_by_meaning(connection, begin, work.path, assignment, embedder)
        except Exception as error:  # a parser's own bug costs its one file
            stage, reason, skipped = _failure(error, assignment.settings)
            yield "failed", Failed(work.document_id, stage, reason, skipped)
        else:
            yield "begin", begin
            for chunk in chunks:
                yield "known" if chunk.id in work.known else "fresh", (work.document_id, chunk)
            yield "end", End(work.document_id)


def _split_by_meaning(
    connection: Connection, begin: Begin, path: str, assignment: Assignment, embedder: Embedder
) -> list[Chunk]:
    """Raises DocumentError, UnavailableError."""
    from ingest.chunk import split

    def embed(texts: Sequence[str]) -> Vectors:
        vectors = []
        for start in range(0, len(texts), WINDOW):
            connection.send(Alive())
            vectors.append(embedder.embed(texts[start : start + WINDOW]))
        return np.concatenate(vectors) if vectors else embedder.embed(texts)

    counter = load_counter_once(assignment)
    return split(begin.document_id, begin.parsed, assignment.chunking, counter, embed, path=path)


def _failure(error: Exception, settings: IngestSettings) -> tuple[str, str, bool]:
    """-> stage, reason, whether the file is skipped rather than failed. Raises what concerns the whole job."""
    match error:
        case DocumentError():
            return error.stage, error.reason, isinstance(error, UnreadableTypeError)
        case GraftError():
            raise error
        case FutureTimeoutError():
            return "parse", f"reading it took over INGEST_PARSE_SECONDS ({settings.parse_seconds:g} s)", False
        case ProcessExpired():
            limit = settings.parse_memory_mb
            reason = f"the parser died on it: it crashed, or took over INGEST_PARSE_MEMORY_MB ({limit} MiB)"
            return "parse", reason, False
    return "parse", f"{type(error).__name__}: {error}"[:300], False


def _emit(connection: Connection, window: list[tuple[str, Any]], embedder: Any) -> None:
    """Embeds what is fresh in the window and sends all of it on, in order."""
    from ingest.index import sparse_document

    start = time.perf_counter()
    fresh = [chunk.searched for kind, (_, chunk) in _chunks(window) if kind == "fresh"]
    vectors = iter(embedder.embed(fresh) if fresh else ())
    seconds = time.perf_counter() - start
    batch: list[Row] = []
    owner = ""
    for kind, payload in window:
        if kind in {"fresh", "known"}:
            owner, chunk = payload
            new = kind == "fresh"
            batch.append(Row(chunk, next(vectors) if new else None, sparse_document(chunk.searched) if new else None))
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


def parse_and_split(work: Work, assignment: Assignment) -> Parsed:
    """Raises DocumentError."""
    try:
        return _parse_and_split(work, assignment)
    except MemoryError:  # what filled the memory is still held: the next file gets a fresh parser
        os._exit(1)


def _parse_and_split(work: Work, assignment: Assignment) -> Parsed:
    from ingest.chunk import split

    start = time.perf_counter()
    parsed, digest = (work.parsed, "") if work.parsed else _read_and_parse(work, assignment)
    chunks = None
    if assignment.chunking.strategy != "semantic":
        counter = load_counter_once(assignment)
        chunks = split(work.document_id, parsed, assignment.chunking, counter, path=work.path)
        if not chunks:
            raise DocumentError("chunk", "no text was found in it")
    return Begin(work.document_id, parsed, digest, time.perf_counter() - start), chunks


def _read_and_parse(work: Work, assignment: Assignment) -> tuple[ParsedText, str]:
    """-> the text, and the sha256 (hex) of what was read."""
    from ingest import parse, reader, remote, sync

    settings = assignment.settings
    limit = settings.max_file_mb * 2**20
    if remote.is_remote(work.place):
        data = remote.read(work.place, assignment.urls, limit)
    else:
        data = sync.read(work.place, work.root, limit)
    digest = hashlib.sha256(data).hexdigest()
    if reader.is_spooled(work.place):
        parsed = reader.load(work.place, settings.max_text_chars)
    else:
        parsed = parse.parse(data, work.name or work.place, parse.options(settings))
    return ParsedText.model_validate(_encodable(parsed.model_dump())), digest


def _encodable(value: Any) -> Any:
    """Without lone surrogates, which no index and no database takes; lengths stay."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(one) for one in value]
    return value


def unpack(asked: Unpack, settings: IngestSettings, urls: tuple[str, ...]) -> "Expanded":
    """Raises DocumentError."""
    from ingest import archive, remote, sync

    into = Path(asked.into)
    into.parent.mkdir(parents=True, exist_ok=True)
    passwords = tuple((settings.passwords.get_secret_value() if settings.passwords else "").splitlines())
    most = settings.archive_mb * 2**20
    link = into.with_name(f"{into.name}.archive")  # its first bytes say what it is
    try:
        if remote.is_remote(asked.place):
            link.write_bytes(remote.read(asked.place, urls, most, "INGEST_ARCHIVE_MB"))
            return archive.expand(str(link), into, archive.limits(settings), passwords)
        with sync.opened(asked.place, asked.root, most, "INGEST_ARCHIVE_MB") as file:
            link.symlink_to(
                f"/proc/self/fd/{file.fileno()}"
            )  # the very file that was checked, whatever its name says now
            return archive.expand(str(link), into, archive.limits(settings), passwords)
    except MemoryError:
        os._exit(1)


_counters: dict[str, TokenCounter] = {}  # one a process, loaded once


def load_counter_once(assignment: Assignment) -> TokenCounter:
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
