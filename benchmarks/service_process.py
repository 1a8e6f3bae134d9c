"""The real service in a process of its own, with a home of the benchmark's, reached over HTTP."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.report import settings
from ingest.errors import GraftError
from ingest.settings import CHECKOUT
from service.client import Client
from service.owner import find_owner

START_SECONDS = 120
READY_SECONDS = 900


class Service(NamedTuple):
    url: str
    process: psutil.Process

    def resident(self) -> dict[str, float]:
        """MiB of the process' memory: in all, and the part that is no file's."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status if ":" in line)
        return {key: int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon", "RssFile")}


@contextmanager
def serving(home: Path, roots: list[Path], llm_url: str | None = None) -> Iterator[Service]:
    """`graft up --no-engine`, as a user would start it. Nothing of the caller's own SERVICE_ settings reaches it."""
    models = settings().models
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SERVICE_", "GRAFT_"))}
    environment |= {
        "GRAFT_HOME": str(home),
        "GRAFT_MODELS": str(models),
        "SERVICE_PORT": "0",
        "SERVICE_INGEST_ROOTS": ":".join(map(str, roots)),
    }
    if llm_url:
        environment["SERVICE_LLM_URL"] = llm_url
    home.mkdir(parents=True, exist_ok=True)
    with (home / "up.log").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-c", "from service.cli import main; main()", "up", "--no-engine"],
            cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield Service(_wait(home, started), psutil.Process(started.pid))
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextmanager
def with_engine(home: Path, **settings: str) -> Iterator[str]:
    """`graft up --ingest examples` with its engine, without the adapter that comes with it. -> its URL, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bare = {"SERVICE_BUNDLED_ADAPTERS": ""}
    environment = {**os.environ, **bare, "GRAFT_HOME": str(home), "SERVICE_PORT": str(port), **settings}
    command = [sys.executable, "-c", "from service.cli import main; main()", "up", "--ingest", "examples"]
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        with Client(url) as client:
            end = time.monotonic() + READY_SECONDS
            while process.poll() is None and time.monotonic() < end:
                with suppress(GraftError):
                    if client.ready().ready:
                        break
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _wait(home: Path, started: "subprocess.Popen[bytes]") -> str:
    """-> its URL, once all but the engine answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if started.poll() is not None:
            raise RuntimeError(f"the service ended: {(home / 'up.log').read_text()[-500:]}")
        owner = find_owner(home)
        if owner and owner.pid == started.pid:
            try:
                with Client(owner.url, timeout=5) as client:
                    parts = client.ready().dependencies
            except Exception:  # not listening yet
                parts = {}
            waiting = {name for name, part in parts.items() if part.state not in {"ok", "off"}}
            if parts and waiting <= {"engine", "adapters"}:
                return owner.url
        time.sleep(0.1)
    raise RuntimeError(f"the service was not up within {START_SECONDS} s: {(home / 'up.log').read_text()[-500:]}")
