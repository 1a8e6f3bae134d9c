"""The FastAPI application: routes, who may reach them, and one place where errors become replies."""

import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingest.errors import (
    ConflictError,
    DocumentError,
    ForbiddenError,
    GraftError,
    InvalidError,
    LockedError,
    NotFoundError,
    SettingsError,
    UnavailableError,
)
from service.deps import Parts
from service.preflight import AdapterRefusedError
from service.routes import adapters, collections, documents, health, jobs, prompts, query, records, tune
from service.schemas import Problem

logger = logging.getLogger(__name__)
STATUS: dict[type[GraftError], int] = {
    NotFoundError: 404,
    ConflictError: 409,
    InvalidError: 422,
    ForbiddenError: 403,
    UnavailableError: 503,
    LockedError: 503,
    SettingsError: 422,
    DocumentError: 422,
}
MAX_BODY = 2**20  # bytes
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def create_app(parts: Parts) -> FastAPI:
    """Routes over `parts`, which whoever built them closes."""
    app = FastAPI(
        title="graft",
        version="0.1.0",
        description="Cited answers from your own documents.",
        responses={422: {"model": Problem, "description": "The request does not fit; `errors` names the fields"}},
    )
    app.state.parts = parts
    for module in (query, records, jobs, tune, collections, documents, adapters, prompts, health):
        app.include_router(module.router)
    app.add_exception_handler(GraftError, _graft_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(Counted)
    upload = parts.ingest.max_upload_mb * 2**20
    app.add_middleware(Guard, loopback_only=parts.keys is None, bodies={("POST", "/documents"): upload})
    return app


class Guard:
    """Bounds every body. Without keys, refuses a Host or Origin beyond loopback, so that no web page drives the service."""

    def __init__(self, app: ASGIApp, loopback_only: bool, bodies: Mapping[tuple[str, str], int]) -> None:
        """`bodies`: by method and path, bytes that a body may have where it is not MAX_BODY."""
        self.app = app
        self.loopback_only = loopback_only
        self.bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        most = self.bodies.get((scope["method"], scope["path"]), MAX_BODY)
        refusal = self._refusal(headers, most)
        if refusal:
            await _problem(*refusal)(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, f"the body is over {most} bytes")
            return message

        await self.app(scope, bounded, send)

    def _refusal(self, headers: dict[bytes, str], most: int) -> tuple[int, str] | None:
        if self.loopback_only:
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            if not _is_loopback(f"//{host}"):
                return 403, f"host {host!r} is not this machine; set SERVICE_API_KEYS_FILE to serve others"
            if origin is not None and not _is_loopback(origin):
                return 403, f"origin {origin!r} is not this machine; set SERVICE_API_KEYS_FILE to serve others"
        length = headers.get(b"content-length", "0")
        if length.isdigit() and int(length) > most:
            return 413, f"the body is over {most} bytes"
        return None


class Counted:
    """Counts requests by route and status."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # nothing was sent: the client had hung up

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            scope["app"].state.parts.metrics.requested(scope["method"], route, status)


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False


async def _graft_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GraftError)
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, UnavailableError) else None
    faults = error.faults if isinstance(error, AdapterRefusedError) else ()
    errors = tuple({"field": fault.name, "message": fault.message} for fault in faults)
    return _problem(status, str(error), errors, headers)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = tuple(
        {"field": _field(one), "message": str(one["msg"]).removeprefix("Value error, ")} for one in error.errors()
    )
    detail = "; ".join(f"{one['field']}: {one['message']}" for one in errors)
    return _problem(422, detail, errors)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and "parsing the body" in str(error.detail):
        message = "is not valid JSON in UTF-8"
        return _problem(422, f"body: {message}", ({"field": "body", "message": message},))
    return _problem(error.status_code, str(error.detail), headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    logger.error("request failed", exc_info=error, extra={"path": request.url.path})
    return _problem(500, "an error of the service's own; its log says more")


def _field(error: dict[str, Any]) -> str:
    location = error["loc"][:1] if error["type"] == "json_invalid" else error["loc"]  # its second part is an offset
    return ".".join(str(part) for part in location[1:] or location)


def _problem(
    status: int, detail: str, errors: tuple[dict[str, str], ...] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(Problem(detail=detail, errors=errors).model_dump(), status, headers)
