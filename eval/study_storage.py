"""Where a study lies: in memory, in a SQLite file, or in a PostgreSQL database, which several machines can share.

Who takes the next trial is settled in turns: a lock beside the file, or one of the database. A trial says whose it is; one whose
process has died is taken over.
"""

import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ingest.errors import InvalidError, LockedError, UnavailableError

if TYPE_CHECKING:
    import optuna

FILES = {".study", ".db", ".sqlite", ".sqlite3"}
TURN_SECONDS = 60.0  # until a turn that does not come is told
BEAT_SECONDS, GRACE_SECONDS = 15.0, 120.0  # between two signs of life of another machine; without one
OWNER, BEAT = "worker", "beat"  # of a trial's attributes


class Opened(NamedTuple):
    """`turn`: in it one process chooses a trial, and no other. `remote`: owners may be on other machines."""

    study: "optuna.Study"
    turn: Callable[[], AbstractContextManager[Any]]
    remote: bool


def said(storage: Path | str | None, name: str) -> str:
    """-> where that is, without a password."""
    if isinstance(storage, Path):
        return str(_file(storage, name))
    return make_url(storage).render_as_string() if storage else "memory"


@contextmanager
def opened(storage: Path | str | None, name: str, minimize: bool = False, shared: bool = False) -> Iterator[Opened]:
    """`storage`: a folder, for a file of the study's name in it; a file; the URL of a database; None: memory. `shared`: others
    may be at it too. Raises LockedError while another process holds it, InvalidError for a URL that is none, UnavailableError.
    """
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # what is in use here is tested here
    make = _made(name, minimize)
    try:
        if storage is None:
            yield Opened(make(None), nullcontext, False)
            return
        url = None if isinstance(storage, Path) else _url(storage)
        if url is None or url.get_backend_name() == "sqlite":
            path = storage if isinstance(storage, Path) else Path((url and url.database) or "")
            with _in_file(_file(path, name), name, make, shared) as found:
                yield found
            return
        with _in_database(url, name, make) as found:
            yield found
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise UnavailableError(f"study {name!r} in {said(storage, name)!r} cannot be read or written: {why}") from error


def own() -> dict[str, Any]:
    """-> what tells this process from all others, also on other machines and in other containers."""
    import psutil

    where = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return {"where": " ".join(where), "pid": os.getpid(), "started": psutil.Process().create_time()}


def lives(attributes: Mapping[str, Any]) -> bool:
    """Whether the owner of a trial with these attributes is still at it."""
    import psutil

    owner = attributes.get(OWNER)
    if owner is None:
        return False
    if owner["where"] == own()["where"]:
        with suppress(psutil.Error):
            return abs(psutil.Process(owner["pid"]).create_time() - float(owner["started"])) < 1
        return False
    return time.time() - float(attributes.get(BEAT, 0.0)) < GRACE_SECONDS


@contextmanager
def held(trial: "optuna.Trial", remote: bool) -> Iterator[None]:
    """For the time that a trial takes: other machines see it live."""
    if not remote:
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(Exception):  # a database that is away for a moment
                trial.set_user_attr(BEAT, time.time())

    thread = threading.Thread(target=beat, daemon=True, name="trial beat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _made(name: str, minimize: bool) -> Callable[[Any], "optuna.Study"]:
    def make(storage: Any) -> "optuna.Study":
        import optuna

        direction = optuna.study.StudyDirection.MINIMIZE if minimize else optuna.study.StudyDirection.MAXIMIZE
        return optuna.create_study(direction=direction, study_name=name, storage=storage, load_if_exists=True)

    return make


@contextmanager
def _in_file(file: Path, name: str, make: Callable[[Any], "optuna.Study"], shared: bool) -> Iterator[Opened]:
    import optuna
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidError(f"the study {str(file)!r} cannot be made: {error.strerror}; name another place") from error

    @contextmanager
    def turn(seconds: float = TURN_SECONDS) -> Iterator[None]:
        lock = FileLock(f"{file}.lock")
        try:
            lock.acquire(timeout=seconds)
        except Timeout as error:
            raise LockedError(f"another process is at study {name!r}; wait for it, or choose another name") from error
        try:
            yield
        finally:
            lock.release()

    with nullcontext() if shared else turn(0):
        with turn() if shared else nullcontext():
            storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": lambda: _connect(file)})
            study = make(storage)
        try:
            yield Opened(study, turn if shared else nullcontext, False)
        finally:
            storage.remove_session()
            storage.engine.dispose()


@contextmanager
def _in_database(url: URL, name: str, make: Callable[[Any], "optuna.Study"]) -> Iterator[Opened]:
    import optuna

    whole = url.render_as_string(hide_password=False)
    engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    try:
        with _database_turn(engine, name):
            storage = optuna.storages.RDBStorage(
                whole, engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
            )
            study = make(storage)
        try:
            yield Opened(study, lambda: _database_turn(engine, name), True)
        finally:
            storage.remove_session()
            storage.engine.dispose()
    finally:
        engine.dispose()


@contextmanager
def _database_turn(engine: Engine, name: str) -> Iterator[None]:
    """A lock of the connection, which goes with it."""
    key = int.from_bytes(hashlib.sha256(f"graft study {name}".encode()).digest()[:8], signed=True)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})


def _url(given: str) -> URL:
    """Raises InvalidError."""
    advice = "give a file, or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        url = make_url(given)
    except ArgumentError as error:
        raise InvalidError(f"--storage is no URL that can be read: {advice}") from error
    if url.get_backend_name() not in {"sqlite", "postgresql"}:
        raise InvalidError(f"--storage {url.render_as_string()!r}: studies lie in SQLite or PostgreSQL; {advice}")
    if url.get_backend_name() == "sqlite" and not url.database:
        raise InvalidError(f"--storage {given!r} names no file; {advice}")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _file(path: Path, name: str) -> Path:
    return path if path.suffix in FILES or path.is_file() else path / f"{name}.study"


def _connect(file: Path) -> sqlite3.Connection:
    """What a trial says is not waited for on its way to the disk: a kill loses nothing, a power cut maybe the last trials."""
    connection = sqlite3.connect(file, timeout=30, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection
