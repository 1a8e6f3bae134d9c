"""What the processes of a job take, seen from outside: processor time and memory, by the part that each plays.

`owner` is the process that owns the index, `child` the one that embeds, `parser` the one that reads files.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

EVERY = 0.2  # seconds between two looks


class Memory(NamedTuple):
    """MiB resident: `own`, and `mapped`: pages of files, which the system may take back."""

    own: float
    mapped: float


class Use(NamedTuple):
    """Of one part: seconds of processor time, and the most memory that was seen."""

    cpu_seconds: float
    peak: Memory


class Watch:
    """Looks at `pid` and all below it, until it ends."""

    def __init__(self, pid: int) -> None:
        self._owner = psutil.Process(pid)
        self._cpu: dict[tuple[str, int], float] = {}
        self._own: defaultdict[str, float] = defaultdict(float)
        self._mapped: defaultdict[str, float] = defaultdict(float)

    def used(self) -> dict[str, Use]:
        parts = {part for part, _ in self._cpu}
        return {
            part: Use(
                sum(seconds for (of, _), seconds in self._cpu.items() if of == part),
                Memory(self._own[part], self._mapped[part]),
            )
            for part in sorted(parts)
        }

    def look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            now: defaultdict[str, list[Memory]] = defaultdict(list)
            for process in (self._owner, *self._owner.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
                    part = self._part(process)
                    times = process.cpu_times()
                    now[part].append(memory(process.pid))
                    self._cpu[part, process.pid] = times.user + times.system
            for part, seen in now.items():
                self._own[part] = max(self._own[part], sum(one.own for one in seen))
                self._mapped[part] = max(self._mapped[part], sum(one.mapped for one in seen))

    def _part(self, process: psutil.Process) -> str:
        if process.pid == self._owner.pid:
            return "owner"
        return "child" if process.ppid() == self._owner.pid else "parser"


@contextmanager
def watching(pid: int) -> Iterator[Watch]:
    watch, over = Watch(pid), threading.Event()

    def keep_looking() -> None:
        while not over.wait(EVERY):
            watch.look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def memory(pid: int) -> Memory:
    """Raises OSError when the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    own, file, shared = (int(fields.get(key, "0").split()[0]) / 1024 for key in ("RssAnon", "RssFile", "RssShmem"))
    return Memory(own, file + shared)
