"""An answer says what its collection's embedder does not read: the question, or a share of the documents."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fixtures import HERON, KESTREL, Service, events, run_graft, until, write

from ingest.catalog import Catalog, Collection, Document, State, now
from ingest.db import connect, migrate
from ingest.schemas import Chunking
from service.languages import LanguageNotes

pytestmark = pytest.mark.slow

CHINESE = "员工每年有几天年休假？"


@pytest.fixture(scope="module")
def english(started: Service) -> Iterator[str]:
    """A collection without a word of Chinese."""
    folder = write(started.root / "english", {"heron.md": HERON, "kestrel.md": KESTREL})
    assert started.ingest(folder, collection="english")["state"] == "succeeded"
    yield "english"
    started.http.delete("/collections/english")


def test_an_answer_over_a_mixed_collection_says_what_is_not_read(service: Service) -> None:
    [note] = service.answer()["notes"]
    assert note.startswith("default: ")
    assert "% of the chunks are Chinese; bge-small-en-v1.5 reads English" in note
    assert "BM25" in note
    found = service.http.post("/retrieve", json={"question": "impeller"}).json()
    assert found["notes"] == [note]


def test_a_question_that_is_not_read_is_named(service: Service, english: str) -> None:
    [note] = service.answer(CHINESE, collection=english)["notes"]
    assert note == ("english: the question is Chinese, which bge-small-en-v1.5 does not read: only BM25 was searched")


def test_where_all_is_read_there_is_no_note(service: Service, english: str) -> None:
    assert service.answer(collection=english)["notes"] == []


def test_where_no_vectors_are_searched_there_is_no_note(service: Service) -> None:
    body = {"question": CHINESE, "retrieval": {"dense_weight": 0}}
    assert service.http.post("/retrieve", json=body).json()["notes"] == []


def test_of_several_collections_each_note_names_its_own(service: Service, english: str) -> None:
    body = {"question": CHINESE, "collections": ["default", english]}
    notes = service.http.post("/retrieve", json=body).json()["notes"]
    assert [note.split(":")[0] for note in notes] == ["default", "default", "english"]


def test_a_streamed_answer_and_the_command_line_say_it_too(service: Service) -> None:
    with service.http.stream("POST", "/query", json={"question": "impeller", "stream": True}) as reply:
        done = dict(events(reply))["done"]
    assert "Chinese" in done["notes"][0]
    for command in ("query", "retrieve"):
        shown = run_graft(service.home, command, "impeller", cwd=service.root)
        assert shown.returncode == 0, shown.stderr
        assert f"note: {done['notes'][0]}" in shown.stdout


def test_the_note_follows_the_documents(service: Service, english: str) -> None:
    def notes() -> list[str]:
        return list(service.http.post("/retrieve", json={"question": "pump", "collection": english}).json()["notes"])

    assert notes() == []
    folder = service.root / "english"
    write(folder, {"notice.md": "# 通知\n\n水泵每年需要维护两次，维护之前必须先切断电源，并在配电柜上挂警示牌。"})
    service.ingest(folder, collection=english)
    until(lambda: any("Chinese" in note for note in notes()), 10)
    (folder / "notice.md").unlink()
    service.ingest(folder, collection=english)
    until(lambda: notes() == [], 10)


def test_counts_add_up_over_documents_and_leave_out_what_is_not_indexed(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/graft.db")
    migrate(engine)
    catalog = Catalog(engine)
    for number in range(30):
        catalog.put([_document(f"{number}", "all", "done", {"en": 3, "zh": number % 2})])
    catalog.put([_document("other", "other", "done", {"fr": 9}), _document("bad", "all", "failed", {"de": 9})])
    assert catalog.languages("all") == {"en": 90, "zh": 15}
    assert catalog.languages("none") == {}


def test_an_embedder_that_reads_all_languages_needs_no_count(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/none.db")  # without tables: a count would fail
    collection = _collection()
    assert LanguageNotes(Catalog(engine)).of(collection, ("*",), CHINESE) == []


def _document(name: str, collection: str, state: State, languages: dict[str, int]) -> Document:
    return Document(
        id=name, collection=collection, uri=f"file:///{name}", first_uri=f"file:///{name}", path=name, size=1, stamp=1,
        content_hash="c", state=state, chunks=sum(languages.values()), languages=languages,
    )  # fmt: skip


def _collection() -> Collection:
    return Collection(name="all", embedder="any", chunking=Chunking(), fingerprint="f", prompt="auto", created_at=now())
