"""The parts of the application, built once at its start and taken down at its end, and how routes reach them."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import Depends, HTTPException, Request
from qdrant_client import QdrantClient

from ingest import db
from ingest.catalog import Catalog, Collection
from ingest.errors import ConflictError, NotFoundError, UnavailableError
from ingest.index import Index
from ingest.index_edge import EdgeIndex
from ingest.index_server import ServerIndex
from ingest.settings import IngestSettings
from service import queues
from service.adapter_serving import AdapterServing
from service.adapters import Registry
from service.answer import Answering
from service.engine import LocalEngine
from service.generate import Generator
from service.jobs import ENDED, IngestPayload, Jobs
from service.metrics import Metrics
from service.principals import LOCAL, Keys, Principal
from service.prompt_store import AUTO, PromptStore
from service.records import Records
from service.retrieve import Retriever
from service.schemas import CollectionSettings, Dependency, Ready
from service.settings import ServiceSettings
from service.tuning import RUNS
from service.work import DEFAULT, Documents

PAUSED_RETRY_SECONDS = 30


class Parts:
    """Everything a route may need. `engine` is None for an engine elsewhere, or none at all."""

    def __init__(
        self,
        settings: ServiceSettings,
        ingest: IngestSettings,
        engine: LocalEngine | None,
        first_folders: Sequence[Path] = (),
    ) -> None:
        self.settings = settings
        self.ingest = ingest
        self.engine = engine
        self.keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
        self.metrics = Metrics()
        self.small_models = small_models(ingest.models)
        self.index = open_index(ingest)
        try:
            database = db.connect(ingest.sqlalchemy_url())
            db.migrate(database)
            self.catalog = Catalog(database)
            self.records = Records(database)
            self.prompts = PromptStore(database)
            self.retriever = Retriever(self.catalog, self.index, ingest, settings.reranker, settings.rerank_ms)
            self.documents = Documents(self.catalog, self.index, self.retriever, self.records, settings, ingest)
            self.jobs = Jobs(self.records, self.metrics, queues.database_url(ingest), self.documents.kinds())
            url = engine.url if engine else settings.llm_url or ""
            self.generator = Generator(url, settings.llm_api_key, settings.first_token_seconds)
            folder = settings.adapter_folder or ingest.home / "adapters"
            registry = Registry(database, folder, settings.max_cpu_loras)
            roots = (*settings.adapter_roots, ingest.home / RUNS)  # what a worker trained may be registered
            serving = settings.model_copy(update={"adapter_roots": roots})
            self.adapters = AdapterServing(registry, self.generator, serving, self.metrics)
            if engine is not None:
                engine.on_restart = self._engine_restarted
                engine.on_pause = self._engine_gone
                engine.on_start = registry.purge
            self.documents.ensure_collection(DEFAULT)
            self.jobs.launch()
            self.first_jobs = [self.jobs.enqueue(first_payload(folder), LOCAL.id).job_id for folder in first_folders]
        except BaseException:
            self.index.close()
            raise

    async def close(self) -> None:
        await to_thread.run_sync(self.jobs.close)
        await self.generator.close()
        self.index.close()
        self.catalog.engine.dispose()

    def answering(self) -> Answering:
        """Raises UnavailableError while the engine is paused."""
        if self.engine is not None and self.engine.state == "paused":
            raise UnavailableError(f"{self.engine.detail}; ask again later", PAUSED_RETRY_SECONDS)
        return Answering(
            self.settings,
            self.retriever,
            self.generator,
            self.adapters,
            self.prompts,
            self.records,
            self.metrics,
            self.small_models,
        )

    def put_collection(self, name: str, given: CollectionSettings) -> Collection:
        """Raises ConflictError when a job is writing to one that would be embedded or split in another way; and as
        `Documents.put_collection`.
        """
        with suppress(NotFoundError):
            held = self.catalog.collection(name)
            if (given.embedder or held.embedder, given.chunking or held.chunking) != (held.embedder, held.chunking):
                self.refuse_busy(name)
        return self.documents.put_collection(name, given)

    def delete_collection(self, name: str, principal: str) -> None:
        """Raises NotFoundError, ConflictError (the default one, or a job is writing to it)."""
        collection = self.catalog.collection(name)
        if name == DEFAULT:
            raise ConflictError(
                f"collection {DEFAULT!r} always exists; ingest an empty folder with allow_empty to empty it"
            )
        self.refuse_busy(name)
        self.documents.delete_collection(name)
        self.pin(name, None, principal)
        self.prompts.use(collection.model_copy(update={"prompt": AUTO}), AUTO, principal)

    def refuse_busy(self, collection: str) -> None:
        """Raises ConflictError."""
        if self.jobs.busy(collection):
            raise ConflictError(f"a job is writing to collection {collection!r}; cancel it, or wait for its end")

    def pin(self, collection: str, adapter: str | None, principal: str) -> None:
        """Gives a collection an adapter of its own, None: none. Raises NotFoundError."""
        registry = self.adapters.registry
        if registry.pointers().get(collection) != adapter:
            registry.activate(adapter, collection, principal, "by the collection's settings")

    def local_engine(self) -> LocalEngine:
        """Raises ConflictError when there is none here to be paused."""
        if self.engine is None:
            raise ConflictError(
                "no engine of this service can be paused: it was started without one, or uses SERVICE_LLM_URL"
            )
        return self.engine

    def _engine_restarted(self) -> None:
        self.metrics.engine_restarted()
        self._engine_gone()

    def _engine_gone(self) -> None:
        self.generator.forget_model()
        self.adapters.engine_restarted()

    async def readiness(self) -> Ready:
        """Every dependency with its state; ready when all answer and the first ingests have ended."""
        checks = {
            "database": await _checked(lambda: str(len(self.catalog.collections())) + " collections"),
            "index": await _checked(
                lambda: f"{self.index.count(self.catalog.collection(DEFAULT).index)} chunks in default"
            ),
            "jobs": await _checked(self._first_jobs),
            "engine": await self._engine(),
            "adapters": await _checked(self._adapters),
        }
        return Ready(ready=all(check.state in {"ok", "off"} for check in checks.values()), dependencies=checks)

    def _adapters(self) -> Dependency:
        """Off is as good as ok while every collection is answered by the bare base."""
        serving = self.adapters
        if serving.state == "off" and any(serving.registry.pointers().values()):
            return Dependency(state="down", detail=serving.detail)
        if serving.state == "ok":
            return Dependency(state="ok", detail=f"{len(serving.registry.adapters())} registered")
        return Dependency(state=serving.state, detail=serving.detail)

    def _first_jobs(self) -> Dependency:
        for identity in self.first_jobs:
            job = self.jobs.job(identity)
            if job.state not in ENDED:
                return Dependency(state="starting", detail=f"ingesting {job.path} ({job.progress.files} files done)")
        return Dependency(state="ok")

    async def _engine(self) -> Dependency:
        if self.engine is not None and self.engine.state != "up":
            state: Literal["starting", "down"] = "starting" if self.engine.state == "starting" else "down"
            return Dependency(state=state, detail=self.engine.detail)
        if not self.generator.url:
            return Dependency(state="down", detail="none was started; run `graft up`, or set SERVICE_LLM_URL")
        up = await self.generator.healthy()
        self.metrics.engine_up(up)
        return Dependency(state="ok" if up else "down", detail=self.generator.url)


async def _checked(check: Callable[[], str | Dependency]) -> Dependency:
    try:
        found = await to_thread.run_sync(check)
    except Exception as error:  # whatever the part raises is its state
        return Dependency(state="down", detail=str(error))
    return found if isinstance(found, Dependency) else Dependency(state="ok", detail=found)


def first_payload(folder: Path) -> IngestPayload:
    """What whoever started the service wants ingested; it needs no root, since nobody else names it."""
    return IngestPayload(target=str(folder), root=str(folder.parent), collection=DEFAULT)


def open_index(settings: IngestSettings) -> Index:
    """Raises LockedError, UnavailableError."""
    if settings.qdrant_url is None:
        return EdgeIndex(settings.home / "index")
    key = settings.qdrant_api_key
    return ServerIndex(
        QdrantClient(url=settings.qdrant_url, api_key=key.get_secret_value() if key else None, timeout=30)
    )


def small_models(models: Path) -> dict[str, tuple[str, ...]]:
    """-> by folder, the languages of the bundled chat models, which get the prompt for small models."""
    found = {}
    for card in models.glob("*/graft-model.json"):
        content = json.loads(card.read_text())
        if content.get("kind") == "chat":
            found[str(card.parent)] = tuple(content.get("languages", ("en",)))
    return found


async def get_parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def get_principal(request: Request, parts: Annotated[Parts, Depends(get_parts)]) -> Principal:
    if parts.keys is None:
        return LOCAL
    principal = parts.keys.principal(request.headers.get("authorization"))
    if principal is None:
        raise HTTPException(401, "send a known key as `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
    return principal


async def get_admin(principal: Annotated[Principal, Depends(get_principal)]) -> Principal:
    principal.require_admin()
    return principal


WithParts = Annotated[Parts, Depends(get_parts)]
WithPrincipal = Annotated[Principal, Depends(get_principal)]
WithAdmin = Annotated[Principal, Depends(get_admin)]
