"""One ingest job: a folder is brought into an index and the catalog, from the process that owns both.

Writes in an order that a kill at any point leaves mendable: a document's row says `writing`; its new chunks are upserted;
its old ones deleted; the index is flushed; the row says `done`. The next run does again whatever is not `done`.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sqlalchemy import RowMapping

from ingest import sync
from ingest.catalog import Catalog, Collection, Document, State, now
from ingest.errors import InvalidError, UnavailableError
from ingest.index import Index, Point, chunk_payload
from ingest.schemas import ChunkCounts, Failure, FileCounts, ParsedText, Progress, Report, Skip, document_id
from ingest.settings import IngestSettings
from ingest.sync import File
from ingest.worker import Assignment, Begin, Broken, End, Failed, Message, Need, Row, Rows, Work

logger = logging.getLogger(__name__)
FLUSH_DOCUMENTS = 64  # documents, or ...
FLUSH_SECONDS = 2.0  # ... seconds, between two flushes of the index


class Cancelled(Exception):
    """The job was asked to stop; what is done is kept, and the next run goes on from there."""


class IngestJob:
    """A folder (or one file) `target` below `root` into `collection`. `run` is called once, in a thread that may block.

    `acl` and `metadata` are set on the job's documents; None leaves what they have (nothing, for new ones).
    `cancelled` is asked several times a second; `report_progress` is told as often.
    """

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        settings: IngestSettings,
        collection: Collection,
        target: Path,
        root: Path,
        *,
        runtime: str,
        dimension: int,
        allow_empty: bool = False,
        acl: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        report_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.catalog = catalog
        self.index = index
        self.settings = settings
        self.collection = collection
        self.target = target
        self.root = root
        self.runtime = runtime
        self.dimension = dimension
        self.allow_empty = allow_empty
        self.acl = acl
        self.metadata = metadata
        self.cancelled = cancelled
        self.report_progress = report_progress
        self.name = collection.index
        self.files = Counter[str]()
        self.chunks = Counter[str]()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.languages = Counter[str]()
        self.failures: list[Failure] = []
        self.skips: list[Skip] = []
        self.notes: list[str] = []
        self.total = 0
        self.open: dict[str, _Writing] = {}
        self.finished: list[tuple[Document, ParsedText | None]] = []
        self.flushed_at = time.monotonic()

    def run(self) -> Report:
        """Raises Cancelled, InvalidError (the folder is not there), UnavailableError (index, embedder or child lost)."""
        start = time.perf_counter()
        self.index.create(self.name, self.dimension)
        try:
            walked = sync.walk(self.target, self.root)
        except OSError as error:
            raise InvalidError(f"{str(self.target)!r} cannot be read: {error.strerror}") from error
        self.failures += walked.failures
        self.skips += walked.skips
        stamps = self.catalog.stamps(self.collection.name, sync.uri_of(str(self.target)))
        if not walked.files and stamps and not self.allow_empty:
            self.notes.append(
                f"no regular file was found in {str(self.target)!r}, so nothing was deleted; "
                "run it with allow_empty to empty the index of this folder"
            )
            stamps = {}
        plan = sync.compare(walked.files, stamps, self.acl, self.metadata)
        self.seconds["walk"] = time.perf_counter() - start
        self.total = len(walked.files)
        self.files["unchanged"] = plan.unchanged
        self.skips += [Skip(path=file.path, reason=row["reason"]) for file, row in plan.skipped]
        self.files["skipped"] = len(plan.skipped)
        self._told(None)
        for file, row in plan.touched:
            self.catalog.touch(row["id"], file.size, file.mtime_ns)
        for kind, pairs in (("moved", plan.moved), ("done", plan.relabelled)):
            for file, row in pairs:
                self._relabel(file, row)
                self.files[kind] += 1
                self._told(file.path)
        self._forget(plan.gone)
        if plan.work:
            self._read(plan.work)
        self.seconds["total"] = time.perf_counter() - start
        return self._report(plan)

    def _read(self, work: Sequence[tuple[File, RowMapping | None]]) -> None:
        """Hands the files to the child as it asks for them, and writes what comes back."""
        assignment = Assignment(
            self.settings, self.collection.embedder, self.runtime, self.collection.chunking, str(self.root)
        )
        waiting = iter(work)
        with _child() as connection:
            connection.send(assignment)
            while True:
                message = self._receive(connection)
                if message is None:
                    break
                if isinstance(message, Need):
                    connection.send(self._assign(waiting, message.files))
                else:
                    self._take(message)
                self._flush(only_if_due=True)
        self._flush()

    def _receive(self, connection: Connection) -> Message | None:
        """-> the next message, None at the end."""
        while not connection.poll(0.1):
            self._told(None)
        try:
            message: Message = connection.recv()
        except (EOFError, ConnectionResetError):
            if self.open:
                raise UnavailableError(
                    "the ingest child died (out of memory?); what it had finished is kept, run the job again"
                ) from None
            return None
        self._told(None)
        return message

    def _assign(self, waiting: Iterator[tuple[File, RowMapping | None]], count: int) -> list[Work]:
        rows, works = [], []
        for file, row in waiting:
            document = self._row(file, row)
            known = self.index.ids(self.name, document.id)
            self.open[document.id] = _Writing(file, document, row, known)
            rows.append(document)
            works.append(Work(document.id, file.place, frozenset(known)))
            if len(works) == count:
                break
        self.catalog.put(rows)
        return works

    def _take(self, message: Message) -> None:
        start = time.perf_counter()
        match message:
            case Broken(reason):
                raise UnavailableError(reason)
            case Begin(identity, parsed, content_hash, seconds):
                self.open[identity].begin(parsed, content_hash)
                self.seconds["parse"] += seconds
            case Rows(identity, rows, seconds):
                self._write(self.open[identity], rows)
                self.seconds["embed"] += seconds
                self.seconds["write"] += time.perf_counter() - start
            case End(identity):
                self._end(self.open.pop(identity))
                self.seconds["write"] += time.perf_counter() - start
            case Failed(identity, stage, reason, skipped):
                self._failed(self.open.pop(identity), stage, reason, skipped)

    def _write(self, writing: "_Writing", rows: Sequence[Row]) -> None:
        document = writing.document
        payloads = [
            (row.chunk.id, chunk_payload(row.chunk, document.id, document.path, document.acl, writing.metadata))
            for row in rows
        ]
        points = [
            Point(row.chunk.id, row.dense, row.sparse, payload)
            for row, (_, payload) in zip(rows, payloads, strict=True)
            if row.dense is not None and row.sparse is not None
        ]
        self.index.upsert(self.name, points)
        self.index.set_payloads(self.name, [one for one, row in zip(payloads, rows, strict=True) if row.dense is None])
        writing.written |= {row.chunk.id for row in rows}
        writing.languages.update(row.chunk.language for row in rows)
        self.chunks["added"] += len(points)
        self.chunks["kept"] += len(rows) - len(points)

    def _end(self, writing: "_Writing") -> None:
        old = writing.known - writing.written
        self.index.delete(self.name, sorted(old))
        self.chunks["deleted"] += len(old)
        self.languages += writing.languages
        self.files["done"] += 1
        self.finished.append((writing.finished(), writing.parsed))

    def _failed(self, writing: "_Writing", stage: str, reason: str, skipped: bool) -> None:
        """An earlier version of the file that was read stays searchable; the report names the file."""
        path = writing.file.path
        self.files["skipped" if skipped else "failed"] += 1
        if skipped:
            self.skips.append(Skip(path=path, reason=reason))
        else:
            self.failures.append(Failure.model_validate({"path": path, "stage": stage, "reason": reason}))
        self.finished.append((writing.unread("skipped" if skipped else "failed", stage, reason), None))

    def _flush(self, only_if_due: bool = False) -> None:
        due = len(self.finished) >= FLUSH_DOCUMENTS or time.monotonic() - self.flushed_at > FLUSH_SECONDS
        if not self.finished or (only_if_due and not due):
            return
        self.index.flush(self.name)
        self.catalog.finish(self.finished)
        self.finished = []
        self.flushed_at = time.monotonic()

    def _relabel(self, file: File, row: RowMapping) -> None:
        """The same bytes under another path, access list or metadata: the payloads alone are written."""
        ids = sorted(self.index.ids(self.name, row["id"]))
        acl = sorted(row["acl"] if self.acl is None else self.acl)
        metadata = {**row["metadata"], **(self.metadata or {})}
        held = self.catalog.document(row["id"])
        payloads = self.index.payloads(self.name, ids)
        folders = [file.path, *(str(folder) for folder in Path(file.path).parents if str(folder) != ".")]
        label = {"path": file.path, "folders": folders, "acl": acl, "metadata": {**held.properties, **metadata}}
        self.index.set_payloads(self.name, [(point, {**payloads[point], **label}) for point in ids])
        self.index.flush(self.name)
        moved = {"uri": file.uri, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns}
        self.catalog.finish([(held.model_copy(update={**moved, "acl": tuple(acl), "metadata": metadata}), None)])
        self.chunks["kept"] += len(ids)

    def _forget(self, gone: Sequence[RowMapping]) -> None:
        for row in gone:
            ids = sorted(self.index.ids(self.name, row["id"]))
            self.index.delete(self.name, ids)
            self.chunks["deleted"] += len(ids)
            self.files["deleted"] += 1
            self._told(row["path"])
        if gone:
            self.index.flush(self.name)
            self.catalog.forget([row["id"] for row in gone])

    def _row(self, file: File, row: RowMapping | None) -> Document:
        """The document as it is while it is being written."""
        if row is None:
            taken = self.catalog.ids_first_seen_at(self.collection.name, file.uri)
            taken |= {one.document.id for one in self.open.values()}
            n = 0
            while (identity := document_id(self.collection.name, file.uri, n)) in taken:
                n += 1
            first_uri, held = file.uri, None
        else:
            identity, held = row["id"], self.catalog.document(row["id"])
            first_uri = held.first_uri
        acl = (held.acl if held else ()) if self.acl is None else tuple(sorted(self.acl))
        metadata = {**(held.metadata if held else {}), **(self.metadata or {})}
        new = Document(
            id=identity,
            collection=self.collection.name,
            uri=file.uri,
            first_uri=first_uri,
            path=file.path,
            size=file.size,
            mtime_ns=file.mtime_ns,
            content_hash="",
            state="writing",
            acl=acl,
            metadata=metadata,
        )
        if held:  # until it is done, the earlier text goes on answering
            kept = held.model_dump(
                include={"text_hash", "mime", "chunks", "pages", "languages", "properties", "indexed_at"}
            )
            new = new.model_copy(update=kept)
        return new

    def _told(self, current: str | None) -> None:
        if self.cancelled():
            raise Cancelled
        done = sum(self.files.values())
        chunks = self.chunks["added"] + self.chunks["kept"]
        self.report_progress(Progress(files_total=self.total, files=done, chunks=chunks, current=current))

    def _report(self, plan: sync.Plan) -> Report:
        for row in [row for _, row in plan.relabelled] + [row for _, row in plan.moved]:
            self.languages.update(row["languages"])
        self.files["failed"] = len(self.failures)
        self.files["skipped"] = len(self.skips)
        return Report(
            files=FileCounts.model_validate(dict(self.files)),
            chunks=ChunkCounts.model_validate(dict(self.chunks)),
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            failures=tuple(self.failures),
            skips=tuple(self.skips),
            languages=dict(self.languages.most_common()),
            notes=tuple(self.notes),
        )


class _Writing:
    """A document between its `Begin` and its `End`."""

    def __init__(self, file: File, document: Document, before: RowMapping | None, known: set[str]) -> None:
        self.file = file
        self.document = document
        self.before = before
        self.known = known
        self.written: set[str] = set()
        self.languages = Counter[str]()
        self.parsed: ParsedText | None = None
        self.content_hash = ""
        self.metadata: dict[str, Any] = {}  # what the file says, then what the job sets

    def begin(self, parsed: ParsedText, content_hash: str) -> None:
        self.parsed = parsed
        self.content_hash = content_hash
        self.metadata = {**parsed.metadata, **self.document.metadata}

    def finished(self) -> Document:
        assert self.parsed is not None
        return self.document.model_copy(
            update={
                "state": "done",
                "content_hash": self.content_hash,
                "text_hash": self.parsed.content_address(),
                "mime": self.parsed.mime,
                "chunks": len(self.written),
                "pages": len(self.parsed.pages) or None,
                "languages": dict(self.languages),
                "properties": self.parsed.metadata,
                "indexed_at": now(),
            }
        )

    def unread(self, state: State, stage: str, reason: str) -> Document:
        return self.document.model_copy(update={"state": state, "stage": stage, "reason": reason})


@contextmanager
def _child() -> Iterator[Connection]:
    """Starts the ingest child; on the way out its whole process group is gone."""
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", f"from ingest.worker import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
    try:
        with Connection(ours.detach()) as connection:
            yield connection
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
