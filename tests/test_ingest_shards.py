"""An index as Parquet shards: what is dumped and loaded answers as before, whatever breaks on the way."""

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from qdrant_client import QdrantClient

from ingest.catalog import Catalog, Collection, Document, now
from ingest.db import connect, migrate
from ingest.embed import Embedder
from ingest.errors import ConflictError, InvalidError, NotFoundError, UnavailableError
from ingest.index import Filter, Index, Point, chunk_payload, search, sparse_document
from ingest.index_edge import EdgeIndex
from ingest.index_server import ServerIndex
from ingest.parquet import BLOCK, read_manifest, seal, verify, write_chunks, write_documents
from ingest.pipeline import Cancelled, IngestJob
from ingest.schemas import (
    Chunk,
    Chunking,
    Hit,
    ParsedText,
    Progress,
    Report,
    Retrieval,
    Span,
    chunk_id,
    document_id,
)
from ingest.settings import IngestSettings
from ingest.shards import LoadReport, dump, load
from ingest.sync import Folder
from ingest.writer import Target

DIMENSION = 8


class Home:
    """A catalog, an index and a collection of their own."""

    def __init__(
        self, place: Path, name: str = "default", index: Index | None = None, fingerprint: str = "f" * 64
    ) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        engine = connect(f"sqlite:///{place / 'graft.db'}")
        migrate(engine)
        self.catalog = Catalog(engine)
        if name not in [one.name for one in self.catalog.collections()]:
            self.catalog.put_collection(collection(name, fingerprint))
        self.collection = self.catalog.collection(name)
        self.index = index or EdgeIndex(place / "index")

    def dump(self, folder: Path, **options: Any) -> Any:
        return dump(self.catalog, self.index, self.collection, folder, **options)

    def load(self, folder: Path, **options: Any) -> LoadReport:
        return load(self.catalog, self.index, folder, self.collection, home=self.place, **options)

    def points(self) -> list[Point]:
        found, offset = self.index.scan(self.collection.index, None, 100_000)
        assert offset is None
        return found

    def documents(self) -> dict[str, Document]:
        return {one.path: one for one in self.catalog.documents(self.collection.name)}


def collection(name: str, fingerprint: str = "f" * 64) -> Collection:
    return Collection(
        name=name, embedder="bge-small-en-v1.5", chunking=Chunking(), fingerprint=fingerprint, prompt="auto",
        created_at=now(),
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    opened = Home(tmp_path / "first")
    yield opened
    opened.index.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Home]:
    opened = Home(tmp_path / "second")
    yield opened
    opened.index.close()


def made(name: str, number: int, chunks: int = 5, said: str = "holds") -> tuple[Document, ParsedText, list[Point]]:
    """A document as an ingest job leaves it, with a heading, a parent and labels, its texts in two languages."""
    uri = f"file:///docs/{number}.md"
    identity = document_id(name, uri, 0)
    rng = np.random.default_rng(number)
    points, text = [], ""
    for ordinal in range(chunks):
        piece = (
            "The same words again." if ordinal % 4 == 3 else f"Pump {number} {said} {ordinal} litres. 水泵{number}号。"
        )
        start = len(text)
        text += piece + "\n"
        searched = f"Manual > {number}\n{piece}" if ordinal % 2 else piece
        chunk = Chunk(
            id=chunk_id(identity, searched, sum(one.payload["text"] == piece for one in points)),
            ordinal=ordinal, text=piece, start=start, end=start + len(piece), page=ordinal % 3 or None,
            heading="Oil" if ordinal % 2 else None, language="en", context=f"Manual > {number}" if ordinal % 2 else None,
            parent=Span(start=0, end=start + len(piece)) if ordinal % 2 else None,
        )  # fmt: skip
        dense = rng.standard_normal(DIMENSION).astype(np.float32)
        payload = chunk_payload(chunk, identity, f"docs/{number}.md", ["red"], {"site": {"no": number}}, "e" * 64)
        points.append(Point(chunk.id, dense / np.linalg.norm(dense), sparse_document(searched), payload))
    parsed = ParsedText(text=text, mime="text/markdown")
    document = Document(
        id=identity, collection=name, uri=uri, first_uri=uri, path=f"docs/{number}.md", size=len(text), stamp=number,
        content_hash=f"{number:064}", text_hash=parsed.content_address(), mime="text/markdown", state="done",
        chunks=chunks, languages={"en": chunks}, acl=("red",), given_acl=("red",), metadata={"site": {"no": number}},
        indexed_at=now(),
    )  # fmt: skip
    return document, parsed, points


