"""Makes `.venv` from the hash locks: `python3 -m deploy.environment service|dev|train`, in the checkout's root.

`dev` and `train` come on top of the service's packages, and beside each other. An environment is complete or started over:
its stamp, written last, names what it holds by the hash of the lock. While the stamp holds, nothing is run. Knows pip, and
of the packages torch alone, which no lock holds. Standard library only, for the system's Python.

GRAFT_TORCH_INDEX where the CPU build of torch comes from (default: PyTorch's index); when it does not answer, from what
                  pip sees
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = "graft-stamp.json"
LOCKS = ("service", "dev", "train")
TORCH = "2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NO_SPACE = "the disk is full: free some space (`make clean` removes what graft set up), then run the same command again"
NO_FETCH = (
    "pip could not fetch it: check the network (behind a proxy, HTTPS_PROXY; with an index of your own, "
    "`pip config list`), then run the same command again"
)
REMEDIES = (
    ("No space left on device", NO_SPACE),
    (
        "DO NOT MATCH THE HASHES",
        "a package differs from the one that is locked: the download was damaged or replaced on its way; "
        "try again with PIP_NO_CACHE_DIR=1, and check the package index that `pip config list` names",
    ),
    (
        r"No matching distribution|Could not fetch URL|ConnectionError|Connection(Pool| ?reset| refused)|timed out|"
        r"name resolution|SSLError|ProxyError|ReadTimeout",
        NO_FETCH,
    ),
)


class SetupError(Exception):
    """A step of the set-up failed; the message names the remedy."""


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) == 2 else ""
    if wanted not in LOCKS:
        raise SystemExit(f"usage: python3 -m deploy.environment {'|'.join(LOCKS)}")
    lock, built_from = ROOT / "deploy" / f"{wanted}.lock", ROOT / "pyproject.toml"
    holds = {name: digest(lock.with_stem(name), built_from) for name in LOCKS if name in {"service", wanted}}
    if wanted == "train":
        holds["torch"] = TORCH if has_gpu() else f"{TORCH}+cpu"

    def fill(python: Path) -> None:
        if "torch" in holds:
            install_torch(python, holds["torch"])
        say(f"installing the {wanted} packages ({packages(lock)} packages)")
        install_locked(python, lock)
        # By the locked setuptools, and as a plain path to the checkout.
        options = ["--no-deps", "--no-build-isolation", "--config-settings=editable_mode=compat"]
        pip(python, "install", *options, "-e", str(ROOT))

    ensure(ROOT / ".venv", holds, fill, beside={*LOCKS, "torch"})


def ensure(venv: Path, holds: dict[str, str], fill: Callable[[Path], None], beside: Set[str] = frozenset()) -> None:
    """Makes `venv`, then lets `fill` install into it by its Python, unless the stamp says that it holds all of `holds`.

    A finished environment that holds something else is filled on top; one without a stamp is made again. Names in `beside`
    that the stamp holds stay in it, unless `holds` replaces something.
    """
    made_by = {"path": str(venv.absolute()), "python": "{}.{}".format(*sys.version_info[:2])}
    stamp = venv / STAMP
    wanted = {**made_by, **holds}
    if _is_complete(stamp, wanted):
        return
    with locked(venv.parent / f"{venv.name}.lock"):
        if _is_complete(stamp, wanted):
            return
        python = venv / "bin" / "python"
        if not _is_complete(stamp, made_by):
            if venv.exists():
                say(f"{venv} is unfinished or of another Python: starting over")
                shutil.rmtree(venv)
            say(f"making {venv} (Python {made_by['python']})")
            if subprocess.run([sys.executable, "-m", "venv", str(venv)], stdin=subprocess.DEVNULL).returncode:
                raise SetupError(f"python -m venv could not make {venv}: run {sys.executable} -I service/machine.py")
        kept = _kept(_read(stamp), wanted, beside)
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        fill(python)
        stamp.write_text(json.dumps({**kept, **wanted}) + "\n")
        say(f"{venv.name} is ready ({time.monotonic() - started:.0f} s)")


def install_locked(python: Path, lock: Path) -> None:
    pip(python, "install", "--no-deps", "--require-hashes", "-r", str(lock), total=packages(lock))


def pip(python: Path | str, *arguments: str, total: int = 0) -> None:
    """Runs pip, and says every ten seconds how many of `total` packages it has.

    Raises SetupError with the remedy, after pip's last lines.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, "--progress-bar=off"]
    if arguments[0] == "install":
        command.append("--compile")
    lines, collected, said = [], 0, time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                collected += line.startswith(("Collecting ", "Processing "))
                if not total:
                    continue
                if line.startswith("Installing collected packages"):
                    say(f"  unpacking and compiling {collected} packages")
                    total = 0
                elif time.monotonic() - said > 10:
                    said = time.monotonic()
                    say(f"  {collected} of {total} fetched")
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        output = "\n".join(line for line in lines if line and not line.startswith("WARNING: Location"))
        remedy = next((text for pattern, text in REMEDIES if re.search(pattern, output)), "see pip's words above")
        print("\n".join(output.splitlines()[-8:]), file=sys.stderr)
        raise SetupError(f"pip {arguments[0]} failed: {remedy}")


