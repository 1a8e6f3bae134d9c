"""A question over several collections: each with its own embedder and settings, one list, and nobody sees more than before."""

from collections.abc import Iterator

import pytest
from service_fixtures import Service, WireEngine, run_graft, write
from shelf import BGE, Shelf, bag_of_words

from ingest.errors import NotFoundError
from ingest.index_edge import EdgeIndex
from ingest.schemas import Chunking, Retrieval
from ingest.settings import IngestSettings

pytestmark = pytest.mark.slow

PUMPS = {
    "heron.md": "# Heron H75\n\nChange the oil of the seal chamber every 4,000 running hours.",
    "kestrel.md": "# Kestrel K40\n\nGrease the bearings every 2,000 running hours.",
    "grebe.md": "# Grebe G10\n\nThe strainer is rinsed with water each morning.",
}
STAFF = {
    "leave.md": "# Leave\n\nEmployees have 27 days of annual leave each year.",
    "canteen.md": "# Canteen\n\nThere is soup at noon, and on Fridays there is fish.",
    "shifts.md": "# Shifts\n\nThe night shift begins at ten and ends at six.",
}
OIL, LEAVE = "How often is the oil of the seal chamber changed?", "How many days of annual leave do employees have?"


@pytest.fixture
def shelf(settings: IngestSettings, index: EdgeIndex) -> Shelf:
    return Shelf(settings, index)


@pytest.fixture(scope="module")
def words() -> Iterator[str]:
    with bag_of_words() as name:
        yield name


def filled(shelf: Shelf, embedders: tuple[str, str] = (BGE, BGE), retrieval: Retrieval | None = None) -> Shelf:
    for name, texts, embedder in zip(("pumps", "staff"), (PUMPS, STAFF), embedders, strict=True):
        collection = shelf.collect(name=name, embedder=embedder, retrieval=retrieval)
        for path, text in texts.items():
            shelf.put(collection, path, text)
    return shelf


def test_collections_of_one_embedder_are_ranked_as_if_they_were_one(shelf: Shelf) -> None:
    filled(shelf)
    both = shelf.collect(name="both")
    for path, text in {**PUMPS, **STAFF}.items():
        shelf.put(both, path, text)
    dense = Retrieval(dense_weight=1)
    for question in (OIL, LEAVE):
        whole, parts = (
            shelf.ask(question, "both", retrieval=dense),
            shelf.ask(question, "pumps", "staff", retrieval=dense),
        )
        assert [hit.path for hit in parts] == [hit.path for hit in whole]
        assert [hit.score for hit in parts] == pytest.approx([hit.score for hit in whole], abs=1e-6)


@pytest.mark.parametrize("levers", [{}, {"fusion": "rrf"}, {"mmr": 0.7}, {"neighbours": 1}], ids=str)
def test_the_collection_that_knows_comes_first_whatever_the_order_of_names(
    shelf: Shelf, levers: dict[str, object]
) -> None:
    filled(shelf, retrieval=Retrieval.model_validate(levers))
    for names in (("pumps", "staff"), ("staff", "pumps")):
        oil, leave = shelf.ask(OIL, *names)[0], shelf.ask(LEAVE, *names)[0]
        assert (oil.collection, oil.path) == ("pumps", "heron.md")
        assert (leave.collection, leave.path) == ("staff", "leave.md")


def test_lists_of_different_embedders_take_turns_by_rank(shelf: Shelf, words: str) -> None:
    filled(shelf, (BGE, words))
    hits = shelf.ask(OIL, "pumps", "staff", top_k=6)
    assert [hit.collection for hit in hits] == ["pumps", "staff"] * 3
    assert hits[0].path == "heron.md"
    assert [hit.score for hit in hits] == pytest.approx([1, 1, 61 / 62, 61 / 62, 61 / 63, 61 / 63])
    for name in ("pumps", "staff"):
        alone = [hit.chunk_id for hit in shelf.ask(OIL, name)]
        assert [hit.chunk_id for hit in hits if hit.collection == name] == alone
    assert shelf.ask(LEAVE, "pumps", "staff")[1].path == "leave.md"


def test_the_reranker_compares_what_the_embedders_cannot(shelf: Shelf, words: str) -> None:
    filled(shelf, (BGE, words), Retrieval(rerank=True))
    for question, expected in ((OIL, "heron.md"), (LEAVE, "leave.md")):
        found = shelf.find(question, "pumps", "staff", top_k=6)
        assert found.hits[0].path == expected
        assert found.reranked == 6
        scores = [hit.rerank_score or 0.0 for hit in found.hits]
        assert scores == sorted(scores, reverse=True)


def test_mmr_over_different_embedders_compares_none_of_their_vectors(shelf: Shelf, words: str) -> None:
    filled(shelf, (BGE, words), Retrieval(mmr=0.5))
    assert len(shelf.ask(OIL, "pumps", "staff", top_k=6)) == 6


