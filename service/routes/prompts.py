"""Prompts: versions that never change, which one a collection answers with, and the way back."""

from anyio import to_thread
from fastapi import APIRouter, Response

from service.deps import WithAdmin, WithParts, WithPrincipal
from service.schemas import PromptMove, PromptName, PromptRequest, PromptView

router = APIRouter(tags=["prompts"])


@router.get("/prompts")
async def prompts(parts: WithParts, principal: WithPrincipal) -> list[PromptView]:
    """Every version of every prompt."""
    return await to_thread.run_sync(parts.prompts.versions)


@router.get("/prompts/{name}")
async def prompt(name: str, parts: WithParts, principal: WithPrincipal) -> list[PromptView]:
    """All versions of a name, oldest first; or the one that is named, as `support-2`."""
    return await to_thread.run_sync(parts.prompts.versions, name)


@router.put(
    "/prompts/{name}", status_code=201, responses={200: {"model": PromptView, "description": "It has it already"}}
)
async def put_prompt(
    name: PromptName, body: PromptRequest, response: Response, parts: WithParts, principal: WithAdmin
) -> PromptView:
    """Adds a version. No earlier one changes, and no collection moves to it by itself."""
    view, new = await to_thread.run_sync(parts.prompts.add, name, body.template, principal.id)
    response.status_code = 201 if new else 200
    return view


@router.post("/collections/{name}/prompt/rollback")
async def rollback(name: str, parts: WithParts, principal: WithAdmin) -> PromptMove:
    """To the prompt before the present one."""
    return await to_thread.run_sync(lambda: parts.prompts.roll_back(parts.catalog.collection(name), principal.id))


@router.get("/collections/{name}/prompt/moves")
async def moves(name: str, parts: WithParts, principal: WithPrincipal) -> list[PromptMove]:
    """Every move of a collection's prompt, oldest first: who, when, from, to."""
    return await to_thread.run_sync(lambda: parts.prompts.moves(parts.catalog.collection(name).name))
