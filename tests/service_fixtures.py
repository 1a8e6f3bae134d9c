"""The service as its users meet it: the real `graft` process over HTTP, and an engine that is replaced at the wire alone.

`WireEngine` speaks the part of vLLM's protocol that the service uses, says what a test tells it to say, and keeps what it
was sent. Everything else is real: embedder, index, database, jobs.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file
from sqlalchemy import select as sql_select

from ingest import db
from ingest.schemas import Hit
from service.owner import find_owner
from service.records import Interaction, interactions

CHECKOUT = Path(__file__).resolve().parent.parent
Found = TypeVar("Found")
GRAFT = Path(sys.executable).parent / "graft"
ROOT_MODEL, BASE_NAME = "/models/wire-1b", "wire-1b"
MAX_MODEL_LEN = 4096
BUNDLED = "smollm2-135m-instruct"

HERON = """# Heron H75 submersible pump

## Materials

The impeller of the H75 is made of high-chromium white iron, since sand would wear out a stainless one within a year.
The casing is of grey cast iron, painted twice.

## Oil

Change the oil in the H75 seal chamber every 4,000 running hours; the chamber holds 3.2 litres of Lumina White 32.
"""
KESTREL = """# Kestrel K40 pump

## Bearings

Grease the K40 bearings every 2,000 running hours with 35 g of Lumina EP2 per nipple.

## Starts

The K40 may be started at most six times per hour. A start while the pump turns backwards breaks the coupling.
"""
LEAVE = """# Leave and expenses

Full-time employees have 27 days of annual leave per calendar year. Up to eight unused days may be carried over and must
be taken by 31 March of the next year.

Expense claims must be handed in within 45 days after the journey, with all receipts.
"""
HANDBOOK = """# 员工手册

工作满一年不满十年的员工，每年享有7天年休假；满十年不满二十年的，每年12天；满二十年的，每年16天。

