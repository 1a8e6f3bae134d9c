"""Each lever of retrieval does what docs/retrieval.md says, on a real index with real embeddings."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from qdrant_client import QdrantClient
from service_fixtures import Service, WireEngine, write
from shelf import Shelf, bag_of_words
from sqlalchemy import text as sql

from ingest.index_edge import EdgeIndex
from ingest.index_server import ServerIndex
from ingest.schemas import Chunking, Hit, ParsedText, Retrieval, document_id
from ingest.settings import IngestSettings
from service.expand import merged
from service.mmr import diversified
from service.rerank import BATCH, FIRST, Pace

PUMPS = {
    "heron.md": "# Heron H75\n\nChange the oil of the seal chamber every 4,000 running hours.",
    "copy.md": "# Heron H75\n\nChange the oil of the seal chamber every 4,000 running hours, please.",
    "kestrel.md": "# Kestrel K40\n\nThe oil of the bearings is changed once a year by the service team.",
    "leave.md": "# Leave\n\nEmployees have 27 days of annual leave.",
    "menu.md": "# Canteen\n\nThere is soup at noon, and on Fridays there is fish.",
}
OIL = "How often must the oil of the seal chamber be changed?"
SMALL = Chunking(tokens=16)
STEPS = "# Start\n\n" + "\n\n".join(f"Step {n}: turn valve V{n} to position {n + 3} and wait." for n in range(12))


@pytest.fixture
def shelf(settings: IngestSettings, index: EdgeIndex) -> Shelf:
    return Shelf(settings, index)


@pytest.fixture(scope="module")
def words() -> Iterator[str]:
    with bag_of_words() as name:
        yield name


@pytest.fixture
def pumps(shelf: Shelf) -> Shelf:
    collection = shelf.collect()
    for path, text in PUMPS.items():
        shelf.put(collection, path, text)
    return shelf


def steps(shelf: Shelf, **retrieval: object) -> Shelf:
    shelf.put(shelf.collect(SMALL, Retrieval.model_validate(retrieval)), "steps.md", STEPS)
    return shelf


def paths(hits: Sequence[Hit]) -> list[str]:
    return [hit.path for hit in hits]


# one side alone


def test_a_weight_of_0_is_bm25_alone_and_needs_no_embedder(pumps: Shelf, settings: IngestSettings) -> None:
    fresh = Shelf(settings, pumps.index)
    found = fresh.find(OIL, retrieval=Retrieval(dense_weight=0))
    assert found.hits[0].path in {"heron.md", "copy.md"}
    assert all(hit.dense_score is None and hit.sparse_score for hit in found.hits)
    assert fresh.retriever._embedders == {}


def test_a_weight_of_1_is_dense_alone(pumps: Shelf) -> None:
    hits = pumps.ask("holidays of the staff", retrieval=Retrieval(dense_weight=1))
    assert hits[0].path == "leave.md"
    assert all(hit.sparse_score is None and hit.dense_score is not None for hit in hits)


def test_a_question_that_the_embedder_does_not_read_is_searched_by_words_whatever_the_weight(pumps: Shelf) -> None:
    pumps.put(pumps.catalog.collection("manuals"), "zh.md", "# 手册\n\n水泵每年需要维护两次。")
    assert paths(pumps.ask("水泵需要维护几次？", retrieval=Retrieval(dense_weight=1))) == ["zh.md"]


# settings


def test_settings_of_a_request_hold_for_that_request_alone(pumps: Shelf) -> None:
    assert len(pumps.ask(OIL, retrieval=Retrieval(top_k=2))) == 2
    assert len(pumps.ask(OIL, retrieval=Retrieval(top_k=2), top_k=3)) == 3
    assert len(pumps.ask(OIL)) == 5


def test_a_collection_that_was_written_before_there_were_levers_is_read_and_searched(pumps: Shelf) -> None:
    old = {"dense_weight": 0.6, "candidates": 50, "top_k": 3, "rerank": False}
    chunking = {"strategy": "sentence", "tokens": 224, "overlap": 0, "parent_tokens": None}
    with pumps.catalog.engine.begin() as connection:
        row = {"retrieval": json.dumps(old), "chunking": json.dumps(chunking)}
        connection.execute(sql("UPDATE collections SET retrieval = :retrieval, chunking = :chunking"), row)
    held = pumps.catalog.collection("manuals")
    assert held.retrieval == Retrieval(dense_weight=0.6, candidates=50, top_k=3)
    hits = pumps.ask(OIL)
    assert len(hits) == 3
    assert hits[0].dense_score is not None  # its fingerprint is still its embedder's and chunking's


class Plain(EdgeIndex):
    """Has nothing but what a search needs."""

    def vectors(self, name: str, ids: Sequence[str]) -> NoReturn:
        raise AssertionError("vectors were fetched")

    def at(self, name: str, places: object) -> NoReturn:
        raise AssertionError("neighbours were looked for")


def test_a_lever_that_is_off_asks_the_index_for_nothing(settings: IngestSettings) -> None:
    index = Plain(settings.home / "plain")
    shelf = Shelf(settings, index)
    shelf.put(shelf.collect(), "heron.md", PUMPS["heron.md"])
    found = shelf.find(OIL)
    assert set(found.timings_ms) == {"embed", "search", "rerank"}
    assert (found.timings_ms["rerank"], found.reranked) == (0.0, 0)
    for lever in (Retrieval(mmr=0.5), Retrieval(neighbours=1)):
        with pytest.raises(AssertionError, match="were"):
            shelf.ask(OIL, retrieval=lever)
    index.close()


def test_both_engines_give_the_same_hits_with_every_lever_on(
    settings: IngestSettings, index: EdgeIndex, tmp_path: Path
) -> None:
    elsewhere = settings.model_copy(update={"home": tmp_path / "elsewhere"})
    shelves = [Shelf(settings, index), Shelf(elsewhere, ServerIndex(QdrantClient(":memory:")))]
    for levers in ({"mmr": 0.6, "neighbours": 1}, {"fusion": "rrf", "neighbours": 2}, {"mmr": 0.3, "fusion": "rrf"}):
        ours, theirs = (
            steps(shelf).ask("turn valve V6 to position 9", top_k=3, retrieval=Retrieval.model_validate(levers))
            for shelf in shelves
        )
        assert [(hit.start, hit.end, hit.text) for hit in ours] == [(hit.start, hit.end, hit.text) for hit in theirs]


# maximal marginal relevance


def test_mmr_puts_something_else_before_a_repetition(pumps: Shelf) -> None:
    assert set(paths(pumps.ask(OIL, top_k=2))) == {"heron.md", "copy.md"}
    first, second = pumps.ask(OIL, top_k=2, retrieval=Retrieval(mmr=0.5))
    assert {first.path, second.path} - {"heron.md", "copy.md"} == {"kestrel.md"}
    assert first.path in {"heron.md", "copy.md"}


def test_mmr_of_lambda_1_is_relevance_alone(pumps: Shelf) -> None:
    assert paths(pumps.ask(OIL, retrieval=Retrieval(mmr=1))) == paths(pumps.ask(OIL))


def found(name: str, score: float, rerank_score: float | None = None) -> Hit:
    return Hit(
        chunk_id=name, document_id=name, path=name, text=name, start=0, end=1, score=score, rerank_score=rerank_score
    )


def test_mmr_by_hand() -> None:
    """Relevance a 1, b .9, c .5, d 0; b repeats a; c and d are at right angles to a and to each other. At .5: a, then
    c (.25), then d (0), then b (.45 - .5).
    """
    vectors = dict(zip("abcd", np.eye(3, dtype=np.float32)[[0, 0, 1, 2]], strict=True))
    hits = [found("a", 1), found("b", 0.9), found("c", 0.5), found("d", 0)]
    assert [hit.chunk_id for hit in diversified(hits, [vectors], 0.5, 4)] == ["a", "c", "d", "b"]
    assert [hit.chunk_id for hit in diversified(hits, [vectors], 1, 2)] == ["a", "b"]


def test_mmr_never_weighs_a_rerankers_score_against_a_fused_one() -> None:
    hits = [found("a", 0.2, 0.001), found("b", 0.1, 0.0005), found("c", 1.0), found("d", 0.9)]
    vectors = {name: np.ones(2, dtype=np.float32) / np.sqrt(2, dtype=np.float32) for name in "abcd"}
    chosen = [hit.chunk_id for hit in diversified(hits, [vectors], 0.9, 4)]
    assert chosen == ["a", "b", "c", "d"]


# neighbours


def test_a_hit_comes_with_the_chunks_around_it_and_stands_at_its_place(shelf: Shelf) -> None:
    steps(shelf, top_k=1)
    [alone] = shelf.ask("turn valve V6 to position 9")
    assert alone.text == "Step 6: turn valve V6 to position 9 and wait."
    for reach in (1, 2, 3):
        [hit] = shelf.ask("turn valve V6 to position 9", retrieval=Retrieval(top_k=1, neighbours=reach))
        assert hit.text == STEPS[hit.start : hit.end]
        assert hit.text.startswith(f"Step {6 - reach}:")
        assert hit.text.endswith(f"to position {9 + reach} and wait.")
        assert (hit.chunk_id, hit.ordinal) == (alone.chunk_id, alone.ordinal)


def test_neighbours_end_where_the_document_does(shelf: Shelf) -> None:
    steps(shelf)
    [hit] = shelf.ask("turn valve V11 to position 14", retrieval=Retrieval(top_k=1, neighbours=3))
    assert hit.text == STEPS[STEPS.index("Step 8") :]


def test_overlapping_neighbours_become_one_hit_and_no_text_comes_twice(shelf: Shelf) -> None:
    steps(shelf)
    alone = shelf.ask("turn valve V6 to position 9", top_k=4)
    hits = shelf.ask("turn valve V6 to position 9", top_k=4, retrieval=Retrieval(neighbours=2))
    assert hits[0].chunk_id == alone[0].chunk_id
    spans = sorted((hit.start, hit.end) for hit in hits)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(hit.text == STEPS[hit.start : hit.end] for hit in hits)
    assert all(any(hit.start <= one.start and one.end <= hit.end for hit in hits) for one in alone)


def test_hits_that_overlap_are_merged_by_hand() -> None:
    text = "abcdefghij"

    def span(start: int, end: int, document: str = "d") -> Hit:
        return Hit(
            chunk_id=f"{start}", document_id=document, path="p", text=text[start:end], start=start, end=end, score=1
        )

    kept = merged([span(4, 6), span(8, 10), span(0, 2), span(1, 5), span(1, 5, "other")], {"d": text})
    assert [(hit.chunk_id, hit.document_id, hit.text) for hit in kept] == [
        ("4", "d", "abcdef"), ("8", "d", "ij"), ("1", "other", "bcde"),
    ]  # fmt: skip


def test_neighbours_are_never_read_from_a_text_that_has_moved_on(shelf: Shelf) -> None:
    steps(shelf)
    shelf.keep("manuals", "steps.md", ParsedText(text="New.\n\n" + STEPS, mime="text/markdown"))
    [hit] = shelf.ask("turn valve V6 to position 9", retrieval=Retrieval(top_k=1, neighbours=2))
    assert hit.text == "Step 6: turn valve V6 to position 9 and wait."


def test_a_parent_and_the_neighbours_beyond_it_come_together(shelf: Shelf) -> None:
    text = "\n\n".join(f"## Part {n}\n\nThe torque of part {n} is {n + 20} Nm, always." for n in range(6))
    shelf.put(shelf.collect(Chunking(strategy="hierarchical", tokens=24, parent_tokens=32)), "torque.md", text)
    asked = "the torque of part 3"
    [parent] = shelf.ask(asked, retrieval=Retrieval(top_k=1))
    [hit] = shelf.ask(asked, retrieval=Retrieval(top_k=1, neighbours=2))  # a parent holds two of them at most
    assert hit.text == text[hit.start : hit.end]
    assert hit.start < parent.start
    assert hit.end > parent.end


# headers


@pytest.mark.parametrize("strategy", ["sentence", "token", "heading", "hierarchical", "table", "code", "page"])
def test_with_headers_a_chunk_is_found_by_what_only_its_title_says(shelf: Shelf, words: str, strategy: str) -> None:
    body = "\n\n".join(f"Paragraph {n} speaks of hours, days and weeks of work." for n in range(9))
    chunkings = {
        name: Chunking.model_validate({"strategy": strategy, "tokens": 40, "headers": name == "headed"})
        for name in ("plain", "headed")
    }
    for name, chunking in chunkings.items():
        collection = shelf.collect(chunking, name=name, embedder=words)
        shelf.put(collection, "zephyr-9000.md", body)
        shelf.put(collection, "other.md", body.replace("weeks", "months"))
    by_words = Retrieval(dense_weight=0, candidates=100)
    assert shelf.ask("zephyr", "plain", retrieval=by_words) == []
    hits = shelf.ask("zephyr", "headed", retrieval=by_words, top_k=50)
    assert hits
    assert {hit.path for hit in hits} == {"zephyr-9000.md"}
    assert all(hit.text == body[hit.start : hit.end] and "zephyr" not in hit.text for hit in hits)
    assert all(len(shelf.counter.ids(hit.searched)) <= 40 for hit in hits if hit.parent is None)


def test_a_header_is_the_title_and_the_heading_path_once_each(shelf: Shelf) -> None:
    shelf.put(shelf.collect(Chunking(headers=True)), "pumps/heron.md", "# H75\n\nIntro.\n\n## Oil\n\nChange it yearly.")
    assert {hit.context for hit in shelf.ask("change oil yearly intro")} == {
        "pumps/heron > H75",
        "pumps/heron > H75 > Oil",
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sentence", "semantic"])
def test_headers_are_made_by_an_ingest_and_follow_a_file_that_moves(
    started: Service, wire_engine: WireEngine, strategy: str
) -> None:
    name = f"headed-{strategy}"
    body = {
        "embedder": f"{wire_engine.url}#bytes",
        "chunking": {"strategy": strategy, "headers": True},
        "retrieval": {"dense_weight": 0},
    }
    assert started.http.put(f"/collections/{name}", json=body).status_code == 200
    folder = write(started.root / name, {"zephyr.md": "It is greased each spring.", "other.md": "It is never greased."})

    def found(word: str) -> list[str]:
        reply = started.http.post("/retrieve", json={"question": word, "collection": name})
        return [hit["path"] for hit in reply.json()["hits"]]

    assert started.ingest(folder, collection=name)["state"] == "succeeded"
    assert found("zephyr") == [f"{name}/zephyr.md"]
    (folder / "zephyr.md").rename(folder / "mistral.md")
    assert started.ingest(folder, collection=name)["state"] == "succeeded"
    assert found("mistral") == [f"{name}/mistral.md"]
    assert found("zephyr") == []
    assert started.http.delete(f"/collections/{name}").status_code == 204


# reranking in time


class Clock:
    """Stands still but where work is done."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, tokens: Sequence[int], batches: Iterable[range], per_token: float) -> int:
        """-> pairs that were read."""
        read = 0
        for batch in batches:
            self.now += per_token * len(batch) * max(tokens[place] for place in batch)
            read += len(batch)
        return read


