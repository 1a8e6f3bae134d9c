"""Makes a Python environment from a hash lock: `python3 -m deploy.environment service|dev`, in the checkout's root.

An environment is complete or started over: its stamp, written last, names what it holds by the hash of the lock. While
the stamp holds, nothing is run. Knows pip and nothing of the packages. Standard library only, for the system's Python.
"""

import errno
import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = "graft-stamp.json"
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
    if wanted not in {"service", "dev"}:
        raise SystemExit("usage: python3 -m deploy.environment service|dev")
    locks = {name: ROOT / "deploy" / f"{name}.lock" for name in ("service", "dev")}
    built_from = ROOT / "pyproject.toml"
    holds = {name: digest(lock, built_from) for name, lock in locks.items() if name in {"service", wanted}}

    def fill(python: Path) -> None:
        say(f"installing the {wanted} packages ({packages(locks[wanted])} packages)")
        install_locked(python, locks[wanted])
        # By the locked setuptools, and as a plain path to the checkout.
        options = ["--no-deps", "--no-build-isolation", "--config-settings=editable_mode=compat"]
        pip(python, "install", *options, "-e", str(ROOT))

    ensure(ROOT / ".venv", holds, fill)


def ensure(venv: Path, holds: dict[str, str], fill: Callable[[Path], None]) -> None:
    """Makes `venv`, then lets `fill` install into it by its Python, unless the stamp says that it holds all of `holds`.

    A finished environment that holds something else is filled on top; one without a stamp is made again.
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
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        fill(python)
        stamp.write_text(json.dumps(wanted) + "\n")
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


def _read(stamp: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(stamp.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


if __name__ == "__main__":
    run(main)
