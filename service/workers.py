"""Worker processes and which of them live: each keeps a row in the database, and says every few seconds that it is there."""

import os
import uuid
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Column, Engine, Float, Integer, String, Table, delete, insert, select
from sqlalchemy import update as sql_update

from ingest.catalog import now
from ingest.db import Utc, metadata
from service.owner import ProcessMark, mark

BEAT_SECONDS = 5.0
DEAD_AFTER = timedelta(seconds=60)  # without a beat, of a worker on another machine
FORGOTTEN_AFTER = timedelta(days=1)

workers = Table(
    "workers",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("queue", String(32), nullable=False),
    Column("host", String(200), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", Float, nullable=False),
    Column("beat", Utc, nullable=False),
)


class Workers:
    """Calls block; every call is a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def enlist(self, queue: str) -> str:
        """-> the id of this process as a worker."""
        identity, me = str(uuid.uuid4()), mark(os.getpid())
        row = {"id": identity, "queue": queue, "host": _host(), "pid": me.pid, "started": me.started, "beat": now()}
        with self.engine.begin() as connection:
            connection.execute(delete(workers).where(workers.c.beat < now() - FORGOTTEN_AFTER))
            connection.execute(insert(workers).values(**row))
        return identity

    def beat(self, identity: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(sql_update(workers).where(workers.c.id == identity).values(beat=now()))

    def leave(self, identity: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(workers).where(workers.c.id == identity))

    def living(self, queue: str) -> frozenset[str]:
        """-> ids. A process of this machine is looked for itself, so that a killed one is known to be dead at once."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(workers).where(workers.c.queue == queue)).all()
        here, late = _host(), now() - DEAD_AFTER
        return frozenset(
            row.id
            for row in rows
            if (ProcessMark(pid=row.pid, started=row.started).process() if row.host == here else row.beat > late)
        )


def _host() -> str:
    """Where a process id means the same process: this start of this machine, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}" if boot.is_file() else os.uname().nodename
