"""Archives: what is unpacked of each format, what is left out and why, and that no archive gets past a limit."""

import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import py7zr
import pytest
from backports import zstd
from broken_files import PASSWORD, archive, encrypted_zip, overlapping_zip, special_tar

from ingest.archive import ArchiveLimits, Expanded, expand, is_archive, limits
from ingest.errors import DocumentError
from ingest.settings import CHECKOUT, IngestSettings

LIMITS = ArchiveLimits(depth=3, files=100, total_bytes=64 * 2**20, ratio=100, file_bytes=16 * 2**20)
FILES = {"a.md": b"# A\n\nFirst.\n", "folder/b.txt": b"Second. " * 50_000, "folder/empty.txt": b""}


def tar(files: dict[str, bytes], compression: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as opened:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return out.getvalue()


def seven_zip(files: dict[str, bytes], password: str | None = None, hide_names: bool = False) -> bytes:
    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", password=password, header_encryption=hide_names) as opened:
        for name, data in files.items():
            opened.writestr(data, name)
    return out.getvalue()


MAKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    ".zip": archive,
    ".tar": tar,
    ".tar.gz": lambda files: tar(files, "gz"),
    ".tbz2": lambda files: tar(files, "bz2"),
    ".tar.xz": lambda files: tar(files, "xz"),
    ".tar.zst": lambda files: zstd.compress(tar(files)),
    ".7z": seven_zip,
}
each_format = pytest.mark.parametrize("suffix", MAKERS)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into"


def opened(data: bytes, into: Path, limits: ArchiveLimits = LIMITS, passwords: tuple[str, ...] = ()) -> Expanded:
    place = into.with_suffix(".archive")  # a name that says nothing
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    return expand(str(place), into, limits, passwords)


def contents(found: Expanded) -> dict[str, bytes]:
    return {member.name: Path(member.place).read_bytes() for member in found.members}


def refused(data: bytes, into: Path, limits: ArchiveLimits = LIMITS, passwords: tuple[str, ...] = ()) -> str:
    """The reason; nothing was left behind."""
    with pytest.raises(DocumentError) as caught:
        opened(data, into, limits, passwords)
    assert caught.value.stage == "read"
    assert not into.exists() or not any(into.iterdir())
    return caught.value.reason


def test_an_archive_is_told_by_its_suffix() -> None:
    assert all(is_archive(f"some.folder/A{suffix.upper()}") for suffix in MAKERS)
    assert not any(map(is_archive, ["a.docx", "a.epub", "a.jar", "a.gz", "a.zip.md", "zip"]))


def test_the_settings_give_the_limits() -> None:
    settings = IngestSettings(archive_depth=1, archive_files=2, archive_mb=3, archive_ratio=4, max_file_mb=5)
    assert limits(settings) == (1, 2, 3 * 2**20, 4, 5 * 2**20)


