"""How fast a mixed folder (PDF, DOCX, HTML, Markdown) becomes searchable, against the embedder alone on the same chunks.

Both sides run in new processes, with the same runtime, threads and niceness, in turn. The job's time holds the start of its
child, which is also measured by itself.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks import corpus, mixed
from benchmarks.ingest_once import Ingested, embed_alone, indexed_texts, ingest
from benchmarks.report import Options, Row, at_least, median, say, settings, shown, skipped, spread
from ingest.embed import Embedder, load_embedder

RATIO = 0.85
PAPERS, ABSTRACTS = 60, 360  # about 2,400 chunks


def run(options: Options) -> list[Row]:
    scifact, covid = options.folder("scifact_train"), options.folder("covid_qa")
    name = "ingest / embedder alone"
    if scifact is None or covid is None:
        return [skipped(name, "it needs --data with scifact_train/ and covid_qa/")]
    if not mixed.can_write():
        return [skipped(name, "it needs reportlab and python-docx: make dev")]
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        work = Path(folder)
        papers = corpus.papers(covid, 2 if options.quick else PAPERS)
        mixed.write(work / "documents", papers, corpus.abstracts(scifact, 20 if options.quick else ABSTRACTS))
        if not options.quick:
            corpus.copy_examples(work / "documents")
        return end_to_end(options, work, 1 if options.quick else 2)


def end_to_end(options: Options, work: Path, repetitions: int) -> list[Row]:
    """Of the folder `documents` in `work`."""
    folder, one_line = work / "documents", work / "one"
    one_line.mkdir()
    (one_line / "one.txt").write_text("One line, so that what is left is the start of the child.\n")
    configured = settings(options.scratch)
    embedder = load_embedder(configured.embedder, configured)
    starts = [ingest(work / f"home-one-{n}", one_line, embedder).report.seconds["total"] for n in range(repetitions)]
    jobs: list[Ingested] = []
    alone: list[float] = []
    file = work / "texts.json"
    for n in range(repetitions):
        jobs.append(ingest(work / f"home-{n}", folder, embedder))
        if n == 0:
            file.write_text(json.dumps(indexed_texts(work / "home-0")))
        alone.append(embed_alone(file, embedder).seconds)
        say(f"job {jobs[-1].report.seconds['total']:.1f} s, embedder alone {alone[-1]:.1f} s")
    return _rows(embedder, jobs, alone, starts, folder)


def _rows(embedder: Embedder, jobs: list[Ingested], alone: list[float], starts: list[float], folder: Path) -> list[Row]:
    assert not jobs[0].report.failures, jobs[0].report.failures
    (chunks,) = {job.report.chunks.added for job in jobs}
    totals = [job.report.seconds["total"] for job in jobs]
    start = median(starts)
    ratios = [one / total for one, total in zip(alone, totals, strict=True)]
    running = [one / (total - start) for one, total in zip(alone, totals, strict=True)]
    kinds = Counter(file.suffix.lstrip(".") for file in folder.iterdir())
    files = f"{kinds.total()} files ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"
    name = f"{Path(embedder.name).name} on {embedder.runtime}"
    rows = [
        at_least("ingest / embedder alone, chunks/s", median(ratios), "", RATIO, f"each pair: {spread(ratios, 3)}"),
        shown("the same without the start of the child", median(running), "", f"each pair: {spread(running, 3)}"),
        shown("ingest, parse to searchable", chunks / median(totals), "chunks/s", f"{files}, {chunks:,} chunks; {name}"),
        shown("embedder alone, same chunks", chunks / median(alone), "chunks/s", f"runs: {spread(alone)} s"),
        shown("ingest of a file of one line", start, "s", "what every job pays: its child's imports and model load"),
    ]  # fmt: skip
    for stage in ("walk", "parse", "embed", "write", "total"):
        seconds = median([job.report.seconds[stage] for job in jobs])
        rows.append(shown(f"ingest, stage {stage}", seconds, "s", "" if stage == "total" else "overlaps the others"))
    for part, what in (
        ("child", "embeds, weighs words for BM25"),
        ("parser", "reads, splits, tells languages"),
        ("owner", "writes; with its own start"),
    ):
        used = [job.used[part] for job in jobs]
        note = f"{what}; most memory {max(one.peak.own for one in used):,.0f} MiB"
        rows.append(
            shown(f"ingest, processor time of the {part}", median([one.cpu_seconds for one in used]), "s", note)
        )
    return rows
