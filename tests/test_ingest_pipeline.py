"""Ingest jobs over the life of a folder: what is indexed follows the files, and nothing is done twice."""

import io
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import qdrant_edge as edge
from numpy.typing import NDArray
from reportlab.pdfgen.canvas import Canvas
from sqlalchemy import func, select

from ingest.catalog import Catalog, Collection, Document, now, texts
from ingest.db import connect, migrate
from ingest.errors import InvalidError, NotFoundError, UnavailableError
from ingest.index import Filter, search
from ingest.index_edge import EdgeIndex
from ingest.pipeline import Cancelled, IngestJob, Options
from ingest.schemas import Chunking, Hit, Progress, Report, Retrieval
from ingest.settings import IngestSettings
from ingest.sync import Folder, Labelling
from ingest.writer import Target

PUMP = """# Pump manual

## Oil

The seal chamber holds 3.2 litres of oil.

## Bearings

Grease the bearings every 2,000 hours.

## Impeller

The impeller is made of white iron.

## Cable

The cable is ten metres long.
"""


class Stored(NamedTuple):
    payload: dict[str, Any]
    dense: NDArray[np.float32]


class Home:
    """A catalog and an index of their own, and jobs over one folder into them."""

    def __init__(self, settings: IngestSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        settings.home.mkdir(parents=True, exist_ok=True)
        engine = connect(settings.sqlalchemy_url())
        migrate(engine)
        self.catalog = Catalog(engine)
        self.collection = Collection(
            name="default", embedder=settings.embedder, chunking=Chunking(), fingerprint="f" * 64, prompt="auto",
            created_at=now(),
        )  # fmt: skip
        self.catalog.put_collection(self.collection)
        self.index = EdgeIndex(settings.home / "index")

    def job(self, acl: Any = None, metadata: Any = None, allow_empty: bool = False, **others: Any) -> IngestJob:
        target = Target(self.index, self.collection.index, 384, "e" * 64)
        options = Options(Labelling(acl, metadata), allow_empty)
        return IngestJob(
            self.catalog, target, self.settings, self.collection, Folder(self.folder, self.folder.parent), options,
            runtime="onnxruntime", **others,
        )  # fmt: skip

    def documents(self) -> dict[str, Document]:
        return {document.path.removeprefix("docs/"): document for document in self.catalog.documents("default")}

    def points(self) -> dict[str, Stored]:
        """Everything that the index holds, read by the engine from its folder while ours is closed."""
        self.index.close()
        shard = edge.EdgeShard.load(str(self.settings.home / "index" / self.collection.index))
        records, _ = shard.scroll(edge.ScrollRequest(limit=100_000, with_payload=True, with_vector=True))
        points = {}
        for record in records:
            vectors: Any = record.vector
            points[str(record.id)] = Stored(record.payload or {}, np.asarray(vectors["dense"], dtype=np.float32))
        shard.close()
        self.index = EdgeIndex(self.settings.home / "index")
        return points

    def find(self, question: str) -> list[Hit]:
        return search(self.index, self.collection.index, None, question, Filter(), Retrieval(), 5)

    def kept_texts(self) -> int:
        with self.catalog.engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(texts)).scalar_one()


class Moment(NamedTuple):
    """How a home stood after a job. `found`: the paths that searches for telling words gave."""

    report: Report
    documents: dict[str, Document]
    points: dict[str, Stored]
    kept_texts: int
    found: dict[str, set[str]]

    def chunks(self, path: str) -> dict[str, str]:
        """-> text by chunk id."""
        identity = self.documents[path].id
        stored = {key: point.payload for key, point in self.points.items()}
        return {key: payload["text"] for key, payload in stored.items() if payload["document_id"] == identity}

    def payloads(self, path: str) -> list[dict[str, Any]]:
        identity = self.documents[path].id
        return [point.payload for point in self.points.values() if point.payload["document_id"] == identity]


WORDS = ("zyzzyva", "mooring", "quarterly", "hunter2", "kumquat")


def run(home: Home, **options: Any) -> Moment:
    report = home.job(**options).run()
    found = {word: {hit.path.removeprefix("docs/") for hit in home.find(word) if word in hit.text} for word in WORDS}
    return Moment(report, home.documents(), home.points(), home.kept_texts(), found)


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def pdf(text: str, password: str | None = None) -> bytes:
    out = io.BytesIO()
    canvas = Canvas(out, encrypt=password)
    canvas.drawString(72, 700, text)
    canvas.showPage()
    canvas.save()
    return out.getvalue()