def test_as_many_pairs_are_read_as_fit_into_the_time() -> None:
    clock = Clock()
    pace = Pace(clock)
    tokens = [100] * 40
    started = clock.now
    assert clock.work(tokens, pace.batches(tokens, 1.05), 0.001) == FIRST + 6  # .4 s, and .65 s are left
    assert clock.now - started <= 1.05
    assert clock.work(tokens, pace.batches(tokens, 2.55), 0.001) == 25
    assert clock.work(tokens, pace.batches(tokens, 99), 0.001) == 40


def test_long_pairs_are_fewer_in_the_same_time() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.work([50] * 8, pace.batches([50] * 8, 99), 0.001)
    started = clock.now
    assert clock.work([500] * 20, pace.batches([500] * 20, 4.3), 0.001) == 8
    assert clock.now - started <= 4.3


def test_one_batch_is_read_however_short_the_time_and_the_pace_is_learned_anew() -> None:
    clock = Clock()
    pace = Pace(clock)
    tokens = [100] * 20
    for _ in range(30):
        assert clock.work(tokens, pace.batches(tokens, 0.001), 1.0) == FIRST
    for _ in range(30):
        clock.work(tokens, pace.batches(tokens, 0.001), 0.0001)
    assert clock.work(tokens, pace.batches(tokens, 0.1), 0.0001) > BATCH
    assert list(pace.batches([], 1.0)) == []
    assert clock.work([5, 5], pace.batches([5, 5], 0.0), 1.0) == 2


