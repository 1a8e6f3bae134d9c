"""A worker: takes training jobs from the queue, one after the other, and runs each in processes of its own (`finetune.job`).

Light: it holds no model. A job whose worker was killed goes on with the next worker, from the training's last checkpoint. DBOS
says who runs what; the worker's row, and its process, say who lives.
"""

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from dbos import DBOS
from pydantic import ValidationError
from sqlalchemy import inspect
from sqlalchemy.exc import SQLAlchemyError

from finetune.job import Order, Said
from finetune.room import resume_engine
from finetune.settings import FinetuneSettings
from ingest import db
from ingest.errors import GraftError, UnavailableError
from ingest.settings import IngestSettings
from service import queues
from service.queues import OWNER, TUNE, Unfinished
from service.records import JobRecord, Records
from service.tuning import RUNS, TunePayload, TuneResult, extended
from service.workers import BEAT_SECONDS, Workers

logger = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks at whether a job was cancelled
WRITE_SECONDS = 0.5  # between two notes of how far it is
STOP_SECONDS = {"cancelled": 120.0, "ending": 30.0, "lost": 0.0}  # until a process that was asked to stop is killed
Why = Literal["cancelled", "ending", "lost"]


class Worker:
    """One a process, since DBOS is. `say` is told what it takes and does."""

    def __init__(self, ingest: IngestSettings, settings: FinetuneSettings, say: Callable[[str], None]) -> None:
        self.ingest = ingest
        self.folder = settings.folder or ingest.home / RUNS
        self.say = say
        self.ending = threading.Event()
        self._running: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def run(self, once: bool) -> None:
        """Until `ending` is set; `once`: until nothing is queued. Raises UnavailableError where no service has been yet."""
        engine = db.connect(self.ingest.sqlalchemy_url())
        try:
            with engine.connect() as connection:
                if not inspect(connection).has_table("workers"):
                    raise UnavailableError(
                        f"no service has run with {str(self.ingest.home)!r} yet, so it has no jobs: start it with `graft up`"
                    )
            self.records, self.workers = Records(engine), Workers(engine)
            with self._enlisted() as identity:
                self.say(f"takes jobs of queue {TUNE!r} for {self.ingest.home}")
                self._look_until_the_end(identity, once)
        finally:
            engine.dispose()

    @contextmanager
    def _enlisted(self) -> Iterator[str]:
        """-> its id, under which it takes jobs; at the end none of its jobs runs."""
        identity, left = self.workers.enlist(TUNE), threading.Event()
        beating = threading.Thread(target=self._beat, args=(identity, left), daemon=True, name="beat")
        beating.start()
        queues.launch(queues.database_url(self.ingest), identity, TUNE, self._run)
        try:
            yield identity
        finally:
            self.ending.set()
            end = time.monotonic() + STOP_SECONDS["ending"] + 10
            while self._running and time.monotonic() < end:
                time.sleep(0.1)
            queues.close()
            left.set()
            beating.join()
            self.workers.leave(identity)

    def _beat(self, identity: str, left: threading.Event) -> None:
        while not left.wait(BEAT_SECONDS):
            try:
                self.workers.beat(identity)
            except Exception as error:  # a database that is away for a moment
                logger.warning("no beat: %s", error)

    def _look_until_the_end(self, identity: str, once: bool) -> None:
        while not self.ending.wait(LOOK_SECONDS):
            try:
                active = queues.active(TUNE)
                dead = {one for one in active.values() if one} - self.workers.living(TUNE) - {OWNER}
                if dead:
                    queues.take_over(sorted(dead))
                self._obey(identity)
                if (
                    once
                    and not self._running
                    and not dead
                    and set(active.values()) <= self.workers.living(TUNE) - {identity}
                ):
                    return
            except Exception as error:
                logger.warning("the queue cannot be looked at: %s", error)

    def _obey(self, identity: str) -> None:
        """What others did to a running job reaches its process."""
        for job, run in list(self._running.items()):
            status = DBOS.get_workflow_status(job)  # not from the job's own thread, where it would become a step of it
            if status is None or status.status == "CANCELLED":
                run.stop("cancelled")
            elif status.status != "PENDING" or status.executor_id != identity:
                run.stop("lost")

    def _run(self, job: str) -> None:
        """In a thread of DBOS'. Raises Unfinished when the job is left to the next worker."""
        run = _Run(self.ending)
        with self._lock:
            if job in self._running:
                raise Unfinished
            self._running[job] = run
        try:
            self._work(job, run)
        finally:
            del self._running[job]

    def _work(self, job: str, run: "_Run") -> None:
        try:
            record = self.records.job(job)
            payload = TunePayload.model_validate(record.payload)
        except (GraftError, ValidationError) as error:
            self.records.set_job(job, error=f"its request cannot be read: {error}")
            raise
        notes = _Notes(self.records, record)
        self.say(f"{job}: {payload.recipe} on {payload.data}")
        try:
            result = self._parts(payload, run, notes)
        except GraftError as error:
            self.records.set_job(job, error=str(error), waiting=None)
            self.say(f"{job}: failed: {error}")
            raise
        except Exception as error:
            logger.exception("job failed", extra={"job": job})
            self.records.set_job(job, error=f"{type(error).__name__}: {error}"[:500], waiting=None)
            raise
        if result is None:
            self.say(f"{job}: {'left to the next worker' if run.why != 'cancelled' else 'cancelled'}")
            if run.why != "cancelled":
                raise Unfinished
            return
        self.records.set_job(job, result=result.model_dump(mode="json"), error=None, waiting=None)
        self.say(f"{job}: done{f', adapter {result.adapter}' if result.adapter else f': {result.folder}'}")

    def _parts(self, payload: TunePayload, run: "_Run", notes: "_Notes") -> TuneResult | None:
        """-> what it left; None when it was stopped. Raises GraftError."""
        out = self.folder / payload.run
        holder = f"{payload.run} {uuid.uuid4().hex[:8]}"  # of the pause; who takes the job over is another one
        self.folder.mkdir(parents=True, exist_ok=True)
        result = None
        for part in ("train", "finish"):
            order = Order(part=part, payload=payload, out=out, holder=holder)
            try:
                result = run.do(order, self.folder / f"{payload.run}.log", notes)
            finally:
                notes.write()
                if payload.pause_engine and part == "train":
                    resume_engine(self.ingest.home, holder)
            if run.why is not None and result is None:
                return None
        return result


