"""Adapters: registered, activated under load, rolled back, deleted."""

from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter, Response

from service.adapters import ALL, Adapter, pinned, standing
from service.deps import Parts, WithAdmin, WithParts, WithPrincipal
from service.schemas_adapters import ActivateRequest, AdapterView, Checked, Move, RegisterRequest, RollbackRequest

router = APIRouter(prefix="/adapters", tags=["adapters"])


@router.post("", status_code=201, responses={200: {"model": AdapterView, "description": "It was registered before"}})
async def register(body: RegisterRequest, response: Response, parts: WithParts, principal: WithAdmin) -> AdapterView:
    """Checks a PEFT LoRA folder and registers a copy of it. What is wrong with it is told in one list."""
    source = Path(body.path)
    adapter, new = await parts.adapters.register(source, body.label or _label(source), principal.id)
    response.status_code = 201 if new else 200
    return await _view(parts, adapter)


@router.get("")
async def adapters(parts: WithParts, principal: WithPrincipal) -> list[AdapterView]:
    registry = parts.adapters.registry
    found = await to_thread.run_sync(lambda: (registry.adapters(), registry.pointers()))
    return [view(one, found[1]) for one in found[0]]


@router.get("/moves")
async def moves(parts: WithParts, principal: WithPrincipal) -> list[Move]:
    """Every move of every pointer, oldest first: who, when, from, to, why."""
    return await to_thread.run_sync(parts.adapters.registry.moves)


@router.get("/{name}")
async def adapter(name: str, parts: WithParts, principal: WithPrincipal) -> AdapterView:
    return await _view(parts, await to_thread.run_sync(parts.adapters.registry.adapter, name))


@router.post("/rollback")
async def rollback(parts: WithParts, principal: WithAdmin, body: RollbackRequest | None = None) -> Move:
    """To the adapter before the present one, or to the bare base."""
    body = body or RollbackRequest()
    collection = await _pointer(parts, body.collection)
    if body.to == "base":
        return await parts.adapters.activate(None, collection, principal.id, body.why)
    return await parts.adapters.roll_back(collection, principal.id, body.why)


@router.post("/{name}/activate")
async def activate(name: str, parts: WithParts, principal: WithAdmin, body: ActivateRequest | None = None) -> Move:
    """Every query from now on goes to it; answers in flight end with the adapter that they began with."""
    body = body or ActivateRequest()
    return await parts.adapters.activate(name, await _pointer(parts, body.collection), principal.id, body.why)


@router.put("/{name}/checked")
async def record_check(name: str, body: Checked, parts: WithParts, principal: WithAdmin) -> AdapterView:
    """Keeps what `graft check` found of it; an adapter that graft trained is activated only once it has passed."""
    return await _view(parts, await to_thread.run_sync(parts.adapters.registry.record_check, name, body))


@router.delete("/{name}", status_code=204)
async def delete(name: str, parts: WithParts, principal: WithAdmin) -> None:
    """Its name stops at once. One that answers now is refused."""
    await to_thread.run_sync(parts.adapters.registry.retire, name)


async def _pointer(parts: Parts, collection: str | None) -> str:
    if collection is None:
        return ALL
    return (await to_thread.run_sync(parts.catalog.collection, collection)).name


def _label(source: Path) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in source.name).strip("-")
    return kept[:64].strip("-") or "adapter"


async def _view(parts: Parts, adapter: Adapter) -> AdapterView:
    return view(adapter, await to_thread.run_sync(parts.adapters.registry.pointers))


def view(adapter: Adapter, pointers: dict[str, str | None]) -> AdapterView:
    return AdapterView(
        **adapter.model_dump(exclude={"config", "retired_at"}),
        parent=adapter.parent,
        checked=standing(adapter.manifest, adapter.digest),
        live=pointers.get(ALL) == adapter.name,
        collections=tuple(pinned(pointers, adapter.name)),
    )