def fill(home: Home, documents: range, **options: Any) -> None:
    home.index.create(home.collection.index, DIMENSION)
    for number in documents:
        document, parsed, points = made(home.collection.name, number, **options)
        home.index.upsert(home.collection.index, points)
        home.catalog.finish([(document, parsed)])
    home.index.flush(home.collection.index)


def assert_same(one: Home, two: Home) -> None:
    for before, after in zip(one.points(), two.points(), strict=True):
        assert (after.id, after.sparse, after.payload) == (before.id, before.sparse, before.payload)
        assert after.dense == pytest.approx(before.dense, abs=1e-6)
    assert two.documents() == one.documents()
    for document in one.documents().values():
        assert two.catalog.text(document.id) == one.catalog.text(document.id)


FILES = {
    "pump.md": "# Pump\n\n## Oil\n\nThe seal chamber holds 3.2 litres of oil.\n\n## Bearings\n\nGrease them monthly.\n",
    "leave/policy.md": "---\ntitle: Leave\n---\n# Leave\n\nEverybody has 27 days of leave a year.\n" * 2,
    "zh.txt": "水泵每年需要维护两次，先切断电源。" * 3,
    "long.txt": "\n\n".join(
        f"Paragraph {n} tells of meter {n * 7} and of the mooring at berth {n}." for n in range(60)
    ),
    "broken.pdf": "%PDF-1.4 nothing",
}


def write_files(folder: Path) -> Path:
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def ingest(home: Home, folder: Path, settings: IngestSettings, embedder: Embedder) -> Report:
    target = Target(home.index, home.collection.index, embedder.dimension, embedder.fingerprint)
    settings = settings.model_copy(update={"home": home.place})
    source = Folder(folder, folder.parent)
    return IngestJob(home.catalog, target, settings, home.collection, source, runtime="onnxruntime").run()


def asked(home: Home, embedder: Embedder) -> list[list[Hit]]:
    questions = ("How much oil is in the seal chamber?", "days of leave", "水泵 维护", "the mooring at berth 41")
    return [
        search(home.index, home.collection.index, embedder.embed_query(one), one, Filter(), Retrieval(), 5)
        for one in questions
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "copy"])
def test_a_loaded_dump_answers_as_before_and_an_ingest_of_the_folder_finds_it_unchanged(
    home: Home, name: str, tmp_path: Path, settings: IngestSettings, embedder: Embedder
) -> None:
    docs = write_files(tmp_path / "docs")
    first = ingest(home, docs, settings, embedder)
    assert (first.files.done, first.files.failed) == (4, 1)
    home.dump(tmp_path / "dump")

    other = Home(tmp_path / "second", name)
    report = other.load(tmp_path / "dump")
    assert (report.documents, report.chunks, report.deleted) == (5, first.chunks.added, 0)
    for before, after in zip(asked(home, embedder), asked(other, embedder), strict=True):
        kept = {"chunk_id", "document_id"} if name == "copy" else set()
        assert [one.model_dump(exclude=kept) for one in before] == [one.model_dump(exclude=kept) for one in after]
    for path, document in home.documents().items():
        loaded = other.documents()[path]
        assert loaded.model_dump(exclude={"id", "collection"}) == document.model_dump(exclude={"id", "collection"})

    again = ingest(other, docs, settings, embedder)
    assert (again.files.unchanged, again.files.done, again.files.deleted) == (4, 0, 0)
    (docs / "long.txt").write_text(FILES["long.txt"].replace("meter 7 ", "gauge 7 "))
    edited = ingest(other, docs, settings, embedder)
    assert edited.files.done == 1
    assert edited.chunks.kept > 0
    assert edited.chunks.added == edited.chunks.deleted > 0
    other.index.close()


