"""Documents through the ingest child into one index, in the process that owns it. Knows nothing of folders or catalogs.

A document's new chunks are upserted before its old ones are deleted; what is finished is told after the index is flushed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ingest.catalog import Document
from ingest.errors import UnavailableError
from ingest.index import Index, Point, chunk_payload
from ingest.schemas import ParsedText
from ingest.worker import (
    Assignment,
    Begin,
    Broken,
    End,
    Failed,
    Message,
    Need,
    Row,
    Rows,
    Start,
    Unpack,
    Unpacked,
    Work,
)

FLUSH_DOCUMENTS = 64  # documents, or ...
FLUSH_SECONDS = 2.0  # ... seconds, between two flushes of the index
LOG_BYTES = 16 * 2**20  # of ingest.log, before it begins anew


class Target(NamedTuple):
    """Where chunks are written: the index of `name` in `store`, and what its embedder makes."""

    store: Index
    name: str
    dimension: int  # of the dense vectors
    fingerprint: str  # of the embedder


class Pending(NamedTuple):
    """A document to be written: read from `place` below `root`, or split from the kept text `parsed`."""

    document: Document
    place: str
    root: str
    parsed: ParsedText | None = None
    name: str = ""


class Outcome:
    """What became of a document. `failure`: (stage, reason, whether it is skipped rather than failed), None when done."""

    def __init__(self, pending: Pending, known: set[str]) -> None:
        self.document = pending.document
        self.known = known  # chunks that the index held of it before
        self.written: set[str] = set()
        self.languages = Counter[str]()
        self.parsed: ParsedText | None = None
        self.content_hash = ""
        self.failure: tuple[str, str, bool] | None = None

    def begin(self, parsed: ParsedText, content_hash: str) -> None:
        """The file's own labels are known from here on."""
        self.parsed = parsed
        self.content_hash = content_hash
        self.document = self.document.relabelled(properties=parsed.metadata, own_acl=parsed.acl)


