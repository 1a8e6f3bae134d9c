"""Stands in for the engine at the wire: as much of vLLM's OpenAI protocol as the service speaks, with no model behind it.

`python -m benchmarks.wire_engine` listens on a free port and prints its URL. Each answer is the same 20 tokens, one every
5 ms, so that what the service itself costs can be seen.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ingest.settings import CHECKOUT

MODEL = "wire"
PAUSE = 0.005  # seconds between two tokens
SENTENCE = (
    "The pump is serviced every 4,000 running hours in all stations, and its seals are changed at the same time [1]."
)
TOKENS = len(SENTENCE.split(" "))


@contextmanager
def answering() -> Iterator[str]:
    """-> its URL, ending in /v1, of a new process."""
    command = [sys.executable, "-m", "benchmarks.wire_engine"]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def health(_: Request) -> Response:
    return Response()


async def models(_: Request) -> Response:
    card = {"id": MODEL, "object": "model", "root": MODEL, "parent": None, "max_model_len": 8192}
    return JSONResponse({"object": "list", "data": [card]})


async def tokenize(request: Request) -> Response:
    messages = (await request.json())["messages"]
    count = sum(len(message["content"]) // 4 + 4 for message in messages)
    return JSONResponse({"count": count, "max_model_len": 8192})


async def chat(request: Request) -> Response:
    asked: dict[str, Any] = await request.json()
    assert asked["stream"]
    return StreamingResponse(_tokens(), media_type="text/event-stream")


async def _tokens() -> AsyncIterator[str]:
    start = time.perf_counter()
    for n, word in enumerate(SENTENCE.split(" ")):
        await asyncio.sleep(max(0.0, start + (n + 1) * PAUSE - time.perf_counter()))
        yield _event(
            {"choices": [{"index": 0, "delta": {"content": f" {word}" if n else word}, "finish_reason": None}]}
        )
    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 500, "completion_tokens": TOKENS, "total_tokens": 500 + TOKENS}
    yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'wire', 'object': 'chat.completion.chunk', 'model': MODEL, **content})}\n\n"


def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
    uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
