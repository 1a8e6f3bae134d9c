"""One ingest job: a source (a folder, an object store, a reader) is brought into an index and the catalog.

Runs in the process that owns both. Writes in an order that a kill at any point leaves mendable: a document's row says
`writing`; its new chunks are upserted; its old ones deleted; the index is flushed; the row says `done`. The next run does
again whatever is not `done`. An archive is a folder: its members are documents, its own row has no text and is `done` last.
"""

import shutil
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from sqlalchemy import RowMapping

from ingest import members, sync
from ingest.archive import Expanded, is_archive
from ingest.catalog import Catalog, Collection, Document, State, now
from ingest.errors import GraftError, InvalidError
from ingest.index import delete_documents, folders
from ingest.language import name_of, unread
from ingest.parse_ocr import OCR_MISSING, ocr_languages_installed
from ingest.progress import Meter
from ingest.schemas import ChunkCounts, Failure, FileCounts, Progress, Report, Skip, document_id
from ingest.settings import IngestSettings
from ingest.sync import NO_LABELS, File, Labelling, Walk
from ingest.worker import Assignment
from ingest.writer import FLUSH_DOCUMENTS, Outcome, Pending, Target, Writer

UNREACHED = "the job ended before it was done; the next one takes it up"
AGAIN = frozenset({"failed", "writing"})  # states of what is read again whatever its stamp says


class Cancelled(Exception):
    """The job was asked to stop, or `expired`; what is done is kept, and the next run goes on from there."""

    def __init__(self, expired: bool = False) -> None:
        super().__init__("cancelled")
        self.expired = expired
        self.report: Report | None = None


class Source(Protocol):
    """Where documents come from. Local files are read below `root` alone."""

    @property
    def root(self) -> Path: ...

    def uris(self) -> list[str]:
        """At or below which its documents are."""

    def walk(self, tick: Callable[[], None]) -> Walk:
        """`tick` is called now and then, and may raise. Raises OSError or a GraftError when it cannot be listed."""

    def is_empty(self) -> bool:
        """Whether a walk without files may be taken for a source that is away rather than for files that are gone."""


class Options(NamedTuple):
    """`restore`: documents that were deleted by their ids come back. `only_failed`: nothing but files that failed before.

    `urls`: below which remote files may be read.
    """

    labelling: Labelling = NO_LABELS
    allow_empty: bool = False
    restore: bool = False
    only_failed: bool = False
    urls: tuple[str, ...] = ()


NO_OPTIONS = Options()


