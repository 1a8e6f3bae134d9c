"""Whatever is done in whatever order: the pointer names an adapter that the engine answers with, or the bare base."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from service_fixtures import BASE_NAME, BUNDLED, RESOLVER_FOLDERS, WireEngine, write_lora

from ingest import db
from ingest.errors import ConflictError, NotFoundError
from ingest.settings import IngestSettings
from service.adapter_serving import AdapterServing
from service.adapters import ALL, Registry
from service.generate import Generator
from service.metrics import Metrics
from service.settings import ServiceSettings

SEEDS = (1, 2, 3)
COLLECTIONS = (ALL, "shelf")


class Registered(RuleBasedStateMachine):
    """Registers, activates, rolls back, deletes, and starts service and engine anew."""

    engine: WireEngine
    models: Path

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.database = db.connect(IngestSettings(home=self.root / "home").sqlalchemy_url())
        (self.root / "home").mkdir()
        db.migrate(self.database)
        RESOLVER_FOLDERS.add(self.root / "home" / "adapters")
        self.engine.reset()
        self.loop = asyncio.new_event_loop()
        self.serving: AdapterServing | None = None
        self.history: dict[str, list[str | None]] = {one: [None] for one in COLLECTIONS}
        self.start()

    def start(self) -> None:
        registry = Registry(self.database, self.root / "home" / "adapters", 10)
        given = ServiceSettings(
            llm_url=self.engine.url, llm_model_folder=self.models / BUNDLED, adapter_roots=(self.root,)
        )
        self.serving = AdapterServing(registry, Generator(self.engine.url, None, 10), given, Metrics())
        assert self.run(self.serving._try()), self.serving.detail
        assert self.serving.state == "ok", self.serving.detail

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @property
    def held(self) -> AdapterServing:
        assert self.serving is not None
        return self.serving

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.held.registry.adapters()]

    @rule(seed=st.sampled_from(SEEDS))
    def register(self, seed: int) -> None:
        self.run(self.held.register(write_lora(self.root / f"lora-{seed}", seed), "tuned", "tester"))

    @precondition(lambda self: self.names)
    @rule(data=st.data(), collection=st.sampled_from(COLLECTIONS))
    def activate(self, data: st.DataObject, collection: str) -> None:
        name = data.draw(st.sampled_from(self.names))
        self.run(self.held.activate(name, collection, "tester", None))
        if self.history[collection][-1] != name:
            self.history[collection].append(name)

    @rule(collection=st.sampled_from(COLLECTIONS))
    def roll_back(self, collection: str) -> None:
        stack = self.history[collection]
        current = stack.pop()
        while stack and (stack[-1] == current or (stack[-1] is not None and stack[-1] not in self.names)):
            stack.pop()
        if not stack:
            stack.append(current)
            with pytest.raises(ConflictError):
                self.run(self.held.roll_back(collection, "tester", None))
            return
        assert self.run(self.held.roll_back(collection, "tester", None)).to_name == stack[-1]

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        pointed = name in self.held.registry.pointers().values()
        try:
            self.held.registry.retire(name)
            assert not pointed
        except ConflictError:
            assert pointed
            return
        with pytest.raises(NotFoundError):
            self.run(self.held.activate(name, ALL, "tester", None))

    @rule()
    def restart_service(self) -> None:
        self.run(self.held.generator.close())
        self.held.registry.purge()
        self.start()

    @rule()
    def restart_engine(self) -> None:
        self.engine.stop()
        self.held.registry.purge()
        self.engine.start()
        assert self.run(self.held._try())

    @invariant()
    def pointers_name_what_answers(self) -> None:
        for collection in COLLECTIONS:
            chosen = self.held.registry.chosen(collection)
            wanted = self.history[collection][-1] or self.history[ALL][-1]
            assert (chosen.name if chosen else None) == wanted
            if chosen:
                self.run(self.held.check(chosen))
                said = self.run(self.held.generator.complete(chosen.name, "now", 1))
                assert said == f"{chosen.name} says to now"
            else:
                assert self.run(self.held.generator.complete(BASE_NAME, "now", 1)) == f"{BASE_NAME} says to now"

    def teardown(self) -> None:
        with suppress(Exception):
            self.run(self.held.generator.close())
        self.loop.close()
        self.database.dispose()
        RESOLVER_FOLDERS.discard(self.root / "home" / "adapters")
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.mark.slow
def test_any_order(wire: WireEngine, models: Path) -> None:
    Registered.engine, Registered.models = wire, models
    chosen = settings(
        max_examples=12,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(Registered, settings=chosen)
