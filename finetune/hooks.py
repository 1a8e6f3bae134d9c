"""What a training run tells its caller, and how the caller ends it. Light: imports no training stack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ingest.errors import GraftError
from service.tuning import TuneProgress


class StoppedError(GraftError):
    """A run was ended before its time; a later one with the same recipe and rows goes on after `step`."""

    def __init__(self, out: Path, step: int) -> None:
        kept = f"its checkpoint of step {step} is kept in {str(out)!r}" if step else "nothing was trained yet"
        super().__init__(f"training was stopped: {kept}; the same command goes on from there")
        self.out = out
        self.step = step


def _ignored(_: TuneProgress) -> None:
    pass


class Hooks(NamedTuple):
    """`cancelled` is asked after each step. `callbacks`: transformers' TrainerCallbacks of the caller."""

    progress: Callable[[TuneProgress], None] = _ignored
    cancelled: Callable[[], bool] = lambda: False
    callbacks: tuple[Any, ...] = ()


SILENT = Hooks()
