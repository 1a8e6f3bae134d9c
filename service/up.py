"""Runs the service: `run` with its engine until Ctrl-C, `in_background` for the length of one command."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
import uvloop
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
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        parts = await asyncio.to_thread(Parts, settings, ingest, engine, folders)
        parts.adapters.bundled = settings.bundled_adapters
        server = _Server(parts)
        serving = asyncio.create_task(server.serve_then_close(listening))
        try:
            await _until(stop, serving, _bring_up(server, url, engine, question, console))
        finally:
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
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
        server = _Server(Parts(settings, ingest, None))
        thread = threading.Thread(target=lambda: uvloop.run(server.serve_then_close(listening)), name="service")
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


class _Server(uvicorn.Server):
    """Serves the parts, and closes them in its own event loop. Signals are for whoever runs it."""

    def __init__(self, parts: Parts) -> None:
        config = uvicorn.Config(
            create_app(parts),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self._parts = parts

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve_then_close(self, listening: socket.socket) -> None:
        watching = asyncio.create_task(self._parts.adapters.watch(), name="adapter watch")
        try:
            await self.serve(sockets=[listening])
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await self._parts.close()


async def _until(stop: asyncio.Event, serving: "asyncio.Task[None]", work: Coroutine[None, None, None]) -> None:
    """Does the work and waits, until told to stop or the server ends by itself. Raises what the work raises."""
    stopping, working = asyncio.create_task(stop.wait()), asyncio.create_task(work)
    await asyncio.wait({stopping, serving, working}, return_when=asyncio.FIRST_COMPLETED)
    if working.done() and working.exception() is None:
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working


async def _bring_up(
    server: uvicorn.Server, url: str, engine: LocalEngine | None, question: str | None, console: Console
) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.02)
    console.print(f"service: {url} (docs at {url}/docs)", markup=False)
    if engine is not None:
        await _engine_up(engine, console)
    await _greet(url, question, console)


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
                f"{name}: {one.detail or one.state}"
                for name, one in ready.dependencies.items()
                if one.state in {"starting", "down"}
            ]
            if (said := "; ".join(waiting)) != told:
                told = said
                console.print(f"  waiting for {said}", markup=False)
            await asyncio.sleep(0.5)
        console.print("ready")
        with suppress(GraftError):  # where there are keys, and none of them is at hand
            live = [one.name for one in await asyncio.to_thread(client.adapters) if one.live]
            for name in live:
                console.print(f"adapter: {name} answers; `graft adapters rollback` goes back", markup=False)
        if question:
            console.print(f"\n> {question}", markup=False)
            try:
                answer = await asyncio.to_thread(ask_streaming, client, QueryRequest(question=question))
                print_answer(answer)
            except GraftError as error:
                console.print(f"the question was not answered: {error}", markup=False)
    console.print('\nCtrl-C ends it. In another terminal: .venv/bin/graft query "..."', markup=False)


def check_address(settings: ServiceSettings) -> None:
    """Raises SettingsError for an address beyond loopback without keys."""
    if settings.api_keys_file is None and settings.host not in LOOPBACK:
        raise SettingsError(
            f"SERVICE_HOST {settings.host!r} is reached from other machines, so it needs keys: set SERVICE_API_KEYS_FILE"
        )


def _listen(settings: ServiceSettings) -> socket.socket:
    """Raises SettingsError when the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sends small writes at once only on sockets that name their protocol; others wait 40 ms for the peer
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
