"""A folder full of trouble goes through one job that ends: each file is accounted for, and nothing outside is touched."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import broken_files
import httpx
import psutil
import pytest
from broken_files import DONE, FAILED, SKIPPED, archive
from service_fixtures import Service, WireEngine, is_ready, running, until
from test_ingest_pipeline import Home, Stored, Watch

from ingest.pipeline import IngestJob
from ingest.schemas import Report
from ingest.settings import IngestSettings
from ingest.sync import Folder
from ingest.writer import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PEAK_BYTES = 1.5 * 2**30  # of all processes together, with a parser that may take 1 GiB
LIMITS = {"INGEST_PARSE_MEMORY_MB": "1024", "INGEST_PARSE_SECONDS": "20"}
DIMENSION = 4  # of the vectors that are had at the wire: to embed all the numbers of the sheet takes minutes
GOOD = {
    "a good page": "good/good.pdf",
    "a good document": "good/good.docx",
    "good": "good/good.html",
    "a good file": "a-good.md",
    "the last file is good too": "zz-good.txt",
}


class Corpus(NamedTuple):
    """`expected`: how each file below `folder` may end. Beside `folder` lie files that hold `zyzzyva`."""

    root: Path
    folder: Path
    expected: dict[str, str]


def corpus(root: Path, line_bytes: int = 10 * 2**20) -> Corpus:
    folder = root / "docs"
    folder.mkdir()
    expected = broken_files.write(folder, line_bytes)
    (root / "outside").mkdir()
    (root / "outside/secret.md").write_text("A zyzzyva is a weevil.\n")
    (folder / "leak.md").symlink_to(root / "outside/secret.md")
    (folder / "leak").symlink_to(root / "outside")
    slips = {f"{up}outside/slipped.md": b"A zyzzyva slipped." for up in ("../", "../../", "../../../", f"{root}/")}
    (folder / "slips.zip").write_bytes(archive({**slips, "good.md": b"A good member."}))
    own = {"leak.md": FAILED, "leak": FAILED, "slips.zip": "done or failed"}
    own["documents/self-reference.pdf"] = "done, failed or skipped"  # a page without text, where there is no OCR
    return Corpus(root, folder, {shown(name): outcome for name, outcome in {**expected, **own}.items()})


def embedder_of(engine: WireEngine) -> str:
    return f"{engine.url}#wire-embedder"


def shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def listing(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, below, names in os.walk(folder) for name in below + names}


class Looking:
    """Looks, in a thread, for as long as `watched` lasts."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def _run(self) -> None:
        raise NotImplementedError

    @contextmanager
    def watched(self) -> Iterator[Self]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()


class Peak(Looking):
    """The most memory that a process has taken with its children, beyond what it had when it began. Bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.bytes = 0
        self.owner_bytes = 0
        self._before = process.memory_info().rss
        self._there = {one.pid for one in process.children(recursive=True)}  # of other tests
        super().__init__()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            own = self.process.memory_info().rss - self._before
            self.owner_bytes = max(self.owner_bytes, own)
            made = [one for one in self.process.children(recursive=True) if one.pid not in self._there]
            self.bytes = max(self.bytes, own + sum(map(_resident, made)))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


class Through(NamedTuple):
    """The corpus after its job. `before`, `after`: all files at and below its root, without the home's."""

    corpus: Corpus
    report: Report
    done: set[str]
    points: list[Stored]
    found: dict[str, set[str]]
    peak: Peak
    before: set[str]
    after: set[str]
    left_over: list[psutil.Process]


