"""Collections: how each is embedded, split, searched and answered from."""

from anyio import to_thread
from fastapi import APIRouter

from ingest.catalog import Collection
from service.deps import Parts, WithAdmin, WithParts, WithPrincipal
from service.schemas import CollectionName, CollectionSettings, CollectionView

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
    """Creates or changes one. Another embedder or chunking on a filled collection is refused."""
    pins = "adapter" in body.model_fields_set
    if pins and body.adapter:
        await parts.adapters.ready(body.adapter)
    await to_thread.run_sync(parts.put_collection, name, body)
    if pins:
        await to_thread.run_sync(parts.pin, name, body.adapter, principal.id)
    return await to_thread.run_sync(lambda: _view(parts, parts.catalog.collection(name)))


@router.delete("/{name}", status_code=204)
async def delete_collection(name: str, parts: WithParts, principal: WithAdmin) -> None:
    """Its documents, their texts and its index go; interactions and feedback stay."""
    await to_thread.run_sync(parts.delete_collection, name, principal.id)


def _view(parts: Parts, collection: Collection) -> CollectionView:
    counts = parts.catalog.count(collection.name)
    adapter = parts.adapters.registry.pointers().get(collection.name)
    return CollectionView(
        **collection.model_dump(), adapter=adapter, documents=counts.get("done", 0), chunks=counts["chunks"]
    )