@each_format
def test_members_are_unpacked_under_numbers(suffix: str, into: Path) -> None:
    found = opened(MAKERS[suffix](FILES), into)
    assert contents(found) == FILES
    assert (found.skips, found.failures) == ([], [])
    for member in found.members:
        assert member.size == len(FILES[member.name])
        assert member.digest == hashlib.sha256(FILES[member.name]).hexdigest()
    assert sorted(place.name for place in into.iterdir()) == ["0000001", "0000002", "0000003"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_the_other_methods_of_zip_are_read(method: int, into: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as whole:
        for name, data in FILES.items():
            whole.writestr(name, data)
    assert contents(opened(out.getvalue(), into)) == FILES


@each_format
def test_names_never_lead_anywhere(suffix: str, into: Path) -> None:
    evil = ["../../evil.md", "/tmp/evil.md", "a/../../evil.md"]
    maker = renamed_seven_zip if suffix == ".7z" else MAKERS[suffix]
    data = maker({"good.md": b"good"} | dict.fromkeys(evil, b"evil"))
    found = opened(data, into)
    assert contents(found) == {"good.md": b"good"}
    assert [name for name, _ in found.failures] == evil
    assert all("absolute" in reason or ".." in reason for _, reason in found.failures)
    assert len(list(into.iterdir())) == 1
    assert not list(into.parent.rglob("*evil*"))


def renamed_seven_zip(files: dict[str, bytes]) -> bytes:
    """py7zr writes no name that leads anywhere; these take the place of others in its header, whose checksums follow."""
    out = io.BytesIO()
    letters = dict(zip("abcdefgh", files, strict=False))
    with py7zr.SevenZipFile(out, "w") as opened:
        opened.set_encoded_header_mode(False)
        for letter, name in letters.items():
            opened.writestr(files[name], letter * len(name))
    data = out.getvalue()
    offset, size = struct.unpack("<QQ", data[12:28])
    head = data[32 + offset : 32 + offset + size]
    for letter, name in letters.items():
        head = head.replace((letter * len(name)).encode("utf-16-le"), name.encode("utf-16-le"))
    start = struct.pack("<QQL", offset, size, zlib.crc32(head))
    return data[:8] + struct.pack("<L", zlib.crc32(start)) + start + data[32 : 32 + offset] + head


@each_format
def test_hidden_members_are_skipped(suffix: str, into: Path) -> None:
    hidden = [".git/config", "folder/.env", "__MACOSX/a.md"]
    found = opened(MAKERS[suffix]({"./a.md": b"A"} | dict.fromkeys(hidden, b"hidden")), into)
    assert contents(found) == {"a.md": b"A"}
    assert [name for name, _ in found.skips] == hidden
    assert found.failures == []


def test_links_and_devices_are_skipped(into: Path) -> None:
    found = opened(special_tar("gz"), into)
    assert [member.name for member in found.members] == ["good.md"]
    assert [(name, reason.split(";")[0]) for name, reason in found.skips] == [
        ("link.md", "a symbolic link"),
        ("hard.md", "a hard link"),
        ("disk", "a device"),
        ("pipe", "a named pipe"),
    ]


def test_a_symbolic_link_in_a_zip_or_7z_is_skipped(into: Path) -> None:
    link = zipfile.ZipInfo("link.md")
    link.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as whole:
        whole.writestr(link, "/etc/passwd")
    assert opened(out.getvalue(), into).skips == [("link.md", "a symbolic link; only files are unpacked")]
    (into.parent / "real.md").write_text("real")
    (into.parent / "link.md").symlink_to("real.md")
    with py7zr.SevenZipFile(into.parent / "links.7z", "w") as other:
        other.write(into.parent / "link.md", "link.md")
    found = expand(str(into.parent / "links.7z"), into, LIMITS)
    assert [name for name, _ in found.skips] == ["link.md"]


@each_format
def test_archives_in_archives_are_opened_to_the_limit(suffix: str, into: Path) -> None:
    data = MAKERS[suffix]({"4.md": b"4"})
    for level in (3, 2, 1):
        data = MAKERS[suffix]({f"{level}.md": b"%d" % level, f"in{suffix}": data})
    found = opened(data, into)
    inner = f"in{suffix}"
    assert contents(found) == {"1.md": b"1", f"{inner}/2.md": b"2", f"{inner}/{inner}/3.md": b"3"}
    assert [name for name, _ in found.failures] == [f"{inner}/{inner}/{inner}"]
    assert "INGEST_ARCHIVE_DEPTH (3)" in found.failures[0][1]
    assert len(list(into.iterdir())) == 3  # the archives themselves are not kept
    assert "INGEST_ARCHIVE_DEPTH" in refused(data, into.with_name("other"), LIMITS._replace(depth=0))


def test_a_broken_archive_in_an_archive_costs_itself(into: Path) -> None:
    broken = tar(FILES, "gz")[:-100]
    found = opened(archive({"broken.tgz": broken, "a.md": b"A", "locked.zip": encrypted_zip(FILES, PASSWORD)}), into)
    assert contents(found) == {"a.md": b"A"}
    reasons = dict(found.failures)
    assert "truncated" in reasons["broken.tgz"]
    assert "INGEST_PASSWORDS" in reasons["locked.zip"]
    assert len(list(into.iterdir())) == 1


@each_format
def test_too_many_files_are_refused(suffix: str, into: Path) -> None:
    few = {f"{n}.md": b"text" for n in range(51)}
    assert len(opened(MAKERS[suffix](few), into).members) == 51
    nested = archive({f"one{suffix}": MAKERS[suffix](few), f"two{suffix}": MAKERS[suffix](few)})
    assert "INGEST_ARCHIVE_FILES (100)" in refused(nested, into.with_name("other"))


@each_format
def test_too_much_in_all_is_refused(suffix: str, into: Path) -> None:
    block = os.urandom(2**18)
    data = MAKERS[suffix]({f"{n}.md": block for n in range(6)})
    assert len(opened(data, into, LIMITS._replace(total_bytes=2 * 2**20)).members) == 6
    assert "INGEST_ARCHIVE_MB (1 MiB)" in refused(data, into.with_name("other"), LIMITS._replace(total_bytes=2**20))


@each_format
def test_a_bomb_is_refused_by_its_ratio(suffix: str, into: Path) -> None:
    bomb = MAKERS[suffix]({f"{n}.txt": bytes(15 * 2**20) for n in range(2)})
    if suffix != ".tar":  # which is as long as what is in it
        assert "INGEST_ARCHIVE_RATIO" in refused(bomb, into)
    if suffix not in {".tar", ".zip"}:
        nested = archive({f"{n}{suffix}": bomb for n in range(4)})
        assert "INGEST_ARCHIVE" in refused(nested, into.with_name("nested"))


def test_a_small_archive_is_not_refused_for_its_ratio(into: Path) -> None:
    assert opened(archive({"log.txt": b"the same line\n" * 500_000}), into).members[0].size == 7_000_000


def test_an_overlapping_zip_is_refused(into: Path) -> None:
    data = overlapping_zip()
    assert len(data) < 100_000
    assert "overlap" in refused(data, into, LIMITS._replace(files=10_000, ratio=10**9, total_bytes=2**40))


@each_format
def test_a_file_over_its_limit_costs_itself(suffix: str, into: Path) -> None:
    found = opened(
        MAKERS[suffix]({"big.txt": os.urandom(2**20 + 1), "a.md": b"A"}), into, LIMITS._replace(file_bytes=2**20)
    )
    assert contents(found) == {"a.md": b"A"}
    assert found.failures == [("big.txt", "it is over INGEST_MAX_FILE_MB (1 MiB)")]


def test_declared_sizes_are_not_believed(into: Path) -> None:
    text = b"a" * 5000
    data = archive({"a.md": text}).replace(struct.pack("<L", len(text)), struct.pack("<L", 10))
    found = opened(data, into)
    assert found.members == []
    assert "damaged" in dict(found.failures)["a.md"]


@pytest.mark.parametrize("size", [-512, -(2**40), 2**62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_that_declares_a_senseless_size_ends(kind: bytes, size: int, into: Path) -> None:
    member = tarfile.TarInfo("b.md")
    member.type = kind
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = (size % 2**96 | 2**95).to_bytes(12, "big")  # the binary notation of GNU
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    assert "damaged" in refused(tar({"a.md": b"A"})[:1024] + head + tar(FILES), into)


def test_what_is_left_out_of_a_tar_is_counted(into: Path) -> None:
    bomb = {".hidden": bytes(30 * 2**20), "a.md": b"A"}
    assert "INGEST_ARCHIVE_RATIO" in refused(tar(bomb, "gz"), into)


@pytest.mark.parametrize("hide_names", [False, True])
def test_passwords_are_tried(hide_names: bool, into: Path) -> None:
    wrong = tuple(f"wrong {n}" for n in range(3))
    locked = [seven_zip(FILES, PASSWORD, hide_names)] + ([] if hide_names else [encrypted_zip(FILES, PASSWORD)])
    for number, data in enumerate(locked):
        assert contents(opened(data, into / f"{number}", LIMITS, (*wrong, PASSWORD))) == FILES
        assert "set INGEST_PASSWORDS" in refused(data, into / f"none-{number}")
        assert "none of the 3 in INGEST_PASSWORDS" in refused(data, into / f"wrong-{number}", LIMITS, wrong)


def test_many_wrong_passwords_do_not_pass_for_the_right_one(into: Path) -> None:
    """The check in a zip is one byte: one of 256 passwords passes it."""
    wrong = tuple(f"wrong {n}" for n in range(600))
    assert contents(opened(encrypted_zip({"a.md": b"A"}, PASSWORD), into, LIMITS, (*wrong, PASSWORD))) == {"a.md": b"A"}


def test_a_try_of_a_password_does_not_count(into: Path) -> None:
    files = {f"{n}.md": b"text" for n in range(60)}
    assert contents(opened(seven_zip(files, PASSWORD), into, LIMITS, ("wrong", PASSWORD))) == files


def test_one_encrypted_member_costs_itself(into: Path) -> None:
    plain, locked = archive({"a.md": b"A"}), encrypted_zip({"b.md": b"B"}, PASSWORD)
    found = opened(joined(plain, locked), into)
    assert contents(found) == {"a.md": b"A"}
    assert [name for name, _ in found.failures] == ["b.md"]


def joined(one: bytes, other: bytes) -> bytes:
    """One zip of the members of two, of one member each."""
    bodies, directories = b"", b""
    for data in (one, other):
        start, size = (struct.unpack("<L", data[-22 + at : -18 + at])[0] for at in (16, 12))
        directory = bytearray(data[start : start + size])
        directory[42:46] = struct.pack("<L", len(bodies))
        bodies, directories = bodies + data[:start], directories + bytes(directory)
    return bodies + directories + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directories), len(bodies), 0)


def test_aes_in_a_zip_is_named(into: Path) -> None:
    data = bytearray(encrypted_zip({"a.md": b"A"}, PASSWORD))
    data[8:10] = struct.pack("<H", 99)
    at = data.index(b"PK\1\2")
    data[at + 10 : at + 12] = struct.pack("<H", 99)
    assert "AES" in refused(bytes(data), into, LIMITS, (PASSWORD,))


@each_format
def test_of_a_truncated_archive_nothing_is_kept(suffix: str, into: Path) -> None:
    whole = MAKERS[suffix]({f"{n}.md": os.urandom(3000) for n in range(5)})
    end = len(whole) if suffix != ".tar" else 5 * 3584  # behind it there are only zeros
    for number, length in enumerate([0, 3, 40, 512, 1024, end // 3, end // 2, end - 512, end - 7]):
        reason = refused(whole[:length], into / f"{number}")
        assert any(word in reason for word in ("truncated", "empty", "no zip")), (length, reason)


def test_a_tar_that_ends_between_two_members_is_truncated(into: Path) -> None:
    whole = tar({"a.md": b"A", "b.md": b"B"})
    assert "no end mark" in refused(whole[:1024], into / "cut")
    assert "no end mark" in refused(whole[:1024] + b"no header" + whole[1033:], into / "damaged")


@pytest.mark.parametrize("maker", [lambda files: archive(files, 0), lambda files: stored_seven_zip(files)])
def test_a_wrong_checksum_costs_its_member(maker: Callable[[dict[str, bytes]], bytes], into: Path) -> None:
    data = maker({"a.md": b"A is good", "b.md": b"B is broken", "c.md": b"C is good"})
    found = opened(data.replace(b"B is broken", b"B is BROKEN"), into)
    assert contents(found) == {"a.md": b"A is good", "c.md": b"C is good"}
    assert [name for name, _ in found.failures] == ["b.md"]
    assert "damaged" in found.failures[0][1]
    assert len(list(into.iterdir())) == 2


def stored_seven_zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", filters=[{"id": py7zr.FILTER_COPY}]) as opened:
        for name, data in files.items():
            opened.writestr(data, name)
    return out.getvalue()


def test_the_last_of_one_name_counts(into: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as whole:
        for text in (b"old", b"newer"):
            member = tarfile.TarInfo("a.md")
            member.size = len(text)
            whole.addfile(member, io.BytesIO(text))
    assert contents(opened(out.getvalue(), into)) == {"a.md": b"newer"}
    assert len(list(into.iterdir())) == 1


def test_names_that_are_no_utf8_stay_apart(into: Path) -> None:
    found = opened(tar({os.fsdecode(b"\xb7\xa7.md"): b"1", os.fsdecode(b"\xb1\xc3.md"): b"2"}), into)  # GBK
    assert contents(found) == {"\ufffd\ufffd.md": b"1", "\ufffd\ufffd~2.md": b"2"}


@each_format
def test_damaged_bytes_never_do_worse_than_a_reason(suffix: str, into: Path) -> None:
    chance = random.Random(suffix)
    whole = MAKERS[suffix](FILES | {"inner.zip": archive({"c.md": b"C"})})
    for number in range(60):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 2, 20])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        folder = into / f"{number}"
        try:
            found = opened(bytes(data), folder)
        except DocumentError:
            assert not folder.exists() or not any(folder.iterdir())
        else:
            assert {member.place for member in found.members} == {str(place) for place in folder.iterdir()}


LIMITED = """
import resource, sys
from pathlib import Path
from ingest.archive import ArchiveLimits, expand
from ingest.errors import DocumentError
kind, size = getattr(resource, sys.argv[1]), int(sys.argv[2])
if kind == resource.RLIMIT_AS:
    size += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(kind, (size, size))
try:
    found = expand(sys.argv[3], Path(sys.argv[4]), ArchiveLimits(3, 100, 2**30, 200, 2**30))
    print([(member.name, member.size) for member in found.members], len(found.failures))
except DocumentError as error:
    print("refused:", error.reason)
"""


def under(limit: str, size: int, place: Path, into: Path) -> str:
    command = [sys.executable, "-c", LIMITED, limit, str(size), str(place), str(into)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.zst", ".7z"])
def test_a_member_is_not_held_in_memory(suffix: str, into: Path) -> None:
    data = os.urandom(2**20) * 60
    maker = {".zip": lambda files: archive(files, 0), ".7z": stored_seven_zip}.get(suffix, MAKERS[suffix])
    place = into.with_name(f"big{suffix}")
    place.write_bytes(maker({"big.txt": data}))
    assert under("RLIMIT_AS", 30 * 2**20, place, into) == f"[('big.txt', {len(data)})] 0"


def test_what_cannot_be_written_is_a_reason(into: Path) -> None:
    place = into.with_name("big.zip")
    place.write_bytes(archive({"a.md": b"A", "big.txt": os.urandom(200_000)}))
    assert under("RLIMIT_FSIZE", 100_000, place, into) == "refused: it cannot be unpacked: File too large"
    assert not any(into.iterdir())
