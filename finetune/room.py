"""Room for a training beside the engine: waits until its estimate fits into what is free, or has the engine paused.

A pause is a lease of its holder's: it is lengthened while the training runs, so that the engine comes back by itself after a
killed one, and one training's end is not that of another's pause.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetune.recipe import Recipe
from finetune.settings import FinetuneSettings
from ingest.errors import GraftError, InvalidError, UnavailableError
from ingest.settings import IngestSettings
from service.client import Client
from service.owner import find_owner
from service.schemas_jobs import PauseRequest, ResumeRequest
from service.tuning import Waiting

if TYPE_CHECKING:
    from finetune.memory import Estimate

logger = logging.getLogger(__name__)
GIB = 2**30
LEASE_SECONDS = 30.0  # so long after the death of a run the engine comes back
PAUSED_SECONDS = 20.0  # until the memory of a paused engine is free
AGAIN_SECONDS = 600.0  # until a pause that was not enough is tried again


class Waits(Protocol):
    """Waits a moment; says what for. Raises StoppedError."""

    def __call__(self, waiting_for: Waiting | None = None, hint: str = "") -> None: ...


@contextmanager
def room_for(
    recipe: Recipe, holder: str | None, settings: FinetuneSettings, ingest: IngestSettings, wait: Waits
) -> Iterator[None]:
    """Begins once the run fits; an engine that was paused for it stays so until the end, and its lease's. `holder`: of the
    pause; None: the engine is left alone.

    Raises InvalidError when this machine never has so much memory; what `wait` raises.
    """
    from finetune.hardware import free_memory
    from finetune.memory import advice, check_fits

    estimated, total, share = _estimated(recipe, ingest.models), _total_memory(), settings.memory_share
    if estimated.bytes > total * share:
        raise InvalidError(
            f"the training takes about {estimated.bytes / GIB:.1f} GiB, and of the {total / GIB:.1f} GiB of this machine it may "
            f"take {share:.0%} (FINETUNE_MEMORY_SHARE): {advice(recipe, estimated)}"
        )
    with ExitStack() as held:
        pause_at = float("inf") if holder is None else time.monotonic()
        besides = "; with pause_engine the engine is stopped meanwhile" if holder is None else ""
        while True:
            try:
                check_fits(estimated, free_memory(), share, recipe)
                break
            except UnavailableError as error:
                hint = str(error)
            if holder is not None and time.monotonic() >= pause_at:
                refused = _pause(estimated.bytes / share, ingest.home, holder, held, wait)
                if refused is None:
                    break
                pause_at, besides = time.monotonic() + AGAIN_SECONDS, f"; {refused}"
            wait("memory", hint + besides)
        yield


def service_of(home: Path) -> Client:
    """-> a client of the service at GRAFT_URL, else of the home's owner. Raises UnavailableError."""
    owner = find_owner(home)
    url = os.environ.get("GRAFT_URL") or (owner.url if owner else None)
    if url is None:
        raise UnavailableError(f"no service runs for {str(home)!r}: start it with `graft up`, or set GRAFT_URL")
    return Client(url, os.environ.get("GRAFT_API_KEY"))


def _pause(needs: float, home: Path, holder: str, held: ExitStack, wait: Waits) -> str | None:
    """-> why it does not help; None: the memory is free, and the engine is stopped for as long as `held`."""
    from finetune.hardware import free_memory

    with ExitStack() as paused:
        try:
            paused.enter_context(_paused(home, holder))
        except GraftError as error:
            return f"the engine cannot be paused: {error}"
        end = time.monotonic() + PAUSED_SECONDS
        while time.monotonic() < end:
            if free_memory() >= needs:
                held.enter_context(paused.pop_all())
                return None
            wait()
    resume_engine(home, holder)
    return "without the engine it is not enough either"


@contextmanager
def _paused(home: Path, holder: str) -> Iterator[None]:
    """Raises GraftError when there is no engine to pause."""
    lease, ended = PauseRequest(seconds=LEASE_SECONDS, why="training", holder=holder), threading.Event()
    with service_of(home) as client:
        client.pause_engine(lease)

    def lengthen() -> None:
        while not ended.wait(LEASE_SECONDS / 4):
            try:
                with service_of(home) as again:  # it may have been started anew
                    again.pause_engine(lease)
            except GraftError as error:
                logger.warning("the pause was not lengthened: %s", error)

    lengthening = threading.Thread(target=lengthen, daemon=True, name="pause")
    lengthening.start()
    try:
        yield
    finally:
        ended.set()
        lengthening.join()


def resume_engine(home: Path, holder: str) -> None:
    """Called when this process has ended, by its worker: until then it holds memory that the engine will take."""
    try:
        with service_of(home) as client:
            client.resume_engine(ResumeRequest(holder=holder))
    except GraftError as error:
        logger.warning("the engine comes back by itself within %g s: %s", LEASE_SECONDS, error)


def _estimated(recipe: Recipe, models: Path) -> "Estimate":
    """Of this recipe on its own rows. Raises InvalidError when they do not fit, SettingsError."""
    from finetune.base_folder import find_base
    from finetune.memory import estimate
    from finetune.train import read_data

    return estimate(recipe, find_base(recipe.model.base, models), read_data(recipe)[0])


def _total_memory() -> int:
    """Bytes of the GPU where there is one, else of the machine."""
    import torch

    from finetune.hardware import hardware

    total: int = hardware()["memory_bytes"]
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else total
