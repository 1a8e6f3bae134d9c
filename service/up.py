"""Runs the service: `run` with its engine until Ctrl-C, `in_background` for the length of one command."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from rich.console import Console

from ingest.errors import GraftError, SettingsError, UnavailableError
from ingest.settings import IngestSettings
from service.app import LOOPBACK, create_app
from service.client import Client
from service.deps import Parts
from service.engine import LocalEngine
from service.log import configure
from service.owner import own
from service.schemas import QueryRequest
from service.settings import ServiceSettings
from service.show import ask_streaming, print_answer

SHUTDOWN_SECONDS = 5  # for answers in flight, once the service is told to end


async def run(
    settings: ServiceSettings,
    ingest: IngestSettings,
    folders: Sequence[Path],
    question: str | None,
    with_engine: bool,
    console: Console,
) -> None:
    """Returns after Ctrl-C or SIGTERM, with every process ended that it started."""
    check_address(settings)
    for folder in folders:
        if not folder.exists():
            raise SettingsError(f"{str(folder)!r} does not exist")
    listening = _listen(settings)
    url = _url(listening)
    with listening, own(ingest.home, url):
        configure(ingest.home, settings.log_level)
        engine = None
        if with_engine and not settings.llm_url:
            engine = LocalEngine(settings, ingest, lambda said: console.print(f"  engine: {said}"))
        parts = await asyncio.to_thread(Parts, settings, ingest, engine, folders)
        server = _server(parts)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await _started(server, serving)
            console.print(f"service: {url} (docs at {url}/docs, logs in {ingest.home / 'logs'})")
            if engine is not None:
                await _or_end(_engine_up(engine, console), serving)
            if not serving.done():
                await _or_end(_greet(url, question, console), serving)
            await serving
        finally:
            server.should_exit = True
            with suppress(KeyboardInterrupt):
                await asyncio.gather(serving, return_exceptions=True)
            await parts.close()
            if engine is not None:
                await engine.stop()
            console.print("ended")


@contextmanager
def in_background(settings: ServiceSettings, ingest: IngestSettings) -> Iterator[str]:
    """-> the URL of a service on a free loopback port, without an engine of its own."""
    settings = settings.model_copy(update={"host": "127.0.0.1", "port": 0})
    listening = _listen(settings)
    url = _url(listening)
    with listening, own(ingest.home, url):
        configure(ingest.home, settings.log_level)
        parts = Parts(settings, ingest, None)
        server = _server(parts)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="service")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise UnavailableError(f"the service did not start; see {ingest.home / 'logs'}")
                time.sleep(0.02)
            yield url
        finally:
            server.should_exit = True
            thread.join()
            asyncio.run(parts.close())


async def _engine_up(engine: LocalEngine, console: Console) -> None:
    start = time.monotonic()
    console.print(f"engine: starting vLLM with {engine.served_name} (log: {engine.log})")
    await engine.start()
    console.print(f"engine: up after {time.monotonic() - start:.0f} s, {engine.detail}")


async def _greet(url: str, question: str | None, console: Console) -> None:
    """Waits until the service is ready, asks the question, and says how to go on."""
    key = os.environ.get("GRAFT_API_KEY")
    with Client(url, key) as client:
        told = ""
        while not (ready := await asyncio.to_thread(client.ready)).ready:
            waiting = [
                f"{name}: {one.detail or one.state}" for name, one in ready.dependencies.items() if one.state != "ok"
            ]
            if (said := "; ".join(waiting)) != told:
                told = said
                console.print(f"  waiting for {said}", markup=False)
            await asyncio.sleep(0.5)
        console.print("ready")
        if question:
            console.print(f"\n> {question}", markup=False)
            try:
                answer = await asyncio.to_thread(ask_streaming, client, QueryRequest(question=question))
                print_answer(answer)
            except GraftError as error:
                console.print(f"the question was not answered: {error}", markup=False)
    console.print('\nCtrl-C ends it. In another terminal: .venv/bin/graft query "..."', markup=False)


async def _or_end(work: Coroutine[None, None, None], serving: "asyncio.Task[None]") -> None:
    """Does the work unless the server ends first."""
    task = asyncio.create_task(work)
    await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return
    await task


async def _started(server: uvicorn.Server, serving: "asyncio.Task[None]") -> None:
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.02)
    if not server.started:
        await serving


def check_address(settings: ServiceSettings) -> None:
    """Raises SettingsError for an address beyond loopback without keys."""
    if settings.api_keys_file is None and settings.host not in LOOPBACK:
        raise SettingsError(
            f"SERVICE_HOST {settings.host!r} is reached from other machines, so it needs keys: set SERVICE_API_KEYS_FILE"
        )


def _server(parts: Parts) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(parts), log_config=None, access_log=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS, lifespan="off"
    )
    return uvicorn.Server(config)


def _listen(settings: ServiceSettings) -> socket.socket:
    """Raises SettingsError when the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); end what uses that port, or set "
            "SERVICE_PORT to another"
        ) from error
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