class Watch:
    """Notes the progress of a job, and every process that is started meanwhile, the parser's included."""

    def __init__(self) -> None:
        self.before = set(psutil.Process().children(recursive=True))
        self.started: set[psutil.Process] = set()
        self.progress: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.started |= set(psutil.Process().children(recursive=True)) - self.before

    def left_over(self) -> list[psutil.Process]:
        return psutil.wait_procs(self.started, timeout=10)[1]


@pytest.fixture
def home(settings: IngestSettings, tmp_path: Path) -> Home:
    (tmp_path / "docs").mkdir()
    return Home(settings, tmp_path / "docs")


@pytest.fixture(scope="module")
def life(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Moment]:
    """Jobs one after the other over one folder that changes between them. Jobs without a file to read are quick."""
    root = tmp_path_factory.mktemp("life")
    folder = root / "docs"
    settings = IngestSettings(home=root / "home", models=models, embedder_runtime="onnxruntime", threads=2)
    write(
        folder,
        {
            "pump.md": PUMP,
            "figures.txt": "The tank holds 1234 litres.",
            "old.md": "# Mooring\n\nThe mooring line is blue.\n",
            "gone.md": "# Words\n\nA zyzzyva is a weevil.\n",
            "report.pdf": pdf("The quarterly report is short."),
            "same.txt": "Rewritten with the same bytes.",
        },
    )
    home = Home(settings, folder)
    moments = {"first": run(home), "again": run(home)}

    write(folder, {"pump.md": PUMP.replace("3.2 litres", "3.4 litres"), "figures.txt": "The tank holds 5678 litres."})
    (folder / "archive").mkdir()
    (folder / "old.md").rename(folder / "archive/new.md")
    (folder / "gone.md").unlink()
    write(
        folder,
        {
            "same.txt": "Rewritten with the same bytes.",
            "report.pdf": b"%PDF-1.4 torn",
            "locked.pdf": pdf("hunter2", password="hunter2"),
            "torn.docx": b"PK\x03\x04" + b"garbage" * 50,
            "empty.txt": b"",
            "sound.mp3": b"ID3\x04\x00",
        },
    )
    write(root, {"outside/secret.txt": "The password is hunter2."})
    (folder / "leak.txt").symlink_to(root / "outside/secret.txt")
    (folder / "leak").symlink_to(root / "outside")
    (folder / "inside.md").symlink_to("pump.md")
    for name in ("figures.txt", "same.txt"):
        os.utime(folder / name, ns=(2**60, 2**60))
    moments["changed"] = run(home)

    for name in ("report.pdf", "locked.pdf", "torn.docx", "empty.txt", "sound.mp3", "leak.txt", "leak", "inside.md"):
        (folder / name).unlink()
    moments["staff"] = run(home, acl=["staff"], metadata={"site": "north"})
    moments["silent"] = run(home)
    moments["board"] = run(home, acl=["board", "audit"])

    write(folder, {"old.md": "A kumquat under an old name.\n", "figures.txt": "The tank holds 9999 litres."})
    os.utime(folder / "figures.txt", ns=(2**60 + 1, 2**60 + 1))
    moments["later"] = run(home)
    moments["everybody"] = run(home, acl=[])

    shutil.rmtree(folder)
    folder.mkdir()
    moments["emptied"] = run(home)
    moments["allowed"] = run(home, allow_empty=True)
    home.index.close()
    return moments


def test_a_folder_is_brought_in_and_found(life: dict[str, Moment]) -> None:
    first = life["first"]
    assert first.report.files.model_dump(exclude_defaults=True) == {"done": 6}
    assert first.report.chunks.added == len(first.points) == 9
    assert first.found["zyzzyva"] == {"gone.md"}
    assert first.found["quarterly"] == {"report.pdf"}
    assert all(document.state == "done" for document in first.documents.values())
    assert first.kept_texts == 6
    payload = next(payload for payload in first.payloads("pump.md") if "bearings" in payload["text"])
    assert payload["path"] == "docs/pump.md"
    assert payload["folders"] == ["docs/pump.md", "docs"]
    assert payload["heading"] == "Pump manual > Bearings"
    assert PUMP[payload["start"] : payload["end"]] == payload["text"]


