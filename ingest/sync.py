"""A folder against the catalog: which files are new, changed, moved, gone or as they were. Reads no more than it must.

A file is unchanged when size and modification time are; else its content hash decides. A file gone from one name whose
bytes appear under a new one has moved. Symbolic links are never followed.
"""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

from sqlalchemy import RowMapping

from ingest.errors import DocumentError
from ingest.schemas import Failure, Skip


class File(NamedTuple):
    """`place` is its absolute path, `path` what users see: the path below the allowed root."""

    uri: str
    place: str
    path: str
    size: int  # bytes
    mtime_ns: int


class Walk(NamedTuple):
    files: list[File]
    skips: list[Skip]
    failures: list[Failure]


class Plan(NamedTuple):
    unchanged: int
    skipped: list[tuple[File, RowMapping]]  # of a kind that no text is read from, and as they were
    touched: list[tuple[File, RowMapping]]  # rewritten with the same bytes
    relabelled: list[tuple[File, RowMapping]]  # same bytes; another path, access list or metadata
    moved: list[tuple[File, RowMapping]]
    gone: list[RowMapping]
    work: list[tuple[File, RowMapping | None]]  # to be read: with the row of an earlier version, if any


def uri_of(place: str) -> str:
    return "file://" + quote_from_bytes(os.fsencode(place))


def walk(target: Path, root: Path) -> Walk:
    """All regular files at or below `target`; hidden names are skipped. Raises OSError when `target` cannot be listed."""
    found = Walk([], [], [])
    prefix = len(str(root).rstrip("/")) + 1
    if not target.is_dir():
        status = target.lstat()
        found.files.append(_file(str(target), prefix, status))
        return found
    folders = [str(target)]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == str(target):
                raise
            found.failures.append(Failure(path=_shown(folder, prefix), stage="read", reason=_said(error)))
            continue
        for entry in entries:
            _sort_in(entry, found, folders, prefix, target)
    return found


def _sort_in(entry: os.DirEntry[str], found: Walk, folders: list[str], prefix: int, target: Path) -> None:
    shown = _shown(entry.path, prefix)
    try:
        if entry.is_symlink():
            inside = (os.path.realpath(entry.path) + "/").startswith(str(target).rstrip("/") + "/")
            if inside:
                found.skips.append(Skip(path=shown, reason="a symbolic link; its target is read where it lies"))
            else:
                reason = "a symbolic link that leaves the folder; it was not followed"
                found.failures.append(Failure(path=shown, stage="read", reason=reason))
        elif entry.name.startswith("."):
            if not entry.is_dir():
                found.skips.append(Skip(path=shown, reason="hidden: its name starts with a dot"))
        elif entry.is_dir():
            folders.append(entry.path)
        elif entry.is_file():
            found.files.append(_file(entry.path, prefix, entry.stat(follow_symlinks=False)))
        else:
            found.skips.append(Skip(path=shown, reason="not a regular file"))
    except OSError as error:
        found.failures.append(Failure(path=shown, stage="read", reason=_said(error)))


def compare(
    files: Sequence[File],
    stamps: Mapping[str, RowMapping],
    acl: Sequence[str] | None,
    metadata: Mapping[str, Any] | None,
) -> Plan:
    """`acl` and `metadata`: what this job sets on its documents; None leaves them as they are."""
    plan = Plan(0, [], [], [], [], [], [])
    present = {file.uri for file in files}
    gone = {uri: row for uri, row in stamps.items() if uri not in present}
    by_size: dict[int, list[RowMapping]] = {}
    for lost in gone.values():
        if lost["state"] == "done":
            by_size.setdefault(lost["size"], []).append(lost)
    unchanged = 0
    for file in files:
        row = stamps.get(file.uri)
        if row is None:
            source = _moved_from(file, by_size.get(file.size, []))
            if source is None:
                plan.work.append((file, None))
            else:
                by_size[file.size].remove(source)
                del gone[source["uri"]]
                plan.moved.append((file, source))
            continue
        same_stamp = row["size"] == file.size and row["mtime_ns"] == file.mtime_ns
        if row["state"] == "skipped" and same_stamp:
            plan.skipped.append((file, row))
        elif row["state"] != "done" or not (same_stamp or _hash(file) == row["content_hash"]):
            plan.work.append((file, row))
        elif _relabelled(file, row, acl, metadata):
            plan.relabelled.append((file, row))
        else:
            unchanged += 1
            if not same_stamp:
                plan.touched.append((file, row))
    plan.gone.extend(gone.values())
    return plan._replace(unchanged=unchanged)


def read(place: str, root: str, max_bytes: int) -> bytes:
    """The bytes of a regular file below `root`; nothing is read of anything else. Raises DocumentError."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DocumentError("read", _said(error)) from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        real = os.path.realpath(f"/proc/self/fd/{descriptor}")
        if not stat.S_ISREG(status.st_mode):
            raise DocumentError("read", "not a regular file")
        if not real.startswith(root.rstrip("/") + "/"):
            raise DocumentError("read", "it lies outside the allowed folder; it was not read")
        if status.st_size > max_bytes:
            megabytes = max_bytes // 2**20
            raise DocumentError("read", f"it has {status.st_size:,} bytes, over INGEST_MAX_FILE_MB ({megabytes} MiB)")
        try:
            return file.read(status.st_size)  # read(max_bytes) would take that much memory for every file
        except OSError as error:
            raise DocumentError("read", _said(error)) from error


def _moved_from(file: File, candidates: Sequence[RowMapping]) -> RowMapping | None:
    if not candidates or file.size == 0:
        return None
    digest = _hash(file)
    return next((row for row in candidates if row["content_hash"] == digest), None)


def _relabelled(file: File, row: RowMapping, acl: Sequence[str] | None, metadata: Mapping[str, Any] | None) -> bool:
    if file.path != row["path"] or (acl is not None and sorted(acl) != sorted(row["acl"])):
        return True
    return metadata is not None and any(row["metadata"].get(key) != value for key, value in metadata.items())


def _hash(file: File) -> str | None:
    """sha256 (hex); None when the file cannot be read now, which its reading will report."""
    try:
        descriptor = os.open(file.place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def _file(place: str, prefix: int, status: os.stat_result) -> File:
    return File(uri_of(place), place, _shown(place, prefix), status.st_size, status.st_mtime_ns)


def _shown(place: str, prefix: int) -> str:
    """Names that are not UTF-8 are shown with replacement marks; the URI keeps their bytes."""
    return os.fsencode(place[prefix:]).decode("utf-8", "replace")


def _said(error: OSError) -> str:
    return error.strerror or type(error).__name__
