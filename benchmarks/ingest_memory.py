"""The memory of an ingest job's processes at 1,000, 10,000 and 100,000 chunks: whether it stays as it is.

Vectors come from a server on the loopback that answers at once (`stub_embedder`), since embedding so many would take
hours; so the child holds no model here (`ingest_speed` shows it with one). The owner holds the index, which grows with
what is in it: beside it stands a new process that opens the finished index and searches it once.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import mixed
from benchmarks.ingest_once import Ingested, index_memory, ingest
from benchmarks.processes import Memory
from benchmarks.report import Options, Row, at_most, say, settings, shown
from benchmarks.stub_embedder import serving_vectors
from ingest.embed import load_embedder

SIZES, QUICK_SIZES = (1_000, 10_000, 100_000), (100, 400)
FLAT = 1.25
PER_FILE = 20  # paragraphs, two of which are a chunk


class Measured(NamedTuple):
    job: Ingested
    finished: Memory  # of a process that has only the finished index


def run(options: Options) -> list[Row]:
    found = []
    with serving_vectors() as embedder:
        for size in QUICK_SIZES if options.quick else SIZES:
            with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
                found.append(measure(Path(folder), 2 * size, embedder))
            job = found[-1].job
            say(f"{job.report.chunks.added:,} chunks in {job.report.seconds['total']:.0f} s")
    return _rows(found)


def measure(work: Path, paragraphs: int, embedder: str) -> Measured:
    write_notes(work / "documents", paragraphs)
    job = ingest(work / "home", work / "documents", load_embedder(embedder, settings()))
    assert not job.report.failures, job.report.failures
    return Measured(job, index_memory(work / "home"))


def write_notes(folder: Path, paragraphs: int) -> None:
    """Markdown files of PER_FILE paragraphs under two headings, 100 files a folder."""
    for n in range(paragraphs // PER_FILE):
        file = folder / f"{n // 100:03}" / f"note-{n:05}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        mixed.write_markdown(file, mixed.drawn_blocks(PER_FILE, n, heading_every=PER_FILE // 2))


def _rows(found: list[Measured]) -> list[Row]:
    rows = []
    for part in ("child", "parser", "owner"):
        peaks = [one.job.used[part].peak for one in found]
        sizes = [one.job.report.chunks.added for one in found]
        for one, size, peak in zip(found, sizes, peaks, strict=True):
            note = f"and {peak.mapped:,.0f} MiB of mapped files"
            if part == "owner":
                note += f"; the finished index alone: {one.finished.own:,.0f} and {one.finished.mapped:,.0f} MiB"
            rows.append(shown(f"ingest of {size:,} chunks, peak memory of the {part}", peak.own, "MiB", note))
        name = f"peak memory of the {part}, {sizes[-1]:,} / {sizes[0]:,} chunks"
        ratio = peaks[-1].own / peaks[0].own
        if part == "owner":
            beyond = [max(peak.own - one.finished.own, 0.0) for one, peak in zip(found, peaks, strict=True)]
            grown = (beyond[-1] - beyond[0]) / (sizes[-1] - sizes[0]) * 1000
            rows.append(
                shown(name, ratio, "times", f"beyond the finished index {grown:+.2f} MiB for 1,000 more chunks")
            )
        else:
            rows.append(at_most(name, ratio, "times", FLAT, "embedding by a stub: vectors that mean nothing"))
    last = found[-1].job.report
    rate = last.chunks.added / last.seconds["total"]
    return [*rows, shown(f"ingest of {last.chunks.added:,} chunks, all but the embedding", rate, "chunks/s")]
