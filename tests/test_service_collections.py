"""Collections over HTTP: their defaults, what may change when, and what stays."""

from service_fixtures import DOCUMENTS, Service, WireEngine

from service.prompt import CURRENT

FIELDS = {
    "name", "embedder", "chunking", "fingerprint", "retrieval", "prompt", "adapter", "threshold", "created_at",
    "documents", "chunks",
}  # fmt: skip


def test_default_is_there_with_its_defaults(service: Service) -> None:
    listed = service.http.get("/collections").json()
    default = service.http.get("/collections/default").json()
    assert default in listed
    assert set(default) == FIELDS
    assert default["documents"] == len(DOCUMENTS)
    assert default["chunks"] >= len(DOCUMENTS)
    assert (default["adapter"], default["threshold"]) == (None, None)
    assert default["embedder"] == "bge-small-en-v1.5"


def test_default_cannot_be_deleted(service: Service) -> None:
    reply = service.http.delete("/collections/default")
    assert reply.status_code == 409
    assert "default" in reply.json()["detail"]
    assert service.http.get("/collections/default").json()["documents"] == len(DOCUMENTS)


def test_put_creates_changes_and_leaves_out(service: Service, adapter: str) -> None:
    created = service.http.put("/collections/shelf", json={"threshold": 0.3, "adapter": adapter})
    assert created.status_code == 200
    changed = service.http.put("/collections/shelf", json={"prompt": "cited", "retrieval": {"top_k": 3}}).json()
    assert (changed["threshold"], changed["adapter"], changed["prompt"]) == (0.3, adapter, CURRENT["cited"])
    assert changed["retrieval"]["top_k"] == 3
    assert changed["created_at"] == created.json()["created_at"]
    unset = service.http.put("/collections/shelf", json={"threshold": None, "adapter": None}).json()
    assert (unset["threshold"], unset["adapter"], unset["prompt"]) == (None, None, CURRENT["cited"])
    assert service.http.delete("/collections/shelf").status_code == 204
    assert service.http.get("/collections/shelf").status_code == 404
    assert service.http.delete("/collections/shelf").status_code == 404


def test_other_embedder_or_chunking_is_for_empty_collections(service: Service, wire: WireEngine) -> None:
    embedder = f"{wire.url}#wire-embedder"
    before = service.http.get("/collections/default").json()
    for change in ({"embedder": embedder}, {"chunking": {"tokens": 100}}):
        reply = service.http.put("/collections/default", json=change)
        assert reply.status_code == 409
        assert "'default'" in reply.json()["detail"]
        created = service.http.put("/collections/hollow", json=change)
        assert created.status_code == 200
        assert created.json()["fingerprint"] != before["fingerprint"]
    both = service.http.get("/collections/hollow").json()
    assert (both["embedder"], both["chunking"]["tokens"]) == (embedder, 100)
    assert service.http.get("/collections/default").json() == before
    assert service.http.post("/retrieve", json={"question": "x", "collection": "hollow"}).json()["hits"] == []
    service.http.delete("/collections/hollow")


def test_the_same_settings_on_a_filled_collection_are_fine(service: Service) -> None:
    before = service.http.get("/collections/default").json()
    same = {"embedder": before["embedder"], "chunking": before["chunking"]}
    assert service.http.put("/collections/default", json=same).json() == before
