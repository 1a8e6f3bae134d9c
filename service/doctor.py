"""What is installed, what would be used, what is missing, and the remedy."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ingest.errors import GraftError
from ingest.model_files import find_model, onnx_file
from ingest.parse_ocr import REMEDY, ocr_languages_installed
from ingest.runtime import choose_runtime, has_gpu, processor
from ingest.schemas import Frozen
from ingest.settings import IngestSettings
from service import machine
from service.client import Client
from service.engine import choose_dtype, engine_python, model_argument
from service.owner import find_owner
from service.settings import ServiceSettings

PACKAGES = (
    "fastapi",
    "qdrant-edge-py",
    "qdrant-client",
    "onnxruntime",
    "openvino",
    "kreuzberg",
    "llama-index-core",
    "dbos",
)


class Finding(Frozen):
    name: str
    state: Literal["ok", "missing", "note"]
    found: str
    remedy: str = ""


def examine(settings: ServiceSettings, ingest: IngestSettings) -> list[Finding]:
    """Runs the short probes of embedder and engine when nothing is kept of them yet."""
    return [
        *_machine(),
        *_packages(),
        *_models(settings, ingest),
        *_engine(settings, ingest),
        *_home(settings, ingest),
        *_adapters(ingest),
    ]


def _machine() -> Iterator[Finding]:
    for check in machine.checks():
        state: Literal["ok", "missing"] = "ok" if check.ok else "missing"
        yield Finding(name=check.name, state=state, found=check.found, remedy=check.remedy)
    yield Finding(name="vector unit", state="note", found=processor())


def _packages() -> Iterator[Finding]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Finding(name="packages", state="note", found=versions)


def _models(settings: ServiceSettings, ingest: IngestSettings) -> Iterator[Finding]:
    name = f"embedder {ingest.embedder}"
    if ingest.embedder.startswith(("http://", "https://")):
        yield Finding(name=name, state="note", found="a server; it is asked at the first ingest")
    elif not (ingest.models / ingest.embedder).is_dir() and not Path(ingest.embedder).is_dir():
        found = f"not a folder in {ingest.models} nor a path; it would be fetched from the hub"
        yield Finding(name=name, state="missing", found=found, remedy="make models")
    else:
        folder = find_model(ingest.embedder, ingest)
        file = onnx_file(folder)
        runtime: str = "torch" if file is None else ingest.embedder_runtime
        if file is not None and runtime == "auto":
            runtime = f"{choose_runtime(file, ingest)}, by probe {_kept(ingest.home / 'embedder-probe.json')}"
        yield Finding(name=name, state="ok", found=f"{folder}, runtime {runtime}")
    yield _ocr(ingest)
    reranker = ingest.models / settings.reranker
    found = str(reranker) if reranker.is_dir() else "not fetched; it is used only where a collection asks for it"
    yield Finding(name=f"reranker {settings.reranker}", state="ok" if reranker.is_dir() else "note", found=found)


def _ocr(ingest: IngestSettings) -> Finding:
    """Without it, text in images is left out, and each job's report says so."""
    held = ocr_languages_installed()
    if ingest.ocr == "off":
        return Finding(name="OCR", state="note", found="INGEST_OCR is off")
    if not held:
        return Finding(name="OCR", state="note", found=f"no data of tesseract are installed; `{REMEDY}` adds them")
    lacking = sorted(set(ingest.ocr_languages.split("+")) - set(held))
    also = f"; not {', '.join(lacking)} of INGEST_OCR_LANGUAGES" if lacking else ""
    return Finding(name="OCR", state="ok", found=", ".join(held) + also)


def _engine(settings: ServiceSettings, ingest: IngestSettings) -> Iterator[Finding]:
    if settings.llm_url:
        yield Finding(name="engine", state="note", found=f"a vLLM that runs elsewhere: {settings.llm_url}")
        return
    try:
        python = engine_python(settings)
        dtype = choose_dtype(settings, ingest.home)
        kept = _kept(ingest.home / "engine-probe.json")
        found = f"vLLM in {python.parent.parent}, {'GPU' if has_gpu() else 'CPU'}, {dtype} (probe {kept})"
        yield Finding(name="engine", state="ok", found=found)
    except GraftError as error:
        yield Finding(name="engine", state="missing", found=str(error), remedy="make engine")
    try:
        model = model_argument(settings.model, ingest.models)
        local = Path(model).is_dir()
        found = model if local else f"{model} is no folder in {ingest.models}; vLLM would fetch it from the hub"
        bundled = settings.model == ServiceSettings.model_fields["model"].default
        state: Literal["ok", "missing", "note"] = "ok" if local else "missing" if bundled else "note"
        yield Finding(name="model", state=state, found=found, remedy="make models")
    except GraftError as error:
        yield Finding(name="model", state="missing", found=str(error), remedy="name a folder with config.json")


def _home(settings: ServiceSettings, ingest: IngestSettings) -> Iterator[Finding]:
    owner = find_owner(ingest.home)
    held = f", owned by process {owner.pid} at {owner.url}" if owner else ", nothing runs in it"
    yield Finding(name="home", state="note", found=f"{ingest.home}{held}")
    database = "PostgreSQL or other, by INGEST_DATABASE_URL" if ingest.database_url else "SQLite in the home"
    index = f"a Qdrant server: {ingest.qdrant_url}" if ingest.qdrant_url else "Qdrant Edge in the home"
    yield Finding(name="database", state="note", found=database)
    yield Finding(name="index", state="note", found=index)
    access = f"keys of {settings.api_keys_file}" if settings.api_keys_file else "no keys: this machine alone"
    yield Finding(name="access", state="note", found=access)


def _adapters(ingest: IngestSettings) -> Iterator[Finding]:
    """As the running service found them: each start of an engine is tried anew."""
    owner = find_owner(ingest.home)
    if owner is None:
        yield Finding(
            name="adapters", state="note", found="an engine is tried with adapters when it starts; none runs here"
        )
        return
    try:
        with Client(owner.url, timeout=10) as client:
            held = client.ready().dependencies["adapters"]
    except GraftError as error:
        yield Finding(name="adapters", state="note", found=str(error))
        return
    state: Literal["ok", "missing", "note"] = "ok" if held.state == "ok" else "note"
    if held.state in {"down", "off"}:
        state = "missing"
    remedy = "mend the engine as it says, or roll back to the base: graft adapters rollback --base"
    yield Finding(name="adapters", state=state, found=held.detail, remedy=remedy)


def _kept(file: Path) -> str:
    try:
        return json.dumps(json.loads(file.read_text()))
    except (OSError, ValueError):
        return "none"