class Writer:
    """One a job; a context manager that ends the child with its whole process group.

    `take(n)` gives up to n more documents, none at the end. `tick` is called several times a second, and may raise to
    stop the job. `is_removed(document id)`: deleted meanwhile, so that nothing more is written of it.
    """

    def __init__(
        self,
        target: Target,
        assignment: Assignment,
        take: Callable[[int], list[Pending]],
        tick: Callable[[], None],
        is_removed: Callable[[str], bool],
    ) -> None:
        self.target = target
        self.assignment = assignment
        self.take = take
        self.tick = tick
        self.is_removed = is_removed
        self.open: dict[str, Outcome] = {}
        self.chunks = Counter[str]()  # added, kept, deleted
        self.pages = 0
        self.exhausted = False  # `take` has given all
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.finished: list[Outcome] = []  # and not flushed yet
        self._flushed_at = time.monotonic()
        self._child: Connection | None = None
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ending.close()

    def unpack(self, place: str, root: str, into: Path) -> Unpacked:
        """Opens an archive. Only before `write`. Raises UnavailableError."""
        child = self._connection()
        child.send(Unpack(place, root, str(into)))
        reply = self._receive(child)
        if not isinstance(reply, Unpacked):
            raise UnavailableError("the ingest child ended while it unpacked an archive; run the job again")
        return reply

    def write(self) -> Generator[list[Outcome]]:
        """-> what is finished, each time the index was flushed. Raises UnavailableError (index, embedder or child lost)."""
        child = self._connection()
        child.send(Start())
        while (message := self._receive(child)) is not None:
            if isinstance(message, Need):
                child.send(self._assign(message.files))
            else:
                self._handle(message)
            if self._is_due():
                yield self.flush()
        if self.open or not self.exhausted:
            raise UnavailableError(
                "the ingest child died (out of memory?); what it had finished is kept, run the job again"
            )
        if self.finished:
            yield self.flush()

    def _connection(self) -> Connection:
        if self._child is None:
            self._child = self._ending.enter_context(_child(self.assignment.settings.home))
            self._child.send(self.assignment)
        return self._child

    def _receive(self, child: Connection) -> Message | None:
        """-> the next message, None at the end."""
        silent_since = time.monotonic()
        limit = self.assignment.settings.stall_seconds
        while not child.poll(0.1):
            self.tick()
            if time.monotonic() - silent_since > limit:
                raise UnavailableError(
                    f"the ingest child gave no sign of life for INGEST_STALL_SECONDS ({limit:g} s); what it had finished is "
                    "kept, run the job again"
                )
        try:
            message: Message = child.recv()
        except (EOFError, ConnectionResetError):
            return None
        self.tick()
        return message

    def _assign(self, count: int) -> list[Work]:
        works = []
        taken = self.take(count)
        self.exhausted = not taken
        for pending in taken:
            identity = pending.document.id
            known = self.target.store.ids(self.target.name, identity)
            self.open[identity] = Outcome(pending, known)
            path = pending.document.path
            works.append(
                Work(identity, pending.place, pending.root, frozenset(known), pending.parsed, pending.name, path)
            )
        return works

    def _handle(self, message: Message) -> None:
        start = time.perf_counter()
        match message:
            case Broken(reason):
                raise UnavailableError(reason)
            case Begin(identity, parsed, content_hash, seconds):
                self.open[identity].begin(parsed, content_hash)
                self.pages += len(parsed.pages)
                self.seconds["parse"] += seconds
            case Rows(identity, rows, seconds):
                self._write(self.open[identity], rows)
                self.seconds["embed"] += seconds
                self.seconds["write"] += time.perf_counter() - start
            case End(identity):
                self._end(self.open.pop(identity))
                self.seconds["write"] += time.perf_counter() - start
            case Failed(identity, stage, reason, skipped):
                outcome = self.open.pop(identity)
                outcome.failure = (stage, reason, skipped)
                self.finished.append(outcome)

    def _write(self, outcome: Outcome, rows: Sequence[Row]) -> None:
        document = outcome.document
        if self.is_removed(document.id):
            return
        index, name, _, fingerprint = self.target
        payloads = [
            chunk_payload(row.chunk, document.id, document.path, document.acl, document.labels(), fingerprint)
            for row in rows
        ]
        both = list(zip(rows, payloads, strict=True))
        points = [
            Point(row.chunk.id, row.dense, row.sparse, payload)
            for row, payload in both
            if row.dense is not None and row.sparse is not None
        ]
        index.upsert(name, points)
        index.set_payloads(name, [(row.chunk.id, payload) for row, payload in both if row.dense is None])
        outcome.written |= {row.chunk.id for row in rows}
        outcome.languages.update(row.chunk.language for row in rows)
        self.chunks["added"] += len(points)
        self.chunks["kept"] += len(rows) - len(points)

    def _end(self, outcome: Outcome) -> None:
        old = outcome.known - outcome.written
        self.target.store.delete(self.target.name, sorted(old))
        self.chunks["deleted"] += len(old)
        self.finished.append(outcome)

    def _is_due(self) -> bool:
        late = time.monotonic() - self._flushed_at > FLUSH_SECONDS
        return len(self.finished) >= FLUSH_DOCUMENTS or (bool(self.finished) and late)

    def flush(self) -> list[Outcome]:
        """-> what is finished since the last one."""
        self.target.store.flush(self.target.name)
        finished, self.finished = self.finished, []
        self._flushed_at = time.monotonic()
        return finished


@contextmanager
def _child(home: Path) -> Iterator[Connection]:
    """Starts the ingest child; on the way out its whole process group is gone.

    Its libraries write to ingest.log, and what they load by themselves lies below `home`, where nobody else can put it.
    """
    ours, theirs = socket.socketpair()
    for folder in (home / "logs", home / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    with theirs, open(home / "logs/ingest.log", "ab") as log:
        if log.tell() > LOG_BYTES:
            log.truncate(0)
        child = subprocess.Popen(
            [sys.executable, "-c", f"from ingest.worker import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(home / "tmp")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        with Connection(ours.detach()) as connection:
            yield connection
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
