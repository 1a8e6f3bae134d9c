"""Durable jobs: enqueued by name, run by this process, resumed after a kill, cancelled within a second.

DBOS keeps which job is in which state; the `jobs` table keeps what was asked, how far it is, and its report. A job is one
step: what it writes to (catalog, index, dump) is its checkpoint, so it is simply run again. Two jobs on one collection run
one after the other. What each kind does is in `service.work`; trainings are run by worker processes, and only watched here.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dbos import DBOS, WorkflowStatus
from pydantic import ValidationError

from ingest.catalog import now
from ingest.errors import ConflictError, GraftError, NotFoundError, UnavailableError
from ingest.pipeline import Cancelled
from ingest.reader import ReaderSpec
from ingest.remote import is_remote, shown
from ingest.schemas import Chunking, Frozen, Progress, Report
from service import queues
from service.metrics import Metrics
from service.queues import INGEST, OWNER, TUNE, Unfinished
from service.records import JobKind, JobRecord, Records
from service.schemas_jobs import Job, JobState
from service.tuning import TunePayload, Wait
from service.workers import Workers

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.5
NO_WORKER = Wait(
    waiting_for="worker", hint="no worker runs: start one in this checkout with `graft worker --queue tune`"
)
STATES: dict[str, JobState] = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "CANCELLED": "cancelled",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
}
ENDED = frozenset({"succeeded", "failed", "cancelled"})


class IngestPayload(Frozen):
    """`target`: a folder or file at or below `root` (both absolute), a URL, or the name of a `reader`.

    `only`: no more than these files and folders of it. `acl`, `metadata`: null leaves what documents have.
    """

    target: str
    root: str = ""
    collection: str
    only: tuple[str, ...] = ()
    reader: ReaderSpec | None = None
    allow_empty: bool = False
    restore: bool = False
    only_failed: bool = False
    acl: tuple[str, ...] | None = None
    metadata: dict[str, Any] | None = None


class ReindexPayload(Frozen):
    """Null: as it is. `flip`: make it live at the end."""

    collection: str
    embedder: str | None = None
    chunking: Chunking | None = None
    flip: bool = True


class DumpPayload(Frozen):
    """To or from the folder, or the store, `target`."""

    collection: str
    target: str


class LoadPayload(DumpPayload):
    pass


Payload = IngestPayload | ReindexPayload | DumpPayload | LoadPayload | TunePayload
Work = Callable[[Any, Callable[[], bool], Callable[[Progress], None]], Report]
KINDS: dict[JobKind, type[Payload]] = {
    "ingest": IngestPayload,
    "reindex": ReindexPayload,
    "dump": DumpPayload,
    "load": LoadPayload,
    "tune": TunePayload,
}


class Jobs:
    """One an application and a process, since DBOS is. `work` does it, by kind, in a thread of DBOS'."""

    def __init__(self, records: Records, metrics: Metrics, url: str, work: Mapping[JobKind, Work]) -> None:
        self.records = records
        self.workers = Workers(records.engine)
        self.metrics = metrics
        self.url = url
        self._kinds = work
        self._cancelled: set[str] = set()
        self._stopping = threading.Event()
        self._running = 0
        self._writing: set[str] = set()  # collections
        self._idle = threading.Condition()

    def launch(self) -> None:
        """Jobs that a killed process left running go on."""
        queues.launch(self.url, OWNER, INGEST, self._run)

    def close(self, seconds: float = 10) -> None:
        """Running jobs stop where they are, and stay running for the next process."""
        self._stopping.set()
        with self._idle:
            self._idle.wait_for(lambda: self._running == 0, timeout=seconds)
        queues.close()

    def enqueue(self, payload: Payload, principal: str) -> Job:
        identity = str(uuid.uuid4())
        kind = next(kind for kind, model in KINDS.items() if type(payload) is model)
        values = payload.model_dump(mode="json")
        number = self.records.add_job(
            JobRecord(id=identity, created_at=now(), principal=principal, kind=kind, payload=values)
        )
        if isinstance(payload, TunePayload):
            queues.enqueue(TUNE, identity, number)
        else:
            queues.enqueue(INGEST, identity, number, partition=payload.collection)
        return self.job(identity)

    def jobs(self, collection: str | None, limit: int) -> list[Job]:
        """The latest first, without their curves."""
        found = [self.job(identity) for identity in self.records.job_ids(collection, limit)]
        return [one.model_copy(update={"curve": ()}) for one in found]

    def job(self, identity: str) -> Job:
        """Raises NotFoundError."""
        record = self.records.job(identity)
        status = DBOS.get_workflow_status(identity)
        state: JobState = STATES.get(status.status, "running") if status else "failed"
        error = record.error
        if state == "failed" and not error:
            error = "it was given up after its process died too often" if status else "it was never enqueued; ask again"
        if state == "running" and identity in self._cancelled:
            state = "cancelled"
        waits = None
        if record.kind == "tune" and status and state not in ENDED:
            state, waits = self._with_a_worker(status, record)
        return Job(
            job_id=identity,
            kind=record.kind,
            state=state,
            collection=record.payload["collection"] or "",
            path=_shown(record.payload.get("target") or record.payload.get("data") or ""),
            created_at=record.created_at,
            progress=record.progress,
            report=record.report,
            tuning=record.tuning,
            curve=record.curve or (),
            result=record.result,
            waiting_for=waits.waiting_for if waits else None,
            hint=waits.hint if waits else None,
            error=error,
        )

    def _with_a_worker(self, status: WorkflowStatus, record: JobRecord) -> tuple[JobState, Wait | None]:
        """-> its state, and what it waits for: one whose worker was killed is queued for the next."""
        living = self.workers.living(TUNE)
        if status.status == "PENDING" and status.executor_id in living:
            return "running", record.waiting
        return "queued", None if living else NO_WORKER

    def busy(self, collection: str) -> bool:
        """Whether a job of this collection is queued or running."""
        queued = {self.records.job(identity).payload["collection"] for identity in queues.active(INGEST)}
        with self._idle:
            return collection in queued | self._writing  # a cancelled job may not have stopped yet

    def cancel(self, identity: str) -> Job:
        """A job that has ended stays as it ended. Raises NotFoundError."""
        if self.job(identity).state not in ENDED:
            self._cancelled.add(identity)
            DBOS.cancel_workflow(identity)
        return self.job(identity)

    def retry(self, identity: str, principal: str) -> Job:
        """-> a new job: of an ingest, the files alone that failed. Raises NotFoundError, ConflictError (it has not ended)."""
        job = self.job(identity)
        if job.state not in ENDED:
            raise ConflictError(f"job {identity!r} is still {job.state}; cancel it first, or wait for its end")
        record = self.records.job(identity)
        payload = KINDS[record.kind].model_validate(record.payload)
        if isinstance(payload, IngestPayload):
            payload = payload.model_copy(update={"only_failed": job.state == "succeeded" or payload.only_failed})
        return self.enqueue(payload, principal)

    def _run(self, identity: str) -> None:
        with self._idle:
            self._running += 1
        try:
            self._work(identity)
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _work(self, identity: str) -> None:
        try:
            record = self.records.job(identity)
            payload = KINDS[record.kind].model_validate(record.payload)
            assert not isinstance(payload, TunePayload)
        except (NotFoundError, ValidationError) as error:
            self.records.set_job(identity, error=f"its request cannot be read: {error}")
            raise
        told = 0.0

        def stop() -> bool:
            return self._stopping.is_set() or identity in self._cancelled

        def tell(progress: Progress) -> None:
            nonlocal told
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                self.records.set_job(identity, progress=progress.model_dump(mode="json"))

        try:
            with self._alone(payload.collection, stop):
                report = self._kinds[record.kind](payload, stop, tell)
        except Cancelled as stopped:
            self._stopped(identity, record.kind, stopped)
            return
        except GraftError as error:
            self.records.set_job(identity, error=str(error))
            self.metrics.job_ended(record.kind, "failed")
            raise
        except Exception as error:
            logger.exception("job failed", extra={"job": identity})
            self.records.set_job(identity, error=f"{type(error).__name__}: {error}"[:500])
            self.metrics.job_ended(record.kind, "failed")
            raise
        self._succeeded(identity, record.kind, report)

    @contextmanager
    def _alone(self, collection: str, stop: Callable[[], bool]) -> Iterator[None]:
        """Waits for a cancelled job of the collection that has not stopped yet. Raises Cancelled."""
        with self._idle:
            while collection in self._writing:
                self._idle.wait(0.2)
                if stop():
                    raise Cancelled
            self._writing.add(collection)
        try:
            yield
        finally:
            with self._idle:
                self._writing.discard(collection)
                self._idle.notify_all()

    def _stopped(self, identity: str, kind: JobKind, stopped: Cancelled) -> None:
        if not stopped.expired and identity not in self._cancelled:
            raise Unfinished from None
        if stopped.report:
            self.records.set_job(identity, report=stopped.report.model_dump(mode="json"))
        if stopped.expired:
            said = "it took over INGEST_JOB_SECONDS; what it has done is kept, run it again to go on"
            self.records.set_job(identity, error=said)
            self.metrics.job_ended(kind, "failed")
            raise UnavailableError(said)
        self.metrics.job_ended(kind, "cancelled")

    def _succeeded(self, identity: str, kind: JobKind, report: Report) -> None:
        """Every file is accounted for, and nothing is left to do."""
        last = self.records.job(identity).progress
        total = sum(report.files.model_dump().values())
        ended = {
            "files_total": total,
            "files": total,
            "bytes": last.bytes_total or 0,
            "chunks": report.chunks.added + report.chunks.kept,
            "seconds_left": 0.0,
            "current": None,
        }
        progress = last.model_copy(update=ended)
        self.records.set_job(
            identity, report=report.model_dump(mode="json"), progress=progress.model_dump(mode="json"), error=None
        )
        self.metrics.job_ended(kind, "succeeded")


def _shown(target: str) -> str:
    """Without what may be secret in a URL."""
    kind, mark, place = target.partition(":")
    if is_remote(target):
        return shown(target)
    return f"{kind}{mark}{shown(place)}" if is_remote(place) else target
