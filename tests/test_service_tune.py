"""Trainings as jobs of the service: what is refused, who may ask, and that the service leaves them to a worker."""

import asyncio
import hashlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from service_fixtures import Service, WireEngine, engine_venv, events, run_graft, running

from ingest import db
from ingest.settings import IngestSettings
from service.engine import LocalEngine
from service.settings import ServiceSettings
from service.tuning import POINTS, LossPoint, extended
from service.workers import Workers

ROW = {"prompt": [{"role": "user", "content": "Hello?"}], "completion": [{"role": "assistant", "content": "Hello."}]}


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Iterator[Service]:
    """A service with keys, where no worker is; `http` has the admin's."""
    folder = tmp_path_factory.mktemp("tuning")
    root = folder / "root"
    root.mkdir()
    (root / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "elsewhere.jsonl").write_text(json.dumps(ROW) + "\n")
    (root / "link.jsonl").symlink_to(folder / "elsewhere.jsonl")
    keys = [
        {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "groups": groups}
        for name, groups in (("admin", ["admin"]), ("reader", []))
    ]
    (folder / "keys.json").write_text(json.dumps(keys))
    settings = {"SERVICE_LLM_URL": wire_engine.url, "SERVICE_API_KEYS_FILE": str(folder / "keys.json")}
    with running(folder / "home", root, "--no-engine", key="admin", **settings) as service:
        yield service


def body(service: Service, **fields: Any) -> dict[str, Any]:
    return {"recipe": "sft-lora", "data": str(service.root / "rows.jsonl"), **fields}


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"recipe": "../../etc/recipe"}, 422, "recipe"),
        ({"recipe": "x.toml"}, 422, "recipe"),
        ({"settings": ["max_steps"]}, 422, "settings.0"),
        ({"settings": ["eval_data=/etc/passwd"]}, 422, "give the rows as data"),
        ({"settings": ["data.data=/etc/passwd"]}, 422, "give the rows as data"),
        ({"settings": ["model.base=/etc"]}, 403, "outside the folders"),
        ({"settings": ["parent=../../etc"]}, 403, "outside the folders"),
        ({"settings": ["output_dir=/tmp/x"]}, 403, "may not be set by a request"),
        ({"settings": ["push_to_hub=true"]}, 403, "may not be set by a request"),
        ({"settings": ["training.deepspeed=x.json"]}, 403, "may not be set by a request"),
        ({"data": "/etc/passwd"}, 403, "outside the folders"),
        ({"data": "../elsewhere.jsonl"}, 422, "no data set '../elsewhere.jsonl'"),
        ({"data": "/etc/passwd#one"}, 403, "outside the folders"),
        ({"data": "/etc/x.json#one"}, 403, "outside the folders"),
        ({"data": "nothing"}, 422, "no data set 'nothing'"),
        ({"collection": "nobody"}, 404, "nobody"),
        ({"label": "graft-probe-1"}, 422, "label"),
        ({"activate": True, "check": False}, 422, "activate needs check"),
        ({"activate": True, "register": False}, 422, "activate needs check"),
        ({"surprise": 1}, 422, "surprise"),
    ],
)
def test_what_no_worker_should_see_is_refused(tuning: Service, fields: dict[str, Any], status: int, said: str) -> None:
    before = tuning.http.get("/jobs").json()
    reply = tuning.http.post("/tune", json=body(tuning, **fields))
    assert (reply.status_code, said in reply.text) == (status, True), reply.text
    assert tuning.http.get("/jobs").json() == before


def test_rows_are_read_below_the_roots_alone(tuning: Service) -> None:
    for name, status, said in (("link.jsonl", 403, "outside the folders"), ("gone.jsonl", 422, "does not exist")):
        reply = tuning.http.post("/tune", json=body(tuning, data=str(tuning.root / name)))
        assert (reply.status_code, said in reply.text) == (status, True), reply.text


def test_only_an_admin_trains_and_pauses(tuning: Service) -> None:
    reader = {"authorization": "Bearer reader"}
    for method, path in (("POST", "/tune"), ("POST", "/engine/pause"), ("POST", "/engine/resume"), ("GET", "/engine")):
        sent = body(tuning) if path == "/tune" else None
        assert tuning.http.request(method, path, json=sent, headers=reader).status_code == 403, path
        assert httpx.request(method, tuning.url + path, json=sent, trust_env=False).status_code == 401, path


def test_an_engine_elsewhere_is_not_paused(tuning: Service) -> None:
    reply = tuning.http.post("/engine/pause", json={"seconds": 5})
    assert (reply.status_code, "SERVICE_LLM_URL" in reply.text) == (409, True)