def install_torch(python: Path, version: str) -> None:
    """`version`: TORCH, with what CUDA needs, or TORCH+cpu. Raises SetupError."""
    if version != TORCH:
        return install_torch_cpu(python)
    if any(python.parents[1].glob("lib/python3.*/site-packages/torch-*+cpu.dist-info")):
        pip(python, "uninstall", "--yes", "torch")  # pip would take it for the same version
    say(f"installing torch {TORCH} for CUDA (several GB)")
    pip(python, "install", f"torch=={TORCH}", total=30)


def install_torch_cpu(python: Path) -> None:
    """Without what it needs, which the locks hold. Raises SetupError."""
    index = os.environ.get("GRAFT_TORCH_INDEX") or TORCH_INDEX
    source = ("--index-url", index) if answers(index) else ()
    say(f"installing torch {TORCH} for the CPU from {index if source else 'the index that pip is set to'} (200 MB)")
    try:
        # By its full name, so that no CUDA build of several GB comes instead.
        pip(python, "install", "--no-deps", *source, f"torch=={TORCH}+cpu")
    except SetupError as error:
        if NO_FETCH not in str(error):
            raise
        raise SetupError(
            f"{error}\nWhat is needed is torch {TORCH}+cpu for Python {platform.python_version()}: "
            f"name an index that carries it in GRAFT_TORCH_INDEX (now {index})"
        ) from error


def answers(index: str) -> bool:
    """Whether a package index answers within five seconds."""
    request = urllib.request.Request(f"{index.rstrip('/')}/torch/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return (
        smi is not None and subprocess.run([smi, "-L"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`: two set-ups side by side wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here: waiting for it")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def packages(requirements: Path) -> int:
    """How many packages a requirements file names."""
    return len(re.findall(r"^[A-Za-z0-9][^\s;]*==", requirements.read_text(), re.MULTILINE))


def say(text: str) -> None:
    print(text, flush=True)


def run(step: Callable[[], None]) -> None:
    """Runs a script's main: an expected failure is one line and exit status 1, Ctrl-C exit status 130."""
    try:
        step()
    except SetupError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit(f"error: {NO_SPACE}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _is_complete(stamp: Path, wanted: dict[str, str]) -> bool:
    return _read(stamp).items() >= wanted.items() and (stamp.parent / "bin/python").exists()


def _kept(found: dict[str, str], wanted: dict[str, str], beside: Set[str]) -> dict[str, str]:
    """What a stamp names beside `wanted` and still holds: what replaces something may have moved the rest as well."""
    if any(found.get(name, value) != value for name, value in wanted.items()):
        return {}
    return {name: value for name, value in found.items() if name in beside}


def _read(stamp: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(stamp.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


if __name__ == "__main__":
    run(main)