def test_each_collection_keeps_its_own_settings(shelf: Shelf) -> None:
    for name, levers in (("pumps", {"dense_weight": 0, "top_k": 2}), ("staff", {"neighbours": 1, "top_k": 9})):
        collection = shelf.collect(Chunking(tokens=16), Retrieval.model_validate(levers), name)
        shelf.put(collection, "a.md", "\n\n".join(f"Rule {n} of {name}: close door {n} at noon." for n in range(5)))
    hits = shelf.ask("close door 3 at noon", "pumps", "staff")
    assert len(hits) == 2  # top_k is the first one's
    alone, wide = sorted(hits, key=lambda hit: hit.collection or "")
    assert (alone.collection, wide.collection) == ("pumps", "staff")
    assert alone.dense_score is None
    assert alone.text.count("Rule") == 1
    assert wide.text.count("Rule") > 1


def test_access_and_filters_hold_in_each(shelf: Shelf, words: str) -> None:
    for name, embedder in (("pumps", BGE), ("staff", words)):
        collection = shelf.collect(name=name, embedder=embedder)
        for n, groups in enumerate([(), ("red",), ("blue",)]):
            shelf.put(collection, f"{n}.md", f"# Oil {n}\n\nThe oil of {name} is changed yearly.", groups, {"n": n})

    def seen(**fields: object) -> set[tuple[str | None, str]]:
        return {
            (hit.collection, hit.path) for hit in shelf.ask("oil changed yearly", "pumps", "staff", top_k=50, **fields)
        }

    assert seen(groups=frozenset()) == {("pumps", "0.md"), ("staff", "0.md")}
    assert seen(groups=frozenset({"red"})) == {(name, path) for name in ("pumps", "staff") for path in ("0.md", "1.md")}
    assert seen(filters={"metadata.n": 2}) == {("pumps", "2.md"), ("staff", "2.md")}


def test_a_collection_that_is_not_there_is_named(shelf: Shelf) -> None:
    filled(shelf)
    with pytest.raises(NotFoundError, match="'ghosts'"):
        shelf.ask(OIL, "pumps", "ghosts")


# over HTTP


@pytest.fixture(scope="module")
def staff(started: Service, wire_engine: WireEngine) -> Iterator[str]:
    """A second collection, with an embedder of its own, beside `default`."""
    body = {"embedder": f"{wire_engine.url}#bytes", "retrieval": {"dense_weight": 0.1}}
    assert started.http.put("/collections/staff", json=body).status_code == 200
    folder = write(started.root / "staff", {"canteen.md": STAFF["canteen.md"], "shifts.md": STAFF["shifts.md"]})
    assert started.ingest(folder, collection="staff")["state"] == "succeeded"
    yield "staff"
    assert started.http.delete("/collections/staff").status_code == 204


def test_an_answer_draws_on_all_of_them_and_its_record_says_so(service: Service, staff: str, wire: WireEngine) -> None:
    wire.say("On Fridays there is fish [1].")
    answer = service.answer("When is there fish in the canteen?", collections=["default", staff])
    assert (answer["collection"], answer["collections"]) == ("default", ["default", staff])
    kept = service.interaction(answer["interaction_id"])
    assert kept["collections"] == ["default", staff]
    assert {hit["collection"] for hit in kept["hits"]} == {"default", staff}
    assert "there is fish" in wire.last().body["messages"][-1]["content"]
    alone = service.interaction(service.answer()["interaction_id"])
    assert (alone["collection"], alone["collections"]) == ("default", None)


def test_retrieval_settings_of_a_request_travel(service: Service, staff: str) -> None:
    body = {
        "question": "When is there fish?",
        "collections": [staff, "default"],
        "retrieval": {"top_k": 1, "dense_weight": 0},
    }
    [hit] = service.http.post("/retrieve", json=body).json()["hits"]
    assert (hit["collection"], hit["path"], hit["dense_score"]) == (staff, "staff/canteen.md", None)


@pytest.mark.parametrize("path", ["/query", "/retrieve"])
def test_what_is_wrong_with_the_names_is_said(service: Service, path: str) -> None:
    def status(**fields: object) -> tuple[int, str]:
        reply = service.http.post(path, json={"question": "When?", **fields})
        return reply.status_code, reply.json()["detail"]

    assert status(collections=["default", "ghosts"])[0] == 404
    assert "'ghosts'" in status(collections=["default", "ghosts"])[1]
    assert status(collections=["default", "staff"], collection="default")[0] == 422
    assert "not both" in status(collections=["default", "staff"], collection="default")[1]
    assert "each is named once" in status(collections=["default", "default"])[1]
    for names in (["default"], [], [f"c{n}" for n in range(11)], ["Default", "x"], "default"):
        assert status(collections=names)[0] == 422
    for retrieval in ({"mmr": 2}, {"neighbours": 4}, {"fusion": "sum"}, {"rerank_depth": 0}, {"unknown": 1}):
        assert status(retrieval=retrieval)[0] == 422


def test_the_command_takes_several(service: Service, staff: str) -> None:
    for names in (["-c", "default", "-c", staff], ["-c", f"default,{staff}"]):
        shown = run_graft(service.home, "retrieve", "When is there fish?", *names, cwd=service.root)
        assert shown.returncode == 0, shown.stderr
        assert "staff: staff/canteen.md" in shown.stdout
        assert "default: " in shown.stdout
    one = run_graft(service.home, "retrieve", "When is there fish?", "-c", staff, cwd=service.root)
    assert "canteen.md" in one.stdout
    assert "staff: " not in one.stdout
