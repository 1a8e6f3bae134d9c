"""Adapters over HTTP: registered, activated, pinned, rolled back, deleted, and found again after a restart."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fixtures import (
    BASE_NAME,
    DOCUMENTS,
    Service,
    WireEngine,
    is_ready,
    run_graft,
    running,
    until,
    write,
    write_lora,
)
from test_service_health import figures
from test_service_keys import keys_file

FIELDS = {
    "name", "label", "digest", "base", "rank", "target_modules", "size", "parent", "principal", "created_at", "checked",
    "manifest", "live", "collections",
}  # fmt: skip


numbers = count(1)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Iterator[Service]:
    root = write(tmp_path_factory.mktemp("own"), {f"docs/{name}": text for name, text in DOCUMENTS.items()})
    settings = {"SERVICE_LLM_URL": wire_engine.url}
    with running(root / "home", root, "--no-engine", "--ingest", "docs", **settings) as service:
        yield service


@pytest.fixture
def alone(own: Service, wire: WireEngine, tmp_path: Path) -> Service:
    """A service of these tests, on the bare base and without an adapter; `root` is the test's own, below its root."""
    if adapters_state(own) in {"off", "down"}:  # an earlier test's engine mixed
        wire.stop()
        until(lambda: adapters_state(own) == "starting", 20)
        wire.start()
    until(lambda: is_ready(own), 120)
    own.http.delete("/collections/shelf")
    if any(one["live"] for one in own.http.get("/adapters").json()):
        rollback(own, to="base")
    for one in own.http.get("/adapters").json():
        assert own.http.delete(f"/adapters/{one['name']}").status_code == 204
    own.http.put("/collections/shelf", json={})
    return replace(own, root=own.root / f"test-{next(numbers)}")


def adapters_state(service: Service) -> str:
    return str(service.http.get("/health/ready").json()["dependencies"]["adapters"]["state"])


def register(service: Service, seed: int = 1, label: str = "tuned", status: int = 201, **config: Any) -> str:
    """Weights of the test's own: names are never used for others, and old ones must not come back by chance."""
    folder = write_lora(service.root / f"loras/{label}-{seed}", abs(hash((service.root, seed))), **config)
    reply = service.http.post("/adapters", json={"path": str(folder), "label": label})
    assert reply.status_code == status, reply.text
    return str(reply.json()["name"])


def post(service: Service, where: str, status: int = 200, **body: Any) -> dict[str, Any]:
    reply = service.http.post(where, json=body)
    assert reply.status_code == status, reply.text
    return dict(reply.json())


def activate(service: Service, name: str, status: int = 200, **body: Any) -> dict[str, Any]:
    return post(service, f"/adapters/{name}/activate", status, **body)


def rollback(service: Service, status: int = 200, **body: Any) -> dict[str, Any]:
    return post(service, "/adapters/rollback", status, **body)


def answering(service: Service, **fields: Any) -> str | None:
    name = service.answer(**fields)["adapter"]
    return str(name) if name else None