单笔超过5000元的报销由财务总监陆承志签字。
"""
DOCUMENTS = {
    "pumps/heron.md": HERON,
    "pumps/kestrel.md": KESTREL,
    "policies/leave.md": LEAVE,
    "zh/handbook.md": HANDBOOK,
}
RESOLVER_FOLDERS: set[Path] = set()  # of all homes: where the engine at the wire looks for adapters
IMPELLER = "What is the impeller of the H75 made of?"
IMPELLER_ANSWER = ("The impeller", " of the H75 is made of", " high-chromium", " white iron.")


@dataclass(frozen=True)
class Reply:
    """What the engine says to the next chat requests."""

    tokens: Sequence[str] = IMPELLER_ANSWER
    first_delay: float = 0.0  # seconds before the first token
    delay: float = 0.0  # seconds before each other one
    reasoning: str = ""  # sent as reasoning_content before the answer
    status: int = 200
    error: str = ""  # of a status other than 200; with 200: sent as an error object after the tokens
    cut: bool = False  # the connection ends after the tokens, without a finish reason
    finish: str = "stop"


@dataclass
class Asked:
    """A chat request as the engine received it. `gone` is set when its client closed the connection too early."""

    body: dict[str, Any]
    gone: threading.Event = field(default_factory=threading.Event)
    gone_at: float = 0.0
    sent: int = 0  # tokens


class WireEngine:
    """An OpenAI-protocol server on a free loopback port, which it keeps over `stop` and `start`."""

    def __init__(self) -> None:
        self.reply = Reply()
        self.root = ROOT_MODEL  # the folder of the model that it says it serves
        self.asked: list[Asked] = []
        self.adapters: set[str] = set()  # loaded
        self.resolves = True  # an adapter that is not loaded is looked for in the resolver's folders
        self.mixes = False  # an answer is made by whatever adapter was loaded last
        self.port = 0
        self._server: _Server | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        server = _Server(("127.0.0.1", self.port), _Handler)
        server.engine = self
        self.port = server.server_port
        self._server = server
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True, name="wire engine").start()

    def stop(self) -> None:
        """As a killed process: the port is closed and so is every connection."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server = None
        self.adapters.clear()

    def reset(self) -> None:
        if self._server is None:
            self.start()
        self.reply, self.root, self.resolves, self.mixes = Reply(), ROOT_MODEL, True, False
        self.asked.clear()

    def say(self, *tokens: str, **others: Any) -> None:
        self.reply = replace(Reply(), tokens=tokens, **others)

    def last(self) -> Asked:
        return self.asked[-1]

    def finds(self, model: str) -> bool:
        """Whether it serves a model of this name; as vLLM with its filesystem resolver."""
        if model == BASE_NAME or model in self.adapters:
            return True
        configs = (
            [folder / model / "adapter_config.json" for folder in tuple(RESOLVER_FOLDERS)] if self.resolves else []
        )
        bases = [json.loads(file.read_text())["base_model_name_or_path"] for file in configs if file.is_file()]
        if self.root in bases:  # each home names its trial's adapters alike, maybe for another base
            self.adapters.add(model)
            return True
        return False

    def completion(self, model: str, prompt: str) -> str:
        """What a model says to a prompt: always the same, and each its own."""
        last = sorted(self.adapters)[-1] if self.mixes and self.adapters else model
        return f"{last} says to {prompt}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    engine: WireEngine

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {})
        elif self.path == "/v1/models":
            base = {"id": BASE_NAME, "root": self.server.engine.root, "parent": None, "max_model_len": MAX_MODEL_LEN}
            loaded = [{"id": one, "root": "/", "parent": BASE_NAME} for one in sorted(self.server.engine.adapters)]
            self._json(200, {"object": "list", "data": [*loaded, base]})
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self._json(200, {"count": count_tokens(body["messages"])})
        elif self.path == "/v1/embeddings":
            texts = body["input"]
            rows = [{"index": at, "embedding": [1.0, *map(float, text.encode()[:3])]} for at, text in enumerate(texts)]
            self._json(200, {"data": rows})
        elif self.path == "/v1/chat/completions":
            self._chat(body)
        elif self.path == "/v1/completions":
            if self._found(body["model"]):
                text = self.server.engine.completion(body["model"], body["prompt"])
                self._json(200, {"choices": [{"text": text, "finish_reason": "length"}]})
        elif self.path == "/v1/load_lora_adapter":
            if Path(body["lora_path"]).is_dir():
                self.server.engine.adapters.add(body["lora_name"])
                self._json(200, "Success: LoRA adapter added successfully.")
            else:
                self._json(404, {"error": {"message": "No adapter found"}})
        elif self.path == "/v1/unload_lora_adapter":
            self.server.engine.adapters.discard(body["lora_name"])
            self._json(200, "Success: LoRA adapter removed successfully.")
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def _found(self, model: str) -> bool:
        found = self.server.engine.finds(model)
        if not found:
            self._json(404, {"error": {"message": f"The model `{model}` does not exist."}})
        return found

    def _chat(self, body: dict[str, Any]) -> None:
        asked, reply = Asked(body), self.server.engine.reply
        self.server.engine.asked.append(asked)
        if not self._found(body["model"]):
            return
        if reply.status != 200:
            self._json(reply.status, {"error": {"message": reply.error}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        try:
            self._stream(asked, reply)
        except (ConnectionError, BrokenPipeError):
            asked.gone_at = time.monotonic()
            asked.gone.set()
            self.close_connection = True

    def _stream(self, asked: Asked, reply: Reply) -> None:
        if reply.reasoning:
            self._event({"choices": [{"delta": {"reasoning_content": reply.reasoning}, "finish_reason": None}]})
        for at, token in enumerate(reply.tokens):
            self._wait(reply.delay if at else reply.first_delay)
            self._event({"choices": [{"delta": {"content": token}, "finish_reason": None}]})
            asked.sent += 1
        if reply.error:
            self._event({"error": {"message": reply.error, "code": 500}})
        if reply.cut or reply.error:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._event({"choices": [{"delta": {}, "finish_reason": reply.finish}]})
        usage = {"prompt_tokens": count_tokens(asked.body["messages"]), "completion_tokens": len(reply.tokens)}
        self._event({"choices": [], "usage": {**usage, "total_tokens": sum(usage.values())}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _wait(self, seconds: float) -> None:
        """Raises ConnectionError as soon as the client has closed."""
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            if select.select([self.connection], [], [], min(left, 0.05))[0] and not self.connection.recv(
                1, socket.MSG_PEEK
            ):
                raise ConnectionResetError
            if not left:
                return

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def count_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """The wire engine's tokenizer: words."""
    return sum(len(re.findall(r"\S+", message["content"])) for message in messages)


@dataclass(frozen=True)
class Service:
    """A running `graft up`. `http`: without a key; `roots[0]` is a folder that may be ingested."""

    url: str
    home: Path
    root: Path
    process: subprocess.Popen[bytes]
    http: httpx.Client

    def ask(self, question: str = IMPELLER, **fields: Any) -> httpx.Response:
        return self.http.post("/query", json={"question": question, **fields})

    def answer(self, question: str = IMPELLER, **fields: Any) -> dict[str, Any]:
        reply = self.ask(question, **fields)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def interaction(self, identity: str) -> dict[str, Any]:
        reply = self.http.get(f"/interactions/{identity}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def ingest(self, folder: Path, **fields: Any) -> dict[str, Any]:
        """-> the job, ended."""
        reply = self.http.post("/ingest", json={"path": str(folder), **fields})
        assert reply.status_code == 202, reply.text
        return self.wait(reply.json()["job_id"])

    def wait(self, job_id: str, seconds: float = 120) -> dict[str, Any]:
        return until(lambda: _ended(self.http.get(f"/jobs/{job_id}").json()), seconds)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _ended(job: dict[str, Any]) -> dict[str, Any] | None:
    return job if job["state"] in {"succeeded", "failed", "cancelled"} else None


def until(look: Callable[[], Found | None], seconds: float, pause: float = 0.05) -> Found:
    """-> the first true thing that `look` gives. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"not so within {seconds:g} s: {look}"
        time.sleep(pause)


def events(reply: httpx.Response) -> Iterator[tuple[str, Any]]:
    """-> (event, data) of a server-sent stream."""
    name = "message"
    for line in reply.iter_lines():
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            yield name, json.loads(line[5:])


def environment(home: Path, **settings: str) -> dict[str, str]:
    """Ours, without what it says of graft; the embedder's runtime is set, which spares each home its probe."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("SERVICE_", "INGEST_", "GRAFT_"))}
    models = os.environ.get("GRAFT_MODELS", str(CHECKOUT / ".models"))
    base = {"GRAFT_HOME": str(home), "GRAFT_MODELS": models, "INGEST_EMBEDDER_RUNTIME": "onnxruntime"}
    base["SERVICE_LLM_MODEL_FOLDER"] = f"{models}/{BUNDLED}"  # what the engine at the wire says to serve
    base["SERVICE_BUNDLED_ADAPTERS"] = ""  # tests say themselves which adapter answers
    RESOLVER_FOLDERS.add(home / "adapters")
    return {**ours, **base, "SERVICE_PORT": "0", **settings}


@contextmanager
def running(
    home: Path, root: Path, *arguments: str, key: str | None = None, seconds: float = 60, **settings: str
) -> Iterator[Service]:
    """`graft up` in `root`; it is ended as Ctrl-C ends it."""
    output = home.parent / f"{home.name}.output"
    with output.open("ab") as log:
        process = subprocess.Popen(
            [str(GRAFT), "up", *arguments],
            cwd=root,
            env=environment(home, **settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = until(lambda: _url(home, process, output), seconds)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=url, timeout=60, headers=headers, trust_env=False) as http:
            until(lambda: _lives(http), seconds)
            yield Service(url, home, root, process, http)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pytest.fail("graft up did not end within 30 s of Ctrl-C")


def _url(home: Path, process: subprocess.Popen[bytes], output: Path) -> str | None:
    assert process.poll() is None, f"graft up ended:\n{output.read_text()}"
    owner = find_owner(home)
    return owner.url if owner and owner.pid == process.pid else None


def _lives(http: httpx.Client) -> bool:
    with suppress(httpx.HTTPError):
        return http.get("/health/live").is_success
    return False


def is_ready(service: Service) -> bool:
    return service.http.get("/health/ready").status_code == 200


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def recorded(home: Path) -> list[Interaction]:
    """All interactions in a home's database, oldest first."""
    engine = db.connect(f"sqlite:///{home / 'graft.db'}")
    try:
        with engine.connect() as connection:
            rows = connection.execute(sql_select(interactions).order_by(interactions.c.created_at)).mappings()
            return [Interaction.model_validate(dict(row)) for row in rows]
    finally:
        engine.dispose()


def run_graft(home: Path, *arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(GRAFT), *arguments],
        cwd=cwd,
        env=environment(home, **settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def hit(text: str, n: int = 1, start: int = 0, **fields: Any) -> Hit:
    """A passage as retrieval gives it."""
    known = {"chunk_id": f"c{n}", "document_id": f"d{n}", "path": f"p{n}.md", "score": 1.0, "language": "en"}
    return Hit.model_validate({**known, "text": text, "start": start, "end": start + len(text), **fields})


def write_lora(folder: Path, seed: int = 1, **config: Any) -> Path:
    """A small PEFT LoRA for the bundled model, as PEFT writes it: queries and values of the first two layers."""
    rank = config.get("r", 4)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in (0, 1):
        for name, out in (("q_proj", 576), ("v_proj", 192)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = random.standard_normal((rank, 576), np.float32) * 0.05
            tensors[f"{module}.lora_B.weight"] = random.standard_normal((out, rank), np.float32) * 0.05
    return write_lora_folder(folder, tensors, **{"r": rank} | config)


def write_lora_folder(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), str(folder / "adapter_model.safetensors"))
    known = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return folder


ENGINE = """#!{python}
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

held = bytearray(b"1") * {held}
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def engine_venv(folder: Path, held: int = 1) -> Path:
    """An environment whose `python -m vllm...` says that it is well, and nothing else; it holds so many bytes of memory."""
    script = folder / "venv" / "bin" / "python"
    script.parent.mkdir(parents=True)
    script.write_text(ENGINE.format(python=sys.executable, held=held))
    script.chmod(0o755)
    return folder / "venv"


@pytest.fixture(scope="session")
def wire_engine() -> Iterator[WireEngine]:
    engine = WireEngine()
    yield engine
    engine.stop()


@pytest.fixture
def wire(wire_engine: WireEngine) -> Iterator[WireEngine]:
    """The engine behind `service`, as new."""
    wire_engine.reset()
    yield wire_engine
    wire_engine.reset()


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Iterator[Service]:
    """One service for all tests that leave it as it was: DOCUMENTS are in `default`, from `root`/docs."""
    root = tmp_path_factory.mktemp("root")
    home = tmp_path_factory.mktemp("homes") / "main"
    write(root / "docs", DOCUMENTS)
    with running(home, root, "--no-engine", "--ingest", "docs", SERVICE_LLM_URL=wire_engine.url) as service:
        until(lambda: is_ready(service), 120)
        yield service


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`graft up --ingest examples`, its engine up: the real one, for all tests that leave it as it was."""
    home = tmp_path_factory.mktemp("engine") / "home"
    venv = os.environ.get("GRAFT_VLLM_VENV", str(CHECKOUT / ".venv-vllm"))
    with running(home, CHECKOUT, "--ingest", "examples", GRAFT_VLLM_VENV=venv) as service:
        until(lambda: is_ready(service), 500, pause=0.5)
        yield service


@pytest.fixture(scope="session")
def adapter(started: Service) -> str:
    """One that is registered in `service`, and neither live nor pinned."""
    until(lambda: is_ready(started), 60)
    reply = started.http.post(
        "/adapters", json={"path": str(write_lora(started.root / "loras/tuned")), "label": "tuned"}
    )
    assert reply.status_code == 201, reply.text
    return str(reply.json()["name"])


@pytest.fixture
def service(started: Service, wire: WireEngine) -> Service:
    return started