def same_points(one: Mapping[str, Stored], other: Mapping[str, Stored]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].payload == other[key].payload and np.array_equal(one[key].dense, other[key].dense) for key in one
    )


def test_a_second_run_writes_nothing(life: dict[str, Moment]) -> None:
    again = life["again"]
    assert again.report.files.model_dump(exclude_defaults=True) == {"unchanged": 6}
    assert again.report.chunks.model_dump(exclude_defaults=True) == {}
    assert same_points(again.points, life["first"].points)
    assert again.documents == life["first"].documents
    assert again.kept_texts == 6


def test_an_edit_changes_its_own_chunk_and_keeps_the_others(life: dict[str, Moment]) -> None:
    before, after = life["first"].chunks("pump.md"), life["changed"].chunks("pump.md")
    assert len(before) == len(after) == 4
    assert len(before.keys() & after.keys()) == 3
    (edited,) = [text for key, text in after.items() if key not in before]
    assert "3.4 litres" in edited
    assert not any("3.2 litres" in text for text in after.values())
    for key in before.keys() & after.keys():
        assert np.array_equal(life["first"].points[key].dense, life["changed"].points[key].dense)


def test_an_edit_that_keeps_the_size_is_seen(life: dict[str, Moment]) -> None:
    assert list(life["changed"].chunks("figures.txt").values()) == ["The tank holds 5678 litres."]
    assert life["changed"].documents["figures.txt"].size == life["first"].documents["figures.txt"].size


def test_a_file_rewritten_with_the_same_bytes_is_not_read_again(life: dict[str, Moment]) -> None:
    before, after = life["first"].documents["same.txt"], life["changed"].documents["same.txt"]
    assert after.indexed_at == before.indexed_at
    assert after.stamp == 2**60
    assert life["changed"].report.files.unchanged == 1


def test_a_moved_file_keeps_its_document_and_is_not_embedded_again(life: dict[str, Moment]) -> None:
    before, after = life["first"], life["changed"]
    assert after.report.files.moved == 1
    assert after.documents["archive/new.md"].id == before.documents["old.md"].id
    assert after.documents["archive/new.md"].indexed_at == before.documents["old.md"].indexed_at
    assert after.chunks("archive/new.md") == before.chunks("old.md")
    (payload,) = after.payloads("archive/new.md")
    assert payload["folders"] == ["docs/archive/new.md", "docs/archive", "docs"]
    assert after.found["mooring"] == {"archive/new.md"}


def test_a_new_file_under_the_name_of_a_moved_one_is_another_document(life: dict[str, Moment]) -> None:
    later = life["later"]
    assert later.documents["old.md"].id != later.documents["archive/new.md"].id
    assert later.documents["archive/new.md"].id == life["first"].documents["old.md"].id
    assert (later.found["kumquat"], later.found["mooring"]) == ({"old.md"}, {"archive/new.md"})


def test_only_what_is_new_was_embedded(life: dict[str, Moment]) -> None:
    """The edited section and the edited figures."""
    assert life["changed"].report.chunks.added == 2
    assert len(life["changed"].points.keys() - life["first"].points.keys()) == 2


def test_a_deleted_file_leaves_no_trace(life: dict[str, Moment]) -> None:
    changed = life["changed"]
    assert changed.report.files.deleted == 1
    assert "gone.md" not in changed.documents
    assert changed.found["zyzzyva"] == set()
    assert not any("zyzzyva" in point.payload["text"] for point in changed.points.values())
    assert changed.kept_texts == len({document.text_hash for document in changed.documents.values()} - {None})


def test_bad_files_are_told_with_stage_and_reason_and_the_rest_is_taken_in(life: dict[str, Moment]) -> None:
    report = life["changed"].report
    told = {failure.path.removeprefix("docs/"): (failure.stage, failure.reason) for failure in report.failures}
    assert told.keys() == {"report.pdf", "locked.pdf", "torn.docx", "empty.txt", "leak.txt", "leak"}
    assert report.files.failed == 6
    assert told["empty.txt"] == ("parse", "the file is empty")
    assert "it is encrypted with a password" in told["locked.pdf"][1]
    assert told["torn.docx"][0] == told["report.pdf"][0] == "parse"
    assert report.files.done == 2
    failed = life["changed"].documents["torn.docx"]
    assert (failed.state, failed.stage, failed.reason) == ("failed", *told["torn.docx"])


