"""Whether the process lives, whether it can answer, and its figures."""

from fastapi import APIRouter, Response

from service.deps import WithParts, WithPrincipal
from service.schemas import Ready

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live() -> dict[str, str]:
    return {"state": "ok"}


@router.get("/health/ready", responses={503: {"model": Ready}})
async def ready(parts: WithParts, response: Response) -> Ready:
    """503 until every dependency answers and the first ingests have ended."""
    found = await parts.readiness()
    if not found.ready:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return found


@router.get("/metrics")
async def metrics(parts: WithParts, principal: WithPrincipal) -> Response:
    """In Prometheus' text format."""
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")