@pytest.mark.parametrize("engine", ["edge", "server"])
def test_every_point_document_and_text_comes_back(home: Home, tmp_path: Path, engine: str) -> None:
    fill(home, range(7))
    home.catalog.finish(
        [(made("default", 7)[0].model_copy(update={"state": "skipped", "chunks": 0, "text_hash": None}), None)]
    )
    odd = home.points()[0]
    home.index.set_payloads(home.collection.index, [(odd.id, {**odd.payload, "rating": {"stars": [1, 2]}})])
    report = home.dump(tmp_path / "dump", rows_per_shard=10)
    assert (report.documents, report.chunks, report.shards) == (8, 35, 5)
    index = ServerIndex(QdrantClient(":memory:")) if engine == "server" else None
    other = Home(tmp_path / "second", index=index)
    assert other.load(tmp_path / "dump").resumed == 0
    for before, after in zip(home.points(), other.points(), strict=True):
        assert (after.id, after.sparse, after.payload) == (before.id, before.sparse, before.payload)
        assert after.dense == pytest.approx(before.dense, abs=1e-6)
    assert other.documents() == home.documents()
    other.dump(tmp_path / "again", rows_per_shard=10)
    for shard in read_manifest(tmp_path / "dump").shards:
        if shard.holds_chunks and engine == "edge":
            assert pq.read_table(tmp_path / "again" / shard.file).equals(pq.read_table(tmp_path / "dump" / shard.file))
    assert not list((tmp_path / "second/loads").iterdir())
    other.index.close()


def test_the_columns_are_those_that_the_documentation_names(home: Home, tmp_path: Path) -> None:
    fill(home, range(2))
    home.dump(tmp_path / "dump")
    page = (Path(__file__).parent.parent / "docs/moving.md").read_text()
    for shard in read_manifest(tmp_path / "dump").shards:
        for column in pq.read_schema(tmp_path / "dump" / shard.file).names:
            assert f"`{column}`" in page
    row = pq.read_table(tmp_path / "dump/chunks-00000.parquet").to_pylist()[0]
    assert len(row["dense"]) == DIMENSION
    assert row["acl"] == ["red"]


def load_and_die(place: Path, folder: Path, chunks: int) -> None:
    def progress(told: Progress) -> None:
        if told.chunks >= chunks:
            os.kill(os.getpid(), signal.SIGKILL)

    Home(place).load(folder, progress=progress)