@pytest.fixture(scope="module")
def through(models: Path, tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Through:
    made = corpus(tmp_path_factory.mktemp("broken"))
    home = Home(
        IngestSettings(
            home=tmp_path_factory.mktemp("homes") / "broken", models=models, embedder=embedder_of(wire_engine), threads=2,
            parse_memory_mb=1024, parse_seconds=20,
        ),
        made.folder,
    )  # fmt: skip
    before, watch = listing(made.root), Watch()
    with Peak(psutil.Process()).watched() as peak:
        target = Target(home.index, home.collection.index, DIMENSION, "e" * 64)
        source = Folder(made.folder, made.root)
        job = IngestJob(
            home.catalog, target, home.settings, home.collection, source, runtime="onnxruntime", report_progress=watch
        )
        report = job.run()
    done = {path for path, document in home.documents().items() if document.state == "done"}
    found = {question: {hit.path.removeprefix("docs/") for hit in home.find(question)} for question in GOOD}
    points = list(home.points().values())
    home.index.close()
    return Through(made, report, done, points, found, peak, before, listing(made.root), watch.left_over())


def outcomes(report: Report, done: set[str]) -> dict[str, str]:
    """By path below the folder. Each file has one."""
    told = [(one.path, FAILED) for one in report.failures] + [(one.path, SKIPPED) for one in report.skips]
    told = [(path.removeprefix("docs/"), outcome) for path, outcome in told] + [(path, DONE) for path in done]
    assert len(told) == len(dict(told))
    return dict(told)


def unexpected(found: dict[str, str], expected: dict[str, str]) -> dict[str, str | None]:
    """Files that did not end as they may, those that are not told of, and those that nobody knows."""
    wrong = {path: found.get(path) for path, allowed in expected.items() if (found.get(path) or "?") not in allowed}
    inside = tuple(f"{path}/" for path, allowed in expected.items() if allowed != FAILED)
    unknown = {path: found[path] for path in found.keys() - expected.keys() if not path.startswith(inside)}
    return {**wrong, **unknown}


def test_every_file_is_accounted_for_as_it_may_end(through: Through) -> None:
    found = outcomes(through.report, through.done)
    assert unexpected(found, through.corpus.expected) == {}
    counts = through.report.files
    assert (counts.done, counts.failed, counts.skipped) == tuple(
        list(found.values()).count(outcome) for outcome in (DONE, FAILED, SKIPPED)
    )


def test_every_failure_says_where_and_why(through: Through) -> None:
    for failure in through.report.failures:
        assert len(failure.reason.split()) > 2, failure
        assert "Traceback" not in failure.reason
        assert len(failure.reason) < 500
    reasons = {failure.path.removeprefix("docs/"): failure.reason for failure in through.report.failures}
    assert "INGEST_PASSWORDS" in reasons["documents/encrypted.pdf"]
    assert "INGEST_PASSWORDS" in reasons["archives/encrypted.zip"]
    assert "INGEST_ARCHIVE_RATIO" in reasons["archives/bomb.zip"]
    assert any(
        "INGEST_ARCHIVE_DEPTH" in why for path, why in reasons.items() if path.startswith("archives/nested.zip/")
    )


def test_the_good_files_are_found(through: Through) -> None:
    assert {path for question, path in GOOD.items() if path not in through.found[question]} == set()


def test_memory_is_bounded_and_no_process_is_left(through: Through) -> None:
    assert through.peak.bytes < PEAK_BYTES
    assert through.peak.owner_bytes < 500 * 2**20
    assert through.left_over == []


def test_nothing_outside_the_folder_was_read_or_written(through: Through) -> None:
    assert through.after == through.before
    texts = [point.payload["text"] for point in through.points]
    assert not [text for text in texts if "zyzzyva" in text or "root:x:" in text]
    assert not any(Path(place, "evil.md").exists() for place in ("/etc", "/tmp", "/"))


class Asked(Looking):
    """Asks the service ten times a second. `slowest`: seconds; `wrong`: answers of another status than 200."""

    def __init__(self, service: Service, path: str) -> None:
        self.service, self.path = service, path
        self.times: list[float] = []
        self.wrong: list[Any] = []
        super().__init__()

    def _run(self) -> None:
        with httpx.Client(base_url=self.service.url, timeout=30, trust_env=False) as http:
            while not self._ended.wait(0.1):
                begun = time.monotonic()
                try:
                    reply = http.post(self.path, json={"question": "How often is the pump serviced?"})
                    if reply.status_code != 200:
                        self.wrong.append(reply.text)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                self.times.append(time.monotonic() - begun)


def test_a_running_service_answers_meanwhile(tmp_path: Path, wire_engine: WireEngine) -> None:
    """While a file vanishes again and again."""
    wire_engine.reset()
    made = corpus(tmp_path, 2**20)
    first = tmp_path / "first"
    first.mkdir()
    (first / "pump.md").write_text("# Pump\n\n" + broken_files.TEXT)
    home = tmp_path / "home"
    settings = {**LIMITS, "INGEST_EMBEDDER": embedder_of(wire_engine)}
    with running(home, tmp_path, "--no-engine", SERVICE_LLM_URL=wire_engine.url, **settings) as service:
        until(lambda: is_ready(service), 120)
        service.ingest(first)
        owner = Peak(psutil.Process(service.process.pid))
        with (
            Asked(service, "/query").watched() as queries,
            Asked(service, "/retrieve").watched() as searches,
            owner.watched() as peak,
            broken_files.vanishing(made.folder) as vanishing,
        ):
            reply = service.http.post("/ingest", json={"path": str(made.folder)})
            assert reply.status_code == 202, reply.text
            job = service.wait(reply.json()["job_id"], 600)
        assert job["state"] == "succeeded", job
        listed = service.http.get("/documents", params={"path": "docs", "limit": 10_000}).json()
    report = Report.model_validate(job["report"])
    done = {one["path"].removeprefix("docs/") for one in listed if one["state"] == "done"}
    found = outcomes(report, done)
    assert found.pop(vanishing.name, None) in {None, DONE, FAILED}
    assert unexpected(found, made.expected) == {}
    for asked in (queries, searches):
        assert asked.wrong == []
        assert len(asked.times) > 20
        assert max(asked.times) < 3
    assert peak.bytes < PEAK_BYTES