def test_a_job_waits_for_a_worker_and_says_how_to_start_one(tuning: Service) -> None:
    datasets = tuning.home / "datasets"
    datasets.mkdir()
    (datasets / "pumps.jsonl").write_text(json.dumps(ROW) + "\n")
    asked = body(tuning, data="pumps", settings=["max_steps=2", "base=some/model"], label="pumps", collection="default")
    reply = tuning.http.post("/tune", json=asked)
    assert reply.status_code == 202, reply.text
    job = reply.json()
    assert (job["kind"], job["state"], job["collection"]) == ("tune", "queued", "default")
    assert job["path"] == str(datasets / "pumps.jsonl")
    assert job["waiting_for"] == "worker"
    assert "graft worker --queue tune" in job["hint"]

    time.sleep(1.2)  # more than twice what a queue takes to be looked at
    assert tuning.http.get(f"/jobs/{job['job_id']}").json() == job
    with closing(sqlite3.connect(tuning.home / "jobs.db")) as states:
        held = states.execute("SELECT status FROM workflow_status WHERE workflow_uuid = ?", [job["job_id"]]).fetchone()
    assert held == ("ENQUEUED",)  # the service leaves it alone

    listed = run_graft(tuning.home, "jobs", "list", cwd=tuning.root, GRAFT_API_KEY="admin", COLUMNS="250")
    assert listed.returncode == 0, listed.stderr
    assert "waits for a worker" in " ".join(listed.stdout.split())

    assert tuning.http.post(f"/jobs/{job['job_id']}/cancel").json()["state"] == "cancelled"
    ended = tuning.http.get(f"/jobs/{job['job_id']}").json()
    assert (ended["state"], ended["waiting_for"]) == ("cancelled", None)
    with tuning.http.stream("GET", f"/jobs/{job['job_id']}/events") as stream:
        assert list(events(stream)) == [("done", ended)]


def test_workers_live_as_long_as_their_process(tmp_path: Path) -> None:
    engine = db.connect(f"sqlite:///{tmp_path}/graft.db")
    db.migrate(engine)
    workers = Workers(engine)
    me = workers.enlist("tune")
    assert workers.living("tune") == {me}
    assert workers.living("ingest") == frozenset()
    with engine.begin() as connection:  # another process that had this id
        connection.exec_driver_sql("UPDATE workers SET started = started - 100")
    assert workers.living("tune") == frozenset()
    with engine.begin() as connection:  # elsewhere, where its beat alone can be seen
        connection.exec_driver_sql("UPDATE workers SET host = 'another'")
    assert workers.living("tune") == {me}
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE workers SET beat = '2020-01-01 00:00:00'")
    assert workers.living("tune") == frozenset()
    workers.leave(me)
    engine.dispose()


def test_a_curve_stays_small_and_a_step_done_again_replaces_what_was_there() -> None:
    curve: tuple[LossPoint, ...] = ()
    for step in range(1, 3 * POINTS):
        curve = extended(curve, LossPoint(step=step, loss=1 / step))
        assert len(curve) <= POINTS + 1
    assert [point.step for point in curve] == sorted({point.step for point in curve})
    last = curve[-1]
    assert last == LossPoint(step=3 * POINTS - 1, loss=1 / (3 * POINTS - 1))
    curve = extended(curve, LossPoint(step=last.step, eval_loss=0.5))
    assert curve[-1] == last.model_copy(update={"eval_loss": 0.5})
    for step in range(1, 3 * POINTS):
        rare = {"eval_loss": 1 / step} if step % 50 == 0 else {}
        curve = extended(curve, LossPoint(step=step, loss=1 / step, **rare))
    assert [point.step for point in curve if point.eval_loss] == [*range(50, 3 * POINTS, 50)]  # what is rare is kept
    for step in range(1, 3 * POINTS):
        curve = extended(curve, LossPoint(step=step, eval_loss=1 / step))
        assert len(curve) <= POINTS + 1
    again = extended(curve, LossPoint(step=7, loss=9.0))
    assert (again[-1].loss, max(point.step for point in again)) == (9.0, 7)


def started(home: Path) -> int:
    """-> the process id of the engine that was started last."""
    return int(json.loads((home / "engine.json").read_text())["pid"])


async def within(seconds: float, so: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, f"not so within {seconds:g} s"
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_a_pause_ends_the_engine_and_its_lease_brings_it_back(tmp_path: Path, models: Path) -> None:
    asyncio.run(_paused_and_back(tmp_path, models))


async def _paused_and_back(tmp_path: Path, models: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    settings = ServiceSettings.model_validate({"engine_dtype": "float32", "GRAFT_VLLM_VENV": engine_venv(tmp_path)})
    told: list[str] = []
    engine = LocalEngine(settings, IngestSettings(home=home, models=models))
    engine.on_restart, engine.on_pause = lambda: told.append("restart"), lambda: told.append("pause")
    await engine.start()
    first = started(home)
    try:
        assert (engine.state, engine.paused_seconds()) == ("up", None)
        await asyncio.gather(engine.pause(1, "training", "one"), engine.pause(0.8, "training", "one"))
        assert not psutil.pid_exists(first)
        assert (engine.state, engine.detail) == ("paused", "the engine is paused for training")
        await asyncio.sleep(0.5)
        await engine.pause(0.8, "training", "one")  # lengthened
        await asyncio.sleep(0.5)
        assert (engine.state, started(home)) == ("paused", first)
        await within(5, lambda: engine.state == "up")  # nobody lengthened it any more
        second = started(home)
        assert second != first
        await asyncio.gather(engine.pause(600, "training", "one"), engine.pause(600, "training", "another"))
        engine.resume("one")
        engine.resume("nobody")
        await asyncio.sleep(0.6)
        assert (engine.state, engine.holders()) == ("paused", ("another",))
        assert (engine.paused_seconds() or 0) > 500
        engine.resume("another")
        await within(5, lambda: engine.state == "up")
        assert engine.holders() == ()
        assert started(home) not in {first, second}
        assert told == ["pause", "pause"]  # a pause is no crash
        os.kill(started(home), signal.SIGKILL)
        await within(2, lambda: told[-1] == "restart")
        await engine.pause(2.5, "training", "one")  # while it is about to be started again
        await asyncio.sleep(2.2)
        assert engine.state == "paused"
        await within(8, lambda: engine.state == "up")
    finally:
        last = started(home)
        await engine.stop()
    assert not psutil.pid_exists(last)
