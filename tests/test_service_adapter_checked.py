"""An adapter that graft trained answers once its check has passed; the product's own answers until a user moves anything."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import (
    BUNDLED,
    CHECKOUT,
    RESOLVER_FOLDERS,
    Service,
    WireEngine,
    is_ready,
    run_graft,
    running,
    until,
    write_lora,
)
from sqlalchemy import Engine

from ingest import db
from ingest.catalog import now
from service.adapter_rows import standing
from service.adapter_serving import AdapterServing, bundled_for
from service.adapters import ALL, PRODUCT, Registry
from service.base_model import BaseModel, read_base
from service.generate import Generator
from service.metrics import Metrics
from service.preflight import Limits, digest_of, take_in
from service.schemas_adapters import Checked
from service.settings import ServiceSettings

numbers = count(500)  # seeds: weights of each test's own


@pytest.fixture(scope="module")
def base(models: Path) -> BaseModel:
    return read_base(str(models / BUNDLED), None)


def checked(digest: str, passed: bool = True) -> Checked:
    return Checked(
        at=now(), passed=passed, digest=digest, dtype="float32", difference=0.001, bound=0.02, base_difference=0.001,
        tokens_equal=True, prompts=24, changed=20, engine="vLLM", why_not=None if passed else "it differs",
    )  # fmt: skip


def trained(folder: Path, of: BaseModel, passed: bool | None = None, **manifest: Any) -> Path:
    """As `graft tune` leaves it; `passed`: with a check of just these weights."""
    write_lora(folder, next(numbers))
    held = {"made_by": "graft", "base": of.identity, "servable": True, "why_not": None} | manifest
    if passed is not None:
        held["checked"] = checked(digest_of(folder, of), passed).model_dump(mode="json")
    (folder / "manifest.json").write_text(json.dumps(held))
    return folder


@pytest.fixture
def registered(service: Service) -> Iterator[Any]:
    """-> registers a folder; afterwards the bare base answers and the adapters are gone."""
    names = []

    def register(folder: Path, status: int = 201) -> dict[str, Any]:
        reply = service.http.post("/adapters", json={"path": str(folder)})
        assert reply.status_code == status, reply.text
        if status < 300:
            names.append(reply.json()["name"])
        return dict(reply.json())

    yield register
    if any(one["live"] for one in service.http.get("/adapters").json()):
        service.http.post("/adapters/rollback", json={"to": "base"})
    for name in set(names):
        assert service.http.delete(f"/adapters/{name}").status_code == 204


def activate(service: Service, name: str) -> tuple[int, str]:
    reply = service.http.post(f"/adapters/{name}/activate")
    return reply.status_code, reply.text


def test_one_of_ours_answers_by_name_and_is_activated_once_it_has_passed(
    service: Service, registered: Any, base: BaseModel
) -> None:
    one = registered(trained(service.root / "ours/plain", base))
    name = one["name"]
    assert one["checked"] == "no"
    assert service.answer(adapter=name)["adapter"] == name
    status, said = activate(service, name)
    assert status == 409
    assert f"graft check {name}" in said
    pinned = service.http.put("/collections/default", json={"adapter": name})
    assert (pinned.status_code, "graft check" in pinned.text) == (409, True)

    def record(held: Checked) -> tuple[int, str]:
        reply = service.http.put(f"/adapters/{name}/checked", json=held.model_dump(mode="json"))
        return reply.status_code, reply.text

    assert record(checked("0" * 64))[0] == 409  # of other weights
    assert service.http.put(f"/adapters/{name}/checked", json={"passed": True}).status_code == 422
    assert record(checked(one["digest"], passed=False))[0] == 200
    assert service.http.get(f"/adapters/{name}").json()["checked"] == "failed"
    assert activate(service, name)[0] == 409
    assert record(checked(one["digest"]))[0] == 200
    shown = service.http.get(f"/adapters/{name}").json()
    assert (shown["checked"], shown["manifest"]["made_by"]) == ("passed", "graft")
    assert activate(service, name)[0] == 200
    assert (
        service.http.put("/adapters/nobody/checked", json=checked("0" * 64).model_dump(mode="json")).status_code == 404
    )


def test_a_check_that_the_folder_brings_counts_for_its_own_weights_alone(
    service: Service, registered: Any, base: BaseModel
) -> None:
    good = trained(service.root / "ours/good", base, passed=True)
    assert registered(good)["checked"] == "passed"
    other = trained(service.root / "ours/pasted", base)
    (other / "manifest.json").write_text((good / "manifest.json").read_text())
    pasted = registered(other)
    assert pasted["checked"] == "no"
    assert activate(service, pasted["name"])[0] == 409
    scaled = trained(service.root / "ours/scaled", base, passed=True)
    config = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}))
    assert registered(scaled)["checked"] == "no"  # the weights are the same, what is served is not


def test_a_folder_that_was_checked_after_it_was_registered(service: Service, registered: Any, base: BaseModel) -> None:
    folder = trained(service.root / "ours/late", base)
    name = registered(folder)["name"]
    held = json.loads((folder / "manifest.json").read_text())
    held["checked"] = checked(digest_of(folder, base)).model_dump(mode="json")
    (folder / "manifest.json").write_text(json.dumps(held))
    again = registered(folder, 200)
    assert (again["name"], again["checked"]) == (name, "passed")
    assert service.http.get(f"/adapters/{name}").json()["checked"] == "passed"


def test_one_of_another_tool_goes_by_its_preflight(service: Service, registered: Any) -> None:
    one = registered(write_lora(service.root / "ours/foreign", next(numbers)))
    assert one["checked"] is None
    assert activate(service, one["name"])[0] == 200


def test_what_the_engine_cannot_load_is_refused_with_the_reason(
    service: Service, registered: Any, base: BaseModel
) -> None:
    folder = trained(service.root / "ours/dora", base, servable=False, why_not="DoRA: merge it first")
    reply = registered(folder, 422)
    assert {error["field"] for error in reply["errors"]} == {"servable"}
    assert "DoRA: merge it first" in reply["detail"]


@pytest.mark.slow
def test_the_list_says_which_are_checked(service: Service, registered: Any, base: BaseModel) -> None:
    names = [
        registered(trained(service.root / f"ours/{passed}", base, passed))["name"] for passed in (True, False, None)
    ]
    names.append(registered(write_lora(service.root / "ours/foreign", next(numbers)))["name"])
    listed = run_graft(service.home, "adapters", "list", cwd=service.root, COLUMNS="200").stdout.splitlines()
    rows = {name: next(line for line in listed if name in line).split() for name in names}
    for name, word in zip(names, ("passed", "failed", "no", "-"), strict=True):
        assert word in rows[name]


# the adapter that comes with the product


class Home:
    """A registry in a home of its own, and the engine at the wire; each `start` is one of the service."""

    def __init__(self, folder: Path, engine: WireEngine, models: Path) -> None:
        self.folder, self.engine, self.models = folder, engine, models
        self.shipped = folder / "shipped"
        self.shipped.mkdir()
        self.database: Engine = db.connect(f"sqlite:///{folder / 'graft.db'}")
        db.migrate(self.database)
        self.registry = Registry(self.database, folder / "adapters", 10)
        RESOLVER_FOLDERS.add(folder / "adapters")

    def start(self) -> str | None:
        """-> the live adapter once the engine has been tried."""
        settings = ServiceSettings(llm_url=self.engine.url, llm_model_folder=self.models / BUNDLED, max_loras=1)
        return asyncio.run(self._start(settings))

    async def _start(self, settings: ServiceSettings) -> str | None:
        generator = Generator(self.engine.url, None, 10)
        serving = AdapterServing(self.registry, generator, settings, Metrics())
        serving.bundled = self.shipped
        watching = asyncio.create_task(serving.watch())
        while serving.state == "starting":  # noqa: ASYNC110 - it has no event for it
            await asyncio.sleep(0.02)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await generator.close()
        assert serving.state == "ok", serving.detail
        return self.registry.pointers().get(ALL)


@pytest.fixture
def home(tmp_path: Path, wire: WireEngine, models: Path) -> Iterator[Home]:
    held = Home(tmp_path, wire, models)
    yield held
    held.database.dispose()


def test_the_products_adapter_answers_in_a_new_home_and_goes_for_good(home: Home, base: BaseModel) -> None:
    assert home.start() is None  # none comes with it
    trained(home.shipped / "other", base, True, base="somebody/else")
    assert home.start() is None
    trained(home.shipped / "tuned", base, True)
    name = home.start()
    assert name is not None
    assert name.startswith("tuned-")
    (move,) = home.registry.moves()
    assert (move.principal, move.why, move.from_name, move.to_name) == (
        PRODUCT,
        "it comes with the product",
        None,
        name,
    )
    assert home.start() == name
    assert home.registry.roll_back(ALL, "ann", None).to_name is None
    assert home.start() is None
    home.registry.retire(name)
    assert home.start() is None
    assert len(home.registry.moves()) == 2


def test_a_home_with_an_adapter_of_its_own_keeps_it(home: Home, base: BaseModel) -> None:
    folder = write_lora(home.folder / "mine", next(numbers))
    limits = AdapterServing(home.registry, Generator("", None, 1), ServiceSettings(), Metrics()).limits
    home.registry.register(folder, "mine", base, limits._replace(roots=(home.folder,)), "ann")
    trained(home.shipped / "tuned", base, True)
    assert home.start() is None
    assert [one.label for one in home.registry.adapters()] == ["mine"]


@pytest.mark.parametrize("wrong", ["unchecked", "unfit", "unreadable"])
def test_one_that_is_refused_keeps_nobody_from_starting(
    home: Home, base: BaseModel, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = trained(home.shipped / "tuned", base, None if wrong == "unchecked" else True)
    if wrong == "unfit":
        (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    if wrong == "unreadable":
        (folder / "manifest.json").write_text("{")
    assert home.start() is None
    warned = [record for record in caplog.records if "comes with the product" in record.getMessage()]
    assert len(warned) == (0 if wrong == "unreadable" else 1)
    trained(home.shipped / "tuned", base, True)  # mended, it answers at the next start
    assert home.start() is not None


@pytest.mark.slow
def test_graft_up_makes_it_live_and_a_rollback_stands(tmp_path: Path, wire: WireEngine, base: BaseModel) -> None:
    trained(tmp_path / "shipped/tuned", base, True)
    settings = {"SERVICE_LLM_URL": wire.url, "SERVICE_BUNDLED_ADAPTERS": str(tmp_path / "shipped")}
    with running(tmp_path / "home", tmp_path, "--no-engine", **settings) as service:
        until(lambda: is_ready(service), 120)
        (one,) = service.http.get("/adapters").json()
        assert (one["live"], one["checked"], one["principal"]) == (True, "passed", PRODUCT)
        done = run_graft(service.home, "adapters", "rollback", cwd=tmp_path)
        assert "the base" in done.stdout
    with running(tmp_path / "home", tmp_path, "--no-engine", **settings) as service:
        until(lambda: is_ready(service), 120)
        assert not any(one["live"] for one in service.http.get("/adapters").json())
    assert f"adapter: {one['name']} answers" in (tmp_path / "home.output").read_text()


def test_the_adapter_that_comes_with_the_product_has_passed_as_it_is(base: BaseModel, tmp_path: Path) -> None:
    """A check is of these very weights: after any change of them `graft check` has to be run again."""
    folder = bundled_for(CHECKOUT / "deploy/adapters", base.identity)
    assert folder is not None
    assert (folder / "adapter_model.safetensors").stat().st_size < 6_000_000
    found = take_in(folder, tmp_path, base, Limits((folder.parent,), 64, 100))
    assert standing(found.manifest, found.digest) == "passed"
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text()