class IngestJob:
    """`source` into `collection`. `run` is called once, in a thread that may block.

    `runtime`: of the embedder, as the question's side chose it; `reads`: its languages. `cancelled` is asked several times
    a second; `report_progress` is told as often.
    """

    def __init__(
        self,
        catalog: Catalog,
        target: Target,
        settings: IngestSettings,
        collection: Collection,
        source: Source,
        options: Options = NO_OPTIONS,
        *,
        runtime: str,
        reads: tuple[str, ...] = ("*",),
        cancelled: Callable[[], bool] = lambda: False,
        report_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.catalog = catalog
        self.index, self.name = target.store, target.name
        self.settings = settings
        self.collection = collection
        self.source = source
        self.options = options
        self.reads = reads
        self.can_ocr = settings.ocr == "auto" and bool(ocr_languages_installed())
        self.cancelled = cancelled
        self.report_progress = report_progress
        self.scratch = settings.scratch / uuid.uuid4().hex
        self.deadline = time.monotonic() + settings.job_seconds
        self.files = Counter[str]()
        self.chunks = Counter[str]()
        self.languages = Counter[str]()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.failures: list[Failure] = []
        self.skips: list[Skip] = []
        self.notes: list[str] = []
        self.meter = Meter()
        self.waiting: Iterator[tuple[File, RowMapping | None]] = iter(())
        self.files_of: dict[str, File] = {}
        self.archives: list[Document] = []
        self.started = time.perf_counter()
        assignment = Assignment(settings, collection.embedder, runtime, collection.chunking, options.urls)
        self.writer = Writer(target, assignment, self._take, self._tick, catalog.is_removed)
        self.dimension = target.dimension

    def run(self) -> Report:
        """Raises Cancelled, InvalidError (the source is not there), UnavailableError (index, embedder or child lost)."""
        self.index.create(self.name, self.dimension)
        self.started = time.perf_counter()
        try:
            with self.writer:
                self._run()
        except Cancelled as stopped:
            self._leave()
            stopped.report = self._report()
            raise
        except GraftError:
            with suppress(Exception):  # the first error is the one to tell
                self._leave()
            raise
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        return self._report()

    def _run(self) -> None:
        walked = self._walk()
        stamps = self.catalog.stamps(self.collection.name, self.source.uris())
        if not walked.files and stamps and not self.options.allow_empty and self.source.is_empty():
            self.notes.append(
                f"no regular file was found in {self.source.uris()[0]!r}, so nothing was deleted; "
                "run it with --allow-empty (allow_empty) to empty the index of it"
            )
            stamps = {}
        opened = self._open_archives(walked, stamps)
        plan = sync.compare(opened, stamps, self.options.labelling, walked.unseen, self.options.restore, self._tick)
        plan = self._still_skipped(plan)
        if self.options.only_failed:
            plan = _only_failed(plan)
        else:
            self.failures += walked.failures
            self.skips += walked.skips
        self.seconds["walk"] = time.perf_counter() - self.started
        self._carry_out(plan)
        self.catalog.finish([(archive, None) for archive in self.archives])
        self.files["done"] += sum(archive.state == "done" for archive in self.archives)

    def _walk(self) -> Walk:
        try:
            return self.source.walk(self._tick)
        except OSError as error:
            raise InvalidError(f"{self.source.uris()[0]!r} cannot be read: {error.strerror}") from error

    def _carry_out(self, plan: sync.Plan) -> None:
        if self.collection.chunking.headers:  # they may hold the path
            plan = plan._replace(moved=[], work=[*plan.moved, *plan.work])
        self.files["unchanged"] += plan.unchanged
        removed = [row["id"] for _, row in plan.skipped if row["state"] == "removed"]
        self._drop(removed)  # a deletion may have been cut off
        for file, row in plan.skipped:
            if row["state"] == "skipped" and sync.relabelled(file, row, self.options.labelling):
                self._label_kept(file, row)
            reason = sync.REMOVED if row["state"] == "removed" else row["reason"]
            self.skips.append(Skip(path=file.path, reason=reason))
        self.files["skipped"] = len(self.skips)
        self.meter.files_total = (
            self.files.total() + len(plan.relabelled) + len(plan.moved) + len(plan.gone) + len(plan.work)
        )
        self._tick()
        self.catalog.touch((row["id"], file.size, file.stamp) for file, row in plan.touched)
        self._relabel(plan.moved, "moved")
        self._relabel(plan.relabelled, "done")
        self._forget(plan.gone)
        if plan.work:
            self._read(plan.work)

    def _read(self, work: Sequence[tuple[File, RowMapping | None]]) -> None:
        self.waiting = iter(work)
        self.meter.begin(sum(file.size for file, _ in work))
        with closing(self.writer.write()) as finished:
            for outcomes in finished:
                self._finish(outcomes)
                self._tick()

    def _take(self, count: int) -> list[Pending]:
        """The next documents, their rows `writing`."""
        while files := list(islice(self.waiting, count)):
            pending = []
            for file, row in files:
                document = self._row(file, row)
                self.files_of[document.id] = file
                unpacked = Path(file.place).is_relative_to(self.scratch)
                root = self.scratch if unpacked else self.source.root
                pending.append(Pending(document, file.place, str(root), name=file.path if unpacked else ""))
            written = self.catalog.put([one.document for one in pending], self.options.restore)
            self.skips += [
                Skip(path=one.document.path, reason=sync.REMOVED) for one in pending if one.document.id not in written
            ]
            if written:
                return [one for one in pending if one.document.id in written]
        return []

    def _finish(self, outcomes: Sequence[Outcome]) -> None:
        """An earlier version of a file that could not be read stays searchable; the report names the file."""
        rows = []
        for outcome in outcomes:
            file = self.files_of.pop(outcome.document.id)
            self.meter.bytes += file.size
            if Path(file.place).is_relative_to(self.scratch):
                Path(file.place).unlink(missing_ok=True)
            if outcome.failure is None:
                self.files["done"] += 1
                self.languages += outcome.languages
                rows.append((_done(outcome), outcome.parsed))
                continue
            stage, reason, skipped = outcome.failure
            self._failed(file.path, stage, reason, skipped)
            if outcome.known:
                self._label(outcome.document)  # its earlier version may be seen by those alone who may see it now
            rows.append((_unread(outcome.document, "skipped" if skipped else "failed", stage, reason), None))
        self._drop(self.catalog.finish(rows))

    def _drop(self, ids: Sequence[str]) -> None:
        delete_documents(self.index, self.collection.name, ids)

    def _failed(self, path: str, stage: str, reason: str, skipped: bool) -> None:
        self.files["skipped" if skipped else "failed"] += 1
        if skipped:
            self.skips.append(Skip(path=path, reason=reason))
        else:
            self.failures.append(Failure.model_validate({"path": path, "stage": stage, "reason": reason}))

    def _leave(self) -> None:
        """What was being written when the job ended is left as failed, not as being written for good."""
        self._finish(self.writer.flush())
        rows = []
        for outcome in self.writer.open.values():
            path = outcome.document.path
            self.failures.append(Failure(path=path, stage="read", reason=UNREACHED))
            rows.append((_unread(outcome.document, "failed", "read", UNREACHED), None))
        self._drop(self.catalog.finish(rows))
        left = sum(1 for _ in self.waiting)
        if left:
            self.notes.append(f"{left} files were not reached; run it again to go on")

    # archives

    def _open_archives(self, walked: Walk, stamps: dict[str, RowMapping]) -> list[File]:
        """-> the files, with the members of each archive in its place."""
        held = members.rows_by_archive(stamps)
        files = []
        for file in walked.files:
            if not is_archive(file.path):
                files.append(file)
            elif self.settings.archive_depth:
                files += self._members(file, stamps.pop(file.uri, None), held.get(file.uri, {}), walked.unseen)
            else:
                self.skips.append(Skip(path=file.path, reason="no archive is opened: INGEST_ARCHIVE_DEPTH is 0"))
        return files

    def _members(
        self, file: File, row: RowMapping | None, held: dict[str, RowMapping], unseen: list[str]
    ) -> list[File]:
        """`held`: rows of the members, by URI, as they are known."""
        if row and row["state"] == "removed" and not self.options.restore:
            self.skips.append(Skip(path=file.path, reason=sync.REMOVED))
            unseen.append(file.uri)
            return []
        if row and self._is_unchanged(file, row, held):
            self.files["unchanged"] += 1
            if sync.relabelled(file, row, self.options.labelling):
                kept = {"state": "done", "mime": members.MIME}
                self.catalog.finish([(self._row(file, row).model_copy(update=kept), None)])
            return [members.from_row(file, uri, one) for uri, one in held.items()]
        if self.options.only_failed and not any(one["state"] in AGAIN for one in (row, *held.values()) if one):
            return []
        self._tick(file.path)
        reply = self.writer.unpack(file.place, str(self.source.root), self.scratch / uuid.uuid4().hex)
        document = self._row(file, row).model_copy(
            update={"mime": members.MIME, "content_hash": "", "indexed_at": now()}
        )
        if reply.expanded is None:
            self._failed(file.path, "read", reply.reason, skipped=False)
            self.archives.append(_unread(document, "failed", "read", reply.reason))
            unseen.append(file.uri)
            for uri, one in held.items():  # they may be seen by those alone who may see the archive now
                self._label_kept(members.from_row(file, uri, one)._replace(sidecar=file.sidecar), one)
            return []
        if self.options.restore:
            self.catalog.put([document], restore=True)
        return self._unpacked(file, document, reply.expanded, unseen)

    def _is_unchanged(self, file: File, row: RowMapping, held: dict[str, RowMapping]) -> bool:
        """Whether an archive and all that is known of its members is as it was, so that it need not be opened."""
        sidecar = None if file.sidecar is None else file.sidecar.model_dump(mode="json")
        same = (row["state"], row["size"], row["stamp"], row["sidecar"]) == ("done", file.size, file.stamp, sidecar)
        return same and all(one["state"] == "done" or self._stays_out(one) for one in held.values())

    def _unpacked(self, file: File, document: Document, expanded: Expanded, unseen: list[str]) -> list[File]:
        """-> the members as files. An archive with a member that could not be unpacked is opened again by the next job."""
        found = members.from_unpacked(file, expanded, self.scratch)
        for name, reason in expanded.skips:
            self._failed(f"{file.path}/{name}", "read", reason, skipped=True)
        for name, reason in found.failures:
            self._failed(f"{file.path}/{name}", "read", reason, skipped=False)
            unseen += [members.uri_of(file, name), members.uri_of(file, name) + "/"]  # a file, or an archive in it
        if found.failures:
            reason = f"{len(dict(found.failures))} of its files could not be unpacked"
            self._failed(file.path, "read", reason, skipped=False)
            self.archives.append(_unread(document, "failed", "read", reason))
        elif self.options.only_failed:  # others of its files may have changed, and are not looked at
            self.archives.append(_unread(document, "failed", "read", "the next run of its folder reads the rest of it"))
        else:
            self.archives.append(document.model_copy(update={"state": "done"}))
        return found.files

    # rows

    def _row(self, file: File, row: RowMapping | None) -> Document:
        """The document as it is while it is being written; until it is done, the earlier text goes on answering."""
        acl, metadata = self.options.labelling
        new = {
            "uri": file.uri,
            "path": file.path,
            "size": file.size,
            "stamp": file.stamp,
            "content_hash": "",
            "state": "writing",
            "stage": None,
            "reason": None,
            "sidecar": file.sidecar,
        }
        if acl is not None:
            new["given_acl"] = tuple(sorted(acl))
        if row is not None:
            held = self.catalog.document(row["id"])
            return held.relabelled(**new, metadata={**held.metadata, **(metadata or {})})
        taken = self.catalog.ids_first_seen_at(self.collection.name, file.uri)
        n = 0
        while (identity := document_id(self.collection.name, file.uri, n)) in taken:
            n += 1
        own = {"id": identity, "collection": self.collection.name, "first_uri": file.uri, "metadata": metadata or {}}
        return Document.model_validate({**new, **own}).relabelled()

    def _relabel(self, pairs: Sequence[tuple[File, RowMapping]], kind: str) -> None:
        """The same bytes under another path, access list or metadata: the payloads alone are written."""
        for start in range(0, len(pairs), FLUSH_DOCUMENTS):
            batch = []
            for file, row in pairs[start : start + FLUSH_DOCUMENTS]:
                self._tick(file.path)
                unread = {"state": "done", "content_hash": row["content_hash"]}
                document = self._row(file, row).model_copy(update=unread)
                self.chunks["kept"] += self._label(document)
                self.languages.update(document.languages)
                self.files[kind] += 1
                batch.append((document, None))
            self.index.flush(self.name)
            self.catalog.finish(batch)

    def _label_kept(self, file: File, row: RowMapping) -> None:
        """Of a file that stays as it was read before: its labels alone."""
        held = self.catalog.document(row["id"])
        same = {name: getattr(held, name) for name in ("state", "stage", "reason", "content_hash")}
        document = self._row(file, row).model_copy(update=same)
        self._label(document)
        self.index.flush(self.name)
        self.catalog.put([document])

    def _label(self, document: Document) -> int:
        """Writes what the document's row says of it to its chunks. -> how many there are."""
        ids = sorted(self.index.ids(self.name, document.id))
        payloads = self.index.payloads(self.name, ids)
        labels = {
            "path": document.path,
            "folders": folders(document.path),
            "acl": list(document.acl),
            "metadata": document.labels(),
        }
        self.index.set_payloads(self.name, [(point, {**payloads[point], **labels}) for point in ids])
        return len(ids)

    def _forget(self, gone: Sequence[RowMapping]) -> None:
        """Their chunks go from every index that the collection has."""
        for start in range(0, len(gone), FLUSH_DOCUMENTS):
            batch = gone[start : start + FLUSH_DOCUMENTS]
            self.catalog.unsettle([row["id"] for row in batch])
            for row in batch:
                self.chunks["deleted"] += len(self.index.ids(self.name, row["id"]))
                self.files["deleted"] += 1
            self._drop([row["id"] for row in batch])
            self.catalog.forget([row["id"] for row in batch])
            self._tick(batch[-1]["path"])

    # telling

    def _tick(self, current: str | None = None) -> None:
        if self.cancelled():
            raise Cancelled
        if time.monotonic() > self.deadline:
            raise Cancelled(expired=True)
        counts = self.chunks + self.writer.chunks
        progress = self.meter.progress(
            self.files.total() + len(self.writer.finished), self.writer.pages, counts["added"] + counts["kept"], current
        )
        self.report_progress(progress)

    def _stays_out(self, row: RowMapping) -> bool:
        """Whether a file that was not taken in is still not to be: not restored, and not readable now that there is OCR."""
        if row["state"] == "removed":
            return not self.options.restore
        return row["state"] == "skipped" and not (self.can_ocr and (row["reason"] or "").startswith(OCR_MISSING))

    def _still_skipped(self, plan: sync.Plan) -> sync.Plan:
        again = [pair for pair in plan.skipped if not self._stays_out(pair[1])]
        skipped = [pair for pair in plan.skipped if self._stays_out(pair[1])]
        return plan._replace(skipped=skipped, work=[*plan.work, *again])

    def _report(self) -> Report:
        chunks = self.chunks + self.writer.chunks
        self.seconds["total"] = time.perf_counter() - self.started
        seconds = {**self.seconds, **self.writer.seconds}
        self.files["failed"] = len(self.failures)
        self.files["skipped"] = len(self.skips)
        return Report(
            files=FileCounts.model_validate(dict(self.files)),
            chunks=ChunkCounts.model_validate(dict(chunks)),
            seconds={stage: round(spent, 3) for stage, spent in seconds.items()},
            failures=tuple(self.failures),
            skips=tuple(self.skips),
            languages=dict(self.languages.most_common()),
            notes=(*self.notes, *self._language_note(), *self._ocr_note()),
        )

    def _language_note(self) -> list[str]:
        said = unread(self.languages, self.reads)
        if not said:
            return []
        read = ", ".join(map(name_of, self.reads))
        return [
            f"{said}; {self.collection.embedder} reads {read}; try multilingual-e5-small; BM25 finds them meanwhile"
        ]

    def _ocr_note(self) -> list[str]:
        count = sum(skip.reason.startswith(OCR_MISSING) for skip in self.skips)
        return [f"{count} files: {OCR_MISSING}"] if count else []


def _only_failed(plan: sync.Plan) -> sync.Plan:
    work = [pair for pair in plan.work if pair[1] is not None and pair[1]["state"] in AGAIN]
    return sync.Plan(0, [], [], [], [], [], work)


def _done(outcome: Outcome) -> Document:
    assert outcome.parsed is not None
    return outcome.document.model_copy(
        update={
            "state": "done",
            "content_hash": outcome.content_hash,
            "text_hash": outcome.parsed.content_address(),
            "mime": outcome.parsed.mime,
            "chunks": len(outcome.written),
            "pages": len(outcome.parsed.pages) or None,
            "languages": dict(outcome.languages),
            "indexed_at": now(),
        }
    )


def _unread(document: Document, state: State, stage: str, reason: str) -> Document:
    return document.model_copy(update={"state": state, "stage": stage, "reason": reason})
