"""Ingest over HTTP: what a job tells, that it can be cancelled, and that collections do not wait for each other."""

import time
from pathlib import Path

import pytest
from service_fixtures import HANDBOOK, HERON, KESTREL, Service, events, until, write


@pytest.fixture
def folder(service: Service, request: pytest.FixtureRequest) -> Path:
    """An allowed folder of this test's own."""
    path = service.root / str(request.node.name)
    path.mkdir()
    return path


@pytest.fixture
def many(service: Service, folder: Path) -> Path:
    """A folder that keeps a job busy for longer than a test looks."""
    text = "\n\n".join(f"Pump {n} was looked at by the electricians, who found it in order. " * 40 for n in range(40))
    return write(folder, {f"{n}.md": f"# Log {n}\n\n{text}" for n in range(60)})


def start(service: Service, folder: Path, collection: str) -> str:
    reply = service.http.post("/ingest", json={"path": str(folder), "collection": collection})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job_id"])


def state(service: Service, job_id: str) -> str:
    return str(service.http.get(f"/jobs/{job_id}").json()["state"])


def cancel(service: Service, job_id: str) -> str:
    reply = service.http.post(f"/jobs/{job_id}/cancel")
    assert reply.status_code == 200, reply.text
    return str(reply.json()["state"])


def test_job_from_202_to_its_report(service: Service, folder: Path) -> None:
    files = {"a.md": HERON, "b/c.md": KESTREL, "zh.md": HANDBOOK, "broken.pdf": b"%PDF-1.4 nothing", "empty.md": b""}
    write(folder, files)
    body = {"path": str(folder), "collection": "mixed", "metadata": {"department": "stores", "year": 2024}}
    reply = service.http.post("/ingest", json=body)
    assert reply.status_code == 202
    assert set(reply.json()) >= {"job_id", "state", "progress", "report"}
    assert reply.json()["state"] in {"queued", "running"}
    job_id = reply.json()["job_id"]

    with service.http.stream("GET", f"/jobs/{job_id}/events") as stream:
        got = list(events(stream))
    assert [kind for kind, _ in got[:-1]] == ["progress"] * (len(got) - 1)
    assert got[-1][0] == "done"
    done = got[-1][1]
    assert done == service.http.get(f"/jobs/{job_id}").json()
    assert done["state"] == "succeeded"
    assert done["error"] is None

    report = done["report"]
    assert (report["files"]["done"], report["files"]["failed"]) == (3, 2)
    assert report["chunks"]["added"] >= 3
    assert report["languages"] == {"en": 2, "zh": 1} or set(report["languages"]) == {"en", "zh"}
    failed = {failure["path"]: failure for failure in report["failures"]}
    assert set(failed) == {f"{folder.name}/broken.pdf", f"{folder.name}/empty.md"}
    assert all(failure["reason"] for failure in failed.values())

    view = service.http.get("/collections/mixed").json()
    assert (view["documents"], view["chunks"]) == (3, report["chunks"]["added"])
    documents = {one["path"]: one for one in service.http.get("/documents?collection=mixed").json()}
    broken = documents[f"{folder.name}/broken.pdf"]
    assert broken["state"] == "failed"
    assert broken["reason"] == failed[f"{folder.name}/broken.pdf"]["reason"]
    assert documents[f"{folder.name}/a.md"]["metadata"]["department"] == "stores"
    assert service.http.get(f"/documents/{documents[f'{folder.name}/a.md']['id']}/text").json()["text"] == HERON
    assert service.http.get(f"/documents/{broken['id']}/text").status_code == 404

    def found(**filters: object) -> int:
        query = {"question": "pump", "collection": "mixed", "filters": filters}
        return len(service.http.post("/retrieve", json=query).json()["hits"])

    assert found(**{"metadata.department": "stores"}) == found(**{"metadata.year": [2023, 2024]}) == found() > 0
    assert found(**{"metadata.department": "sales"}) == found(**{"metadata.year": 2023}) == 0

    # what is gone leaves; an emptied folder is believed only when asked to
    (folder / "b" / "c.md").unlink()
    assert service.ingest(folder, collection="mixed")["report"]["files"]["deleted"] == 1
    for path in [*folder.rglob("*.*")]:
        path.unlink()
    kept = service.ingest(folder, collection="mixed")
    assert "allow_empty" in kept["report"]["notes"][0]
    assert service.http.get("/collections/mixed").json()["documents"] == 2
    service.ingest(folder, collection="mixed", allow_empty=True)
    assert service.http.get("/documents?collection=mixed").json() == []
    assert service.http.delete("/collections/mixed").status_code == 204


def test_events_of_an_ended_job_are_its_end(service: Service) -> None:
    job = service.ingest(service.root / "docs")
    with service.http.stream("GET", f"/jobs/{job['job_id']}/events") as stream:
        assert list(events(stream)) == [("done", job)]
    assert cancel(service, job["job_id"]) == "succeeded"  # too late: it stays as it ended


@pytest.mark.slow
def test_a_collection_takes_one_job_at_a_time_others_do_not_wait_and_a_cancel_leaves_nothing(
    service: Service, many: Path
) -> None:
    other = write(service.root / "between", {"a.md": KESTREL})
    first, second = start(service, many, "busy"), start(service, many, "busy")
    third = start(service, other, "between")
    assert service.wait(third)["state"] == "succeeded"
    assert (state(service, first), state(service, second)) == ("running", "queued")

    assert service.http.delete("/collections/busy").status_code == 409
    held = service.http.put("/collections/busy", json={"chunking": {"tokens": 100}})
    assert held.status_code == 409, held.text

    assert cancel(service, second) == "cancelled"
    until(lambda: service.http.get(f"/jobs/{first}").json()["progress"]["files_total"], 30)
    assert service.children()
    cancelled = time.monotonic()
    assert cancel(service, first) == "cancelled"
    until(lambda: not service.children(), 10)
    assert time.monotonic() - cancelled < 2.5  # the promise is two seconds
    assert (state(service, first), state(service, second)) == ("cancelled", "cancelled")

    until(lambda: service.http.delete("/collections/busy").status_code == 204, 5)
    assert service.http.delete("/collections/between").status_code == 204
    assert service.http.get("/health/live").status_code == 200