@pytest.mark.slow
def test_a_killed_load_goes_on_at_the_first_shard_that_is_missing(home: Home, tmp_path: Path) -> None:
    fill(home, range(100))
    home.dump(tmp_path / "dump", rows_per_shard=100)
    process = multiprocessing.get_context("spawn").Process(
        target=load_and_die, args=(tmp_path / "x", tmp_path / "dump", 330)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    other = Home(tmp_path / "x")
    assert {one.state for one in other.documents().values()} == {"writing"}
    written: list[int] = []
    report = other.load(tmp_path / "dump", progress=lambda told: written.append(told.chunks))
    assert (report.resumed, report.chunks, max(written)) == (3, 500, 200)
    assert_same(home, other)
    other.index.close()


def test_a_cancelled_load_goes_on_and_one_into_an_index_that_is_gone_begins_anew(
    home: Home, other: Home, tmp_path: Path
) -> None:
    fill(home, range(40))
    home.dump(tmp_path / "dump", rows_per_shard=50)
    told: list[Progress] = []
    with pytest.raises(Cancelled):
        other.load(tmp_path / "dump", progress=told.append, cancelled=lambda: bool(told) and told[-1].chunks >= 100)
    other.index.drop(other.collection.index)
    assert other.load(tmp_path / "dump").resumed == 0
    assert_same(home, other)


def expiring(after: int) -> Callable[[], bool]:
    """Asked for the `after`th time, a job has had its time."""
    asked = iter(range(1, after))

    def cancelled() -> bool:
        if next(asked, None) is None:
            raise Cancelled(expired=True)
        return False

    return cancelled


def test_a_dump_and_a_load_end_wherever_they_are_asked_to_and_go_on(home: Home, other: Home, tmp_path: Path) -> None:
    fill(home, range(12))
    fill(other, range(6), chunks=9, said="leaks")
    asked: list[int] = []
    home.dump(tmp_path / "whole", rows_per_shard=20, cancelled=lambda: bool(asked.append(1)))
    for after in range(1, len(asked) + 1):  # the last one while it seals
        with pytest.raises(Cancelled) as stopped:
            home.dump(tmp_path / "dump", rows_per_shard=20, cancelled=expiring(after))
        assert stopped.value.expired
    home.dump(tmp_path / "dump", rows_per_shard=20)

    shards = len(read_manifest(tmp_path / "dump").shards)
    with pytest.raises(Cancelled):
        other.load(tmp_path / "dump", cancelled=expiring(shards + 2))  # all hashed: while it looks for its documents
    assert "writing" not in {one.state for one in other.documents().values()}
    stops = 0
    for after in range(shards + 10, 2000, 7):
        try:
            other.load(tmp_path / "dump", cancelled=expiring(after))
            break
        except Cancelled:
            stops += 1
    assert stops > 5
    assert_same(home, other)


def test_hashing_is_interrupted_within_a_large_shard(tmp_path: Path) -> None:
    document, text, _ = made("default", 1)
    noise = np.random.default_rng(0).bytes(2 * BLOCK).hex()
    write_documents(tmp_path / "documents-0.parquet", [[(document, text.model_copy(update={"text": noise}))]])
    sealed: list[int] = []
    manifest = seal(tmp_path, collection("default"), None, None, lambda: sealed.append(1))
    verified: list[int] = []
    verify(tmp_path, manifest.shards[0], lambda: verified.append(1))
    assert len(sealed) == len(verified) == -(-manifest.shards[0].bytes // BLOCK) > 1


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("flip", r"chunks-00002.parquet' is damaged: its sha256 is another one"),
        ("cut", r"documents-00000.parquet' is damaged: it has 100 bytes"),
        ("lose", r"chunks-00001.parquet' cannot be read \(No such file or directory\)"),
        ("cut manifest", r"manifest.json' cannot be read"),
        ("newer", r"of format 'graft-index', version 2; this release reads"),
        ("elsewhere", r"names '../secret', which is no name of a shard"),
        ("other form", r"manifest.json': dimension: Input should be a valid integer"),
    ],
)
def test_a_damaged_dump_is_refused_by_name_before_anything_is_loaded(
    home: Home, other: Home, tmp_path: Path, harm: str, said: str
) -> None:
    fill(home, range(10))
    folder = tmp_path / "dump"
    home.dump(folder, rows_per_shard=20)
    manifest = folder / "manifest.json"
    match harm:
        case "flip":
            data = bytearray((folder / "chunks-00002.parquet").read_bytes())
            data[len(data) // 2] ^= 1
            (folder / "chunks-00002.parquet").write_bytes(data)
        case "cut":
            os.truncate(folder / "documents-00000.parquet", 100)
        case "lose":
            (folder / "chunks-00001.parquet").unlink()
        case "cut manifest":
            os.truncate(manifest, 200)
        case "newer":
            manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
        case "elsewhere":
            manifest.write_text(manifest.read_text().replace("chunks-00000.parquet", "../secret"))
        case "other form":
            manifest.write_text(manifest.read_text().replace('"dimension": 8', '"dimension": "many"'))
    with pytest.raises(InvalidError, match=said):
        other.load(folder)
    assert other.index.count(other.collection.index) == 0
    assert other.documents() == {}


def test_what_is_no_dump_is_not_found(other: Home, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no dump was finished there"):
        other.load(tmp_path)


def test_a_dump_of_another_embedder_or_other_vectors_is_refused(home: Home, tmp_path: Path) -> None:
    fill(home, range(3))
    home.dump(tmp_path / "dump")
    other = Home(tmp_path / "second", fingerprint="0" * 64)
    with pytest.raises(ConflictError, match="load it into a new collection, then `graft reindex` that one"):
        other.load(tmp_path / "dump")
    other.index.close()
    third = Home(tmp_path / "third")
    third.index.create(third.collection.index, 4)
    third.index.upsert(
        third.collection.index, [Point(home.points()[0].id, np.eye(4, dtype=np.float32)[0], sparse_document("x"), {})]
    )
    with pytest.raises(ConflictError, match="vectors have 8 dimensions, those of collection 'default' 4"):
        third.load(tmp_path / "dump")
    third.index.close()


def test_a_folder_with_anything_else_in_it_is_left_alone(home: Home, tmp_path: Path) -> None:
    fill(home, range(3))
    home.dump(tmp_path / "dump")
    with pytest.raises(ConflictError, match="holds a finished dump already"):
        home.dump(tmp_path / "dump")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/chunks-00000.parquet").write_text("of a machine that has not sealed it yet")
    with pytest.raises(ConflictError, match=r"holds 'chunks-00000.parquet', which is of no broken-off dump"):
        home.dump(tmp_path / "mine")
    assert (tmp_path / "mine/chunks-00000.parquet").exists()


def test_a_dump_that_was_broken_off_is_written_anew(home: Home, other: Home, tmp_path: Path) -> None:
    fill(home, range(20))
    told: list[Progress] = []
    with pytest.raises(Cancelled):
        home.dump(
            tmp_path / "dump",
            rows_per_shard=30,
            progress=told.append,
            cancelled=lambda: bool(told) and told[-1].chunks > 60,
        )
    assert (tmp_path / "dump/chunks-00001.parquet").exists()
    with pytest.raises(NotFoundError):
        other.load(tmp_path / "dump")
    (tmp_path / "dump/note.txt").write_text("mine")
    with pytest.raises(ConflictError, match=r"note.txt"):
        home.dump(tmp_path / "dump")
    (tmp_path / "dump/note.txt").unlink()
    assert home.dump(tmp_path / "dump", rows_per_shard=100).shards == 2
    assert sorted(file.name for file in (tmp_path / "dump").iterdir()) == [
        "chunks-00000.parquet", "documents-00000.parquet", "manifest.json",
    ]  # fmt: skip
    other.load(tmp_path / "dump")
    assert_same(home, other)


@pytest.mark.slow
def test_a_dump_that_was_killed_when_all_was_written_is_done_when_it_resumes(home: Home, tmp_path: Path) -> None:
    fill(home, range(20))
    first = home.dump(tmp_path / "dump", rows_per_shard=30)
    (tmp_path / "dump/.unfinished").touch()  # what a kill leaves after the manifest
    with pytest.raises(ConflictError, match="holds a finished dump already"):
        home.dump(tmp_path / "dump")
    again = home.dump(tmp_path / "dump", resume=True)
    assert again.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})
    assert not (tmp_path / "dump/.unfinished").exists()
    stranger = Home(tmp_path / "second", "copy")
    with pytest.raises(ConflictError, match="holds a finished dump already"):
        stranger.dump(tmp_path / "dump", resume=True)
    stranger.index.close()
    os.truncate(tmp_path / "dump/chunks-00001.parquet", 100)
    with pytest.raises(ConflictError, match="holds a finished dump already"):
        home.dump(tmp_path / "dump", resume=True)
    assert home.dump(tmp_path / "new", resume=True).chunks == first.chunks


