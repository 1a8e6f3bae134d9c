"""Both engines behind one protocol, on the real chunks of examples/: the same answers, filters, and access lists."""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import qdrant_edge
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient

from ingest.chunk import split
from ingest.embed import Embedder, load_counter
from ingest.errors import LockedError, UnavailableError
from ingest.index import (
    DENSE,
    SPARSE,
    Candidates,
    Filter,
    Index,
    Point,
    chunk_payload,
    fuse,
    search,
    sparse_document,
    sparse_query,
)
from ingest.index_edge import EdgeIndex
from ingest.index_server import ServerIndex
from ingest.language import reads
from ingest.parse import ParseOptions, parse
from ingest.schemas import Chunk, Chunking, Hit, Retrieval, SparseVector, document_id
from ingest.settings import CHECKOUT, IngestSettings

EXAMPLES = CHECKOUT / "examples"
ASKED = json.loads((CHECKOUT / "tests/example_questions.json").read_text())
ANSWERABLE = [asked for asked in ASKED if asked["path"]]
CHINESE = [asked for asked in ANSWERABLE if asked["language"] == "zh"]
ENGLISH = [asked for asked in ANSWERABLE if asked["language"] == "en"]
QUESTIONS = [asked["question"] for asked in [*ENGLISH[:9], *CHINESE[:6]]]
GROUPS: tuple[tuple[str, ...], ...] = ((), ("red",), ("blue",), ("red", "green"))  # of the documents in turn


class Corpus(NamedTuple):
    points: list[Point]
    documents: dict[str, str]  # path -> document id


def corpus_of(models: Path, embedder: Embedder) -> Corpus:
    """All of examples/ in chunks small enough that there are about 150."""
    counter = load_counter("bge-small-en-v1.5", IngestSettings(models=models))
    chunks: list[Chunk] = []
    payloads: list[dict[str, Any]] = []
    documents = {}
    for n, file in enumerate(sorted(file for file in EXAMPLES.rglob("*") if file.is_file())):
        path = str(file.relative_to(EXAMPLES))
        documents[path] = document_id("default", path, 0)
        parsed = parse(file.read_bytes(), path, ParseOptions(1_000_000))
        for chunk in split(documents[path], parsed, Chunking(tokens=96), counter):
            chunks.append(chunk)
            labels = {"number": n % 3, "draft": n % 2 == 0, "site": "north" if n % 2 else "south"}
            payloads.append(chunk_payload(chunk, documents[path], path, GROUPS[n % len(GROUPS)], labels, "bge"))
    vectors = embedder.embed([chunk.text for chunk in chunks])
    points = [
        Point(chunk.id, vector, sparse_document(chunk.text), payload)
        for chunk, vector, payload in zip(chunks, vectors, payloads, strict=True)
    ]
    return Corpus(points, documents)


@pytest.fixture(scope="module")
def corpus(models: Path, embedder: Embedder) -> Corpus:
    return corpus_of(models, embedder)


@pytest.fixture(scope="module")
def edge(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeIndex]:
    index = EdgeIndex(tmp_path_factory.mktemp("edge"))
    index.create("examples", 384)
    index.upsert("examples", corpus.points)
    yield index
    index.close()


@pytest.fixture(scope="module")
def server(corpus: Corpus) -> ServerIndex:
    """The client's local mode stands in for a server."""
    index = ServerIndex(QdrantClient(":memory:"))
    index.create("examples", 384)
    index.upsert("examples", corpus.points)
    return index


@pytest.fixture(scope="module")
def vectors(embedder: Embedder) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {asked["question"]: embedder.embed_query(asked["question"]) for asked in ANSWERABLE}


