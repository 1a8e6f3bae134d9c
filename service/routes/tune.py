"""`POST /tune`, and the engine's pause while a training needs its memory. The training itself is a worker's."""

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter

from ingest.errors import ForbiddenError, InvalidError
from service.deps import Parts, WithAdmin, WithParts
from service.engine import LocalEngine
from service.schemas_jobs import EngineView, Job, PauseRequest, ResumeRequest, TuneRequest
from service.tuning import DATASETS, RUNS, TunePayload

router = APIRouter(tags=["training"])
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # of a data set; of a model, also as a hub has it
DATA_KEYS = frozenset({"data", "eval_data"})
# Settings that read, write or run what the roots do not cover.
LOCAL_KEYS = re.compile(r"(^|_)(dir|path|file|config|hub|code|url|checkpoint|deepspeed|init_kwargs)(_|$)")


@router.post("/tune", status_code=202)
async def tune(body: TuneRequest, parts: WithParts, principal: WithAdmin) -> Job:
    """Trains by a recipe, as a job of a worker process (`graft worker --queue tune`)."""

    def enqueue() -> Job:
        return parts.jobs.enqueue(_payload(body, parts), principal.id)

    return await to_thread.run_sync(enqueue)


@router.get("/engine")
async def engine(parts: WithParts, principal: WithAdmin) -> EngineView:
    return _view(parts.local_engine())


@router.post("/engine/pause")
async def pause(parts: WithParts, principal: WithAdmin, body: PauseRequest | None = None) -> EngineView:
    """Stops the engine, whose memory is free at the reply. It starts again by itself when the time is over."""
    body, local = body or PauseRequest(), parts.local_engine()
    await local.pause(body.seconds, body.why, body.holder)
    return _view(local)


@router.post("/engine/resume")
async def resume(parts: WithParts, principal: WithAdmin, body: ResumeRequest | None = None) -> EngineView:
    """Starts a paused engine again, once nobody else holds it; `GET /health/ready` says when it answers, with every adapter."""
    local = parts.local_engine()
    local.resume((body or ResumeRequest()).holder)
    return _view(local)


def _view(local: LocalEngine) -> EngineView:
    return EngineView(
        state=local.state, detail=local.detail, paused_seconds=local.paused_seconds(), holders=local.holders()
    )


def _payload(body: TuneRequest, parts: Parts) -> TunePayload:
    """Raises NotFoundError, InvalidError, ForbiddenError: all that can be told without the training stack."""
    if body.collection is not None:
        parts.catalog.collection(body.collection)
    roots = (parts.ingest.home / DATASETS, *parts.settings.ingest_roots, *parts.settings.adapter_roots)
    weights = (parts.ingest.home / RUNS, parts.adapters.registry.folder, parts.ingest.models, *roots)
    return TunePayload(
        recipe=body.recipe,
        settings=tuple(_setting(one, weights, parts.adapters.registry.folder) for one in body.settings),
        data=_data(body.data, parts.ingest.home / DATASETS, roots),
        run=f"{body.label or body.recipe}-{uuid.uuid4().hex[:8]}",
        collection=body.collection,
        label=body.label,
        check=body.check,
        register_it=body.register_it,
        activate=body.activate,
        pause_engine=body.pause_engine,
    )


def _data(named: str, datasets: Path, roots: Sequence[Path]) -> str:
    """A name is looked for among the data sets, a path below the roots; "FILE#NAME" is one of those that FILE lists."""
    listed, mark, one = named.partition(".json#")
    place, mark = (f"{listed}.json", "#") if mark else (named, "")
    if NAME.fullmatch(place):
        for found in (datasets / place, datasets / f"{place}.jsonl"):
            if found.exists():
                return f"{_below(str(found), roots, 'data')}{mark}{one}"
    if not place.startswith("/"):
        raise InvalidError(
            f"data: there is no data set {named!r} in {str(datasets)!r}; name one, or give an absolute path"
        )
    target = _below(place, roots, "data")
    if not target.exists():
        raise InvalidError(f"data: {place!r} does not exist")
    return f"{target}{mark}{one}"


def _setting(setting: str, roots: Sequence[Path], adapters: Path) -> str:
    """As it is given, unless it names what a request may not; a parent may be the name of a registered adapter. Raises
    ForbiddenError, InvalidError.
    """
    key, _, text = (part.strip() for part in setting.partition("="))
    name, value = key.rpartition(".")[2], text.strip("\"'")
    if name in DATA_KEYS:
        raise InvalidError(f"settings: {key!r} is not set here; give the rows as data")
    if LOCAL_KEYS.search(name):
        raise ForbiddenError(f"settings: {key!r} may not be set by a request; run `graft tune` on the machine itself")
    if name == "parent" and NAME.fullmatch(value) and (adapters / value).is_dir():
        value = str(adapters / value)
    if name == "parent" or (name == "base" and not NAME.fullmatch(value)):
        return f"{key}={str(_below(value, roots, f'settings: {key}'))!r}"
    return setting


def _below(path: str, roots: Sequence[Path], what: str) -> Path:
    """-> the real place. Raises ForbiddenError, InvalidError; nothing is read."""
    try:
        target = Path(os.path.realpath(Path(path).expanduser()))
        real = [Path(os.path.realpath(root)) for root in roots]
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidError(f"{what}: {path!r} cannot be used: {error}") from error
    if not any(target == root or root in target.parents for root in real):
        listed = ", ".join(repr(str(root)) for root in roots)
        raise ForbiddenError(
            f"{what}: {path!r} lies outside the folders that a training may read ({listed}); "
            "SERVICE_INGEST_ROOTS and SERVICE_ADAPTER_ROOTS add to them"
        )
    return target
