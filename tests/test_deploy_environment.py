"""The stamp of an environment: what was installed beside something else stays named, and what is named is not repeated."""

import json
import sys
from pathlib import Path

import pytest

from deploy.environment import STAMP, SetupError, ensure

PARTS = {"service", "dev", "train"}


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A finished environment that holds nothing yet."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").touch()
    made_by = {"path": str(folder), "python": "{}.{}".format(*sys.version_info[:2])}
    (folder / STAMP).write_text(json.dumps(made_by))
    return folder


def fills(venv: Path, **holds: str) -> bool:
    """Whether `ensure` had something to do."""
    filled: list[Path] = []
    ensure(venv, holds, filled.append, PARTS)
    return filled == [venv / "bin/python"]


def stamped(venv: Path) -> dict[str, str]:
    found = json.loads((venv / STAMP).read_text())
    return {name: value for name, value in found.items() if name not in {"path", "python"}}


@pytest.mark.parametrize("order", [("dev", "train"), ("train", "dev")])
def test_parts_live_beside_each_other(venv: Path, order: tuple[str, str]) -> None:
    for part in order:
        assert fills(venv, **{"service": "1", part: "1"})
    assert stamped(venv) == {"service": "1", "dev": "1", "train": "1"}
    for part in ("service", *order):
        assert not fills(venv, **{"service": "1", part: "1"})


def test_what_replaces_a_part_makes_the_others_be_filled_again(venv: Path) -> None:
    fills(venv, service="1", dev="1")
    fills(venv, service="1", train="1")
    assert fills(venv, service="2", dev="2")
    assert stamped(venv) == {"service": "2", "dev": "2"}
    assert fills(venv, service="2", train="1")
    assert stamped(venv) == {"service": "2", "dev": "2", "train": "1"}


def test_names_that_are_not_beside_go(venv: Path) -> None:
    fills(venv, engine="cpu")
    fills(venv, other="cuda")
    assert stamped(venv) == {"other": "cuda"}


def test_a_failed_fill_leaves_no_stamp(venv: Path) -> None:
    def fail(python: Path) -> None:
        raise SetupError("the disk is full")

    fills(venv, service="1", dev="1")
    with pytest.raises(SetupError):
        ensure(venv, {"service": "1", "train": "1"}, fail, PARTS)
    assert not (venv / STAMP).exists()