def test_a_file_without_text_is_skipped_not_failed(life: dict[str, Moment]) -> None:
    skipped = {skip.path.removeprefix("docs/"): skip.reason for skip in life["changed"].report.skips}
    assert skipped.keys() == {"sound.mp3", "inside.md"}
    assert skipped["sound.mp3"] == "no text is read from audio or video files"


def test_a_link_out_of_the_folder_is_reported_and_nothing_behind_it_is_read(life: dict[str, Moment]) -> None:
    changed = life["changed"]
    leaks = [failure for failure in changed.report.failures if "leak" in failure.path]
    assert [failure.reason for failure in leaks] == ["a symbolic link that leaves the folder; it was not followed"] * 2
    assert changed.found["hunter2"] == set()
    assert not any("leak" in path or "secret" in path for path in changed.documents)


def test_a_file_that_went_bad_keeps_its_earlier_version_searchable(life: dict[str, Moment]) -> None:
    changed = life["changed"]
    assert changed.found["quarterly"] == {"report.pdf"}
    assert changed.documents["report.pdf"].state == "failed"
    assert changed.documents["report.pdf"].text_hash == life["first"].documents["report.pdf"].text_hash
    assert changed.chunks("report.pdf") == life["first"].chunks("report.pdf")


def lists(moment: Moment) -> set[tuple[str, ...]]:
    return {tuple(point.payload["acl"]) for point in moment.points.values()}


def test_an_access_list_reaches_every_chunk_without_embedding(life: dict[str, Moment]) -> None:
    assert lists(life["first"]) == lists(life["changed"]) == {()}
    assert lists(life["staff"]) == {("staff",)}
    assert all(document.acl == ("staff",) for document in life["staff"].documents.values())
    assert life["staff"].report.chunks.added == 0
    assert {point.payload["metadata"]["site"] for point in life["staff"].points.values()} == {"north"}


def test_a_later_job_without_an_access_list_keeps_the_one_that_is_set(life: dict[str, Moment]) -> None:
    assert life["silent"].report.files.model_dump(exclude_defaults=True) == {"unchanged": 4}
    assert same_points(life["silent"].points, life["staff"].points)


def test_another_access_list_rewrites_the_payloads_alone(life: dict[str, Moment]) -> None:
    staff, board = life["staff"], life["board"]
    assert lists(board) == {("audit", "board")}
    assert board.report.chunks.model_dump(exclude_defaults=True) == {"kept": len(staff.points)}
    for key, point in staff.points.items():
        assert np.array_equal(board.points[key].dense, point.dense)
        assert board.points[key].payload == {**point.payload, "acl": ["audit", "board"]}


def test_an_edited_file_keeps_its_access_list_and_metadata(life: dict[str, Moment]) -> None:
    (payload,) = life["later"].payloads("figures.txt")
    assert payload["text"] == "The tank holds 9999 litres."
    assert payload["acl"] == ["audit", "board"]
    assert payload["metadata"] == {"site": "north"}
    (fresh,) = life["later"].payloads("old.md")
    assert (fresh["acl"], fresh["metadata"]) == ([], {})


def test_an_empty_access_list_opens_the_documents_to_everybody(life: dict[str, Moment]) -> None:
    assert lists(life["everybody"]) == {()}


def test_an_emptied_folder_deletes_nothing_and_says_so(life: dict[str, Moment]) -> None:
    emptied = life["emptied"]
    assert emptied.report.files.deleted == 0
    assert same_points(emptied.points, life["everybody"].points)
    assert "nothing was deleted" in emptied.report.notes[0]
    assert "allow_empty" in emptied.report.notes[0]


def test_an_emptied_folder_empties_the_index_when_that_is_allowed(life: dict[str, Moment]) -> None:
    allowed = life["allowed"]
    assert allowed.report.files.deleted == 5
    assert (allowed.points, allowed.documents, allowed.kept_texts) == ({}, {}, 0)
    assert allowed.report.notes == ()