@pytest.fixture
def hurried(settings: IngestSettings, index: EdgeIndex) -> Shelf:
    return steps(Shelf(settings, index, rerank_ms=0.01))


def test_what_time_does_not_allow_follows_in_its_fused_order(hurried: Shelf) -> None:
    fused = hurried.ask("turn valve V6 to position 9", top_k=10)
    answer = hurried.find("turn valve V6 to position 9", top_k=10, retrieval=Retrieval(rerank=True))
    assert answer.reranked == FIRST
    assert answer.timings_ms["rerank"] > 0
    read, others = answer.hits[:FIRST], answer.hits[FIRST:]
    assert {hit.chunk_id for hit in read} == {hit.chunk_id for hit in fused[:FIRST]}
    scores = [hit.rerank_score or 0.0 for hit in read]
    assert scores == sorted(scores, reverse=True)
    assert [hit.chunk_id for hit in others] == [hit.chunk_id for hit in fused[FIRST:]]
    assert all(hit.rerank_score is None for hit in others)


def test_the_depth_says_how_many_are_read(shelf: Shelf) -> None:
    steps(shelf)
    found = shelf.find("turn valve V6 to position 9", top_k=10, retrieval=Retrieval(rerank=True, rerank_depth=3))
    assert found.reranked == 3
    assert [hit.rerank_score is not None for hit in found.hits] == [True] * 3 + [False] * 7


