"""A folder against the catalog: which files are new, changed, moved, gone or as they were. Reads no more than it must.

A file is unchanged when size and modification time are; else its content hash decides. A file gone from one name whose
bytes appear under a new one has moved. Symbolic links are never followed. `NAME.graft.json` beside a file NAME is its
sidecar: its labels (`acl`, `metadata`), never a document.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote_from_bytes

from pydantic import ValidationError
from sqlalchemy import RowMapping

from ingest.catalog import is_below
from ingest.errors import DocumentError
from ingest.schemas import Failure, Labels, Skip

SIDECAR = ".graft.json"
HASH_BYTES = 8 * 2**20
REMOVED = "it was deleted by its id and is kept out; `--restore` brings it back"


class File(NamedTuple):
    """`place` is where it is read from: an absolute path or a URL; `path` what users see: the path below the allowed root.

    `stamp` changes when the content does: nanoseconds of modification, or a hash of what a store calls its version.
    """

    uri: str
    place: str
    path: str
    size: int  # bytes
    stamp: int
    sidecar: Labels | None = None


class Walk(NamedTuple):
    """`unseen`: URIs of files that could not be taken in, and of folders ("/" at the end) that could not be listed: no part
    of that file, and nothing in that folder, counts as gone.
    """

    files: list[File]
    skips: list[Skip]
    failures: list[Failure]
    unseen: list[str]


class Plan(NamedTuple):
    unchanged: int
    skipped: list[tuple[File, RowMapping]]  # of a kind that no text is read from or kept out, and as they were
    touched: list[tuple[File, RowMapping]]  # rewritten with the same bytes
    relabelled: list[tuple[File, RowMapping]]  # same bytes; another path, access list or metadata
    moved: list[tuple[File, RowMapping]]
    gone: list[RowMapping]
    work: list[tuple[File, RowMapping | None]]  # to be read: with the row of an earlier version, if any


class Labelling(NamedTuple):
    """What a job sets on its documents; None leaves them as they are."""

    acl: Sequence[str] | None = None
    metadata: Mapping[str, Any] | None = None


NO_LABELS = Labelling()


class Folder(NamedTuple):
    """A folder (or one file) `target` below the allowed `root`; with `only`, no more than these of its files and folders."""

    target: Path
    root: Path
    only: tuple[Path, ...] = ()

    def uris(self) -> list[str]:
        """At or below which its documents are."""
        return [uri_of(str(_described(path))) for path in self.only or (self.target,)]

    def walk(self, tick: Callable[[], None] = lambda: None) -> Walk:
        """Raises OSError when `target` cannot be listed."""
        if not self.only:
            return walk(self.target, self.root, tick)
        os.stat(self.target)
        found = Walk([], [], [], [])
        paths = dict.fromkeys(map(_described, self.only))
        for path in paths:
            hidden = any(part.startswith(".") for part in path.relative_to(self.target).parts)
            if hidden or path.is_symlink() or any(above in paths for above in path.parents):
                continue
            try:
                more = walk(path, self.root, tick)
            except FileNotFoundError:  # it is gone, maybe since it was looked for
                continue
            found.files.extend(more.files)
            found.skips.extend(more.skips)
            found.failures.extend(more.failures)
            found.unseen.extend(more.unseen)
        return found

    def is_empty(self) -> bool:
        """Whether nothing at all is where the files were: an unmounted disk rather than one file that was deleted."""
        return not self.only or not any(os.scandir(self.target))


def uri_of(place: str) -> str:
    return "file://" + quote_from_bytes(os.fsencode(place))


def walk(target: Path, root: Path, tick: Callable[[], None] = lambda: None) -> Walk:
    """All regular files at or below `target`; hidden names are skipped. Raises OSError when `target` cannot be listed."""
    found = Walk([], [], [], [])
    prefix = len(str(root).rstrip("/")) + 1
    if not target.is_dir():
        status = target.lstat()
        beside = Path(f"{target}{SIDECAR}")
        if stat.S_ISREG(status.st_mode):
            _add(found, str(target), prefix, status, str(beside) if beside.is_file() else None)
        else:
            found.skips.append(Skip(path=_shown(str(target), prefix), reason="not a regular file"))
        return found
    folders = [str(target)]
    while folders:
        folder = folders.pop()
        tick()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == str(target):
                raise
            found.failures.append(Failure(path=_shown(folder, prefix), stage="read", reason=_said(error)))
            found.unseen.append(uri_of(folder) + "/")
            continue
        sidecars = {entry.name: entry.path for entry in entries if entry.name.endswith(SIDECAR)}
        names = {entry.name for entry in entries} if sidecars else set()
        for entry in entries:
            if entry.name not in sidecars:
                _sort_in(entry, found, folders, prefix, target, sidecars.get(entry.name + SIDECAR))
            elif entry.name.removesuffix(SIDECAR) not in names:
                reason = "a sidecar of a file that is not there"
                found.skips.append(Skip(path=_shown(entry.path, prefix), reason=reason))
    return found


def _sort_in(
    entry: os.DirEntry[str], found: Walk, folders: list[str], prefix: int, target: Path, sidecar: str | None
) -> None:
    try:
        if entry.is_symlink():
            shown = _shown(entry.path, prefix)
            inside = (os.path.realpath(entry.path) + "/").startswith(str(target).rstrip("/") + "/")
            if inside:
                found.skips.append(Skip(path=shown, reason="a symbolic link; its target is read where it lies"))
            else:
                reason = "a symbolic link that leaves the folder; it was not followed"
                found.failures.append(Failure(path=shown, stage="read", reason=reason))
        elif entry.name.startswith("."):
            if not entry.is_dir():
                shown = _shown(entry.path, prefix)
                found.skips.append(Skip(path=shown, reason="hidden: its name starts with a dot"))
        elif entry.is_dir():
            folders.append(entry.path)
        elif entry.is_file():
            _add(found, entry.path, prefix, entry.stat(follow_symlinks=False), sidecar)
        else:
            found.skips.append(Skip(path=_shown(entry.path, prefix), reason="not a regular file"))
    except OSError as error:
        found.failures.append(Failure(path=_shown(entry.path, prefix), stage="read", reason=_said(error)))
        found.unseen.extend([uri_of(entry.path), uri_of(entry.path) + "/"])


def _add(found: Walk, place: str, prefix: int, status: os.stat_result, sidecar: str | None) -> None:
    """A file whose sidecar cannot be understood is not taken in: it might be shown to those who may not see it."""
    uri, shown = uri_of(place), _shown(place, prefix)
    try:
        labels = None if sidecar is None else read_sidecar(sidecar, place[: prefix - 1], os.path.basename(sidecar))
    except DocumentError as error:
        found.failures.append(Failure(path=shown, stage="read", reason=error.reason))
        found.unseen.append(uri)
        return
    found.files.append(File(uri, place, shown, status.st_size, status.st_mtime_ns, labels))


def read_sidecar(place: str, root: str, name: str) -> Labels:
    """`name`: that it is known by. Raises DocumentError."""
    try:
        labels = Labels.model_validate_json(read(place, root, 2**20))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        said = f"its sidecar {name!r} does not fit: {where}: {first['msg']}"
        reason = f'{said}; write {{"acl": ["group"], "metadata": {{}}}}'
        raise DocumentError("read", reason) from error
    return labels if labels.acl is None else labels.model_copy(update={"acl": tuple(sorted(labels.acl))})


def _is_hidden(uri: str, unseen: str) -> bool:
    """A file hides its own parts alone: a folder that was at its place is gone."""
    return is_below(uri, unseen) and (unseen.endswith("/") or not uri.startswith(unseen + "/"))


def compare(
    files: Sequence[File],
    stamps: Mapping[str, RowMapping],
    labelling: Labelling = NO_LABELS,
    unseen: Sequence[str] = (),
    restore: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Plan:
    """`restore`: documents that were deleted by their ids come back. `tick` is called often while files are hashed."""
    plan = Plan(0, [], [], [], [], [], [])
    present = {file.uri for file in files}
    gone = {uri: row for uri, row in stamps.items() if uri not in present}
    if unseen:
        gone = {uri: row for uri, row in gone.items() if not any(_is_hidden(uri, one) for one in unseen)}
    by_size: dict[int, list[RowMapping]] = {}
    for lost in gone.values():
        if lost["state"] == "done":
            by_size.setdefault(lost["size"], []).append(lost)
    unchanged = 0
    for file in files:
        row = stamps.get(file.uri)
        if row is None:
            source = _moved_from(file, by_size.get(file.size, []), tick)
            if source is None:
                plan.work.append((file, None))
            else:
                by_size[file.size].remove(source)
                del gone[source["uri"]]
                plan.moved.append((file, source))
            continue
        same_stamp = row["size"] == file.size and row["stamp"] == file.stamp
        state = row["state"]
        if (state == "skipped" and same_stamp) or (state == "removed" and not restore):
            plan.skipped.append((file, row))
            continue
        same = same_stamp or (row["size"] == file.size and _hash(file, tick) == row["content_hash"])
        if state != "done" or not same:
            plan.work.append((file, row))
        elif relabelled(file, row, labelling):
            plan.relabelled.append((file, row))
        else:
            unchanged += 1
            if not same_stamp:
                plan.touched.append((file, row))
    plan.gone.extend(gone.values())
    return plan._replace(unchanged=unchanged)


def read(place: str, root: str, max_bytes: int) -> bytes:
    """The bytes of a regular file below `root`; nothing is read of anything else. Raises DocumentError."""
    with opened(place, root, max_bytes, "INGEST_MAX_FILE_MB") as file:
        try:
            return file.read(
                os.fstat(file.fileno()).st_size
            )  # read(max_bytes) would take that much memory for every file
        except OSError as error:
            raise DocumentError("read", _said(error)) from error


@contextmanager
def opened(place: str, root: str, max_bytes: int, limit: str) -> Iterator[BinaryIO]:
    """A regular file below `root`, open for reading. `limit`: the setting of `max_bytes`. Raises DocumentError."""
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
            raise DocumentError("read", f"it has {status.st_size:,} bytes, over {limit} ({max_bytes // 2**20} MiB)")
        yield file


def _moved_from(file: File, candidates: Sequence[RowMapping], tick: Callable[[], None]) -> RowMapping | None:
    """Under another suffix a file may be read as something else, and is another document."""
    alike = [row for row in candidates if PurePath(row["path"]).suffix == PurePath(file.path).suffix]
    if not alike or file.size == 0:
        return None
    digest = _hash(file, tick)
    return next((row for row in alike if row["content_hash"] == digest), None)


def relabelled(file: File, row: RowMapping, labelling: Labelling) -> bool:
    """Whether its path, access list or metadata is another than its row says."""
    sidecar = None if file.sidecar is None else file.sidecar.model_dump(mode="json")
    if file.path != row["path"] or sidecar != row["sidecar"]:
        return True
    acl, metadata = labelling
    if acl is not None and (row["given_acl"] is None or sorted(acl) != sorted(row["given_acl"])):
        return True
    return metadata is not None and any(row["metadata"].get(key) != value for key, value in metadata.items())


def _hash(file: File, tick: Callable[[], None]) -> str | None:
    """sha256 (hex); None when the file cannot be read now, which its reading will report."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(file.place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            while block := opened.read(HASH_BYTES):
                digest.update(block)
                tick()
    except OSError:
        return None
    return digest.hexdigest()


def _described(path: Path) -> Path:
    """The file that a sidecar belongs to; any other path is itself."""
    return Path(str(path).removesuffix(SIDECAR))


def _shown(place: str, prefix: int) -> str:
    """Names that are not UTF-8 are shown with replacement marks; the URI keeps their bytes."""
    return os.fsencode(place[prefix:]).decode("utf-8", "replace")


def _said(error: OSError) -> str:
    return error.strerror or type(error).__name__
