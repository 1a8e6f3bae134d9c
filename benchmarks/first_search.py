"""How soon a search finds a document of a large folder that is still coming in, in the real service, over HTTP."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import corpus, mixed
from benchmarks.report import Options, Row, shown, skipped
from benchmarks.service_process import serving
from ingest.errors import GraftError
from service.client import Client
from service.schemas import SearchRequest
from service.schemas_jobs import IngestRequest

EVERY = 0.05  # seconds between two searches
PAPERS, ABSTRACTS = 60, 360  # about 2,400 chunks, as in ingest_speed
NAME = "first"


def run(options: Options) -> list[Row]:
    scifact, covid = options.folder("scifact_train"), options.folder("covid_qa")
    name = "first search that finds a document of a large folder"
    if scifact is None or covid is None:
        return [skipped(name, "it needs --data with scifact_train/ and covid_qa/")]
    if not mixed.can_write():
        return [skipped(name, "it needs reportlab and python-docx: make dev")]
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        work = Path(folder)
        papers = corpus.papers(covid, 2 if options.quick else PAPERS)
        abstracts = corpus.abstracts(scifact, 20 if options.quick else ABSTRACTS)
        files = mixed.write(work / "documents", papers, abstracts)
        with serving(work / "home", [work / "documents"]) as service, Client(service.url) as client:
            return measure(client, work / "documents", len(files))


def measure(client: Client, folder: Path, files: int) -> list[Row]:
    start = time.perf_counter()
    job = client.ingest(IngestRequest(path=str(folder), collection=NAME))
    first = None
    while first is None and client.job(job.job_id).state in {"queued", "running"}:
        with suppress(GraftError):  # no collection yet
            if client.retrieve(SearchRequest(question="infection of the lungs", collection=NAME)).hits:
                first = time.perf_counter() - start
        time.sleep(EVERY)
    ended = client.wait(job.job_id)
    whole = time.perf_counter() - start
    assert ended.state == "succeeded", ended
    assert first is not None, "no search found anything while the job ran"
    note = f"{files} files, {ended.progress.chunks:,} chunks; a search every {EVERY:g} s, from the request to ingest on"
    return [
        shown("first search that finds a document of a large folder", first, "s", note),
        shown("the whole job", whole, "s"),
        shown("first search / whole job", first / whole, "", "what would be waited for without it: 1"),
    ]
