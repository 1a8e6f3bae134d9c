"""What a benchmark is given and what it gives back: options, rows of a table, and the words about the machine."""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from ingest.runtime import processor
from ingest.settings import CHECKOUT, IngestSettings

PACKAGES = (
    "onnxruntime",
    "openvino",
    "qdrant-edge-py",
    "kreuzberg",
    "llama-index-core",
    "sqlalchemy",
    "fastapi",
    "uvicorn",
)


class Options(NamedTuple):
    """`data`: a folder with the real data sets (README.md here). `scratch`: what later runs take from earlier ones."""

    data: Path | None
    scratch: Path
    quick: bool

    def folder(self, name: str) -> Path | None:
        """-> the data set's folder, None when it is not there."""
        found = self.data / name if self.data else None
        return found if found and found.is_dir() else None


def settings(home: Path | None = None) -> IngestSettings:
    """The product's own, from the environment, for a home of the benchmark's."""
    given: dict[str, Any] = {"home": home} if home else {}
    return IngestSettings(**given)


class Row(NamedTuple):
    """One line of the table. `figure` None: not measured, the note says why. `holds` None: there is no bar."""

    name: str
    figure: float | None
    unit: str
    bar: str = ""
    holds: bool | None = None
    note: str = ""


def shown(name: str, figure: float, unit: str, note: str = "") -> Row:
    return Row(name, figure, unit, note=note)


def at_least(name: str, figure: float, unit: str, bar: float, note: str = "") -> Row:
    return Row(name, figure, unit, f">= {bar:,g}", figure >= bar, note)


def at_most(name: str, figure: float, unit: str, bar: float, note: str = "") -> Row:
    return Row(name, figure, unit, f"<= {bar:,g}", figure <= bar, note)


def skipped(name: str, why: str) -> Row:
    return Row(name, None, "", note=f"not measured: {why}")


def say(text: str) -> None:
    """Progress, to standard error: the table alone goes to standard output."""
    print(f"  {text}", file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def percentile(values: Sequence[float], q: float) -> float:
    """`q` in percent; the value at or above which that share lies, so a p99 of 100 values is the second largest."""
    return float(np.percentile(values, q, method="higher")) if len(values) else float("nan")


def spread(values: Sequence[float], digits: int = 1) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in values)


def machine() -> dict[str, str]:
    return {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"Linux {platform.release()}, {' '.join(platform.libc_ver())}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "code": _commit(),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
        ),
    }


def table(rows: Sequence[Row], facts: dict[str, str], command: str) -> str:
    """In Markdown."""
    lines = [f"Command: `{command}`", "", *(f"- {name}: {fact}" for name, fact in facts.items()), ""]
    lines += ["| what | figure | bar | holds | note |", "|---|---:|---:|---|---|"]
    for row in rows:
        figure = "-" if row.figure is None else f"{number(row.figure)} {row.unit}".strip()
        holds = {True: "yes", False: "**no**", None: ""}[row.holds]
        lines.append(f"| {row.name} | {figure} | {row.bar} | {holds} | {row.note} |")
    return "\n".join(lines)


def number(figure: float) -> str:
    """Three significant digits, and whole numbers from 100 on."""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CHECKOUT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "no commit"
    return commit + (" with changes" if git("status", "--porcelain") else "")