def test_registered_listed_shown(alone: Service) -> None:
    name = register(alone)
    assert name.startswith("tuned-")
    shown = alone.http.get(f"/adapters/{name}").json()
    assert alone.http.get("/adapters").json() == [shown]
    assert set(shown) == FIELDS
    assert (shown["rank"], shown["target_modules"], shown["label"]) == (4, ["q_proj", "v_proj"], "tuned")
    assert shown["base"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (shown["live"], shown["collections"], shown["principal"], shown["checked"]) == (False, [], "local", None)
    assert (alone.home / "adapters" / name / "adapter_model.safetensors").is_file()
    assert alone.http.get("/adapters/nobody").status_code == 404


def test_same_folder_twice_is_one_adapter(alone: Service) -> None:
    name = register(alone)
    assert register(alone, status=200) == name
    assert register(alone, label="otherwise", status=200) == name
    assert register(alone, seed=2) != name
    assert len(alone.http.get("/adapters").json()) == 2


def test_label_comes_from_the_folder(alone: Service) -> None:
    folder = write_lora(alone.root / "support (v2)", 79)
    assert post(alone, "/adapters", 201, path=str(folder))["name"].startswith("support--v2-")


def test_manifest_is_kept(alone: Service) -> None:
    folder = write_lora(alone.root / "made", 78)
    (folder / "manifest.json").write_text('{"parent": "tuned-00000000", "checked": true, "dataset": "abc"}')
    shown = post(alone, "/adapters", 201, path=str(folder))
    assert (shown["parent"], shown["checked"], shown["manifest"]["dataset"]) == ("tuned-00000000", None, "abc")


def test_faults_are_refused_in_one_list(service: Service) -> None:
    folder = write_lora(service.root / "loras/bad", use_dora=True, peft_type="IA3")
    reply = service.http.post("/adapters", json={"path": str(folder), "label": "bad"})
    assert reply.status_code == 422
    assert {error["field"] for error in reply.json()["errors"]} == {"use_dora", "peft_type"}
    outside = service.http.post("/adapters", json={"path": "/etc", "label": "bad"})
    assert outside.status_code == 422
    assert "SERVICE_ADAPTER_ROOTS" in outside.json()["detail"]
    assert not list((service.home / "adapters").glob(".staging-*"))
    reserved = service.http.post("/adapters", json={"path": str(folder), "label": "graft-probe"})
    assert reserved.status_code == 422


def test_activated_answers_and_rolls_back(alone: Service, wire: WireEngine) -> None:
    one, two = register(alone, 1), register(alone, 2)
    assert answering(alone) is None
    assert activate(alone, one, why="better on pumps")["to_name"] == one
    assert answering(alone) == one
    assert wire.last().body["model"] == one
    assert answering(alone, adapter=None) is None
    assert wire.last().body["model"] == BASE_NAME
    assert answering(alone, adapter=two) == two
    activate(alone, two)
    assert answering(alone) == two
    assert rollback(alone)["to_name"] == one
    assert rollback(alone)["to_name"] is None
    assert answering(alone) is None
    assert "roll back" in rollback(alone, 409)["detail"]
    activate(alone, two)
    assert rollback(alone, to="base", why="numbers fell")["to_name"] is None
    assert rollback(alone)["to_name"] == two
    moves = alone.http.get("/adapters/moves").json()[-7:]
    assert [(move["kind"], move["from_name"], move["to_name"]) for move in moves] == [
        ("activate", None, one),
        ("activate", one, two),
        ("rollback", two, one),
        ("rollback", one, None),
        ("activate", None, two),
        ("activate", two, None),
        ("rollback", None, two),
    ]
    assert (moves[0]["why"], moves[0]["principal"], moves[0]["collection"]) == ("better on pumps", "local", None)


def test_answer_in_flight_ends_with_the_adapter_that_it_began_with(alone: Service, wire: WireEngine) -> None:
    one, two = register(alone, 1), register(alone, 2)
    activate(alone, one)
    wire.say(*["word "] * 20, delay=0.1)
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(alone.answer()))
    asking.start()
    until(lambda: wire.asked, 10)
    activate(alone, two)
    asking.join()
    assert answers[0]["adapter"] == one
    assert answers[0]["answer"].split() == ["word"] * 20
    wire.say("done")
    assert answering(alone) == two


def test_collection_with_an_adapter_of_its_own(alone: Service) -> None:
    one, two = register(alone, 1), register(alone, 2)
    activate(alone, one)
    assert activate(alone, two, collection="shelf")["collection"] == "shelf"
    alone.ingest(alone.home.parent / "docs", collection="shelf")
    assert (answering(alone), answering(alone, collection="shelf")) == (one, two)
    assert alone.http.get("/collections/shelf").json()["adapter"] == two
    shown = alone.http.get(f"/adapters/{two}").json()
    assert (shown["live"], shown["collections"]) == (False, ["shelf"])
    assert rollback(alone, collection="shelf")["to_name"] is None
    assert answering(alone, collection="shelf") == one
    assert alone.http.put("/collections/shelf", json={"adapter": two}).json()["adapter"] == two
    assert "nobody" in alone.http.put("/collections/shelf", json={"adapter": "nobody"}).json()["detail"]
    assert alone.http.delete("/collections/shelf").status_code == 204
    alone.http.put("/collections/shelf", json={})
    assert alone.http.get("/collections/shelf").json()["adapter"] is None
    assert activate(alone, one, 404, collection="nowhere")


