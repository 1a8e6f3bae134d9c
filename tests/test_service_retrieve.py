"""Hierarchical collections: parts are found, their parents come back, each once, with text that stands at its place."""

from collections.abc import Callable

import pytest
from shelf import Shelf

from ingest.index_edge import EdgeIndex
from ingest.schemas import Chunking, ParsedText, Retrieval, document_id
from ingest.settings import IngestSettings

SUBJECTS = ("oil", "seals", "bearings", "valves", "filters", "cables", "switches", "hoses")
MANUAL = "# Manual\n\n" + "".join(
    f"## {subject.title()}\n\n"
    + " ".join(f"Rule {n} on {subject}: look at the {subject} of pump {n} every {n + 2} weeks." for n in range(8))
    + "\n\n"
    for subject in SUBJECTS
)
FIVE = Retrieval(candidates=5)


@pytest.fixture
def shelf(settings: IngestSettings, index: EdgeIndex) -> Shelf:
    return Shelf(settings, index)


HIERARCHICAL = Chunking(strategy="hierarchical", tokens=32, parent_tokens=200)


def test_the_answer_comes_from_the_parent_of_what_was_found(shelf: Shelf) -> None:
    shelf.put(shelf.collect(HIERARCHICAL, FIVE), "manual.md", MANUAL)
    hit = shelf.ask("How often must I look at the seals of pump 3?")[0]
    assert hit.heading == "Manual > Seals"
    assert hit.text.startswith("## Seals")
    assert hit.text.endswith("every 9 weeks.")  # rule 7, in another part
    assert MANUAL[hit.start : hit.end] == hit.text
    assert hit.parent is not None
    assert (hit.start, hit.end) == (hit.parent.start, hit.parent.end)


@pytest.mark.parametrize("rerank", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_as_many_parents_come_back_as_asked_for_each_once(shelf: Shelf, rerank: bool) -> None:
    shelf.put(shelf.collect(HIERARCHICAL, Retrieval(candidates=5, rerank=rerank)), "manual.md", MANUAL)
    hits = shelf.ask("rule on oil: look at the oil of the pump", top_k=7)
    assert len({(hit.start, hit.end) for hit in hits}) == len(hits) == 7
    assert "oil" in hits[0].text
    assert all(MANUAL[hit.start : hit.end] == hit.text for hit in hits)
    assert all((hit.rerank_score is not None) == rerank for hit in hits)


def test_equal_parents_of_two_documents_both_come_back(shelf: Shelf) -> None:
    collection = shelf.collect(HIERARCHICAL, FIVE)
    for path in ("a.md", "b.md"):
        shelf.put(collection, path, "# Oil\n\nThe oil is changed each year.")
    assert sorted(hit.path for hit in shelf.ask("oil")) == ["a.md", "b.md"]
    assert len(shelf.ask("oil", by_document=True)) == 2


def test_a_document_that_was_ingested_again_is_never_answered_from_its_old_text(shelf: Shelf) -> None:
    collection = shelf.collect(HIERARCHICAL, FIVE)
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
    shelf.put(shelf.collect(HIERARCHICAL, FIVE), "manual.md", MANUAL)
    shelf.keep("manuals", "manual.md", ParsedText(text=change(MANUAL), mime="text/markdown"))
    hit = shelf.ask("How often must I look at the hoses of pump 3?")[0]
    assert "hoses" in hit.text
    assert MANUAL[hit.start : hit.end] == hit.text
    assert len(shelf.counter.ids(hit.text)) <= 32


def test_a_document_deleted_since_the_search_leaves_the_part(shelf: Shelf) -> None:
    shelf.put(shelf.collect(HIERARCHICAL, FIVE), "manual.md", MANUAL)
    shelf.catalog.forget([document_id("manuals", "manual.md", 0)])
    assert all(len(shelf.counter.ids(hit.text)) <= 32 for hit in shelf.ask("seals"))


def test_other_collections_are_answered_from_what_was_found(shelf: Shelf) -> None:
    shelf.put(shelf.collect(Chunking(tokens=32), FIVE), "manual.md", MANUAL)
    hits = shelf.ask("How often must I look at the seals of pump 3?")
    assert len(hits) == 5
    assert all(hit.parent is None and len(shelf.counter.ids(hit.text)) <= 32 for hit in hits)
    assert all(MANUAL[hit.start : hit.end] == hit.text for hit in hits)
