"""A run's folder: new, going on from a checkpoint, or finished. One process at a time writes into it.

out/run.json        what is trained on what; there from the start to the end
out/checkpoints/    checkpoint-N; gone when the run is finished
out/log.jsonl       what the trainer logs
out/manifest.json   written last: a folder without it is unfinished
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.recipe import BY_REWARD, OWN, Recipe, recipe_of
from finetune.schemas import Manifest, Rows
from finetune.settings import FinetuneSettings
from ingest.errors import ConflictError, InvalidError, LockedError, NotFoundError
from ingest.files import write_whole
from ingest.schemas import Frozen
from service.base_model import read_base
from service.preflight import CONFIG

MANIFEST, STARTED, CHECKPOINTS, LOG, LOCK = "manifest.json", "run.json", "checkpoints", "log.jsonl", ".lock"


def default_out(recipe: Recipe, digest: str, base: Path, settings: FinetuneSettings, home: Path) -> Path:
    """-> where a run goes that is not told where. `digest`: of the rows."""
    folder = settings.folder or home / "runs"
    return folder / f"{recipe.name}-{digest_of_identity(_identity(recipe, [digest], base))[:8]}"


def read_manifest(out: Path) -> Manifest:
    """Raises NotFoundError for a folder that is no finished run, InvalidError for a broken file."""
    try:
        return Manifest.model_validate_json((out / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"{str(out)!r} is no finished run: it has no {MANIFEST}") from error
    except ValueError as error:
        raise InvalidError(f"{str(out / MANIFEST)!r} is not what `graft tune` writes: {error}") from error


def manifests_before(recipe: Recipe) -> tuple[Manifest | None, Manifest | None]:
    """Those of the adapter which a run goes on from, and of the reward model that it learns by; None where there is none, or
    another tool made it. Raises InvalidError.
    """
    parent, judge = (
        read_manifest(one) if one is not None and (one / MANIFEST).is_file() else None
        for one in (recipe.trained.parent, recipe.reward.reward_model)
    )
    return parent, judge


def as_parent(recipe: Recipe) -> Recipe:
    """With the shape of the adapter that a run goes on from, where the recipe says nothing of it. Raises InvalidError."""
    trained = recipe.trained
    held = _read(trained.parent / CONFIG) if trained.parent is not None else None
    if held is None or held.get("peft_type") != "LORA":  # which is refused where it is loaded
        return recipe
    shape = {name: held.get(name) for name in ("r", "lora_alpha", "use_dora", "use_rslora")}
    own = {name: value for name, value in shape.items() if value is not None and name not in trained.model_fields_set}
    content = recipe.model_dump(exclude_unset=True)
    return recipe_of(content | {"trained": content["trained"] | own})


def processes() -> int:
    """How many train together, as a launcher says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def writes() -> bool:
    """Whether this process is the one of them that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """For the time of a run. Raises LockedError, InvalidError."""
    if not writes():
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidError(
            f"the folder {str(out)!r} cannot be made ({error.strerror}); give another with --out DIR"
        ) from error
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LockedError(
            f"another process is training into {str(out)!r}: wait for it, or give another --out DIR"
        ) from error
    try:
        yield
    finally:
        lock.release()


def begin(out: Path, recipe: Recipe, rows: tuple[Rows, Rows], base: Path, restart: bool = False) -> Path | None:
    """-> the checkpoint to go on from, None for a new run. Raises ConflictError where the folder holds something else."""
    return begin_as(out, _identity(recipe, [one.digest for one in rows], base), restart)


def begin_as(out: Path, wanted: dict[str, Any], restart: bool = False) -> Path | None:
    """As `begin`, of a run that is told by `wanted`."""
    started = _read(out / STARTED)
    differing = _differing(started, wanted)
    finished = (out / MANIFEST).exists()
    if started is not None and (restart or (differing and not finished and last_checkpoint(out) is None)):
        _empty(out)  # nothing is lost where nothing was trained
        started, finished = None, False
    if finished:
        again = "add --restart to train it anew, or " if started is not None else ""
        raise ConflictError(f"{str(out)!r} holds a finished run: {again}give another folder with --out DIR")
    if started is None:
        others = [path.name for path in out.iterdir() if path.name != LOCK]
        if others:
            raise ConflictError(
                f"{str(out)!r} holds other files, as {min(others)!r}: give an empty folder with --out DIR"
            )
        (out / STARTED).write_text(json.dumps(wanted, indent=1) + "\n")
        return None
    if differing:
        raise ConflictError(
            f"{str(out)!r} holds an unfinished run of another {' and '.join(differing)}: add --restart to drop it, or give "
            "another folder with --out DIR"
        )
    return last_checkpoint(out)


def finished(out: Path, recipe: Recipe, rows: tuple[Rows, Rows], base: Path) -> Manifest | None:
    """-> the manifest of a run of just that, if one has ended here."""
    if _differing(_read(out / STARTED), _identity(recipe, [one.digest for one in rows], base)):
        return None
    with suppress(NotFoundError, InvalidError):
        return read_manifest(out)
    return None


def last_checkpoint(out: Path) -> Path | None:
    """-> the last one that is complete: its state is written last. What a kill left half written goes."""
    found = (out / CHECKPOINTS).glob("checkpoint-*")
    for path in sorted(found, key=step_of, reverse=True):
        if _read(path / "trainer_state.json") is not None:
            return path
        shutil.rmtree(path)
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def spent_until(out: Path, step: int) -> float:
    """-> seconds that a run had taken when it logged that step."""
    with suppress(FileNotFoundError):
        lines = [json.loads(line) for line in (out / LOG).read_text().splitlines() if _step(line) <= step]
        return max((float(line.get("seconds", 0.0)) for line in lines if line), default=0.0)
    return 0.0


def keep_log_until(out: Path, step: int) -> None:
    """Drops what was logged after the checkpoint that a run goes on from."""
    with suppress(FileNotFoundError):
        lines = (out / LOG).read_text().splitlines(keepends=True)
        (out / LOG).write_text("".join(line for line in lines if _step(line) <= step))


def finish(out: Path, manifest: Frozen) -> None:
    """The checkpoints go last: a kill in between leaves a finished run."""
    write_whole(out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def settled(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, with what it leaves to defaults, without where on this machine the rows lie."""
    trained = recipe.trained
    own = {"weights", *OWN[trained.weights]}
    if trained.weights == "ia3":  # which has other defaults of its own
        own -= {"target_modules"} - trained.model_fields_set
    held = recipe.model_dump(mode="json", exclude={"data": {"data", "eval_data"}})
    if recipe.method not in BY_REWARD:
        del held["reward"]
    return held | {"trained": {key: value for key, value in held["trained"].items() if key in own}}


def _identity(recipe: Recipe, digests: list[str], base: Path) -> dict[str, Any]:
    """What makes two runs the same."""
    held = settled(recipe)
    del held["name"], held["model"]["base"]
    return {"recipe": held, "rows": digests, "base": read_base(str(base.absolute()), None).identity}


def _differing(started: dict[str, Any] | None, wanted: dict[str, Any]) -> list[str]:
    return [key for key in wanted if (started or {}).get(key) != json.loads(json.dumps(wanted[key]))]


def digest_of_identity(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _empty(out: Path) -> None:
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _step(line: str) -> int:
    with suppress(ValueError, TypeError, KeyError):
        return int(json.loads(line)["step"])
    return 2**62  # a line that a kill cut off
