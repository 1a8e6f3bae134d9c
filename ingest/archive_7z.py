"""Unpacks one 7z archive: py7zr pushes the members, in one pass, into what counts and writes them."""

import stat
from collections.abc import Sequence
from typing import NamedTuple, cast

import py7zr
from py7zr.exceptions import CrcError, DecompressionBombError, PasswordRequired, UnsupportedCompressionMethodError
from py7zr.io import Py7zIO, WriterFactory

from ingest.archive_tree import (
    NO_FILES,
    ArchiveLimitError,
    Copy,
    Found,
    Left,
    MemberError,
    Tree,
    locked,
    plain,
    refusal,
    settle,
)
from ingest.errors import DocumentError


def unpack_7z(place: str, found: Found, tree: Tree, passwords: Sequence[str]) -> None:
    for password in (None, *passwords):
        mark = tree.mark()
        try:
            _unpack_with(password, place, found, tree)
        except PasswordRequired:
            pass
        except (ArchiveLimitError, MemoryError, UnsupportedCompressionMethodError):
            raise
        except Exception:
            if password is None:
                raise
        else:
            return
        tree.rewind(mark)
        found.clear()
    raise DocumentError("read", locked(passwords))


def _unpack_with(password: str | None, place: str, found: Found, tree: Tree) -> None:
    """In one pass, as solid archives need. Raises what py7zr does; of a wrong password, LZMAError, CrcError or the like."""
    with open(place, "rb") as file:  # py7zr reads a file of its own in threads
        room = tree.limits.total_bytes - tree.written
        with py7zr.SevenZipFile(file, password=password, max_extract_size=room) as archive:
            if password is None and archive.needs_password():
                raise PasswordRequired
            wanted = _admitted(archive, found, tree)
            factory = _Factory(wanted, found, tree, password is not None)
            try:
                archive.extract(targets=set(wanted), factory=factory)
            except DecompressionBombError as error:
                raise tree.too_big() from error
            finally:
                factory.close()


class _Entry(NamedTuple):
    name: str
    crc: int | None


def _admitted(archive: py7zr.SevenZipFile, found: Found, tree: Tree) -> dict[str, _Entry]:
    """What is to be unpacked, by number. In `archive` the number becomes the name, and checksums are left to us.

    py7zr ends at the first bad name and at the first bad checksum; here each costs its one member.
    """
    wanted = {}
    for entry in archive.files:
        if entry.is_directory or entry.st_fmt == stat.S_IFDIR:
            continue
        tree.enter()
        name, number = plain(entry.filename.replace("\\", "/")), str(entry.id)
        mode = stat.S_IFLNK if entry.is_symlink or entry.is_junction else entry.st_fmt or 0
        if refused := refusal(name, NO_FILES.get(mode, ""), entry.uncompressed, tree.limits):
            settle(found, name, refused)
        else:
            wanted[number] = _Entry(name, entry.crc32)
        properties = cast(dict[str, object], entry.file_properties())
        properties["filename"] = number
        properties["digest"] = None
        if entry.folder is not None:
            entry.folder.crc = None
    return wanted


class _Factory(WriterFactory):
    """Gives py7zr what it writes the members into, one after another."""

    def __init__(self, wanted: dict[str, _Entry], found: Found, tree: Tree, encrypted: bool) -> None:
        self._wanted, self._found, self._tree, self._encrypted = wanted, found, tree, encrypted
        self._last: _Member | None = None

    def create(self, filename: str) -> Py7zIO:
        self._last = _Member(self._wanted[filename], self._found, self._tree, self._encrypted)
        return self._last

    def close(self) -> None:
        """Of a member that py7zr did not come to the end of, nothing is kept."""
        if self._last:
            self._last.drop()


class _Member(Py7zIO):
    def __init__(self, entry: _Entry, found: Found, tree: Tree, encrypted: bool) -> None:
        self._entry, self._found, self._tree, self._encrypted = entry, found, tree, encrypted
        self._copy = Copy(tree)
        self._failure: Left | None = None
        self._ended = False

    def write(self, s: bytes | bytearray) -> int:
        if self._failure:
            self._tree.add(streamed=len(s))
        else:
            try:
                self._copy.write(s)
            except MemberError as error:
                self._failure = Left(str(error), True)
        return len(s)

    def close(self) -> None:
        if not self._failure and self._entry.crc not in {None, self._copy.crc}:
            if self._encrypted:  # the wrong password, rather
                raise CrcError(self._entry.crc, self._copy.crc, self._entry.name)
            self._failure = Left("it is damaged (its checksum differs)", True)
        if self._failure:
            self._copy.drop()
        settle(self._found, self._entry.name, self._failure or self._copy.finish())
        self._ended = True

    def drop(self) -> None:
        if not self._ended:
            self._copy.drop()

    def read(self, size: int | None = None) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def flush(self) -> None:
        pass

    def size(self) -> int:
        return self._copy.size