def test_a_deletion_during_a_dump_leaves_no_other_document_out(home: Home, tmp_path: Path) -> None:
    plain = made("default", 0)[0].model_copy(update={"state": "skipped", "chunks": 0, "text_hash": None})
    home.catalog.finish(
        (plain.model_copy(update={"id": f"{number:036}", "path": f"{number:04}", "uri": f"file:///{number}"}), None)
        for number in range(1500)
    )
    gone = {f"{number:036}" for number in (0, 1, 1400)}

    def progress(told: Progress) -> None:
        if told.files:
            home.catalog.remove(sorted(gone))

    assert home.dump(tmp_path / "dump", progress=progress).documents == 1499
    rows = pq.read_table(tmp_path / "dump/documents-00000.parquet").column("document_id").to_pylist()
    assert rows == [f"{number:036}" for number in range(1500) if number != 1400]


def test_two_dumps_into_one_folder_do_not_mix(home: Home, tmp_path: Path) -> None:
    fill(home, range(3))
    refused: list[str] = []

    def progress(_: Progress) -> None:
        with pytest.raises(ConflictError) as error:
            home.dump(tmp_path / "dump")
        refused.append(str(error.value))

    home.dump(tmp_path / "dump", progress=progress)
    assert refused
    assert all("another dump is being written into" in one for one in refused)


