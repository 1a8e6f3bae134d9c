"""Collections: how each is embedded, split, searched and answered from; its indexes, old and new."""

from anyio import to_thread
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError

from ingest import remote
from ingest.catalog import Collection
from ingest.embed import index_fingerprint
from ingest.errors import InvalidError
from service.deps import Parts, WithAdmin, WithParts, WithPrincipal
from service.jobs import DumpPayload, LoadPayload, ReindexPayload
from service.routes.jobs import allowed
from service.schemas import CollectionName, CollectionSettings, CollectionView, IndexView
from service.schemas_jobs import Job, MoveRequest, ReindexRequest

router = APIRouter(prefix="/collections", tags=["collections"])


@router.get("")
async def collections(parts: WithParts, principal: WithPrincipal) -> list[CollectionView]:
    return await to_thread.run_sync(lambda: [_view(parts, one) for one in parts.catalog.collections()])


@router.get("/{name}")
async def collection(name: str, parts: WithParts, principal: WithPrincipal) -> CollectionView:
    return await to_thread.run_sync(lambda: _view(parts, parts.catalog.collection(name)))


@router.put("/{name}")
async def put_collection(
    name: CollectionName, body: CollectionSettings, parts: WithParts, principal: WithAdmin
) -> CollectionView:
    """Creates or changes one. Another embedder or chunking of a filled collection is for `reindex`."""
    pins = "adapter" in body.model_fields_set
    if pins and body.adapter:
        await parts.adapters.ready(body.adapter)
    prompt = await to_thread.run_sync(_prompt, parts, body.prompt) if body.prompt else None
    held = await to_thread.run_sync(parts.put_collection, name, body)
    if prompt:
        await to_thread.run_sync(parts.prompts.use, held, prompt, principal.id)
    if pins:
        await to_thread.run_sync(parts.pin, name, body.adapter, principal.id)
    return await to_thread.run_sync(lambda: _view(parts, parts.catalog.collection(name)))


@router.delete("/{name}", status_code=204)
async def delete_collection(name: str, parts: WithParts, principal: WithAdmin) -> None:
    """Its documents, their texts and its indexes go; interactions and feedback stay."""
    await to_thread.run_sync(parts.delete_collection, name, principal.id)


@router.post("/{name}/reindex", status_code=202)
async def reindex(name: str, body: ReindexRequest, parts: WithParts, principal: WithAdmin) -> Job:
    """Builds an index beside the live one, from the kept texts, compares the two, and makes it live."""

    def enqueue() -> Job:
        held = parts.catalog.collection(name)
        embedder = parts.retriever.embedder(body.embedder or held.embedder)
        if index_fingerprint(embedder, body.chunking or held.chunking) == held.fingerprint:
            raise InvalidError(f"collection {name!r} is embedded and split like this already")
        payload = ReindexPayload(collection=name, embedder=body.embedder, chunking=body.chunking, flip=body.flip)
        return parts.jobs.enqueue(payload, principal.id)

    return await to_thread.run_sync(enqueue)


@router.get("/{name}/indexes")
async def indexes(name: str, parts: WithParts, principal: WithPrincipal) -> list[IndexView]:
    """Oldest first: the live one, those kept for a way back, those being built."""
    return await to_thread.run_sync(parts.documents.indexes, name)


@router.post("/{name}/indexes/{index}/activate", status_code=202)
async def activate_index(name: str, index: str, parts: WithParts, principal: WithAdmin) -> Job:
    """Brings an index that is kept up to date and makes it live: the way back, and the way to one built without a flip."""
    return await to_thread.run_sync(lambda: parts.jobs.enqueue(parts.documents.reindexing(name, index), principal.id))


@router.delete("/{name}/indexes/{index}", status_code=204)
async def delete_index(name: str, index: str, parts: WithParts, principal: WithAdmin) -> None:
    def drop() -> None:
        parts.refuse_busy(name)
        parts.documents.drop_index(name, index)

    await to_thread.run_sync(drop)


@router.post("/{name}/dump", status_code=202)
async def dump(name: str, body: MoveRequest, parts: WithParts, principal: WithAdmin) -> Job:
    """Writes the live index as Parquet shards, or to another store."""

    def enqueue() -> Job:
        parts.catalog.collection(name)
        payload = DumpPayload(collection=name, target=_target(parts, body.target, exists=False))
        return parts.jobs.enqueue(payload, principal.id)

    return await to_thread.run_sync(enqueue)


@router.post("/{name}/load", status_code=202)
async def load(name: CollectionName, body: MoveRequest, parts: WithParts, principal: WithAdmin) -> Job:
    """Takes in what `dump` wrote, or another store holds."""

    def enqueue() -> Job:
        payload = LoadPayload(collection=name, target=_target(parts, body.target, exists=True))
        return parts.jobs.enqueue(payload, principal.id)

    return await to_thread.run_sync(enqueue)


def _prompt(parts: Parts, wanted: str) -> str:
    """-> "auto" or a version. An unknown one is a field that does not fit."""
    try:
        return parts.prompts.resolved(wanted)
    except InvalidError as error:
        raise RequestValidationError([{"loc": ("body", "prompt"), "msg": str(error), "type": "prompt"}]) from error


def _target(parts: Parts, target: str, exists: bool) -> str:
    """Folders, also those of embedded stores, lie below the allowed roots. Raises ForbiddenError, InvalidError."""
    from ingest import stores

    if not stores.is_store(target):
        return str(allowed(target, parts.settings.ingest_roots, exists)[0])
    store = stores.parse_store(target)
    if store.is_local:
        allowed(store.place, parts.settings.ingest_roots, exists)
    elif remote.is_remote(store.place):
        remote.allowed(store.place, parts.settings.ingest_urls)
    return target


def _view(parts: Parts, collection: Collection) -> CollectionView:
    counts = parts.catalog.count(collection.name)
    adapter = parts.adapters.registry.pointers().get(collection.name)
    prompt = parts.prompts.pointer(collection)
    return CollectionView(
        **collection.model_dump() | {"prompt": prompt},
        adapter=adapter,
        documents=counts.get("done", 0),
        chunks=counts["chunks"],
    )