@pytest.fixture(params=["edge", "server"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    index: Index = EdgeIndex(tmp_path / "index") if request.param == "edge" else ServerIndex(QdrantClient(":memory:"))
    yield index
    index.close()


def point(number: int, text: str, *, document: str = "d", acl: Sequence[str] = ()) -> Point:
    dense = np.eye(4, dtype=np.float32)[number % 4]
    payload = {"document_id": document, "path": "p", "folders": ["p"], "acl": list(acl), "text": text}
    return Point(f"00000000-0000-4000-8000-{number:012}", dense, sparse_document(text), payload)


FILTERS = [
    Filter(),
    Filter({"folders": ["manuals"]}),
    Filter({"folders": ["zh", "reports/millbrook-commissioning.pdf"]}),
    Filter({"language": ["zh"]}),
    Filter({"document_id": [document_id("default", "faq.html", 0)]}),
    Filter({"metadata.site": ["north"], "metadata.number": [1, 2]}),
    Filter({"metadata.draft": [True]}),
    Filter(groups=frozenset({"red"})),
    Filter(groups=frozenset()),
    Filter({"language": ["en"]}, frozenset({"blue", "green"})),
    Filter({"folders": ["nowhere"]}),
]


def named(where: Filter) -> str:
    """The same in each process, as groups of a set are not."""
    groups = where.groups if where.groups is None else sorted(where.groups)
    return f"{where.must}, groups {groups}"


@pytest.mark.parametrize("where", FILTERS, ids=named)
def test_both_engines_give_the_same_hits_with_the_same_scores(
    edge: EdgeIndex, server: ServerIndex, vectors: dict[str, Any], where: Filter
) -> None:
    for question in QUESTIONS:
        dense = vectors[question] if question.isascii() else None
        ours, theirs = (
            search(index, "examples", dense, question, where, Retrieval(candidates=200), 10) for index in (edge, server)
        )
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-3)
        by_id = {hit.chunk_id: hit for hit in theirs}
        last = ours[-1].score if ours else 0
        for hit in ours:
            if hit.score > last + 1e-3:  # of those that tie for the last place either may be left out
                assert hit.model_dump(exclude={"dense_score", "sparse_score", "score"}) == by_id[
                    hit.chunk_id
                ].model_dump(exclude={"dense_score", "sparse_score", "score"})
                assert hit.dense_score == pytest.approx(by_id[hit.chunk_id].dense_score, abs=1e-3)
                assert hit.sparse_score == pytest.approx(by_id[hit.chunk_id].sparse_score, abs=1e-3)


def test_the_corpus_of_the_comparison_is_large_and_every_filter_but_one_finds_something(
    corpus: Corpus, edge: EdgeIndex, vectors: dict[str, Any]
) -> None:
    assert len(corpus.points) >= 120
    assert edge.count("examples") == len(corpus.points)
    question = QUESTIONS[0]
    found = [search(edge, "examples", vectors[question], question, where, Retrieval(), 5) for where in FILTERS]
    assert [bool(hits) for hits in found] == [True] * (len(FILTERS) - 1) + [False]


def matches(payload: dict[str, Any], where: Filter) -> bool:
    flat = {**payload, **{f"metadata.{key}": value for key, value in payload["metadata"].items()}}
    for field, values in where.must.items():
        held = flat[field] if isinstance(flat[field], list) else [flat[field]]
        if not any(type(one) is type(other) and one == other for one in held for other in values):
            return False
    return where.groups is None or not payload["acl"] or bool(where.groups & set(payload["acl"]))


@pytest.mark.parametrize("where", FILTERS, ids=named)
def test_a_filter_lets_through_exactly_what_it_says(
    corpus: Corpus, edge: EdgeIndex, vectors: dict[str, Any], where: Filter
) -> None:
    candidates = edge.search("examples", vectors[QUESTIONS[0]], None, where, 1000)
    assert {key for key, _ in candidates.dense} == {one.id for one in corpus.points if matches(one.payload, where)}


@given(
    groups=st.sets(st.sampled_from(["red", "blue", "green", "other", ""])),
    words=st.lists(
        st.sampled_from(["pump", "water", "oil", "leave", "水泵", "年休假", "meter", "hours", "the"]),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_nobody_finds_a_chunk_of_a_group_that_is_not_theirs(
    edge: EdgeIndex, groups: set[str], words: list[str], seed: int
) -> None:
    dense = np.random.default_rng(seed).standard_normal(384).astype(np.float32)
    hits = search(edge, "examples", dense, " ".join(words), Filter(groups=frozenset(groups)), Retrieval(), 50)
    assert hits
    for payload in edge.payloads("examples", [hit.chunk_id for hit in hits]).values():
        assert not payload["acl"] or groups & set(payload["acl"])
    if not groups:
        assert {
            tuple(payload["acl"]) for payload in edge.payloads("examples", [hit.chunk_id for hit in hits]).values()
        } == {()}


def ask(edge: EdgeIndex, embedder: Embedder, vectors: dict[str, Any], asked: dict[str, Any]) -> list[Hit]:
    question = asked["question"]
    dense = vectors[question] if reads(embedder.languages, question) else None
    return search(edge, "examples", dense, question, Filter(), Retrieval(), 5)


@pytest.mark.parametrize("asked", CHINESE, ids=lambda asked: asked["question"])
def test_a_chinese_question_finds_its_document_first_by_bm25(
    edge: EdgeIndex, embedder: Embedder, vectors: dict[str, Any], asked: dict[str, Any]
) -> None:
    assert not reads(embedder.languages, asked["question"])
    hits = ask(edge, embedder, vectors, asked)
    assert hits[0].path == asked["path"]
    assert hits[0].dense_score is None


def test_english_questions_find_their_document_first(
    edge: EdgeIndex, embedder: Embedder, vectors: dict[str, Any]
) -> None:
    missed = [asked["question"] for asked in ENGLISH if ask(edge, embedder, vectors, asked)[0].path != asked["path"]]
    assert len(missed) <= 0.1 * len(ENGLISH), missed


def test_english_words_are_found_in_their_other_forms_and_common_ones_do_not_count() -> None:
    stem = sparse_query("greased bearings")
    assert set(stem.indices) == set(sparse_query("greasing bearing").indices)
    assert sparse_query("what is the").indices == []


def test_chinese_is_indexed_by_words_not_by_whole_sentences() -> None:
    document = sparse_document("水泵每年需要维护两次，先切断电源。")
    assert set(sparse_query("维护").indices) <= set(document.indices)
    assert set(sparse_query("电源").indices) <= set(document.indices)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("7124", "Replace the seal KX-7124 once a year."),
        ("kx-7124", "Replace the seal KX7124 once a year."),
        ("error E-404", "The display shows E404."),
        ("2024", "２０２４年的预算是五百万元。"),
        ("1,250 hours", "Grease it every 1250 running hours."),
        ("3.2", "It holds 3.2 litres."),
    ],
)
def test_numbers_and_part_numbers_are_words_too(asked: str, text: str) -> None:
    assert set(sparse_query(asked).indices) & set(sparse_document(text).indices)
    other = set(sparse_document("Seal, budget, display and litres; hours of a year.").indices)
    assert set(sparse_query(asked).indices) - other


def test_fusion_weighs_each_side_scaled_to_its_own_range() -> None:
    """By hand: dense a 1, b 0.5, c 0; BM25 c 1, a 0.25, d 0; weights 0.6 and 0.4."""
    candidates = Candidates([("a", 0.9), ("b", 0.8), ("c", 0.7)], [("c", 12.0), ("a", 6.0), ("d", 4.0)])
    fused = fuse(candidates, 0.6)
    assert [key for key, _ in fused] == ["a", "c", "b", "d"]
    assert [score for _, score in fused] == pytest.approx([0.7, 0.4, 0.3, 0.0])


def test_reciprocal_ranks_are_weighted_and_added() -> None:
    """By hand, k 1, so that ranks are worth 1, 2/3, 1/2: dense a, b, c with weight .7; BM25 c, d, a with .3."""
    candidates = Candidates([("a", 0.9), ("b", 0.8), ("c", 0.1)], [("c", 12.0), ("d", 6.0), ("a", 4.0)])
    fused = fuse(candidates, 0.7, rrf_k=1)
    assert [key for key, _ in fused] == ["a", "c", "b", "d"]
    assert [score for _, score in fused] == pytest.approx([0.85, 0.65, 0.7 * 2 / 3, 0.2])
    assert [key for key, _ in fuse(candidates, 0.7, rrf_k=1000)] == ["a", "c", "b", "d"]
    assert fuse(Candidates([("a", 0.5)], [("a", 9.0)]), 0.7, rrf_k=60) == [("a", 1.0)]
    tied = [("b", 2.0), ("a", 2.0), ("c", 1.0)]
    assert dict(fuse(Candidates([], tied), 0.0, rrf_k=1)) == pytest.approx({"a": 1.0, "b": 1.0, "c": 0.5})


def test_dense_scores_are_valued_among_those_of_peers() -> None:
    peers = [("x", 1.0), ("a", 0.75), ("b", 0.5), ("y", 0.0)]
    candidates = Candidates([("a", 0.75), ("b", 0.5)], [("b", 3.0), ("a", 1.0)])
    assert dict(fuse(candidates, 0.6, peers=peers)) == pytest.approx({"b": 0.7, "a": 0.45})
    assert dict(fuse(candidates, 1.0, rrf_k=1, peers=peers)) == pytest.approx({"a": 2 / 3, "b": 0.5})


def test_without_a_dense_side_the_order_is_that_of_bm25() -> None:
    assert [key for key, _ in fuse(Candidates([], [("b", 3.0), ("a", 2.0), ("c", 1.0)]), 0.0)] == ["b", "a", "c"]


def test_ties_are_broken_the_same_way_every_time() -> None:
    assert [key for key, _ in fuse(Candidates([("b", 0.5), ("a", 0.5)], [("a", 1.0), ("b", 1.0)]), 0.5)] == ["a", "b"]
    assert fuse(Candidates([("b", 0.5)], [("a", 1.0)]), 0.5) == [("a", 0.5), ("b", 0.5)]


@given(
    sides=st.tuples(*[st.dictionaries(st.sampled_from("abcdef"), st.floats(-1, 30), max_size=6)] * 2),
    weight=st.floats(0, 1),
)
def test_fused_scores_lie_between_0_and_1_best_first(sides: tuple[dict[str, float], ...], weight: float) -> None:
    dense, sparse = (sorted(side.items(), key=lambda one: -one[1]) for side in sides)
    scores = [score for _, score in fuse(Candidates(dense, sparse), weight)]
    assert scores == sorted(scores, reverse=True)
    assert all(-1e-9 <= score <= 1 + 1e-9 for score in scores)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_side_without_weight_is_not_asked(edge: EdgeIndex, vectors: dict[str, Any], weight: float) -> None:
    question = QUESTIONS[0]
    for hit in search(edge, "examples", vectors[question], question, Filter(), Retrieval(dense_weight=weight), 10):
        assert (hit.dense_score is None) == (weight == 0)
        assert (hit.sparse_score is None) == (weight == 1)


def test_quantised_vectors_find_what_the_real_ones_do_with_their_scores(
    edge: EdgeIndex, vectors: dict[str, Any]
) -> None:
    for question in QUESTIONS[:9]:
        quick, exact = (
            edge.search("examples", vectors[question], None, FILTERS[1], 10, quantized).dense
            for quantized in (True, False)
        )
        assert [key for key, _ in quick] == [key for key, _ in exact]
        assert [score for _, score in quick] == pytest.approx([score for _, score in exact], abs=1e-6)


def test_dense_vectors_are_fetched_by_id(corpus: Corpus, edge: EdgeIndex, server: ServerIndex) -> None:
    some = corpus.points[3:9]
    for index in (edge, server):
        found = index.vectors("examples", [*(one.id for one in some), "00000000-0000-4000-8000-00000000ffff"])
        assert set(found) == {one.id for one in some}
        assert all(found[one.id] == pytest.approx(one.dense, abs=1e-6) for one in some)
        assert index.vectors("examples", []) == {}


def test_chunks_are_found_by_their_places_in_documents(corpus: Corpus, edge: EdgeIndex, server: ServerIndex) -> None:
    first, second = corpus.documents["faq.html"], corpus.documents["zh/pump-maintenance.md"]
    places = {first: {0, 1}, second: {2}, "nowhere": {0}}
    known = {(one.payload["document_id"], one.payload["ordinal"]): one.payload for one in corpus.points}
    for index in (edge, server):
        found = index.at("examples", places)
        assert {(one["document_id"], one["ordinal"]) for one in found} == {(first, 0), (first, 1), (second, 2)}
        for one in found:
            whole = known[one["document_id"], one["ordinal"]]
            assert one == {key: whole[key] for key in ("document_id", "ordinal", "start", "end", "text")}
        assert index.at("examples", {}) == []


def test_a_point_is_written_changed_and_deleted(engine: Index) -> None:
    engine.create("c", 4)
    engine.create("c", 4)  # is there already
    points = [point(n, f"pump number{n}", document="one" if n < 3 else "two") for n in range(5)]
    engine.upsert("c", points)
    assert engine.count("c") == 5
    assert engine.ids("c", "one") == {one.id for one in points[:3]}
    assert engine.payloads("c", [points[4].id]) == {points[4].id: points[4].payload}

    engine.upsert("c", [points[0]])
    engine.set_payloads("c", [(points[0].id, {"document_id": "two", "text": "moved"})])
    assert engine.payloads("c", [points[0].id]) == {points[0].id: {"document_id": "two", "text": "moved"}}
    candidates = engine.search("c", points[0].dense, sparse_query("number0"), Filter(), 5)
    assert [key for key, _ in candidates.sparse] == [points[0].id]

    engine.delete("c", [points[1].id, "00000000-0000-4000-8000-00000000ffff"])
    engine.delete("c", [])
    assert engine.count("c") == 4
    assert engine.ids("c", "one") == {points[2].id}
    candidates = engine.search("c", points[1].dense, sparse_query("number1"), Filter(), 5)
    assert points[1].id not in {key for side in candidates for key, _ in side}


def test_a_dropped_index_is_empty_and_can_be_made_again(engine: Index) -> None:
    engine.create("c", 4)
    engine.upsert("c", [point(1, "pump")])
    engine.create("other", 4)
    engine.upsert("other", [point(1, "pump")])
    engine.drop("c")
    assert engine.count("c") == 0
    assert engine.search("c", point(1, "").dense, sparse_query("pump"), Filter(), 5) == Candidates([], [])
    engine.create("c", 4)
    assert engine.count("c") == 0
    engine.upsert("c", [point(2, "valve")])
    assert engine.ids("c", "d") == {point(2, "valve").id}
    assert engine.count("other") == 1
    engine.drop("never there")


def test_an_index_that_is_not_there_answers_as_an_empty_one(engine: Index) -> None:
    assert engine.count("c") == 0
    assert engine.ids("c", "d") == set()
    assert engine.payloads("c", [point(1, "").id]) == {}
    assert engine.vectors("c", [point(1, "").id]) == {}
    assert engine.at("c", {"d": {0}}) == []
    assert engine.search("c", point(1, "").dense, sparse_query("pump"), Filter(), 5) == Candidates([], [])
    engine.flush("c")


def scanned(index: Index, name: str, limit: int) -> list[Point]:
    found: list[Point] = []
    offset = None
    while True:
        points, offset = index.scan(name, offset, limit)
        assert len(points) <= limit
        found += points
        if offset is None:
            return found


@pytest.mark.parametrize("limit", [1, 40, 1000])
def test_a_scan_gives_every_point_once_with_its_vectors_and_payload(
    corpus: Corpus, edge: EdgeIndex, server: ServerIndex, limit: int
) -> None:
    expected = {one.id: one for one in corpus.points}
    for index in (edge, server):
        found = scanned(index, "examples", limit)
        assert [one.id for one in found] == sorted(expected)
        for one in found:
            written = expected[one.id]
            assert one.payload == written.payload
            assert one.dense.dtype == np.float32
            assert one.dense == pytest.approx(written.dense, abs=1e-6)
            assert dict(zip(one.sparse.indices, one.sparse.values, strict=True)) == {
                word: float(np.float32(weight))
                for word, weight in zip(written.sparse.indices, written.sparse.values, strict=True)
            }


def test_what_was_scanned_and_written_again_is_scanned_the_same(engine: Index, corpus: Corpus) -> None:
    """Vectors do not drift from one dump to the next, and a chunk without a word in it comes back as one."""
    engine.create("c", 384)
    engine.upsert("c", corpus.points[:30])
    wordless = Point(corpus.points[30].id, corpus.points[30].dense, SparseVector(indices=[], values=[]), {"text": "!"})
    engine.upsert("c", [wordless])
    first = scanned(engine, "c", 100)
    engine.create("d", 384)
    engine.upsert("d", first)
    for before, after in zip(first, scanned(engine, "d", 100), strict=True):
        assert (after.id, after.sparse, after.payload) == (before.id, before.sparse, before.payload)
        assert after.dense == pytest.approx(before.dense, abs=1e-7)
    assert next(one for one in first if one.id == wordless.id).sparse == wordless.sparse


def test_the_indexes_that_exist_are_named_and_no_others(engine: Index) -> None:
    assert engine.names() == []
    for name in ("b.2", "a.1", "c.3"):
        engine.create(name, 4)
    engine.drop("c.3")
    assert engine.names() == ["a.1", "b.2"]
    assert engine.scan("c.3", None, 10) == ([], None)
    assert engine.scan("a.1", None, 10) == ([], None)


def test_a_question_of_common_words_alone_is_answered_by_the_dense_side(engine: Index) -> None:
    engine.create("c", 4)
    engine.upsert("c", [point(n, "pump") for n in range(3)])
    candidates = engine.search("c", point(1, "").dense, sparse_query("what is the"), Filter(), 5)
    assert candidates.dense[0][0] == point(1, "").id
    assert candidates.sparse == []
    assert engine.search("c", None, sparse_query("what is the"), Filter(), 5) == Candidates([], [])


def test_what_was_flushed_is_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    first = EdgeIndex(tmp_path)
    first.create("c", 4)
    first.upsert("c", [point(n, f"pump {n}", acl=["red"]) for n in range(100)])
    first.flush("c")
    first.close()
    second = EdgeIndex(tmp_path)
    assert second.count("c") == 100
    assert second.search("c", None, sparse_query("pump"), Filter(groups=frozenset({"blue"})), 5) == Candidates([], [])
    assert len(second.search("c", None, sparse_query("pump"), Filter(groups=frozenset({"red"})), 5).sparse) == 5
    second.close()


def open_elsewhere(folder: Path) -> str:
    try:
        EdgeIndex(folder).close()
    except LockedError as error:
        return str(error)
    return "opened"


def test_a_second_process_is_refused_and_the_first_works_on(tmp_path: Path) -> None:
    first = EdgeIndex(tmp_path)
    first.create("c", 4)
    first.upsert("c", [point(1, "pump")])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "is open in another process; end that one first" in pool.apply(open_elsewhere, (tmp_path,))
        with pytest.raises(LockedError, match=tmp_path.name):
            EdgeIndex(tmp_path)
        first.upsert("c", [point(2, "valve")])
        first.flush("c")
        assert first.count("c") == 2
        first.close()
        assert pool.apply(open_elsewhere, (tmp_path,)) == "opened"


def test_writing_to_an_index_that_was_dropped_meanwhile_is_an_error_of_ours(tmp_path: Path) -> None:
    index = EdgeIndex(tmp_path)
    with pytest.raises(UnavailableError, match="'c' was dropped"):
        index.upsert("c", [point(1, "pump")])
    index.close()


def test_an_index_made_before_there_were_quantised_vectors_is_searched_and_written(tmp_path: Path) -> None:
    vectors = {DENSE: qdrant_edge.EdgeVectorParams(size=4, distance=qdrant_edge.Distance.Cosine)}
    words = {SPARSE: qdrant_edge.EdgeSparseVectorParams(modifier=qdrant_edge.Modifier.Idf)}
    (tmp_path / "c").mkdir()
    shard = qdrant_edge.EdgeShard.create(
        str(tmp_path / "c"), qdrant_edge.EdgeConfig(vectors=vectors, sparse_vectors=words)
    )
    shard.flush()
    shard.close()
    (tmp_path / "c/.ready").touch()
    index = EdgeIndex(tmp_path)
    index.upsert("c", [point(n, f"pump number{n}") for n in range(4)])
    found = index.search("c", point(2, "").dense, sparse_query("number2"), Filter(), 1)
    assert [key for side in found for key, _ in side] == [point(2, "").id] * 2
    assert found.dense[0][1] == pytest.approx(1)
    index.close()


def test_a_creation_that_was_killed_is_started_over(tmp_path: Path) -> None:
    (tmp_path / "c/segments").mkdir(parents=True)
    index = EdgeIndex(tmp_path)
    assert index.count("c") == 0
    index.create("c", 4)
    index.upsert("c", [point(1, "pump")])
    assert index.count("c") == 1
    index.close()


def test_a_server_that_does_not_answer_is_named_by_its_setting() -> None:
    index = ServerIndex(QdrantClient("http://127.0.0.1:9", timeout=2, check_compatibility=False))
    with pytest.raises(UnavailableError, match="INGEST_QDRANT_URL"):
        index.count("c")
    index.close()
