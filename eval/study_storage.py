"""Where a study lies: in memory, in a SQLite file, or in a PostgreSQL database, which several machines can share.

Who takes the next trial is settled in turns: a lock beside the file, or one of the database. A trial says whose it is; one whose
process has died is taken over.
"""

import hashlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, Engine, QueuePool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ingest.errors import InvalidError, LockedError, UnavailableError

if TYPE_CHECKING:
    import optuna

FILES = {".study", ".db", ".sqlite", ".sqlite3"}
TURN_SECONDS = 60.0  # until a turn that does not come is told
HELD_SECONDS = 300.0  # that a turn may take: one of a machine that is gone ends after these
BEAT_SECONDS, GRACE_SECONDS = 15.0, 120.0  # between two signs of life that are seen elsewhere; without one
OWNER, BEAT = "worker", "beat"  # of a trial's attributes
SECRET = {"password", "passfile", "sslpassword", "sslkey"}  # of a URL's parameters
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Opened(NamedTuple):
    """`turn`: in it one process chooses a trial, and no other. `clock`: the time that all workers go by."""

    study: "optuna.Study"
    turn: Callable[[], AbstractContextManager[Any]]
    clock: Callable[[], float]


def storage_of(given: str) -> Path | str:
    """-> a URL as it is, anything else as a file's or folder's path. Raises InvalidError."""
    if not _URL.match(given):
        return Path(given)
    _url(given)
    return given


def said(storage: Path | str | None, name: str) -> str:
    """-> where that is, without a password."""
    if isinstance(storage, Path):
        return str(_file(storage, name))
    return _shown(make_url(storage)) if storage else "memory"


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
            yield Opened(make(None), nullcontext, time.time)
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
        why = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(f"study {name!r} in {said(storage, name)!r} cannot be read or written: {why}") from error


def own() -> dict[str, Any]:
    """-> what tells this process from all others, also on other machines and in other containers."""
    where = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return {"where": " ".join(where), "pid": os.getpid(), "started": _started(os.getpid())}


def lives(attributes: Mapping[str, Any], now: float) -> bool:
    """Whether the owner of a trial with these attributes is still at it."""
    owner = attributes.get(OWNER)
    if owner is None:
        return False
    if owner["where"] == own()["where"]:
        return owner["started"] is not None and _started(owner["pid"]) == owner["started"]
    return now - float(attributes.get(BEAT, 0.0)) < GRACE_SECONDS


@contextmanager
def held(trial: "optuna.Trial", clock: Callable[[], float]) -> Iterator[None]:
    """For the time that a trial takes: other machines, and other containers of this one, see it live."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(Exception):  # a database that is away for a moment
                trial.set_user_attr(BEAT, clock())
        with suppress(Exception):
            trial.storage.remove_session()  # this thread's connection

    thread = threading.Thread(target=beat, daemon=True, name="trial beat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _started(pid: int) -> int | None:
    """-> ticks since the machine's start, which no change of its clock moves; None for a process that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _made(name: str, minimize: bool) -> Callable[[Any], "optuna.Study"]:
    def make(storage: Any) -> "optuna.Study":
        import optuna

        direction = optuna.study.StudyDirection.MINIMIZE if minimize else optuna.study.StudyDirection.MAXIMIZE
        return optuna.create_study(direction=direction, study_name=name, storage=storage, load_if_exists=True)

    return make


@contextmanager
def _in_file(file: Path, name: str, make: Callable[[Any], "optuna.Study"], shared: bool) -> Iterator[Opened]:
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidError(f"the study {str(file)!r} cannot be made: {error.strerror}; name another place") from error

    @contextmanager
    def turn(seconds: float | None = None) -> Iterator[None]:
        lock = FileLock(f"{file}.lock")
        try:
            lock.acquire(timeout=TURN_SECONDS if seconds is None else seconds)
        except Timeout as error:
            raise LockedError(f"another process is at study {name!r}; wait for it, or choose another name") from error
        except OSError as error:
            raise InvalidError(
                f"the study {str(file)!r} cannot be written: {error.strerror}; name another place"
            ) from error
        try:
            yield
        finally:
            lock.release()

    with nullcontext() if shared else turn(0):
        with turn() if shared else nullcontext():
            storage = _storage("sqlite://", {"creator": lambda: _connect(file), "poolclass": QueuePool}, str(file))
            study = make(storage)
        try:
            yield Opened(study, turn if shared else nullcontext, time.time)
        finally:
            storage.remove_session()
            storage.engine.dispose()


@contextmanager
def _in_database(url: URL, name: str, make: Callable[[Any], "optuna.Study"]) -> Iterator[Opened]:
    how = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
    engine = create_engine(url, **how)
    try:
        with _database_turn(engine, ""):  # of all studies: tables are made once
            storage = _storage(url.render_as_string(hide_password=False), how, _shown(url))
            study = make(storage)
        ahead = _time(engine) - time.time()
        try:
            yield Opened(study, lambda: _database_turn(engine, name), lambda: time.time() + ahead)
        finally:
            storage.remove_session()
            storage.engine.dispose()
    finally:
        engine.dispose()


@contextmanager
def _database_turn(engine: Engine, name: str) -> Iterator[None]:
    """A lock of a transaction, which goes with it: also where a pool of connections stands before the database."""
    key = int.from_bytes(hashlib.sha256(f"graft study {name}".encode()).digest()[:8], signed=True)
    limits = {"lock_timeout": TURN_SECONDS, "idle_in_transaction_session_timeout": HELD_SECONDS}
    with engine.begin() as connection:
        for setting, seconds in limits.items():
            connection.execute(
                text("SELECT set_config(:setting, :value, true)"),
                {"setting": setting, "value": f"{1000 * seconds:.0f}"},
            )
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


def _time(engine: Engine) -> float:
    """The database's, since clocks of machines differ."""
    with engine.connect() as connection:
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def _storage(url: str, how: dict[str, Any], shown: str) -> "optuna.storages.RDBStorage":
    """Raises InvalidError where another version of Optuna has made the tables."""
    import optuna

    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=how)
    except RuntimeError as error:
        raise InvalidError(
            f"the studies in {shown!r} are of another version of Optuna: choose another place, or bring them up to date with "
            "`optuna storage upgrade`"
        ) from error


def _url(given: str) -> URL:
    """Raises InvalidError."""
    advice = "give a file, or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):  # whose text may have the password
        raise InvalidError(f"--storage is no URL that can be read: {advice}") from None
    if url.get_backend_name() not in {"sqlite", "postgresql"}:
        raise InvalidError(f"--storage {_shown(url)!r}: studies lie in SQLite or PostgreSQL; {advice}")
    if url.get_backend_name() == "sqlite" and not url.database:
        raise InvalidError(f"--storage {_shown(url)!r} names no file; {advice}")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _shown(url: URL) -> str:
    """Without passwords, wherever they stand."""
    return url.difference_update_query(SECRET).render_as_string()


def _file(path: Path, name: str) -> Path:
    return path if path.suffix in FILES or path.is_file() else path / f"{name}.study"


def _connect(file: Path) -> sqlite3.Connection:
    """What a trial says is not waited for on its way to the disk: a kill loses nothing, a power cut maybe the last trials."""
    connection = sqlite3.connect(file, timeout=30, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection
