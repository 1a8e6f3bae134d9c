"""The formats of archives: each function unpacks one archive's members, without opening the archives among them.

They are told apart by their first bytes; zip and tar (plain, gzip, bzip2, xz, zstd) are read here, 7z by archive_7z. No
member is held in memory whole.
"""

import bz2
import errno
import gzip
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, cast

from backports import zstd
from py7zr.exceptions import UnsupportedCompressionMethodError

from ingest.archive_7z import unpack_7z
from ingest.archive_tree import (
    NO_FILES,
    Copy,
    Found,
    Left,
    LockedMemberError,
    Member,
    MemberError,
    Outcome,
    Tree,
    locked,
    plain,
    refusal,
    settle,
)
from ingest.errors import DocumentError

BLOCK = 2**18  # bytes read at once
SMALL_BLOCK = 2**12  # of what unpacks without a bound: zipfile gives bzip2 and LZMA no maximal length
LONGEST_HEADER = 2**20  # bytes of a tar header; tarfile reads it in one piece
LOCAL_HEADER = 30  # bytes in front of a zip member's name and data
ENCRYPTED, AES = 0x1, 99  # in a zip: a flag, and the number that stands for a method
COMPRESSED: dict[bytes, Callable[[str], IO[bytes]]] = {
    b"\x1f\x8b": cast(Callable[[str], IO[bytes]], gzip.open),
    b"BZh": cast(Callable[[str], IO[bytes]], bz2.open),
    b"\xfd7zXZ\0": cast(Callable[[str], IO[bytes]], lzma.open),
    b"\x28\xb5\x2f\xfd": cast(Callable[[str], IO[bytes]], zstd.open),
}
TAR_NO_FILES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}


def unpack(place: str, tree: Tree, passwords: Sequence[str]) -> Found:
    """By names as they are in the archive; bytes that are no UTF-8 are surrogates. Raises DocumentError."""
    found: Found = {}
    try:
        kind = _kind(place)
        if kind == "zip":
            _unzip(place, found, tree, passwords)
        elif kind == "7z":
            unpack_7z(place, found, tree, passwords)
        else:
            _untar(place, found, tree)
    except (DocumentError, MemoryError):
        raise
    except UnsupportedCompressionMethodError as error:
        raise DocumentError("read", "it is compressed by a method that is not read here") from error
    except Exception as error:  # of damaged bytes these readers raise many kinds: TypeError, struct.error, ...
        unseekable = isinstance(error, OSError) and error.errno == errno.EINVAL  # where a declared size leads
        said = error.strerror if isinstance(error, OSError) and not unseekable else None
        said = said or f"it is truncated or damaged ({str(error)[:200] or type(error).__name__})"
        raise DocumentError("read", said) from error
    return found


def _kind(place: str) -> str:
    """By what is in it. Raises DocumentError."""
    with open(place, "rb") as file:
        start = file.read(512)
    if not start:
        raise DocumentError("read", "the file is empty")
    if start.startswith(b"7z\xbc\xaf\x27\x1c"):
        return "7z"
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if start.startswith(tuple(COMPRESSED)) or start[257:262] == b"ustar":
        return "tar"
    if zipfile.is_zipfile(place):  # behind a program that unpacks it
        return "zip"
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")  # older tars have no mark
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs lack it
        return "tar"  # an empty one
    except tarfile.TarError as error:
        raise DocumentError("read", "it is no zip, tar or 7z archive") from error
    return "tar"


# zip


def _unzip(place: str, found: Found, tree: Tree, passwords: Sequence[str]) -> None:
    unread = ""
    with zipfile.ZipFile(place) as archive:
        _refuse_overlap(archive)
        for entry in archive.infolist():
            name = entry.filename.replace("\\", "/")
            mode = stat.S_IFMT(entry.external_attr >> 16)
            if name.endswith("/") or mode == stat.S_IFDIR:
                continue
            tree.enter()
            name = plain(name)
            try:
                refused = refusal(name, NO_FILES.get(mode, ""), entry.file_size, tree.limits)
                settle(found, name, refused or _zip_member(archive, entry, tree, passwords))
            except MemberError as error:
                settle(found, name, Left(str(error), True))
                unread = unread or (str(error) if isinstance(error, LockedMemberError) else "")
    if unread and all(isinstance(one, Left) and one.reason == unread for one in found.values()):
        raise DocumentError("read", unread)


