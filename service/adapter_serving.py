"""Keeps the engine and the registry in agreement: tries each start of an engine, loads adapters, says what may be served.

Until an engine has passed the trial it is given no adapter, so that no answer is made by another one (`lora_probe`).
"""

import asyncio
import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ingest.errors import GraftError, SettingsError, UnavailableError
from service.adapters import ALL, PRODUCT, Adapter, Registry
from service.base_model import BaseModel, read_base
from service.generate import AdapterLostError, Generator
from service.lora_probe import MixingError, try_engine
from service.metrics import Metrics
from service.preflight import MANIFEST, Limits
from service.schemas_adapters import Move
from service.settings import ServiceSettings

logger = logging.getLogger(__name__)
WATCH_SECONDS = 1.0
MISSES = 3  # unanswered looks in a row until an engine counts as gone: a busy one may miss one
AGAIN_SECONDS = (30.0, 3600.0)  # until an engine that could not be tried is tried again: at first, at most
State = Literal["starting", "ok", "off"]


class AdapterServing:
    """`state`: "ok" once the engine has passed; "off" when it is given no adapters, `detail` says why."""

    def __init__(self, registry: Registry, generator: Generator, settings: ServiceSettings, metrics: Metrics) -> None:
        self.registry = registry
        self.generator = generator
        self.metrics = metrics
        self.limits = Limits(settings.adapter_roots, settings.max_lora_rank, settings.max_adapter_mb)
        self.state: State = "starting"
        self.detail = "waiting for the engine"
        # Of an engine elsewhere the number is not known; vLLM's own default is 1.
        self._slots = max(settings.max_loras, 8 if settings.llm_url else 1)
        self._substitute = settings.llm_model_folder
        self.bundled: Path | None = None  # folders of adapters that come with the product, where they are to answer
        self._base: BaseModel | None = None  # of the engine that was tried last
        self._registering = asyncio.Lock()

    async def watch(self) -> None:
        """Runs for the length of the service: tries the engine whenever it has come up."""
        pause = AGAIN_SECONDS[0]
        again: float | None = None  # on the monotonic clock; None: what was found holds
        misses = 0
        while True:
            healthy = bool(self.generator.url) and await self.generator.healthy()
            misses = 0 if healthy else misses + 1
            if misses >= MISSES:
                self.engine_restarted()
                pause = AGAIN_SECONDS[0]
            if healthy and (self.state == "starting" or (again is not None and time.monotonic() > again)):
                again = None if await self._try() else time.monotonic() + pause
                pause = min(pause * 2, AGAIN_SECONDS[1])
            await asyncio.sleep(WATCH_SECONDS)

    def engine_restarted(self) -> None:
        """What was found of the engine no longer holds."""
        self.state, self.detail = "starting", "waiting for the engine"

    async def base(self) -> BaseModel:
        """What the engine serves. Raises UnavailableError, SettingsError."""
        root = (await self.generator.model()).root
        return await asyncio.to_thread(read_base, root, self._substitute)

    async def register(self, source: Path, label: str, principal: str) -> tuple[Adapter, bool]:
        """-> the adapter, loaded, and whether it is new. Raises AdapterRefusedError, ConflictError, UnavailableError."""
        async with self._registering:
            base = await self.base()
            adapter, new = await asyncio.to_thread(self.registry.register, source, label, base, self.limits, principal)
        if self.state == "ok":
            await self.load(adapter.name)
        return adapter, new

    async def activate(self, name: str | None, collection: str, principal: str, why: str | None) -> Move:
        """The pointer moves once the engine has the adapter. Raises as `ready`."""
        if name is not None:
            await self.ready(name)
        return await self._moved(await asyncio.to_thread(self.registry.activate, name, collection, principal, why))

    async def roll_back(self, collection: str, principal: str, why: str | None) -> Move:
        """Raises ConflictError when there is nothing to undo; and as `ready`."""
        before = await asyncio.to_thread(self.registry.before, collection)
        if before is not None:
            await self.ready(before)
        return await self._moved(await asyncio.to_thread(self.registry.roll_back, collection, principal, why))

    async def check(self, adapter: Adapter) -> None:
        """Raises UnavailableError when the engine is not to be asked for it: an answer is never made by another."""
        if self.state != "ok":
            raise UnavailableError(f"adapter {adapter.name!r} cannot answer now: {self.detail}; try again")
        if adapter.retired_at:
            raise UnavailableError(f"adapter {adapter.name!r} was deleted; activate another, or roll back")
        base = self._base
        if base is None or base.root != (await self.generator.model()).root:
            base = await self.base()
        if adapter.base != base.identity:
            raise UnavailableError(
                f"adapter {adapter.name!r} belongs to {adapter.base!r}, and the engine serves {base.identity!r}: activate an "
                "adapter of that model, or roll back to the base"
            )

    async def load(self, name: str) -> None:
        """Raises UnavailableError."""
        started = time.perf_counter()
        try:
            await load_into(self.generator, name, self.registry.folder)
        except UnavailableError:
            self.metrics.adapter_load_failed()
            raise
        self.metrics.adapter_loaded(time.perf_counter() - started)

    async def ready(self, name: str) -> None:
        """Before a pointer moves to it: checks it, and loads it where the engine has not, since its turn in a busy engine
        would take half a second. Raises NotFoundError, ConflictError (`Registry.trusted`), UnavailableError.
        """
        await self.check(await asyncio.to_thread(self.registry.trusted, name))
        if name not in await self.generator.loaded_adapters():
            await self.load(name)

    async def _moved(self, move: Move) -> Move:
        logger.info("adapter pointer moved", extra=move.model_dump(mode="json", exclude={"at"}))
        await asyncio.to_thread(self._show_live)
        return move

    def _show_live(self) -> None:
        self.metrics.adapter_live(self.registry.pointers().get(ALL))

    async def _try(self) -> bool:
        """-> whether something is known for sure: that the engine may be given adapters, or that it may not."""
        self.state, self.detail = "starting", "the engine is being tried with adapters"
        self.generator.forget_model()
        try:
            base = self._base = await self.base()
            await asyncio.to_thread(self.registry.restate_base, base)
            await try_engine(self.generator, self.registry.folder, base, self._slots)
            pointers = await asyncio.to_thread(self.registry.pointers)
            living = {one.name for one in await asyncio.to_thread(self.registry.adapters) if one.base == base.identity}
            for name in {name for name in pointers.values() if name in living}:
                with suppress(UnavailableError):  # its queries say so
                    await self.load(name)
            await self._take_bundled(base)
            await asyncio.to_thread(self._show_live)
        except (MixingError, SettingsError) as error:
            self.state, self.detail = "off", f"the engine is given no adapters: {error}"
        except Exception as error:  # whatever it is, the base goes on, and the engine is tried again
            self.state, self.detail = "off", f"the engine could not be tried with adapters: {error}"
            logger.warning("%s", self.detail, exc_info=None if isinstance(error, GraftError) else error)
            return False
        else:
            self.state, self.detail = "ok", "the engine has passed its trial"
            return True
        logger.error("%s", self.detail)
        return True

    async def _take_bundled(self, base: BaseModel) -> None:
        """Makes the product's own adapter for this base answer, unless anybody has ever registered, activated, rolled back or
        deleted one here: what users chose stands. One that is refused is no reason not to start.
        """
        if self.bundled is None or not await asyncio.to_thread(self.registry.untouched):
            return
        folder = await asyncio.to_thread(bundled_for, self.bundled, base.identity)
        if folder is None:
            return
        limits = self.limits._replace(roots=(folder,))
        try:
            adapter, _ = await asyncio.to_thread(self.registry.register, folder, folder.name, base, limits, PRODUCT)
            await self.load(adapter.name)
            move = await asyncio.to_thread(
                self.registry.activate, adapter.name, ALL, PRODUCT, "it comes with the product"
            )
        except GraftError as error:
            logger.warning("the adapter that comes with the product does not answer: %s", error)
        else:
            logger.info("adapter pointer moved", extra=move.model_dump(mode="json", exclude={"at"}))


async def load_into(engine: Generator, name: str, folder: Path) -> None:
    """`folder`: of adapters, by name. The engine finds the adapter by its resolver, at its first request; else it is told of
    the folder. Raises UnavailableError.
    """
    try:
        try:
            await engine.complete(name, "a", 1)
        except AdapterLostError as lost:
            logger.warning("adapter lost: %s", lost)
            await engine.load_adapter(name, str(folder / name))
            await engine.complete(name, "a", 1)
    except GraftError as error:
        raise UnavailableError(f"the engine did not load adapter {name!r}: {error}") from error


def bundled_for(folder: Path, identity: str) -> Path | None:
    """-> the first adapter folder in `folder`, by name, whose manifest names this base."""
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        with suppress(OSError, ValueError, AttributeError):
            if json.loads(manifest.read_text()).get("base") == identity:
                return manifest.parent
    return None