class _Notes:
    """What a job says of itself, kept in its row now and then."""

    def __init__(self, records: Records, record: JobRecord) -> None:
        self.records = records
        self.job = record.id
        self.curve = record.curve or ()
        self._new: dict[str, Any] = {}
        self._written = 0.0

    def take(self, said: Said) -> None:
        if said.point is not None:
            self.curve = extended(self.curve, said.point)
            self._new["curve"] = [point.model_dump() for point in self.curve]
        if said.progress is not None:
            self._new |= {"tuning": said.progress.model_dump(), "waiting": None}
        if said.waits is not None:
            self._new["waiting"] = said.waits.model_dump()
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """What the database does not take now goes with the next note."""
        if not self._new:
            return
        self._written = time.monotonic()
        try:
            self.records.set_job(self.job, **self._new)
        except SQLAlchemyError as error:  # a training is worth more than a note of it
            logger.warning("how far job %s is was not written: %s", self.job, error)
        else:
            self._new = {}


class _Run:
    """A job's processes, one after the other. `why` it is to stop."""

    def __init__(self, ending: threading.Event) -> None:
        self.why: Why | None = None
        self._ending = ending

    def stop(self, why: Why) -> None:
        self.why = self.why or why

    def do(self, order: Order, log: Path, notes: _Notes) -> TuneResult | None:
        """-> what a part left, where it leaves something; None also when it was stopped. Raises GraftError."""
        command = [sys.executable, "-P", "-m", "finetune.job"]  # -P: not what the working folder calls so
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        try:
            return self._followed(process, order, log, notes)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()

    def _followed(self, process: subprocess.Popen[bytes], order: Order, log: Path, notes: _Notes) -> TuneResult | None:
        assert process.stdin is not None
        process.stdin.write(order.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        lines: queue.Queue[Said | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True, name="job output").start()
        kill_at: float | None = None
        while True:
            if self._ending.is_set():
                self.stop("ending")
            if self.why is not None and kill_at is None:
                kill_at = time.monotonic() + STOP_SECONDS[self.why]
                with suppress(BrokenPipeError):
                    process.stdin.write(b"stop\n")
                    process.stdin.flush()
            if kill_at is not None and time.monotonic() > kill_at:
                return None
            with suppress(queue.Empty):
                said = lines.get(timeout=0.2)
                if said is None:
                    self._raise_if_it_died(process.pid, log)
                    return None
                if said.error is not None:
                    raise GraftError(said.error)
                if said.stopped and self.why is None:
                    self._told_by_others()
                if said.result is not None:
                    return said.result
                notes.take(said)

    def _told_by_others(self) -> None:
        """Raises GraftError, unless the worker is told to end too."""
        if not self._ending.wait(2):
            raise GraftError(
                "the training's process was told to end by somebody; `graft jobs retry` goes on from its checkpoint"
            )
        self.stop("ending")

    def _raise_if_it_died(self, pid: int, log: Path) -> None:
        """Raises GraftError."""
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it keeps its number until its group is gone
        code = ended.si_status if ended else 0
        if self.why is None and ended and ended.si_code == os.CLD_KILLED and code == signal.SIGKILL:
            raise GraftError(
                "the training was killed by the system, which does that when memory runs out: lower per_device_train_batch_size "
                "or max_length, set gradient_checkpointing=true, or train with weights=qlora"
            )
        if self.why is None and code != 0:
            raise GraftError(f"the training's process ended with status {code}; {str(log)!r} says more")


def _read(process: subprocess.Popen[bytes], lines: "queue.Queue[Said | None]") -> None:
    assert process.stdout is not None
    with suppress(ValueError):  # closed meanwhile
        for line in iter(process.stdout.readline, b""):
            with suppress(ValidationError):
                lines.put(Said.model_validate_json(line))
    lines.put(None)
