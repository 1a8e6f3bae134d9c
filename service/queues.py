"""DBOS as this project sets it up: two queues, each with a workflow of its name, and each process listens to one of them.

A process that listens to all of them would claim jobs whose code it lacks. DBOS is one a process.
"""

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dbos import DBOS, DBOSConfig, EnqueueOptions
from sqlalchemy import make_url

from ingest.settings import IngestSettings

Queue = Literal["ingest", "tune"]
INGEST: Queue = "ingest"  # of every kind that the service itself does: named when there was one
TUNE: Queue = "tune"  # of what a worker process does
VERSION = "1"  # raised when a payload changes its meaning: a worker takes only jobs of its own version
OWNER = "owner"  # the executor that is the service: one process owns a home
RECOVERIES = 20  # a job that kills its process this often is given up
ACTIVE = ["PENDING", "ENQUEUED"]


class Unfinished(BaseException):
    """The process ends: DBOS, which records every Exception as the job's end, must leave this job as running."""


def database_url(settings: IngestSettings) -> str:
    """Where the jobs' states are kept: beside the records, in a SQLite file of their own."""
    if settings.database_url is None or settings.sqlalchemy_url().startswith("sqlite"):
        return f"sqlite:///{settings.home / 'jobs.db'}"
    return settings.sqlalchemy_url()


def launch(url: str, executor: str, queue: Queue, run: Callable[[str], None]) -> None:
    """`run` gets the ids of jobs. Those that this executor left running when it was killed go on."""
    _write_ahead(url)
    logging.getLogger("dbos").setLevel(logging.ERROR)
    config: DBOSConfig = {
        "name": "graft",  # one application: a queue belongs to the one that registered it, and homes hold this name
        "system_database_url": url,
        "application_version": VERSION,
        "executor_id": executor,
        "log_level": "ERROR",
        "run_migrations": True,
    }
    DBOS(config=config)
    logging.getLogger("dbos").addFilter(_is_news)
    DBOS.listen_queues([queue])

    @DBOS.workflow(name=queue, max_recovery_attempts=RECOVERIES)
    def work(identity: str) -> None:  # DBOS marks the function, and a bound method takes no marks
        run(identity)

    DBOS.launch()
    DBOS.register_queue(INGEST, partition_concurrency=1, worker_concurrency=2, polling_interval_sec=0.5)
    DBOS.register_queue(TUNE, worker_concurrency=1, polling_interval_sec=0.5)


def enqueue(queue: Queue, identity: str, priority: int, partition: str | None = None) -> None:
    options: EnqueueOptions = {
        "workflow_name": queue,
        "queue_name": queue,
        "workflow_id": identity,
        "priority": priority,  # DBOS knows the second alone on SQLite, within which the order would be by chance
        "app_version": VERSION,
    }
    if partition is not None:
        options["queue_partition_key"] = partition
    DBOS.enqueue_workflow_with_options(options, identity)


def active(queue: Queue) -> dict[str, str | None]:
    """-> by id, who runs each queued or running job; None: nobody yet."""
    found = DBOS.list_workflows(status=ACTIVE, queue_name=queue, load_input=False, load_output=False)
    return {one.workflow_id: one.executor_id if one.status == "PENDING" else None for one in found}


def take_over(executors: list[str]) -> None:
    """Jobs that these executors, which are dead, left running are queued again. Done twice at once, it is done once: a job
    that somebody has taken by then names another executor.
    """
    DBOS._recover_pending_workflows(executors)


def close() -> None:
    DBOS.destroy(destroy_registry=True)


def _is_news(record: logging.LogRecord) -> bool:
    """How a job ended is in its row, and its failure was logged where it happened."""
    return "in background workflow" not in record.getMessage()


def _write_ahead(url: str) -> None:
    """DBOS leaves SQLite in its rollback journal, in which readers block writers; the mode stays with the file."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(parsed.database) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
