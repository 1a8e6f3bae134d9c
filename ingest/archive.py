"""An archive's files, and those of the archives in it, unpacked within limits.

Names inside only label: files are written under numbers of our own. Meant for a child with limits on time and memory.

Of several members with one name the last counts, as in an archive that was updated. Names that differ only in bytes that
are no UTF-8 are numbered ("a~2.md").
"""

import posixpath
from collections.abc import Container, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, cast

from ingest.archive_formats import unpack
from ingest.archive_tree import ArchiveLimitError, ArchiveLimits, Found, Left, Member, Tree
from ingest.errors import DocumentError
from ingest.settings import IngestSettings

__all__ = ["ArchiveLimitError", "ArchiveLimits", "Expanded", "Member", "expand", "is_archive", "limits"]

SUFFIXES = (
    ".zip", ".7z", ".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst",
)  # fmt: skip


class Expanded(NamedTuple):
    """`skips` and `failures`: (name, reason). Every name that is no folder is in one of the three, once."""

    members: list[Member]
    skips: list[tuple[str, str]]
    failures: list[tuple[str, str]]


def limits(settings: IngestSettings) -> ArchiveLimits:
    return ArchiveLimits(
        depth=settings.archive_depth,
        files=settings.archive_files,
        total_bytes=settings.archive_mb * 2**20,
        ratio=settings.archive_ratio,
        file_bytes=settings.max_file_mb * 2**20,
    )


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def expand(place: str, into: Path, limits: ArchiveLimits, passwords: Sequence[str] = ()) -> Expanded:
    """Unpacks `place` into the empty folder `into`, which is made if need be.

    Raises DocumentError, and leaves nothing in `into`, when the archive as a whole cannot be unpacked or is over a limit.
    MemoryError passes: what filled the memory is still held then.
    """
    if limits.depth < 1:
        raise DocumentError("read", "archives are not opened (INGEST_ARCHIVE_DEPTH is 0)")
    try:
        into.mkdir(parents=True, exist_ok=True)
        packed = Path(place).stat().st_size
    except OSError as error:
        raise DocumentError("read", error.strerror or type(error).__name__) from error
    tree = Tree(into.absolute(), limits, packed)
    found = _expanded(place, 1, tree, passwords)
    members = [one._replace(name=name) for name, one in found.items() if isinstance(one, Member)]
    left = [(name, one) for name, one in found.items() if isinstance(one, Left)]
    return Expanded(
        members,
        [(name, one.reason) for name, one in left if not one.failed],
        [(name, one.reason) for name, one in left if one.failed],
    )


def _expanded(place: str, depth: int, tree: Tree, passwords: Sequence[str]) -> Found:
    """The archive at `place` and, down to the limit, the archives in it."""
    mark = tree.mark()
    try:
        found = _numbered(unpack(place, tree, passwords))
        for name in [name for name, one in found.items() if isinstance(one, Member) and is_archive(name)]:
            inner = cast(Member, found.pop(name))
            _open_inner(name, inner, depth + 1, found, tree, passwords)
    except BaseException:
        tree.remove(mark)
        raise
    return found


def _open_inner(name: str, inner: Member, depth: int, found: Found, tree: Tree, passwords: Sequence[str]) -> None:
    """Puts into `found` what is in the archive `name`, or why it was not opened."""
    try:
        if depth > tree.limits.depth:
            found[name] = Left(f"an archive {depth} deep: over INGEST_ARCHIVE_DEPTH ({tree.limits.depth})", True)
            return
        for inside, one in _expanded(inner.place, depth, tree, passwords).items():
            found[_free(f"{name}/{inside}", found)] = one
    except ArchiveLimitError:
        raise
    except DocumentError as error:
        found[name] = Left(error.reason, True)
    finally:
        Path(inner.place).unlink()


def _numbered(found: Found) -> Found:
    """By names to be shown, no two the same."""
    shown: Found = {}
    for name, one in found.items():
        readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\0", "\ufffd")
        shown[_free(readable, shown)] = one
    return shown


def _free(name: str, taken: Container[str]) -> str:
    if name not in taken:
        return name
    root, suffix = posixpath.splitext(name)
    return next(other for n in count(2) if (other := f"{root}~{n}{suffix}") not in taken)