def _refuse_overlap(archive: zipfile.ZipFile) -> None:
    """One stretch of data that serves many members makes gigabytes of kilobytes (Fifield, A better zip bomb, 2019)."""
    end = archive.start_dir
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset, reverse=True):
        if entry.header_offset + LOCAL_HEADER + entry.compress_size > end:
            raise DocumentError("read", "its members overlap: a zip bomb?")
        end = entry.header_offset


def _zip_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, tree: Tree, passwords: Sequence[str]) -> Member:
    if not entry.flag_bits & ENCRYPTED:
        return _zip_copy(archive, entry, tree, None)
    if entry.compress_type == AES:
        raise LockedMemberError("it is encrypted with AES, which is not read in a zip: pack it as 7z, or unpack it")
    for password in passwords:
        try:
            return _zip_copy(archive, entry, tree, password.encode())
        except MemberError:
            continue  # one wrong password of 256 is only told by what comes out
    raise LockedMemberError(locked(passwords))


def _zip_copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, tree: Tree, password: bytes | None) -> Member:
    unbounded = entry.compress_type in {zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
    copy = Copy(tree)
    try:
        with archive.open(entry, pwd=password) as source:
            while block := source.read(SMALL_BLOCK if unbounded else BLOCK):
                copy.write(block)
        return copy.finish()
    except BaseException as error:
        copy.drop()
        if isinstance(error, NotImplementedError):
            raise MemberError(f"it is compressed by a method that is not read here ({error})") from error
        if isinstance(error, DocumentError | MemberError | MemoryError) or not isinstance(error, Exception):
            raise
        raise MemberError(f"it is damaged ({error})") from error


# tar


class _TarStream:
    """What tarfile reads. Only forward, and in pieces: declared sizes may be negative, or of a header in gigabytes."""

    def __init__(self, raw: IO[bytes], tree: Tree | None) -> None:
        """`tree` counts what is read, where `raw` decompresses."""
        self._raw, self._tree = raw, tree
        self._at = 0
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self._raw.read(size)
        self._at += len(self.last)
        if self._tree:
            self._tree.add(streamed=len(self.last))
        return self.last

    def seek(self, position: int, whence: int = 0) -> int:
        if position < self._at:
            raise tarfile.ReadError("its members overlap")
        if self._tree:
            while self._at < position and self.read(min(BLOCK, position - self._at)):
                pass
        else:
            self._at = self._raw.seek(position)
        return self._at

    def tell(self) -> int:
        return self._at


def _untar(place: str, found: Found, tree: Tree) -> None:
    with open(place, "rb") as file:
        start = file.read(6)
    opened = next((decompress for mark, decompress in COMPRESSED.items() if start.startswith(mark)), None)
    with opened(place) if opened else open(place, "rb") as raw:
        stream = _TarStream(raw, tree if opened else None)
        archive = tarfile.TarFile(fileobj=cast(IO[bytes], stream), encoding="utf-8", errors="surrogateescape")
        while entry := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # which the stubs lack, and which would keep them all
            if not entry.isdir():
                tree.enter()
                settle(found, plain(entry.name), _tar_member(archive, entry, tree))
        if stream.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
            raise DocumentError("read", "it is truncated or damaged (no end mark)")
        while opened and stream.read(BLOCK):  # up to the checksum
            pass


def _tar_member(archive: tarfile.TarFile, entry: tarfile.TarInfo, tree: Tree) -> Outcome:
    """Damage to one member is damage to the archive here: it raises tarfile.TarError, EOFError, ..."""
    kind = "" if entry.isreg() else TAR_NO_FILES.get(entry.type, "of an unknown kind")
    if refused := refusal(plain(entry.name), kind, entry.size, tree.limits):
        return refused
    copy = Copy(tree)
    try:
        source = cast(IO[bytes], archive.extractfile(entry))
        while block := source.read(BLOCK):
            copy.write(block)
        return copy.finish()
    except BaseException:
        copy.drop()
        raise
