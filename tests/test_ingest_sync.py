"""The walk over a folder, and reading a file of it: nothing outside is ever touched."""

import os
from pathlib import Path

import pytest

from ingest.errors import DocumentError
from ingest.sync import read, uri_of, walk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs/deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.txt").write_text("secret")
    (tmp_path / "docs/a.txt").write_text("a")
    (tmp_path / "docs/deep/b.txt").write_text("b")
    return tmp_path / "docs"


def paths(folder: Path, root: Path | None = None) -> list[str]:
    return sorted(file.path for file in walk(folder, root or folder).files)


def test_all_files_below_the_folder_are_found_by_their_path_below_the_root(folder: Path) -> None:
    assert paths(folder) == ["a.txt", "deep/b.txt"]
    assert paths(folder / "deep", folder) == ["deep/b.txt"]
    assert paths(folder / "a.txt", folder) == ["a.txt"]


def test_hidden_files_and_folders_are_left_out(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("x")
    (folder / ".env").write_text("KEY=secret")
    assert paths(folder) == ["a.txt", "deep/b.txt"]
    assert [skip.path for skip in walk(folder, folder).skips] == [".env"]


def test_a_link_that_leaves_the_folder_is_reported_and_not_followed(folder: Path) -> None:
    (folder / "file").symlink_to(folder.parent / "outside/secret.txt")
    (folder / "dir").symlink_to(folder.parent / "outside")
    (folder / "dangling").symlink_to("/nowhere/at/all")
    (folder / "sibling").symlink_to(folder.parent / "docs-of-another")
    found = walk(folder, folder)
    assert sorted(file.path for file in found.files) == ["a.txt", "deep/b.txt"]
    assert {failure.path for failure in found.failures} == {"file", "dir", "dangling", "sibling"}
    assert all("leaves the folder" in failure.reason and failure.stage == "read" for failure in found.failures)


def test_a_link_inside_the_folder_is_skipped_and_its_target_read_once(folder: Path) -> None:
    (folder / "again.txt").symlink_to("deep/b.txt")
    (folder / "loop").symlink_to(".")
    (folder / "deep/up").symlink_to("..")
    found = walk(folder, folder)
    assert sorted(file.path for file in found.files) == ["a.txt", "deep/b.txt"]
    assert found.failures == []


def test_what_is_no_regular_file_is_skipped_without_opening_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    found = walk(folder, folder)
    assert [(skip.path, skip.reason) for skip in found.skips] == [("pipe", "not a regular file")]


def test_a_name_that_is_not_utf8_is_shown_and_keeps_an_address_of_its_own(folder: Path) -> None:
    for name in (b"caf\xe9.txt", b"caf\xe8.txt"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("x")
    found = [file for file in walk(folder, folder).files if file.path.startswith("caf")]
    assert [file.path for file in found] == ["caf\ufffd.txt"] * 2
    assert len({file.uri for file in found}) == 2
    assert all(read(file.place, str(folder), 10) == b"x" for file in found)


def test_an_address_is_a_file_uri() -> None:
    assert uri_of("/data/水泵 1.md") == "file:///data/%E6%B0%B4%E6%B3%B5%201.md"


def test_a_folder_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        walk(folder / "gone", folder)


def test_a_file_swapped_for_a_link_after_the_walk_is_not_read(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(folder.parent / "outside/secret.txt")
    with pytest.raises(DocumentError) as caught:
        read(str(folder / "a.txt"), str(folder), 100)
    assert caught.value.stage == "read"


def test_a_folder_swapped_for_a_link_after_the_walk_is_not_read(folder: Path) -> None:
    (folder / "deep/secret.txt").write_text("harmless")
    (folder / "deep").rename(folder.parent / "elsewhere")
    (folder / "deep").symlink_to(folder.parent / "outside")
    with pytest.raises(DocumentError, match="outside the allowed folder"):
        read(str(folder / "deep/secret.txt"), str(folder), 100)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(DocumentError, match="not a regular file"):
        read(str(folder / "pipe"), str(folder), 100)


def test_a_file_over_the_size_limit_is_refused_by_the_settings_name(folder: Path) -> None:
    (folder / "big.txt").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(DocumentError, match=r"1,048,577 bytes, over INGEST_MAX_FILE_MB \(1 MiB\)"):
        read(str(folder / "big.txt"), str(folder), 2**20)