@pytest.mark.slow
def test_a_file_of_an_unread_kind_is_not_looked_at_again(home: Home) -> None:
    write(home.folder, {"a.md": "Words.", "sound.mp3": b"ID3\x04\x00"})
    first = home.job().run()
    watch = Watch()
    second = home.job(report_progress=watch).run()
    assert second.files.skipped == first.files.skipped == 1
    assert second.skips == first.skips
    assert second.files.unchanged == 1
    assert watch.started == set()


def test_a_folder_that_is_not_there_is_refused(home: Home) -> None:
    home.folder.rmdir()
    with pytest.raises(InvalidError, match=r"docs' cannot be read: No such file"):
        home.job().run()


def test_an_embedder_that_is_not_there_fails_the_job_with_the_remedy(home: Home) -> None:
    write(home.folder, {"a.txt": "Words."})
    home.collection = home.collection.model_copy(update={"embedder": "no-such-model"})
    watch = Watch()
    with pytest.raises(UnavailableError, match=r"no-such-model.*make models"):
        home.job(report_progress=watch).run()
    assert watch.started
    assert watch.left_over() == []


@pytest.mark.slow
def test_a_cancelled_job_ends_its_processes_and_the_next_one_completes_it(home: Home) -> None:
    paragraph = "\n\n".join(f"## Part {n}\n\nPart {n} of file %d." for n in range(5))
    write(home.folder, {f"{n}.md": paragraph.replace("%d", str(n)) for n in range(50)})
    watch = Watch()
    job = home.job(cancelled=lambda: bool(watch.progress) and watch.progress[-1].chunks > 0, report_progress=watch)
    with pytest.raises(Cancelled):
        job.run()
    assert 0 < watch.progress[-1].chunks < 250
    assert watch.progress[-1].files_total == 50
    assert len(watch.started) >= 2
    assert watch.left_over() == []

    watch = Watch()
    report = home.job(report_progress=watch).run()
    assert report.files.done + report.files.unchanged == 50
    assert report.chunks.added < 250
    assert {document.state for document in home.documents().values()} == {"done"}
    assert len(home.points()) == 250
    assert watch.left_over() == []


@pytest.mark.slow
def test_a_job_over_its_time_ends_with_every_file_in_a_last_state(home: Home) -> None:
    write(home.folder, {f"{n}.md": f"# Part {n}\n\nThe part is blue." for n in range(60)})
    job = home.job()
    job.deadline = time.monotonic() + 3600

    def stop(progress: Progress) -> None:
        if progress.chunks:
            job.deadline = 0

    job.report_progress = stop
    with pytest.raises(Cancelled) as caught:
        job.run()
    assert caught.value.expired
    report = caught.value.report
    assert report is not None
    assert report.files.done < 60
    assert {document.state for document in home.documents().values()} <= {"done", "failed"}
    assert {failure.reason for failure in report.failures} == {
        "the job ended before it was done; the next one takes it up"
    }
    assert home.job().run().files.model_dump(exclude_defaults=True).keys() == {"done", "unchanged"}


def test_a_child_that_says_nothing_for_too_long_ends_the_job(home: Home) -> None:
    write(home.folder, {"a.md": "Words."})
    home.settings = home.settings.model_copy(update={"stall_seconds": 0.2})  # less than its start takes
    watch = Watch()
    with pytest.raises(UnavailableError, match=r"no sign of life for INGEST_STALL_SECONDS \(0\.2 s\)"):
        home.job(report_progress=watch).run()
    assert watch.left_over() == []


@pytest.mark.slow
def test_a_child_that_dies_between_two_documents_fails_the_job(home: Home) -> None:
    write(home.folder, {"a.md": "Words.", "b.md": "More words."})
    watch = Watch()

    def kill(progress: Progress) -> None:
        watch(progress)
        for process in watch.started:
            if process.ppid() == os.getpid():
                process.kill()

    with pytest.raises(UnavailableError, match="the ingest child died"):
        home.job(report_progress=kill).run()
    assert home.job().run().files.done == 2


@pytest.mark.slow
def test_a_broken_deletion_is_finished_by_the_next_job(home: Home) -> None:
    write(home.folder, {"a.md": "A zyzzyva is a weevil."})
    home.job().run()
    (document,) = home.documents().values()
    home.catalog.remove([document.id])  # and then the process died
    assert home.find("zyzzyva")
    assert home.job().run().files.skipped == 1
    assert home.find("zyzzyva") == []