def dump_into_little_room(place: Path, folder: Path) -> None:
    """No file may have more than 20 kB, which is how a full disk looks to the writer. The exit code says what came of it."""
    home = Home(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        home.dump(folder)
    except UnavailableError as error:
        os._exit(7 if "File too large" in str(error) and "make room there" in str(error) else 8)
    os._exit(0)


def test_a_disk_that_is_full_is_named_and_the_next_dump_succeeds(home: Home, tmp_path: Path) -> None:
    fill(home, range(200))
    home.index.close()
    arguments = (tmp_path / "first", tmp_path / "dump")
    process = multiprocessing.get_context("spawn").Process(target=dump_into_little_room, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 7
    assert [file.name for file in (tmp_path / "dump").iterdir()] == [".unfinished"]
    again = Home(tmp_path / "first")
    assert again.dump(tmp_path / "dump").chunks == 1000
    again.index.close()


def test_shards_that_several_machines_wrote_load_as_one(home: Home, other: Home, tmp_path: Path) -> None:
    """No catalog and no index: a machine has documents, their texts and points, and writes them."""
    fill(home, range(9))
    for machine in range(3):
        rows = [made("default", number) for number in range(machine, 9, 3)]
        write_chunks(tmp_path / f"chunks-m{machine}-0.parquet", [points for _, _, points in rows], DIMENSION)
        write_documents(tmp_path / f"documents-m{machine}-0.parquet", [[(one, text) for one, text, _ in rows]])
    manifest = seal(tmp_path, collection("default"), "e" * 64, DIMENSION)
    assert (manifest.documents, manifest.chunks, len(manifest.shards)) == (9, 45, 6)
    other.load(tmp_path)
    for before, after in zip(home.points(), other.points(), strict=True):
        assert (after.id, after.payload) == (before.id, before.payload)
    assert {path: one.text_hash for path, one in other.documents().items()} == {
        path: one.text_hash for path, one in home.documents().items()
    }
    assert other.catalog.text(document_id("default", "file:///docs/4.md", 0)) == made("default", 4)[1]


def test_vectors_of_another_embedder_among_the_shards_are_refused(other: Home, tmp_path: Path) -> None:
    document, text, points = made("default", 1)
    write_chunks(tmp_path / "chunks-0.parquet", [points], DIMENSION)
    write_documents(tmp_path / "documents-0.parquet", [[(document, text)]])
    seal(tmp_path, collection("default"), "d" * 64, DIMENSION)
    with pytest.raises(InvalidError, match="vectors of another embedder, 'eeee"):
        other.load(tmp_path)
    assert {one.state for one in other.documents().values()} == {"writing"}
    assert other.index.count(other.collection.index) == 0


def test_a_load_over_another_version_leaves_nothing_of_it_and_spares_the_rest(
    home: Home, other: Home, tmp_path: Path
) -> None:
    fill(home, range(5))
    home.dump(tmp_path / "dump", rows_per_shard=7)
    fill(other, range(3), chunks=9, said="leaks")
    fill(other, range(10, 12))
    report = other.load(tmp_path / "dump")
    assert report.deleted == 3 * 8  # what is said alike stays
    texts = [one.payload["text"] for one in other.points()]
    assert len(texts) == 5 * 5 + 2 * 5
    assert not [one for one in texts if "leaks" in one]
    paths = {f"docs/{number}.md" for number in (10, 11)}
    assert {path: one for path, one in other.documents().items() if path not in paths} == home.documents()
    assert paths < set(other.documents())


def test_a_document_that_was_deleted_by_its_id_stays_out(home: Home, other: Home, tmp_path: Path) -> None:
    fill(home, range(3))
    home.dump(tmp_path / "dump")
    gone = made("default", 1)[0]
    other.catalog.put([gone.model_copy(update={"state": "removed", "chunks": 0, "text_hash": None})])
    other.load(tmp_path / "dump")
    assert other.index.ids(other.collection.index, gone.id) == set()
    assert other.index.count(other.collection.index) == 10
    assert other.catalog.document(gone.id).state == "removed"


@pytest.mark.parametrize("name", ["default", "copy"])
def test_no_chunk_of_a_deleted_document_is_found_while_a_load_runs(home: Home, tmp_path: Path, name: str) -> None:
    fill(home, range(60))
    home.dump(tmp_path / "dump", rows_per_shard=50)
    other = Home(tmp_path / "second", name)
    before = made(name, 1)[0]
    other.catalog.put([before.model_copy(update={"state": "removed", "chunks": 0, "text_hash": None})])
    removed = {before.id}

    def progress(told: Progress) -> None:
        assert not any(other.index.ids(other.collection.index, one) for one in removed)
        if told.chunks and len(removed) == 1:
            held = {one.id: other.index.ids(other.collection.index, one.id) for one in other.documents().values()}
            partly = next(identity for identity, ids in held.items() if 0 < len(ids) < 5)
            removed.add(partly)
            other.catalog.remove([partly])
            other.index.delete(other.collection.index, sorted(held[partly]))

    with pytest.raises(Cancelled):
        other.load(tmp_path / "dump", cancelled=expiring(250))  # most of the way through
    report = other.load(tmp_path / "dump", progress=progress)
    assert report.resumed > 0
    assert other.index.count(other.collection.index) == 58 * 5
    assert {other.catalog.document(one).state for one in removed} == {"removed"}
    assert 5 < report.left_out < 10
    other.index.close()


@pytest.mark.parametrize("name", ["default", "copy"])
def test_chunks_without_a_document_are_left_out_and_counted(home: Home, tmp_path: Path, name: str) -> None:
    fill(home, range(3))
    home.catalog.forget([made("default", 1)[0].id])
    home.dump(tmp_path / "dump")
    other = Home(tmp_path / "second", name)
    report = other.load(tmp_path / "dump")
    assert (report.documents, report.left_out, other.index.count(other.collection.index)) == (2, 5, 10)
    other.index.close()


def test_two_documents_of_one_file_are_refused(home: Home, other: Home, tmp_path: Path) -> None:
    fill(home, range(3))
    home.dump(tmp_path / "dump")
    document, text, _ = made("default", 2)
    other.catalog.finish([(document.model_copy(update={"id": document_id("default", document.uri, 1)}), text)])
    with pytest.raises(ConflictError, match=r"holds 'file:///docs/2.md' as document '.*' already"):
        other.load(tmp_path / "dump")
    assert other.index.count(other.collection.index) == 0


def test_a_collection_without_chunks_is_dumped_and_loaded(home: Home, other: Home, tmp_path: Path) -> None:
    report = home.dump(tmp_path / "dump")
    assert (report.documents, report.chunks, report.shards) == (0, 0, 0)
    assert other.load(tmp_path / "dump").chunks == 0


def test_a_copy_of_a_dump_loads_from_where_it_lies(home: Home, other: Home, tmp_path: Path) -> None:
    fill(home, range(3))
    home.dump(tmp_path / "dump")
    shutil.move(tmp_path / "dump", tmp_path / "elsewhere")
    other.load(tmp_path / "elsewhere")
    assert_same(home, other)
