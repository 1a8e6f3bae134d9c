"""One process owns a `GRAFT_HOME`: its index, its jobs, its engine. `owner.json` says which, and on which port."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import ValidationError

from ingest.errors import LockedError, SettingsError
from ingest.files import write_whole
from ingest.schemas import Frozen


class ProcessMark(Frozen):
    """A process, told from a later one of the same id by its start (seconds since the epoch)."""

    pid: int
    started: float

    def process(self) -> psutil.Process | None:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


class Owner(ProcessMark):
    url: str


def mark(pid: int) -> ProcessMark:
    return ProcessMark(pid=pid, started=psutil.Process(pid).create_time())


@contextmanager
def own(home: Path, url: str) -> Iterator[None]:
    """Holds the home. Raises LockedError, naming the process that has it; SettingsError when it cannot be written."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / "owner.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        held = _read(home / "owner.json")
        who = f"process {held.pid} at {held.url}" if held else "another process"
        raise LockedError(
            f"{str(home)!r} belongs to {who}; use that one, end it, or set GRAFT_HOME to another folder"
        ) from error
    except OSError as error:
        raise SettingsError(f"GRAFT_HOME {str(home)!r} cannot be written: {error.strerror}") from error
    try:
        me = mark(os.getpid())
        write_whole(home / "owner.json", Owner(pid=me.pid, started=me.started, url=url).model_dump_json())
        yield
    finally:
        (home / "owner.json").unlink(missing_ok=True)
        lock.release()


def find_owner(home: Path) -> Owner | None:
    """-> the living owner of a home, if there is one."""
    held = _read(home / "owner.json")
    return held if held and held.process() else None


def remember_engine(home: Path, pid: int) -> None:
    write_whole(home / "engine.json", mark(pid).model_dump_json())


def end_leftover_engine(home: Path) -> bool:
    """Ends the engine that a killed owner left behind, and nothing else. -> whether there was one."""
    file = home / "engine.json"
    try:
        held = ProcessMark.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return False
    ended = end_group(held)
    file.unlink(missing_ok=True)
    return ended


def end_group(held: ProcessMark, seconds: float = 10) -> bool:
    """Ends a process that leads a group, with the whole group: SIGTERM, and SIGKILL for what is left."""
    process = held.process()
    if process is None:
        return False
    with suppress(ProcessLookupError):
        os.killpg(held.pid, signal.SIGTERM)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(ChildProcessError):
                os.waitpid(held.pid, os.WNOHANG)
            os.killpg(held.pid, 0)
            time.sleep(0.1)
        os.killpg(held.pid, signal.SIGKILL)
    return True


def _read(file: Path) -> Owner | None:
    try:
        return Owner.model_validate_json(file.read_text())
    except (OSError, ValidationError, json.JSONDecodeError):
        return None
