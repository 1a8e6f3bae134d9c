"""Where an ingest job's documents come from, beside a folder (`sync.Folder`): remote files, and LlamaIndex readers."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ingest import reader, remote
from ingest.reader import ReaderSpec
from ingest.sync import Walk


class Remote(NamedTuple):
    """An object store's prefix, or one file of the web; below one of `prefixes`."""

    url: str
    prefixes: tuple[str, ...]
    root: Path = Path("/nonexistent")  # no local file is read

    def uris(self) -> list[str]:
        return [remote.uri_of(self.url)]

    def walk(self, tick: Callable[[], None]) -> Walk:
        return remote.walk(self.url, self.prefixes)

    def is_empty(self) -> bool:
        return True


class Reader(NamedTuple):
    """All documents of a LlamaIndex reader, written into the folder `root` first."""

    spec: ReaderSpec
    root: Path
    cancelled: Callable[[], bool]
    seconds: float

    def uris(self) -> list[str]:
        return [reader.uri_of(self.spec)]

    def walk(self, tick: Callable[[], None]) -> Walk:
        return reader.spool(self.spec, self.root, cancelled=self.cancelled, seconds=self.seconds)

    def is_empty(self) -> bool:
        return True
