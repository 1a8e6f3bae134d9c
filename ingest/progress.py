"""How far a job is, how fast, and how long it will still take."""

import time
from collections import deque

from ingest.schemas import Progress

WINDOW = 30.0  # seconds that a rate is taken over
SETTLED = 3.0  # seconds before a rate is told


class Meter:
    """Counts what a job has done of `files_total` files, `bytes_total` bytes of which are read."""

    def __init__(self) -> None:
        self.files_total: int | None = None
        self.bytes_total = 0
        self.bytes = 0
        self.started: float | None = None  # of the reading
        self._chunks: deque[tuple[float, int]] = deque()

    def begin(self, bytes_total: int) -> None:
        self.bytes_total = bytes_total
        self.started = time.monotonic()

    def progress(self, files: int, pages: int, chunks: int, current: str | None) -> Progress:
        return Progress(
            files_total=self.files_total,
            files=files,
            bytes_total=self.bytes_total if self.started else None,
            bytes=self.bytes,
            pages=pages,
            chunks=chunks,
            chunks_per_second=self._rate(chunks),
            seconds_left=self._left(),
            current=current,
        )

    def _rate(self, chunks: int) -> float | None:
        now = time.monotonic()
        if not self._chunks or now - self._chunks[-1][0] > 0.5:
            self._chunks.append((now, chunks))
        while len(self._chunks) > 1 and now - self._chunks[0][0] > WINDOW:
            self._chunks.popleft()
        since, before = self._chunks[0]
        return round((chunks - before) / (now - since), 1) if now - since > SETTLED else None

    def _left(self) -> float | None:
        if self.started is None:
            return None
        spent = time.monotonic() - self.started
        if self.bytes >= self.bytes_total:
            return 0.0
        if not self.bytes or spent < SETTLED:
            return None
        return round(spent / self.bytes * (self.bytes_total - self.bytes), 1)
