"""What the tree of one outermost archive has given so far, against its limits; its members' files while they are written.

Knows no format. Nothing that an archive declares is believed: what comes out is counted while it is written.
"""

import contextlib
import errno
import hashlib
import re
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ingest.errors import DocumentError

RATIO_FREE = 10 * 2**20  # bytes that are never refused for their ratio: a log can shrink to a thousandth
LONGEST_NAME = 4096  # as on Linux
NO_FILES = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


class ArchiveLimits(NamedTuple):
    """`depth`: archives in a chain, the outermost included; 0: none is opened. `ratio`: unpacked / packed."""

    depth: int
    files: int
    total_bytes: int
    ratio: int
    file_bytes: int


class Member(NamedTuple):
    name: str  # inside the archive, "/" between folders; of an archive in the archive: "inner.zip/doc.md"
    place: str  # absolute path of the unpacked file
    size: int  # bytes
    digest: str  # sha256 (hex)


class Left(NamedTuple):
    """A member that was not unpacked."""

    reason: str
    failed: bool


Outcome = Member | Left
Found = dict[str, Outcome]  # by name, in the order of the archive


class ArchiveLimitError(DocumentError):
    """The outermost archive goes no further: over a limit, or its files cannot be written."""


class MemberError(Exception):
    """One member cannot be unpacked; the message is the reason."""


class LockedMemberError(MemberError):
    """It is encrypted."""


class Mark(NamedTuple):
    entries: int
    written: int
    streamed: int
    numbers: int


class Tree:
    """Counts, over all archives in one outermost archive of `packed` bytes. Raises ArchiveLimitError when it is too much."""

    def __init__(self, into: Path, limits: ArchiveLimits, packed: int) -> None:
        self.into, self.limits, self.packed = into, limits, packed
        self.entries = 0
        self.written = 0  # bytes of files
        self.streamed = 0  # bytes that were decompressed in passing: a tar's own, what is left out of a 7z
        self.numbers = 0  # of files ever begun

    def enter(self) -> None:
        self.entries += 1
        if self.entries > self.limits.files:
            raise ArchiveLimitError("read", f"it holds more files than INGEST_ARCHIVE_FILES ({self.limits.files:,})")

    def add(self, written: int = 0, streamed: int = 0) -> None:
        self.written += written
        self.streamed += streamed
        size = max(self.written, self.streamed)
        if size > self.limits.total_bytes:
            raise self.too_big()
        if size > max(RATIO_FREE, self.packed * self.limits.ratio):
            said = f"it unpacks to over {self.limits.ratio:,} times its size (INGEST_ARCHIVE_RATIO): a bomb?"
            raise ArchiveLimitError("read", said)

    def too_big(self) -> ArchiveLimitError:
        megabytes = self.limits.total_bytes // 2**20
        return ArchiveLimitError("read", f"it unpacks to more than INGEST_ARCHIVE_MB ({megabytes:,} MiB)")

    def mark(self) -> Mark:
        return Mark(self.entries, self.written, self.streamed, self.numbers)

    def remove(self, since: Mark) -> None:
        """The files begun since then. Their numbers are not given again, and what they counted stays counted."""
        for number in range(since.numbers + 1, self.numbers + 1):
            self.place(number).unlink(missing_ok=True)

    def rewind(self, to: Mark) -> None:
        """As if nothing had been unpacked since then."""
        self.remove(to)
        self.entries, self.written, self.streamed = to.entries, to.written, to.streamed

    def place(self, number: int) -> Path:
        return self.into / f"{number:07d}"


class Copy:
    """One member's file while it is written. Raises ArchiveLimitError, and MemberError for a file that is too long."""

    def __init__(self, tree: Tree) -> None:
        tree.numbers += 1
        self._tree, self._place = tree, tree.place(tree.numbers)
        self.size, self.crc, self._digest = 0, 0, hashlib.sha256()
        try:
            self._file = open(self._place, "xb")  # noqa: SIM115 - open for as long as this copy is
        except OSError as error:
            raise _unwritable(error) from error

    def write(self, block: bytes | bytearray) -> None:
        self._tree.add(written=len(block))
        self.size += len(block)
        if self.size > self._tree.limits.file_bytes:
            raise MemberError(too_long(self._tree.limits))
        try:
            self._file.write(block)
        except OSError as error:
            raise _unwritable(error) from error
        self.crc = zlib.crc32(block, self.crc)
        self._digest.update(block)

    def finish(self) -> Member:
        try:
            self._file.close()
        except OSError as error:
            raise _unwritable(error) from error
        return Member("", str(self._place), self.size, self._digest.hexdigest())

    def drop(self) -> None:
        with contextlib.suppress(OSError):  # what it still held found no room either
            self._file.close()
        self._place.unlink(missing_ok=True)


def refusal(name: str, kind: str, size: int, limits: ArchiveLimits) -> Left | None:
    """Why a member is not unpacked, if so. `kind`: "" for a file, "a symbolic link", ...; `size`: as declared."""
    parts = name.split("/")
    if not name:
        return Left("it has no name", True)
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        return Left("its name is an absolute path; it was not unpacked", True)
    if ".." in parts:
        return Left('its name leads out of the archive (".."); it was not unpacked', True)
    if "__MACOSX" in parts:
        return Left("what macOS keeps beside a file", False)
    if any(part.startswith(".") for part in parts):
        return Left("hidden: a part of its name starts with a dot", False)
    if kind:
        return Left(f"{kind}; only files are unpacked", False)
    return Left(too_long(limits), True) if size > limits.file_bytes else None


def plain(name: str) -> str:
    """Without the parts that say nothing ("./a//b" -> "a/b"), and not too long to be shown."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    name = ("/" if name.startswith("/") else "") + "/".join(parts)
    return name if len(name) <= LONGEST_NAME else f"{name[:100]}…{name[101 - LONGEST_NAME :]}"


def settle(found: Found, name: str, outcome: Outcome) -> None:
    """The last of one name counts."""
    earlier = found.pop(name, None)
    if isinstance(earlier, Member):
        Path(earlier.place).unlink()
    found[name] = outcome


def too_long(limits: ArchiveLimits) -> str:
    return f"it is over INGEST_MAX_FILE_MB ({limits.file_bytes // 2**20:,} MiB)"


def locked(passwords: Sequence[str]) -> str:
    tried = f"none of the {len(passwords)} in INGEST_PASSWORDS fits" if passwords else "set INGEST_PASSWORDS"
    return f"it is encrypted with a password: {tried}"


def _unwritable(error: OSError) -> ArchiveLimitError:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return ArchiveLimitError("read", "the disk is full" if full else f"it cannot be unpacked: {error.strerror}")