# access


@pytest.mark.parametrize(
    "levers",
    [
        {"mmr": 0.5}, {"neighbours": 3}, {"fusion": "rrf"}, {"rerank": True, "mmr": 0.3, "neighbours": 2},
        {"dense_weight": 0}, {"dense_weight": 1, "quantized": False},
    ],
    ids=str,
)  # fmt: skip
def test_no_lever_shows_what_a_principal_may_not_see_or_a_filter_leaves_out(
    shelf: Shelf, levers: dict[str, object]
) -> None:
    collection = shelf.collect(SMALL, Retrieval.model_validate(levers))
    for n, groups in enumerate([(), ("red",), ("blue",)]):
        text = STEPS.replace("wait", ("wait", "secretred", "secretblue")[n])
        shelf.put(collection, f"{n}.md", text, groups, {"n": n})
    asked = "turn valve V6 to position 9"
    seen = {
        groups: {hit.path for hit in shelf.ask(asked, groups=frozenset(groups), top_k=50)}
        for groups in ((), ("red",), ("red", "blue"))
    }
    assert seen == {(): {"0.md"}, ("red",): {"0.md", "1.md"}, ("red", "blue"): {"0.md", "1.md", "2.md"}}
    assert all("secret" not in hit.text for hit in shelf.ask(asked, groups=frozenset(), top_k=50))
    only = shelf.ask(asked, filters={"metadata.n": 2}, top_k=50)
    assert {hit.document_id for hit in only} == {document_id("manuals", "2.md", 0)}
