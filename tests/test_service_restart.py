"""What is kept when the service ends, by Ctrl-C or by SIGKILL."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import DOCUMENTS, IMPELLER, Service, WireEngine, is_ready, running, until, write

pytestmark = pytest.mark.slow


def kept(service: Service, interaction_id: str) -> dict[str, Any]:
    paths = ("/documents", "/collections", f"/interactions/{interaction_id}")
    found = {path: service.http.get(path).json() for path in paths}
    hits = service.http.post("/retrieve", json={"question": IMPELLER, "top_k": 20}).json()["hits"]
    return {**found, "hits": hits}


def test_restart_keeps_documents_interactions_and_feedback(tmp_path: Path, wire: WireEngine) -> None:
    root, home = write(tmp_path / "root", DOCUMENTS), tmp_path / "home"
    settings = {"SERVICE_LLM_URL": wire.url}
    with running(home, root, "--no-engine", "--ingest", ".", **settings) as service:
        until(lambda: is_ready(service), 120)
        answer = service.answer()
        given = {"interaction_id": answer["interaction_id"], "rating": "up", "comment": "right"}
        assert service.http.post("/feedback", json=given).status_code == 201
        before = kept(service, answer["interaction_id"])
        assert len(before["/documents"]) == len(DOCUMENTS)
        assert before[f"/interactions/{answer['interaction_id']}"]["feedback"][0]["comment"] == "right"
    assert service.process.returncode in {0, 130}
    assert not (home / "owner.json").exists()
    with running(home, root, "--no-engine", "--ingest", ".", **settings) as service:
        until(lambda: is_ready(service), 120)
        assert kept(service, answer["interaction_id"]) == before


def test_job_of_a_killed_service_goes_on(tmp_path: Path, wire: WireEngine) -> None:
    home = tmp_path / "home"
    text = "The electricians looked at the pump and found it in order. " * 60
    root = write(tmp_path / "root", {f"{n}.md": f"# Log {n}\n\nThis is number {n}. {text}" for n in range(60)})
    with running(home, root, "--no-engine", SERVICE_LLM_URL=wire.url) as service:
        job_id = service.http.post("/ingest", json={"path": str(root)}).json()["job_id"]
        until(lambda: service.http.get(f"/jobs/{job_id}").json()["progress"]["files"] >= 5, 90)
        children = service.children()
        assert children
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 5)
    killed = time.monotonic()
    with running(home, root, "--no-engine", SERVICE_LLM_URL=wire.url) as service:
        job = service.wait(job_id, 180)
        assert job["state"] == "succeeded", (job, time.monotonic() - killed)
        documents = service.http.get("/documents").json()
        assert len(documents) == 60
        assert {one["state"] for one in documents} == {"done"}
        assert service.ingest(root)["report"]["files"]["unchanged"] == 60
        hits = service.http.post("/retrieve", json={"question": "pump", "top_k": 100}).json()["hits"]
        assert len({hit["chunk_id"] for hit in hits}) == len(hits) == 100


def test_cancelled_job_stays_cancelled_over_a_restart(tmp_path: Path, wire: WireEngine) -> None:
    home = tmp_path / "home"
    root = write(tmp_path / "root", {f"{n}.md": f"# Log {n}\n\n{'The pump was fine. ' * 500}" for n in range(60)})
    with running(home, root, "--no-engine", SERVICE_LLM_URL=wire.url) as service:
        job_id = service.http.post("/ingest", json={"path": str(root)}).json()["job_id"]
        until(lambda: service.http.get(f"/jobs/{job_id}").json()["state"] == "running", 30)
        assert service.http.post(f"/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    with running(home, root, "--no-engine", SERVICE_LLM_URL=wire.url) as service:
        time.sleep(1)  # it would have been taken up by now
        assert service.http.get(f"/jobs/{job_id}").json()["state"] == "cancelled"
        assert not service.children()
