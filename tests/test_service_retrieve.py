"""Hierarchical collections: parts are found, their parents come back, each once, with text that stands at its place."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ingest.catalog import Catalog, Collection, Document, now
from ingest.chunk import split
from ingest.db import connect, migrate
from ingest.embed import Embedder, load_counter
from ingest.index import Point, chunk_payload, sparse_document
from ingest.index_edge import EdgeIndex
from ingest.parse import markdown_headings
from ingest.schemas import Chunking, Hit, ParsedText, Retrieval, document_id
from ingest.settings import IngestSettings
from service.retrieve import Retriever

EMBEDDER = "bge-small-en-v1.5"
SUBJECTS = ("oil", "seals", "bearings", "valves", "filters", "cables", "switches", "hoses")
MANUAL = "# Manual\n\n" + "".join(
    f"## {subject.title()}\n\n"
    + " ".join(f"Rule {n} on {subject}: look at the {subject} of pump {n} every {n + 2} weeks." for n in range(8))
    + "\n\n"
    for subject in SUBJECTS
)
VECTORS: dict[str, NDArray[np.float32]] = {}  # by text: the tests share theirs


class Shelf:
    """A catalog and an index, filled as an ingest job would."""

    def __init__(self, settings: IngestSettings, embedder: Embedder, index: EdgeIndex) -> None:
        engine = connect(f"sqlite:///{settings.home}/graft.db")
        migrate(engine)
        self.catalog = Catalog(engine)
        self.index = index
        self.embedder = embedder
        self.counter = load_counter(EMBEDDER, settings)
        self.retriever = Retriever(self.catalog, index, settings, "ms-marco-minilm-l-12-v2")

    def collect(self, chunking: Chunking, rerank: bool = False) -> Collection:
        collection = Collection(
            name="manuals", embedder=EMBEDDER, chunking=chunking, fingerprint="f" * 64, prompt="auto", created_at=now(),
            retrieval=Retrieval(candidates=5, rerank=rerank),
        )  # fmt: skip
        self.catalog.put_collection(collection)
        self.index.create(collection.index, self.embedder.dimension)
        return collection

    def put(self, collection: Collection, path: str, text: str) -> None:
        name = document_id("manuals", path, 0)
        parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
        chunks = split(name, parsed, collection.chunking, self.counter)
        fresh = [chunk.searched for chunk in chunks if chunk.searched not in VECTORS]
        VECTORS.update(zip(fresh, self.embedder.embed(fresh) if fresh else (), strict=True))
        gone = self.index.ids(collection.index, name) - {chunk.id for chunk in chunks}
        points = [
            Point(
                chunk.id,
                VECTORS[chunk.searched],
                sparse_document(chunk.searched),
                chunk_payload(chunk, name, path, (), {}, "e"),
            )
            for chunk in chunks
        ]
        self.index.upsert(collection.index, points)
        self.index.delete(collection.index, sorted(gone))
        self.keep(path, parsed)

    def keep(self, path: str, parsed: ParsedText) -> None:
        row = Document(
            id=document_id("manuals", path, 0), collection="manuals", uri=f"file:///{path}", first_uri=f"file:///{path}",
            path=path, size=1, stamp=1, content_hash="c", text_hash=parsed.content_address(), state="done",
        )  # fmt: skip
        self.catalog.finish([(row, parsed)])

    def ask(self, question: str, top_k: int = 5, by_document: bool = False) -> list[Hit]:
        return self.retriever.retrieve(question, "manuals", {}, None, top_k, by_document).hits


@pytest.fixture
def shelf(settings: IngestSettings, embedder: Embedder, index: EdgeIndex) -> Shelf:
    Path(settings.home).mkdir(parents=True, exist_ok=True)
    return Shelf(settings, embedder, index)


HIERARCHICAL = Chunking(strategy="hierarchical", tokens=32, parent_tokens=200)


def test_the_answer_comes_from_the_parent_of_what_was_found(shelf: Shelf) -> None:
    shelf.put(shelf.collect(HIERARCHICAL), "manual.md", MANUAL)
    hit = shelf.ask("How often must I look at the seals of pump 3?")[0]
    assert hit.heading == "Manual > Seals"
    assert hit.text.startswith("## Seals")
    assert hit.text.endswith("every 9 weeks.")  # rule 7, in another part
    assert MANUAL[hit.start : hit.end] == hit.text
    assert hit.parent is not None
    assert (hit.start, hit.end) == (hit.parent.start, hit.parent.end)


@pytest.mark.parametrize("rerank", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_as_many_parents_come_back_as_asked_for_each_once(shelf: Shelf, rerank: bool) -> None:
    shelf.put(shelf.collect(HIERARCHICAL, rerank), "manual.md", MANUAL)
    hits = shelf.ask("rule on oil: look at the oil of the pump", top_k=7)
    assert len({(hit.start, hit.end) for hit in hits}) == len(hits) == 7
    assert "oil" in hits[0].text
    assert all(MANUAL[hit.start : hit.end] == hit.text for hit in hits)
    assert all((hit.rerank_score is not None) == rerank for hit in hits)


def test_equal_parents_of_two_documents_both_come_back(shelf: Shelf) -> None:
    collection = shelf.collect(HIERARCHICAL)
    for path in ("a.md", "b.md"):
        shelf.put(collection, path, "# Oil\n\nThe oil is changed each year.")
    assert sorted(hit.path for hit in shelf.ask("oil")) == ["a.md", "b.md"]
    assert len(shelf.ask("oil", by_document=True)) == 2


def test_a_document_that_was_ingested_again_is_never_answered_from_its_old_text(shelf: Shelf) -> None:
    collection = shelf.collect(HIERARCHICAL)
    shelf.put(collection, "manual.md", MANUAL)
    assert "every 2 weeks" in shelf.ask("seals")[0].text
    changed = "# Preface\n\nNew.\n\n" + MANUAL.replace("every 2 weeks", "every 99 weeks")
    shelf.put(collection, "manual.md", changed)
    for hit in shelf.ask("seals"):
        assert changed[hit.start : hit.end] == hit.text
        assert "every 2 weeks" not in hit.text


@pytest.mark.parametrize("change", [lambda text: "A new first line.\n" + text, lambda text: text[:200]])
def test_where_the_kept_text_has_moved_on_the_part_stays_as_it_was_found(
    shelf: Shelf, change: Callable[[str], str]
) -> None:
    shelf.put(shelf.collect(HIERARCHICAL), "manual.md", MANUAL)
    shelf.keep("manual.md", ParsedText(text=change(MANUAL), mime="text/markdown"))
    hit = shelf.ask("How often must I look at the hoses of pump 3?")[0]
    assert "hoses" in hit.text
    assert MANUAL[hit.start : hit.end] == hit.text
    assert len(shelf.counter.ids(hit.text)) <= 32


def test_a_document_deleted_since_the_search_leaves_the_part(shelf: Shelf) -> None:
    shelf.put(shelf.collect(HIERARCHICAL), "manual.md", MANUAL)
    shelf.catalog.forget([document_id("manuals", "manual.md", 0)])
    assert all(len(shelf.counter.ids(hit.text)) <= 32 for hit in shelf.ask("seals"))


def test_other_collections_are_answered_from_what_was_found(shelf: Shelf) -> None:
    shelf.put(shelf.collect(Chunking(tokens=32)), "manual.md", MANUAL)
    hits = shelf.ask("How often must I look at the seals of pump 3?")
    assert len(hits) == 5
    assert all(hit.parent is None and len(shelf.counter.ids(hit.text)) <= 32 for hit in hits)
    assert all(MANUAL[hit.start : hit.end] == hit.text for hit in hits)
