"""The words of a training job, as the service keeps and shows them: what is asked, how far it is, what it leaves.

The service cannot import the training stack: it enqueues a job by name, and a worker process that has the stack takes it.
"""

from collections.abc import Sequence
from typing import Any, Literal

from ingest.schemas import Frozen

RUNS, DATASETS = "runs", "datasets"  # folders of GRAFT_HOME
POINTS = 400  # of a loss curve that a job keeps
Waiting = Literal["worker", "memory", "service"]


class TunePayload(Frozen):
    """`data`: the rows' real place. `run`: the name of the folder that the training writes to, and goes on in when retried.

    `collection`: whose adapter it shall be; null: the live one of all others.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    data: str
    run: str
    collection: str | None = None
    label: str | None = None
    check: bool = True
    register_it: bool = True
    activate: bool = False
    pause_engine: bool = False


class TuneProgress(Frozen):
    """How far a training is. `seconds_left` of the training; `tokens_per_second` over the last steps; `reward` of the model's own
    answers, where it learns from these.
    """

    stage: Literal["waiting", "loading", "training", "evaluating", "saving", "checking"]
    step: int = 0
    steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None
    reward: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


class LossPoint(Frozen):
    step: int
    loss: float | None = None
    eval_loss: float | None = None


class TuneResult(Frozen):
    """`adapter`: its name in the registry, where it was registered. `manifest`: what the run left beside its weights."""

    folder: str
    adapter: str | None = None
    live: bool = False  # or the one of the collection that was asked for
    manifest: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


class Wait(Frozen):
    """What a job waits for, and what helps."""

    waiting_for: Waiting
    hint: str


def extended(curve: Sequence[LossPoint], point: LossPoint) -> tuple[LossPoint, ...]:
    """-> the curve with this point, at most POINTS and one; what a resumed run does again replaces what was there."""
    held = [one for one in curve if one.step < point.step]
    same = next((one for one in curve if one.step == point.step), point)
    both = same.model_copy(update={name: value for name, value in point if value is not None})
    return (*(thinned(held) if len(held) >= POINTS else held), both)


def thinned(curve: Sequence[LossPoint]) -> list[LossPoint]:
    """-> every second point, and those with a held-out loss, which are few; unless they are more than half of POINTS."""
    rare = sum(point.eval_loss is not None for point in curve) <= POINTS // 2
    return [point for at, point in enumerate(curve) if at % 2 == 0 or (rare and point.eval_loss is not None)]
