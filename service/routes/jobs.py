"""`POST /ingest` and the jobs that it starts."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
from anyio import to_thread
from fastapi import APIRouter
from sse_starlette import EventSourceResponse, ServerSentEvent

from ingest.errors import ForbiddenError, InvalidError
from service.deps import Parts, WithAdmin, WithParts
from service.jobs import ENDED, IngestPayload
from service.schemas import IngestRequest, Job

router = APIRouter(tags=["ingest"])


@router.post("/ingest", status_code=202)
async def ingest(body: IngestRequest, parts: WithParts, principal: WithAdmin) -> Job:
    """Brings a folder (or one file) into a collection, which is created if need be."""

    def enqueue() -> Job:
        target, root = allowed(body.path, parts.settings.ingest_roots)
        parts.ensure_collection(body.collection)
        payload = IngestPayload(
            target=str(target),
            root=str(root),
            collection=body.collection,
            allow_empty=body.allow_empty,
            acl=None if body.acl is None else tuple(body.acl),
            metadata=body.metadata,
        )
        return parts.jobs.enqueue(payload, principal.id)

    return await to_thread.run_sync(enqueue)


@router.get("/jobs/{job_id}")
async def job(job_id: str, parts: WithParts, principal: WithAdmin) -> Job:
    return await to_thread.run_sync(parts.jobs.job, job_id)


@router.post("/jobs/{job_id}/cancel")
async def cancel(job_id: str, parts: WithParts, principal: WithAdmin) -> Job:
    """What the job has finished is kept; running it again goes on from there."""
    return await to_thread.run_sync(parts.jobs.cancel, job_id)


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def events(job_id: str, parts: WithParts, principal: WithAdmin) -> EventSourceResponse:
    """`progress` whenever it moves, and `done` with the whole job at its end."""
    first = await to_thread.run_sync(parts.jobs.job, job_id)
    return EventSourceResponse(_followed(parts, first), ping=15)


async def _followed(parts: Parts, current: Job) -> AsyncIterator[ServerSentEvent]:
    told = None
    while current.state not in ENDED:
        if (current.state, current.progress) != told:
            told = (current.state, current.progress)
            yield ServerSentEvent(event="progress", data=current.model_dump_json())
        await anyio.sleep(0.3)
        current = await to_thread.run_sync(parts.jobs.job, current.job_id)
    yield ServerSentEvent(event="done", data=current.model_dump_json())


def allowed(path: str, roots: tuple[Path, ...]) -> tuple[Path, Path]:
    """-> (the real target, the root that it lies below). Raises ForbiddenError, InvalidError; nothing is read."""
    try:
        target = Path(os.path.realpath(path))
        for root in sorted((Path(os.path.realpath(one)) for one in roots), key=lambda one: -len(one.parts)):
            if target == root or root in target.parents:
                if not target.exists():
                    raise InvalidError(f"path {path!r} does not exist")
                return target, root if target != root or root.is_dir() else root.parent
    except (ValueError, OSError) as error:
        raise InvalidError(f"path {path!r} cannot be used: {error}") from error
    listed = ", ".join(repr(str(root)) for root in roots)
    raise ForbiddenError(
        f"path {path!r} lies outside the folders that may be ingested ({listed}); "
        "`graft up --root DIR` or SERVICE_INGEST_ROOTS adds one"
    )
