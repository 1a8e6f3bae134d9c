"""Documents over HTTP: uploads and their versions, deletion that leaves no trace, retry, and who may do what."""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fixtures import HERON, KESTREL, LEAVE, Service, write

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(service: Service, request: pytest.FixtureRequest) -> Path:
    path = service.root / str(request.node.name)
    path.mkdir()
    return path


def ended(service: Service, reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 202, reply.text
    return service.wait(reply.json()["job_id"])


def upload(service: Service, collection: str, files: dict[str, str | bytes], **fields: Any) -> httpx.Response:
    form = {"collection": collection} | {key: json.dumps(value) for key, value in fields.items()}
    parts = [("files", (name, content)) for name, content in files.items()]
    return service.http.post("/documents", data=form, files=parts)


def found(service: Service, collection: str, question: str) -> list[str]:
    reply = service.http.post("/retrieve", json={"question": question, "collection": collection})
    return [hit["text"] for hit in reply.json()["hits"]]


def listed(service: Service, collection: str, **query: str) -> dict[str, dict[str, Any]]:
    reply = service.http.get("/documents", params={"collection": collection, **query})
    assert reply.status_code == 200, reply.text
    return {one["path"]: one for one in reply.json()}


def test_an_uploaded_file_is_searchable_and_its_next_version_replaces_it(service: Service) -> None:
    job = ended(service, upload(service, "up", {"heron.md": HERON, "kestrel.md": KESTREL}, metadata={"site": "north"}))
    assert job["state"] == "succeeded"
    assert job["report"]["files"]["done"] == 2
    documents = listed(service, "up")
    assert set(documents) == {"heron.md", "kestrel.md"}
    assert documents["heron.md"]["metadata"]["site"] == "north"
    assert any("white iron" in text for text in found(service, "up", "impeller material"))

    job = ended(service, upload(service, "up", {"heron.md": HERON.replace("white iron", "bronze")}))
    assert job["report"]["files"] == {"done": 1, "unchanged": 0, "moved": 0, "deleted": 0, "skipped": 0, "failed": 0}
    assert job["report"]["chunks"]["kept"] >= 1
    texts = found(service, "up", "impeller material")
    assert any("bronze" in text for text in texts)
    assert not any("white iron" in text for text in texts)
    ended(service, upload(service, "up", {"heron.md": HERON}, acl=["board"]))
    again = listed(service, "up")["heron.md"]
    assert again["acl"] == ["board"]
    assert again["id"] == documents["heron.md"]["id"]
    assert again["metadata"]["site"] == "north"  # labels stay when an upload says nothing of them


@pytest.mark.parametrize(
    "name",
    ["../../etc/evil.md", "/etc/evil.md", ".hidden.md", "a/../b.md", "x.md.graft.json", "x" * 250 + ".md"],
)
def test_a_name_that_is_none_is_refused_and_nothing_is_written(service: Service, name: str) -> None:
    before = sorted(service.home.rglob("*"))
    reply = upload(service, "evil", {"good.md": "Good.", name: "Evil."})
    assert reply.status_code == 422, reply.text
    assert "files" in reply.json()["detail"]
    assert not [path for path in service.home.rglob("*") if path not in before and "uploads" in path.parts]


def test_a_form_that_does_not_fit_is_refused_by_its_field(service: Service) -> None:
    reply = service.http.post("/documents", data={"collection": "up"})
    assert reply.status_code == 422
    assert "files" in reply.json()["detail"]
    reply = service.http.post("/documents", data={"metadata": "[1"}, files=[("files", ("a.md", "x"))])
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == "metadata"


def test_a_deleted_document_leaves_no_trace_and_is_kept_out_until_it_is_restored(
    service: Service, folder: Path
) -> None:
    write(folder, {"heron.md": HERON, "leave.md": LEAVE})
    body = {"path": str(folder), "collection": "gone"}
    ended(service, service.http.post("/ingest", json=body))
    document = listed(service, "gone", path=f"{folder.name}/heron.md").popitem()[1]
    assert service.http.delete(f"/documents/{document['id']}").status_code == 204
    assert not any("impeller" in text for text in found(service, "gone", "impeller of the Heron"))
    assert service.http.get(f"/documents/{document['id']}").status_code == 404
    assert service.http.get(f"/documents/{document['id']}/text").status_code == 404
    assert service.http.delete(f"/documents/{document['id']}").status_code == 204  # the first may have been cut off
    assert service.http.delete("/documents/nonsense").status_code == 404
    assert (folder / "heron.md").exists()

    job = ended(service, service.http.post("/ingest", json=body))
    assert job["report"]["files"]["skipped"] == 1
    assert "--restore" in job["report"]["skips"][0]["reason"]
    (folder / "heron.md").write_text(HERON + "\nEdited.\n")
    ended(service, service.http.post("/ingest", json=body))
    assert not any("impeller" in text for text in found(service, "gone", "impeller of the Heron"))

    job = ended(service, service.http.post("/ingest", json=body | {"restore": True}))
    assert job["report"]["files"]["done"] == 1
    assert any("impeller" in text for text in found(service, "gone", "impeller of the Heron"))


def test_an_uploaded_document_is_deleted_with_its_file_and_can_come_again(service: Service) -> None:
    ended(service, upload(service, "once", {"heron.md": HERON}, acl=[]))
    (document,) = listed(service, "once").values()
    assert service.http.delete(f"/documents/{document['id']}").status_code == 204
    assert not [path for path in (service.home / "uploads/once").rglob("*") if path.is_file()]
    assert listed(service, "once") == {}
    ended(service, upload(service, "once", {"heron.md": HERON}))
    assert list(listed(service, "once")) == ["heron.md"]


def test_retry_takes_the_failed_files_alone(service: Service, folder: Path) -> None:
    write(folder, {"good.md": HERON, "torn.docx": b"PK\x03\x04torn"})
    job = ended(service, service.http.post("/ingest", json={"path": str(folder), "collection": "retry"}))
    assert job["report"]["files"]["failed"] == 1
    write(folder, {"torn.docx": (Path(__file__).parent.parent / "examples/faq.html").read_bytes(), "new.md": LEAVE})
    os.rename(folder / "torn.docx", folder / "torn.docx.tmp")
    write(folder, {"torn.docx": b"PK\x03\x04torn still"})
    again = ended(service, service.http.post(f"/jobs/{job['job_id']}/retry"))
    assert again["report"]["files"] == {"done": 0, "unchanged": 0, "moved": 0, "deleted": 0, "skipped": 0, "failed": 1}
    assert "new.md" not in str(listed(service, "retry"))
    failed = listed(service, "retry", state="failed")
    assert [one["stage"] for one in failed.values()] == ["parse"]


def test_jobs_are_listed_the_latest_first(service: Service, folder: Path) -> None:
    write(folder, {"a.md": "Words."})
    ids = [
        ended(service, service.http.post("/ingest", json={"path": str(folder), "collection": "listed"}))["job_id"]
        for _ in range(2)
    ]
    jobs = service.http.get("/jobs", params={"collection": "listed"}).json()
    assert [job["job_id"] for job in jobs] == ids[::-1]


def test_only_some_files_of_a_folder_are_looked_at(service: Service, folder: Path) -> None:
    write(folder, {"a.md": "The tank is green.", "b.md": "The pipe is blue."})
    body: dict[str, Any] = {"path": str(folder), "collection": "only"}
    ended(service, service.http.post("/ingest", json=body))
    write(folder, {"a.md": "The tank is violet.", "b.md": "The pipe is orange."})
    (folder / "c.md").write_text("The valve is white.")
    job = ended(service, service.http.post("/ingest", json=body | {"only": ["a.md", str(folder / "gone.md")]}))
    assert job["report"]["files"]["done"] == 1
    assert job["report"]["files"]["deleted"] == 0
    texts = found(service, "only", "which colour")
    assert any("violet" in text for text in texts)
    assert any("blue" in text for text in texts)
    outside = service.http.post("/ingest", json=body | {"only": ["../other.md"]})
    assert outside.status_code == 403
