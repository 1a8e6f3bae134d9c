"""Adapters swapped while clients stream, and registered: the whole product, with its engine and the bundled model.

A swap counts as done for a question by when it was sent: the first question that names no adapter, and after which none goes
to the old one. The adapters are random, of ranks 16 and 64, on all linear layers.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.adapter_tokens import write_adapter
from benchmarks.report import Options, Row, at_most, percentile, say, settings, shown, skipped
from benchmarks.service_process import with_engine
from ingest.errors import GraftError
from service.base_model import read_base
from service.preflight import Limits, take_in
from service.settings import ServiceSettings

CLIENTS = 8
SWAP_MS = 500.0
QUESTION = {
    "question": "What is the impeller of the Heron H75 made of?",
    "max_tokens": 24,
    "source": "bench",
    "stream": True,
}
PREFIX = 12  # letters by which an answer is told from another adapter's


class Asked(NamedTuple):
    """`sent`, `first`, `ended`: seconds on one clock; `adapter` None: it failed."""

    sent: float
    first: float
    ended: float
    adapter: str | None
    answer: str


def run(options: Options) -> list[Row]:
    given: dict[str, Any] = {}
    service = ServiceSettings(**given)
    if not (service.engine_venv / "bin/python").exists():
        return [skipped("swaps of adapters", "no engine is installed (make engine)")]
    model = settings().models / service.model
    folder = options.scratch / "swapped"
    for name, rank, seed in (("one", 16, 101), ("two", 16, 102), ("wide", 64, 103)):
        write_adapter(folder / name, model, rank, seed, strength=0.1)
    rows = _taking_in(folder, model)
    home = options.scratch / "adapter-swap"
    shutil.rmtree(home, ignore_errors=True)  # registered before, they would not be copied again
    with (
        with_engine(home, SERVICE_ADAPTER_ROOTS=str(folder)) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as http,
    ):
        names = []
        for name in ("one", "wide", "two"):
            loaded, start = _load_seconds(http), time.perf_counter()
            reply = http.post("/adapters", json={"path": str(folder / name)}).raise_for_status()
            seconds = time.perf_counter() - start
            names.append(str(reply.json()["name"]))
            rank = reply.json()["rank"]
            note = f"of it the load {_load_seconds(http) - loaded:.2f} s"
            rows.append(shown(f"POST /adapters, rank {rank}, {name}", seconds, "s", note))
        rows += _swaps(http, url, [names[0], names[2]], 12.0 if options.quick else 60.0, 3.0 if options.quick else 5.0)
    return rows


def _load_seconds(http: httpx.Client) -> float:
    """Of all loads so far."""
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("graft_adapter_load_seconds_sum"))


def _taking_in(folder: Path, model: Path) -> list[Row]:
    rows = []
    base = read_base(str(model), None)
    for name in ("one", "wide"):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        start = time.perf_counter()
        found = take_in(folder / name, copy, base, Limits((folder,), 64, 2048))
        note = f"{found.size / 2**20:.1f} MB copied, hashed and every value looked at"
        rows.append(shown(f"preflight of a rank-{found.rank} adapter", time.perf_counter() - start, "s", note))
    return rows


def _swaps(http: httpx.Client, url: str, names: Sequence[str], seconds: float, pause: float) -> list[Row]:
    alone = {name: _ask(http, {"adapter": name}).answer for name in names}
    if len({answer[:PREFIX] for answer in alone.values()}) < len(names):
        raise GraftError("the adapters answer alike")
    http.post(f"/adapters/{names[0]}/activate").raise_for_status()
    swaps: list[tuple[float, float, str]] = []
    with _asking(url) as asked:
        time.sleep(pause)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            name = names[(len(swaps) + 1) % 2]
            start = time.perf_counter()
            http.post(f"/adapters/{name}/activate").raise_for_status()
            swaps.append((start, time.perf_counter(), name))
            say(f"swap {len(swaps)}: {(swaps[-1][1] - start) * 1000:.0f} ms")
            time.sleep(pause)
    failed = sum(one.adapter is None for one in asked)
    mixed = sum(one.adapter is not None and one.answer[:PREFIX] != alone[one.adapter][:PREFIX] for one in asked)
    late = [_until_new(asked, *swap) for swap in swaps]
    near = [one.first - one.sent for one in asked if any(start <= one.sent <= done + 0.5 for start, done, _ in swaps)]
    far = [
        one.first - one.sent
        for one in asked
        if not any(start - 1 <= one.sent <= done + 1.5 for start, done, _ in swaps)
    ]
    took = [(done - start) * 1000 for start, done, _ in swaps]
    note = f"{len(swaps)} swaps in {seconds:g} s among {CLIENTS} streaming clients, {len(asked)} answers"
    said = f"until it is answered, from when on every new query goes there; median {percentile(took, 50):.0f} ms"
    return [
        at_most("activation, p95", percentile(took, 95), "ms", SWAP_MS, f"{said}; {note}"),
        shown("last query on the old adapter after an activation was sent", max(late), "ms"),
        at_most("failed requests during swaps", failed, "", 0),
        at_most("answers mixed from two adapters", mixed, "", 0, f"told by their first {PREFIX} letters"),
        shown("first token of a query sent during a swap, median", percentile(near, 50), "s", f"{len(near)} queries"),
        shown("first token of a query sent away from swaps, median", percentile(far, 50), "s", f"{len(far)} queries"),
    ]


def _until_new(asked: Sequence[Asked], start: float, done: float, name: str) -> float:
    """-> milliseconds after the activation was sent, until the last query went to the old adapter."""
    old = [one.sent - start for one in asked if start <= one.sent <= done + 2 and one.adapter not in {name, None}]
    return max(old, default=0.0) * 1000


@contextmanager
def _asking(url: str) -> Iterator[list[Asked]]:
    asked: list[Asked] = []
    ended = threading.Event()

    def client() -> None:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            while not ended.is_set():
                asked.append(_ask(http, {}))

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    try:
        yield asked
    finally:
        ended.set()
        for one in clients:
            one.join()


def _ask(http: httpx.Client, fields: dict[str, Any]) -> Asked:
    sent, first, text, adapter = time.perf_counter(), 0.0, "", None
    try:
        with http.stream("POST", "/query", json=QUESTION | fields) as reply:
            event = ""
            for line in reply.iter_lines():
                if line.startswith("event:"):
                    event = line[6:].strip()
                elif line.startswith("data:") and event == "token":
                    first = first or time.perf_counter()
                    text += json.loads(line[5:])["text"]
                elif line.startswith("data:") and event == "done":
                    adapter = json.loads(line[5:])["adapter"]
    except httpx.HTTPError:
        pass
    return Asked(sent, first, time.perf_counter(), adapter, text)