def test_deleted_at_once_and_welcome_back_under_its_name(alone: Service) -> None:
    one, two = register(alone, 1), register(alone, 2)
    activate(alone, one)
    alone.http.put("/collections/shelf", json={"adapter": two})
    for name, where in ((one, "all collections"), (two, "'shelf'")):
        reply = alone.http.delete(f"/adapters/{name}")
        assert reply.status_code == 409
        assert where in reply.json()["detail"]
    alone.http.put("/collections/shelf", json={"adapter": None})
    assert alone.http.delete(f"/adapters/{two}").status_code == 204
    assert alone.ask(adapter=two).status_code == 404
    assert alone.http.delete(f"/adapters/{two}").status_code == 404
    assert activate(alone, two, 404)
    assert (alone.home / "adapters" / two).is_dir()  # the engine was told of it
    assert [one_["name"] for one_ in alone.http.get("/adapters").json()] == [one]
    assert register(alone, 2) == two
    assert answering(alone, adapter=two) == two


def test_rollback_passes_over_the_deleted(alone: Service) -> None:
    one, two, three = (register(alone, seed) for seed in (1, 2, 3))
    for name in (one, two, one, two, three):
        activate(alone, name)
    assert alone.http.delete(f"/adapters/{two}").status_code == 204
    assert rollback(alone)["to_name"] == one
    assert rollback(alone)["to_name"] is None


@pytest.mark.slow
def test_restart_finds_the_live_adapter(tmp_path: Path, wire: WireEngine) -> None:
    write(tmp_path / "docs", DOCUMENTS)
    with running(tmp_path / "home", tmp_path, "--no-engine", "--ingest", "docs", SERVICE_LLM_URL=wire.url) as service:
        until(lambda: is_ready(service), 120)
        name = register(service)
        activate(service, name)
    wire.stop()
    wire.start()
    with running(tmp_path / "home", tmp_path, "--no-engine", SERVICE_LLM_URL=wire.url) as service:
        until(lambda: is_ready(service), 60)
        assert name in wire.adapters  # before traffic goes to it
        assert answering(service) == name
        assert figures(service)[("graft_adapter_live", (("adapter", name),))] == 1


def test_lost_adapter_is_loaded_again_or_named_in_a_503(alone: Service, wire: WireEngine) -> None:
    name = register(alone)
    activate(alone, name)
    wire.adapters.clear()
    assert answering(alone) == name
    wire.adapters.clear()
    wire.resolves = False  # it is told of the folder then
    assert answering(alone) == name
    wire.adapters.clear()
    held = alone.home / "adapters" / name
    held.rename(held.with_name("elsewhere"))
    for stream in (False, True):
        reply = alone.ask(stream=stream)
        assert reply.status_code == 503
        assert name in reply.json()["detail"]
    assert all(asked.body["model"] == name for asked in wire.asked)
    assert answering(alone, adapter=None) is None
    assert figures(alone)[("graft_adapter_load_failures_total", ())] >= 2


@pytest.mark.slow
def test_engine_restart_is_tried_anew_before_adapters_answer(alone: Service, wire: WireEngine) -> None:
    name = register(alone)
    activate(alone, name)
    wire.stop()
    until(lambda: adapters_state(alone) == "starting", 10)
    wire.mixes = True
    wire.start()
    until(lambda: adapters_state(alone) == "down", 20)
    reply = alone.ask()
    assert reply.status_code == 503
    assert "given no adapters" in reply.json()["detail"]
    assert answering(alone, adapter=None) is None
    assert not is_ready(alone)  # the live adapter cannot answer
    doctor = run_graft(alone.home, "doctor", cwd=alone.root)
    assert "given no adapters" in doctor.stdout


