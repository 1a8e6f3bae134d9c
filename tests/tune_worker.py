"""A worker process, and rows for it to train on."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from service_fixtures import GRAFT, Service, environment

WORDS = ["impeller", "casing", "bearing", "grease", "coupling", "chamber", "seal", "shaft", "rotor", "oil"]


def rows(count: int) -> str:
    """SFT rows of a few words each, no two alike."""
    pairs = [(WORDS[n % 10], WORDS[(n // 10 + n) % 10], n) for n in range(count)]
    made = [
        {
            "prompt": [{"role": "user", "content": f"What of the {one} and the {other}, part {n}?"}],
            "completion": [{"role": "assistant", "content": f"The {one} of part {n} is next to the {other}."}],
        }
        for one, other, n in pairs
    ]
    return "".join(json.dumps(row) + "\n" for row in made)


@contextmanager
def worker(service: Service, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """`graft worker --queue tune`, ended as Ctrl-C ends it."""
    with (service.home.parent / "worker.output").open("ab") as log:
        process = subprocess.Popen(
            [str(GRAFT), "worker", "--queue", "tune", *arguments],
            cwd=service.root,
            env=environment(service.home, OMP_NUM_THREADS="1", FINETUNE_TRACKERS="", **settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) in {0, -signal.SIGKILL}