@pytest.mark.slow
def test_a_document_that_is_deleted_while_a_job_runs_stays_deleted(home: Home) -> None:
    write(home.folder, {"a.md": "A zyzzyva is a weevil.", "b.md": "Words."})
    home.job().run()
    identity = home.documents()["a.md"].id
    write(home.folder, {"a.md": "A zyzzyva is a beetle.", "b.md": "Other words."})
    job = home.job()
    job.report_progress = lambda progress: None if progress.chunks else home.catalog.remove([identity])
    job.run()
    assert home.find("zyzzyva") == []
    assert home.catalog.document(identity).state == "removed"


@pytest.mark.slow
def test_a_deletion_that_is_cut_off_is_seen_when_the_files_come_back(home: Home) -> None:
    names = {f"{n}.md": f"The mooring {n} is blue." for n in range(5)}
    write(home.folder, {"kept.md": "Words.", **names})
    home.job().run()
    for name in names:
        (home.folder / name).rename(home.folder.parent / name)
    job = home.job()
    job._drop = lambda ids: (_ for _ in ()).throw(Cancelled)  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        job.run()
    for name in names:
        (home.folder.parent / name).rename(home.folder / name)
    home.job().run()
    assert len(home.points()) == 6


def test_text_that_no_index_takes_costs_no_job(home: Home) -> None:
    write(home.folder, {"a.md": '---\ntitle: "a\\ud800b"\nacl: ["x\\ud800"]\n---\nA salmon.', "b.md": "A trout."})
    assert home.job().run().files.done == 2
    assert home.documents()["a.md"].labels()["title"] == "a?b"


@pytest.mark.slow
def test_progress_ends_with_all_files_and_bytes(home: Home) -> None:
    write(home.folder, {"a.md": "Words. " * 50, "b.pdf": pdf("One page."), "c.bin": b"\0\1"})
    home.job().run()
    write(home.folder, {"d.md": "More words.", "a.md": "Other words. " * 50, "e.pdf": pdf("Another page.")})
    told: list[Progress] = []
    home.job(report_progress=told.append).run()
    last = told[-1]
    assert (last.files_total, last.files, last.pages) == (5, 5, 1)
    assert (
        last.bytes_total == last.bytes == sum((home.folder / name).stat().st_size for name in ("a.md", "d.md", "e.pdf"))
    )
    assert [one.files for one in told] == sorted(one.files for one in told)


@pytest.mark.slow
def test_a_forgotten_collection_takes_its_documents_and_texts_along(home: Home) -> None:
    write(home.folder, {"a.txt": "Words of this collection."})
    home.job().run()
    (document,) = home.documents().values()
    assert home.catalog.text(document.id).text == "Words of this collection."
    home.catalog.delete_collection("default")
    home.index.drop(home.collection.index)
    assert home.kept_texts() == 0
    assert home.find("words") == []
    with pytest.raises(NotFoundError, match="no collection 'default'"):
        home.catalog.collection("default")
    with pytest.raises(NotFoundError, match="no document"):
        home.catalog.document(document.id)


@pytest.mark.slow
def test_a_file_that_breaks_the_parsers_limits_costs_that_file_alone(models: Path, tmp_path: Path) -> None:
    settings = IngestSettings(
        home=tmp_path / "home", models=models, embedder_runtime="onnxruntime", threads=2,
        parse_memory_mb=300, parse_seconds=15, max_text_chars=10**9,
    )  # fmt: skip
    home = Home(settings, tmp_path / "docs")
    write(
        home.folder,
        {
            "a.txt": "A salmon comes first.",
            "long.txt": "the pump, " * 1_900_000,
            "many.txt": b"x" * 190 * 2**20,
            "z.txt": "A trout comes last.",
        },
    )
    watch = Watch()
    report = home.job(report_progress=watch).run()
    reasons = {failure.path: failure.reason for failure in report.failures}
    assert reasons.keys() == {"docs/long.txt", "docs/many.txt"}
    assert report.files.done == 2
    assert "INGEST_PARSE_SECONDS (15 s)" in reasons["docs/long.txt"]
    assert "INGEST_PARSE_MEMORY_MB (300 MiB)" in reasons["docs/many.txt"]
    assert {hit.path for hit in home.find("salmon or trout")} == {"docs/a.txt", "docs/z.txt"}
    assert watch.left_over() == []