@pytest.mark.slow
def test_engine_that_mixes_answers_with_the_base_alone(tmp_path: Path, wire: WireEngine) -> None:
    write(tmp_path / "docs", DOCUMENTS)
    wire.mixes = True
    with running(tmp_path / "home", tmp_path, "--no-engine", "--ingest", "docs", SERVICE_LLM_URL=wire.url) as service:
        until(lambda: is_ready(service), 120)
        said = service.http.get("/health/ready").json()["dependencies"]["adapters"]
        assert said["state"] == "off"
        assert "given no adapters" in said["detail"]
        assert answering(service) is None
        name = register(service)
        assert activate(service, name, 503)
        assert service.ask(adapter=name).status_code == 503


@pytest.mark.slow
def test_limit_is_named(tmp_path: Path, wire: WireEngine) -> None:
    settings = {"SERVICE_LLM_URL": wire.url, "SERVICE_MAX_CPU_LORAS": "2", "SERVICE_MAX_LORAS": "2"}
    with running(tmp_path / "home", tmp_path, "--no-engine", **settings) as service:
        until(lambda: is_ready(service), 60)
        names = [register(service, seed) for seed in (1, 2)]
        folder = write_lora(tmp_path / "third", 3)
        assert "SERVICE_MAX_CPU_LORAS" in post(service, "/adapters", 409, path=str(folder))["detail"]
        assert service.http.delete(f"/adapters/{names[0]}").status_code == 204
        post(service, "/adapters", 201, path=str(folder))


def test_two_activations_at_once_leave_one_winner_and_two_rows(alone: Service) -> None:
    names = [register(alone, 1), register(alone, 2)]
    before = len(alone.http.get("/adapters/moves").json())
    clients = [httpx.Client(base_url=alone.url, timeout=60, trust_env=False) for _ in names]
    start = threading.Barrier(2)

    def go(client: httpx.Client, name: str) -> None:
        start.wait()
        assert client.post(f"/adapters/{name}/activate").status_code == 200

    threads = [threading.Thread(target=go, args=pair) for pair in zip(clients, names, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = alone.http.get("/adapters/moves").json()[before:]
    assert len(moves) == 2
    assert {move["to_name"] for move in moves} == set(names)
    assert moves[1]["from_name"] == moves[0]["to_name"]
    assert answering(alone) == moves[1]["to_name"]


def test_adapters_need_an_admin(tmp_path: Path, wire: WireEngine) -> None:
    folder = write_lora(tmp_path / "lora")
    settings = {"SERVICE_LLM_URL": wire.url, "SERVICE_API_KEYS_FILE": str(keys_file(tmp_path))}
    with running(tmp_path / "home", tmp_path, "--no-engine", key="key-admin", **settings) as service:
        until(lambda: is_ready(service), 60)
        name = post(service, "/adapters", 201, path=str(folder))["name"]
        other = {"headers": {"authorization": "Bearer key-a"}}
        assert service.http.get("/adapters", **other).status_code == 200
        for method, path in (
            ("POST", "/adapters"),
            ("POST", f"/adapters/{name}/activate"),
            ("PUT", f"/adapters/{name}/checked"),
            ("POST", "/adapters/rollback"),
            ("DELETE", f"/adapters/{name}"),
        ):
            body = {"path": str(folder)} if path == "/adapters" else {}
            reply = service.http.request(method, path, json=body, **other)
            assert reply.status_code == 403, path
        activate(service, name)
        assert service.http.get("/adapters/moves").json()[0]["principal"] == "key-admin"


@pytest.mark.slow
def test_command_line(alone: Service) -> None:
    def graft(*arguments: str, status: int = 0) -> str:
        run = run_graft(alone.home, "adapters", *arguments, cwd=alone.root)
        assert run.returncode == status, run.stderr + run.stdout
        return run.stdout + run.stderr

    write_lora(alone.root / "mine", 77)
    name = graft("add", "mine", "--label", "mine").strip()
    assert name.startswith("mine-")
    assert name in graft("list")
    assert "q_proj" in graft("show", name)
    assert name in graft("activate", name, "--why", "a trial")
    assert answering(alone) == name
    assert '"live": true' in graft("list", "--json", "-")
    assert "answers for all collections" in graft("rm", name, status=1)
    assert "the base" in graft("rollback")
    assert graft("rm", name) == ""
    assert "a trial" in graft("history", "--json", "-")
    assert name in graft("history")
