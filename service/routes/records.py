"""`GET /interactions/{id}` and `POST /feedback`: a principal reaches its own alone."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header
from pydantic import BaseModel

from service.deps import WithParts, WithPrincipal
from service.records import Feedback, Interaction
from service.schemas import FeedbackRequest

router = APIRouter(tags=["records"])


class FeedbackReply(BaseModel):
    feedback_id: str


class InteractionReply(Interaction):
    feedback: list[dict[str, Any]]


@router.post("/feedback", status_code=201)
async def give_feedback(
    body: FeedbackRequest,
    parts: WithParts,
    principal: WithPrincipal,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
) -> FeedbackReply:
    """Appends feedback. The same `Idempotency-Key` and body give the same `feedback_id`."""
    given = Feedback(rating=body.rating, comment=body.comment, correction=body.correction)
    identity = await to_thread.run_sync(
        parts.records.add_feedback, body.interaction_id, principal.id, given, idempotency_key
    )
    return FeedbackReply(feedback_id=identity)


@router.get("/interactions/{interaction_id}")
async def interaction(interaction_id: str, parts: WithParts, principal: WithPrincipal) -> InteractionReply:
    """What an answer was made of, and what was said of it."""
    found = await to_thread.run_sync(parts.records.interaction, interaction_id, principal.id)
    said = await to_thread.run_sync(parts.records.feedback_of, interaction_id)
    return InteractionReply(**found.model_dump(), feedback=said)
