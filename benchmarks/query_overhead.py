"""What `/query` costs beyond embedding, searching and the engine, under an open-loop load; the engine is replaced at the wire.

The bar is on what the service itself reports (total - embed - search - rerank - generate). Beside it stands what a client
sees beyond the same four parts, which holds HTTP and the writing of the record as well.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import wire_engine
from benchmarks.load import Reply, open_loop
from benchmarks.report import Options, Row, at_most, percentile, say, shown
from benchmarks.service_process import serving
from ingest.settings import CHECKOUT
from service.client import Client
from service.schemas_jobs import IngestRequest

P99_MS = 6.0
QUESTIONS = (
    "How often must the oil of the Heron H75 be changed?",
    "What is the impeller of the Heron H75 made of?",
    "At which clearance must the wear ring of a K40 be replaced?",
    "How many times per hour may a Kestrel K40 be started?",
    "How long does TideBoard keep raw readings?",
    "How many days of annual leave does a full-time employee have?",
    "By when do carried-over leave days have to be used up?",
    "For how long must a fire watch stay after welding?",
    "What load may the crane in the pump workshop carry?",
    "Why did the emergency generator at Reservoir Lane fail to start?",
    "What is the volume of the surge vessel at Millbrook?",
    "How hard is the water that comes from the boreholes?",
)


def run(options: Options) -> list[Row]:
    loads = [(20, 2.0), (100, 1.0)] if options.quick else [(20, 60.0), (100, 10.0)]
    examples = CHECKOUT / "examples"
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="graft-bench-") as folder,
        wire_engine.answering() as engine,
        serving(Path(folder) / "home", [examples], engine) as service,
    ):
        with Client(service.url) as client:
            job = client.wait(client.ingest(IngestRequest(path=str(examples))).job_id)
            assert job.state == "succeeded", job
        bodies = [{"question": question, "source": "bench"} for question in QUESTIONS]
        open_loop(f"{service.url}/query", bodies, 10, 1 if options.quick else 5)  # to warm up
        for rate, seconds in loads:
            say(f"{rate} questions a second for {seconds:g} s")
            replies = open_loop(f"{service.url}/query", bodies, rate, seconds)
            rows += _rows(replies, rate, seconds, with_bar=rate == loads[0][0])
    return rows


def _rows(replies: Sequence[Reply], rate: int, seconds: float, with_bar: bool) -> list[Row]:
    timings = [reply.body["timings_ms"] for reply in replies if reply.body]
    overheads = [overhead(one["total"], one) for one in timings]
    beyond = [overhead(reply.milliseconds, reply.body["timings_ms"]) for reply in replies if reply.body]
    failed = len(replies) - len(timings)
    what = f"/query overhead at {rate} a second"
    note = f"{len(replies):,} questions in {seconds:g} s, {failed} failed; p50 {percentile(overheads, 50):.2f} ms"
    p99 = percentile(overheads, 99)
    first = at_most(f"{what}, p99", p99, "ms", P99_MS, note) if with_bar else shown(f"{what}, p99", p99, "ms", note)
    return [
        first._replace(holds=False) if failed and with_bar else first,
        shown(
            f"{what}, as a client sees it, p99",
            percentile(beyond, 99),
            "ms",
            f"with HTTP and the record's writing; p50 {percentile(beyond, 50):.2f} ms",
        ),
        shown(
            f"/query at {rate} a second, in all, p99",
            percentile([reply.milliseconds for reply in replies], 99),
            "ms",
            "p50 by part: "
            + ", ".join(
                f"{part} {percentile([one[part] for one in timings], 50):.1f}"
                for part in ("embed", "search", "generate")
            )
            + f" ms; the engine's own {wire_engine.TOKENS * wire_engine.PAUSE * 1000:.0f}",
        ),
    ]


def overhead(total: float, timings: dict[str, float]) -> float:
    return total - sum(timings[part] for part in ("embed", "search", "rerank", "generate"))
