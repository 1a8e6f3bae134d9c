"""`POST /ingest` and jobs of any kind."""

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Query
from sse_starlette import EventSourceResponse, ServerSentEvent

from ingest import reader, remote
from ingest.errors import ForbiddenError, InvalidError
from service.deps import Parts, WithAdmin, WithParts
from service.jobs import ENDED, IngestPayload
from service.schemas import CollectionName
from service.schemas_jobs import IngestRequest, Job

router = APIRouter(tags=["ingest"])


@router.post("/ingest", status_code=202)
async def ingest(body: IngestRequest, parts: WithParts, principal: WithAdmin) -> Job:
    """Brings a folder, a file, a URL or a reader's documents into a collection, which is created if need be."""

    def enqueue() -> Job:
        payload = _payload(body, parts)
        parts.documents.ensure_collection(body.collection)
        return parts.jobs.enqueue(payload, principal.id)

    return await to_thread.run_sync(enqueue)


@router.get("/jobs")
async def jobs(
    parts: WithParts,
    principal: WithAdmin,
    collection: CollectionName | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> list[Job]:
    """The latest first."""
    return await to_thread.run_sync(parts.jobs.jobs, collection, limit)


@router.get("/jobs/{job_id}")
async def job(job_id: str, parts: WithParts, principal: WithAdmin) -> Job:
    return await to_thread.run_sync(parts.jobs.job, job_id)


@router.post("/jobs/{job_id}/cancel")
async def cancel(job_id: str, parts: WithParts, principal: WithAdmin) -> Job:
    """What the job has finished is kept; running it again goes on from there."""
    return await to_thread.run_sync(parts.jobs.cancel, job_id)


@router.post("/jobs/{job_id}/retry", status_code=202)
async def retry(job_id: str, parts: WithParts, principal: WithAdmin) -> Job:
    """A new job: of an ingest that succeeded, for the files alone that failed; of any other, the same again."""
    return await to_thread.run_sync(parts.jobs.retry, job_id, principal.id)


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def events(job_id: str, parts: WithParts, principal: WithAdmin) -> EventSourceResponse:
    """`progress` whenever it moves, and `done` with the whole job at its end."""
    first = await to_thread.run_sync(parts.jobs.job, job_id)
    return EventSourceResponse(_followed(parts, first), ping=15)


async def _followed(parts: Parts, current: Job) -> AsyncIterator[ServerSentEvent]:
    told: tuple[object, ...] | None = None
    while current.state not in ENDED:
        now = (current.state, current.progress, current.tuning, current.waiting_for, current.hint)
        if now != told:
            later = {"curve": current.curve[-1:]} if told else {}  # the first has all of it
            told = now
            yield ServerSentEvent(event="progress", data=current.model_copy(update=later).model_dump_json())
        await anyio.sleep(0.3)
        current = await to_thread.run_sync(parts.jobs.job, current.job_id)
    yield ServerSentEvent(event="done", data=current.model_dump_json())


def _payload(body: IngestRequest, parts: Parts) -> IngestPayload:
    """Raises ForbiddenError, InvalidError; nothing is read."""
    settings = parts.settings
    asked: dict[str, Any] = {
        "collection": body.collection,
        "allow_empty": body.allow_empty,
        "restore": body.restore,
        "acl": None if body.acl is None else tuple(body.acl),
        "metadata": body.metadata,
    }
    if body.only and (body.path is None or remote.is_remote(body.path)):
        raise InvalidError("only: names files of a folder, and path is none")
    if body.reader is not None:
        reader.allowed(body.reader.name, settings.ingest_readers)
        return IngestPayload(target=body.reader.name, reader=body.reader, **asked)
    assert body.path is not None
    if remote.is_remote(body.path):
        remote.allowed(body.path, settings.ingest_urls)
        return IngestPayload(target=body.path, **asked)
    target, root = allowed(body.path, settings.ingest_roots)
    return IngestPayload(target=str(target), root=str(root), only=_below(target, body.only), **asked)


def _below(target: Path, only: Sequence[str]) -> tuple[str, ...]:
    """-> the real places of files and folders of `target`, also of those that are gone. Raises ForbiddenError."""
    places = []
    for name in only:
        above, last = os.path.split(os.path.normpath(target / name))
        place = Path(os.path.realpath(above)) / last
        if target != place and target not in place.parents:
            raise ForbiddenError(f"only: {name!r} lies outside {str(target)!r}")
        places.append(str(place))
    return tuple(places)


def allowed(path: str, roots: tuple[Path, ...], exists: bool = True) -> tuple[Path, Path]:
    """-> (the real target, the root that it lies below). Raises ForbiddenError, InvalidError; nothing is read."""
    try:
        target = Path(os.path.realpath(path))
        for root in sorted((Path(os.path.realpath(one)) for one in roots), key=lambda one: -len(one.parts)):
            if target == root or root in target.parents:
                if exists and not target.exists():
                    raise InvalidError(f"path {path!r} does not exist")
                return target, root if target != root or root.is_dir() else root.parent
    except (ValueError, OSError) as error:
        raise InvalidError(f"path {path!r} cannot be used: {error}") from error
    listed = ", ".join(repr(str(root)) for root in roots)
    raise ForbiddenError(
        f"path {path!r} lies outside the folders that may be ingested ({listed}); "
        "`graft up --root DIR` or SERVICE_INGEST_ROOTS adds one"
    )
