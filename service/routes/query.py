"""`POST /query` and `POST /retrieve`."""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from ingest.errors import GraftError
from service.answer import Event, Token, answer
from service.cite import Cited
from service.deps import WithParts, WithPrincipal
from service.schemas import Answer, QueryRequest, Retrieved, SearchRequest

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
router = APIRouter(tags=["answers"])
GONE = Response(status_code=499)  # nobody reads it: the client has hung up


@router.post("/query", response_model=Answer)
async def query(body: QueryRequest, request: Request, parts: WithParts, principal: WithPrincipal) -> Response:
    """Answers a question from a collection. With `"stream": true`: events `token`, `citations`, `done`, or `error`."""
    events = answer(body, principal, parts.answering())
    if body.stream:
        # what fails before the first byte still has a status of its own
        first = await _unless_gone(request, lambda: anext(events))
        return GONE if first is None else EventSourceResponse(_sent(first, events), ping=15, send_timeout=60)
    last = await _unless_gone(request, lambda: _last(events))
    return GONE if last is None else JSONResponse(last.model_dump(mode="json"))


@router.post("/retrieve")
async def retrieve(body: SearchRequest, parts: WithParts, principal: WithPrincipal) -> Retrieved:
    """The hits alone, with dense, sparse and fused scores. Another index than the live one is for who may make it live."""
    if body.index is not None:
        principal.require_admin()
    by_document = body.group_by == "document"
    found = await to_thread.run_sync(
        parts.retriever.retrieve,
        body.question,
        body.names(),
        body.filters,
        principal.groups,
        body.top_k,
        by_document,
        body.retrieval,
        None,
        body.index,
    )
    return Retrieved(hits=tuple(found.hits), timings_ms=found.timings_ms, reranked=found.reranked, notes=found.notes)


async def _last(events: AsyncGenerator[Event]) -> Answer:
    async with aclosing(events):
        async for event in events:
            last = event
    assert isinstance(last, Answer)
    return last


async def _unless_gone(request: Request, work: Callable[[], Awaitable[Result]]) -> Result | None:
    """Does the work; cancels it as soon as the client hangs up, and gives None."""
    result: Result | None = None
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            result = await work()
        except Exception as error:  # raised again outside the group, which would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure:
        raise failure
    return result


async def _sent(first: Event, events: AsyncGenerator[Event]) -> AsyncIterator[ServerSentEvent]:
    try:
        async with aclosing(events):
            yield _as_sent(first)
            async for event in events:
                yield _as_sent(event)
    except GraftError as error:
        yield ServerSentEvent(event="error", data=_json({"detail": str(error)}))
    except Exception:
        logger.exception("an answer broke off")
        yield ServerSentEvent(event="error", data=_json({"detail": "an error of the service's own; its log says more"}))


def _as_sent(event: Event) -> ServerSentEvent:
    match event:
        case Token(text):
            return ServerSentEvent(event="token", data=_json({"text": text}))
        case Cited(sentences, citations):
            body = {
                "sentences": [one.model_dump() for one in sentences],
                "citations": [one.model_dump() for one in citations],
            }
            return ServerSentEvent(event="citations", data=_json(body))
        case Answer():
            return ServerSentEvent(event="done", data=event.model_dump_json(exclude={"sentences", "citations"}))


def _json(body: object) -> str:
    return json.dumps(body, ensure_ascii=False)
