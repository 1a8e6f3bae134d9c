"""A live collection under another chunking or embedder: built beside the old index, compared, flipped to, and back."""

import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import HANDBOOK, HERON, KESTREL, LEAVE, Service, write

pytestmark = pytest.mark.slow

FILES = {"heron.md": HERON, "kestrel.md": KESTREL, "leave.md": LEAVE, "zh/handbook.md": HANDBOOK}


@pytest.fixture
def filled(service: Service, request: pytest.FixtureRequest) -> str:
    """A collection of the test's own, whose sources are gone: what it is built from is kept."""
    name = str(request.node.name).removeprefix("test_")[:40].replace("[", "-").strip("-_")
    folder = write(service.root / name, FILES)
    assert service.ingest(folder, collection=name)["state"] == "succeeded"
    shutil.rmtree(folder)
    return name


def reindex(service: Service, name: str, **body: Any) -> dict[str, Any]:
    reply = service.http.post(f"/collections/{name}/reindex", json=body)
    assert reply.status_code == 202, reply.text
    return service.wait(reply.json()["job_id"])


def indexes(service: Service, name: str) -> list[dict[str, Any]]:
    return list(service.http.get(f"/collections/{name}/indexes").json())


def hits(service: Service, name: str, question: str) -> list[dict[str, Any]]:
    reply = service.http.post("/retrieve", json={"question": question, "collection": name})
    assert reply.status_code == 200, reply.text
    return list(reply.json()["hits"])


def test_another_chunking_is_built_beside_the_live_index_and_flipped_to(service: Service, filled: str) -> None:
    before = hits(service, filled, "impeller of the H75")
    job = reindex(service, filled, chunking={"strategy": "heading", "tokens": 64})
    assert job["state"] == "succeeded", job
    comparison = job["report"]["comparison"]
    assert comparison["known"] == 4
    assert comparison["new_found"] == comparison["live_found"] == 1.0
    assert comparison["overlap"] == 1.0  # four documents: all of them are among the first ten
    view = service.http.get(f"/collections/{filled}").json()
    assert view["chunking"]["strategy"] == "heading"
    old, new = indexes(service, filled)
    assert (old["state"], new["state"]) == ("retired", "live")
    assert view["chunks"] == new["chunks"] == job["report"]["chunks"]["added"]
    after = hits(service, filled, "impeller of the H75")
    assert after[0]["context"] == after[0]["heading"] == "Heron H75 submersible pump > Materials"
    assert "context" not in {key for key, value in before[0].items() if value is not None}
    text = service.http.get(f"/documents/{after[0]['document_id']}/text").json()["text"]
    assert text[after[0]["start"] : after[0]["end"]] == after[0]["text"]


def test_the_way_back_knows_what_happened_meanwhile(service: Service, filled: str) -> None:
    reindex(service, filled, chunking={"strategy": "token", "tokens": 32})
    (gone,) = service.http.get("/documents", params={"collection": filled, "path": f"{filled}/leave.md"}).json()
    assert service.http.delete(f"/documents/{gone['id']}").status_code == 204
    upload = {"files": ("new.md", "The osprey nests on the water tower.")}
    reply = service.http.post("/documents", data={"collection": filled}, files=upload)
    service.wait(reply.json()["job_id"])
    old = indexes(service, filled)[0]
    reply = service.http.post(f"/collections/{filled}/indexes/{old['fingerprint'][:12]}/activate")
    assert reply.status_code == 202, reply.text
    job = service.wait(reply.json()["job_id"])
    assert job["state"] == "succeeded", job
    assert job["report"]["chunks"]["added"] == 1  # the one that came meanwhile; the others were there
    assert service.http.get(f"/collections/{filled}").json()["chunking"]["strategy"] == "sentence"
    assert "osprey" in hits(service, filled, "osprey nest")[0]["text"]
    assert not any("annual leave" in hit["text"] for hit in hits(service, filled, "annual leave days"))


def test_an_index_can_be_built_without_being_made_live_and_dropped(service: Service, filled: str) -> None:
    job = reindex(service, filled, chunking={"strategy": "page", "tokens": 128}, flip=False)
    assert "`graft collections activate`" in job["report"]["notes"][0]
    live, ready = indexes(service, filled)
    assert (live["state"], ready["state"]) == ("live", "ready")
    refused = service.http.delete(f"/collections/{filled}/indexes/{live['fingerprint']}")
    assert refused.status_code == 409
    assert service.http.delete(f"/collections/{filled}/indexes/{ready['fingerprint']}").status_code == 204
    assert len(indexes(service, filled)) == 1
    assert next((service.home / "index").glob(f"{filled}.*")).name == f"{filled}.{live['fingerprint'][:12]}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"chunking": {"strategy": "nonsense"}}, 422),
        ({"chunking": {"strategy": "sentence", "tokens": 5000}}, 422),
        ({"chunking": {"strategy": "sentence", "parent_tokens": 500}}, 422),
        ({"embedder": "no-such-model"}, 422),
    ],
)
def test_what_does_not_fit_is_refused_at_once(service: Service, body: dict[str, Any], status: int) -> None:
    assert service.http.post("/collections/default/reindex", json=body).status_code == status


def test_the_same_again_is_refused_and_an_unknown_collection_is_not_found(service: Service, filled: str) -> None:
    reply = service.http.post(f"/collections/{filled}/reindex", json={})
    assert reply.status_code == 422
    assert "already" in reply.json()["detail"]
    assert service.http.post("/collections/nowhere/reindex", json={}).status_code == 404
    assert service.http.get("/collections/nowhere/indexes").status_code == 404


def test_questions_are_answered_by_one_index_or_the_other_meanwhile(service: Service, filled: str) -> None:
    """No question fails, none meets an empty or a mixed index, while an index is built and flipped to."""
    answered: Counter[str] = Counter()
    faults: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            found = hits(service, filled, "impeller of the H75")
            kinds = {"heading" if hit["context"] else "sentence" for hit in found}
            if len(kinds) != 1 or not any("white iron" in hit["text"] for hit in found):
                faults.append(str(found))
            answered.update(kinds)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for one in asking:
        one.start()
    job = reindex(service, filled, chunking={"strategy": "heading", "tokens": 64})
    count = sum(answered.values())
    while sum(answered.values()) < count + 5:
        assert not faults, faults[0]
    stop.set()
    for one in asking:
        one.join()
    assert job["state"] == "succeeded"
    assert faults == []
    assert answered["sentence"] > 0
    assert answered["heading"] > 0


def test_a_retired_index_holds_nothing_of_a_collection_that_is_gone(service: Service, filled: str) -> None:
    reindex(service, filled, chunking={"strategy": "token", "tokens": 64})
    assert len(list((service.home / "index").glob(f"{filled}.*"))) == 2
    assert service.http.delete(f"/collections/{filled}").status_code == 204
    assert list((service.home / "index").glob(f"{filled}.*")) == []
    assert Path(service.home / "uploads" / filled).exists() is False
