"""A file that is whole or not there."""

import os
from pathlib import Path

import pytest

from ingest.files import write_whole


def test_a_file_is_what_was_written_with_the_modes_of_others(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "泵")
    write_whole(path, b"pump")
    (tmp_path / "b.json").touch()
    assert path.read_text() == "pump"
    assert path.stat().st_mode == (tmp_path / "b.json").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "pump")
    with pytest.raises(ValueError, match="surrogates"):
        write_whole(path, "\ud800")
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "pump")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no" / "a.json", "pump")
    assert path.read_text() == "pump"
    assert os.listdir(tmp_path) == ["a.json"]
    assert not list(tmp_path.parent.glob(".unfinished-*"))
