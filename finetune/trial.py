"""One training of a sweep, in a process of its own: its memory is free afterwards, and what it dies of costs one trial.

The process is forked from one that has loaded the training stack and nothing else, so a trial of seconds does not wait for
imports.
"""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from finetune import runs
from finetune.arguments import refuse_here
from finetune.base_folder import find_base
from finetune.hooks import Hooks, StoppedError
from finetune.recipe import Recipe
from finetune.rows_split import fold_rows
from finetune.settings import FinetuneSettings
from finetune.train import Split, read_data, train
from ingest.errors import ConflictError, GraftError, InvalidError, LockedError, NoRoomError, SettingsError

LOADED = (
    "finetune.trial_stack", "finetune.trial", "torch", "datasets", "peft", "transformers", "transformers.trainer",
    "finetune.chat", "finetune.manifest", "finetune.progress", "finetune.curve", "matplotlib.backends.backend_agg",
)  # fmt: skip
ENDED = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}  # statuses of what was told to end
LOOK_SECONDS, STOP_SECONDS = 0.2, 30.0  # between two looks at a trial; until one that was told to end is killed
LINGER_SECONDS = 10.0  # that one which has said its last may take to clean up
LOCK_SECONDS = 60.0  # that a process of a killed sweep may take to end


class Order(NamedTuple):
    """`fold`: which one of `folds` is held out; None: what the recipe holds out. `metric`: what is told on the way."""

    recipe: Recipe
    out: Path
    settings: FinetuneSettings
    models: Path
    home: Path
    metric: str
    seed: int
    fold: int | None = None
    folds: int = 0


class Told(NamedTuple):
    """One of these at a time. `way`: (per cent of the run, the metric). `error`: whose, and what it says."""

    way: tuple[int, float] | None = None
    metrics: dict[str, float] | None = None
    error: tuple[str, str] | None = None
    stopped: bool = False


def run(order: Order, report: Callable[[int, float], bool], ended: Callable[[], bool]) -> dict[str, float] | None:
    """-> the run's metrics; None when `report` said to give up. `ended`: whether the sweep is to end.

    Raises InvalidError, SettingsError for what does not train; StoppedError when the sweep was ended; GraftError.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(
        [*LOADED, f"finetune.{order.recipe.method}", f"trl.trainer.{order.recipe.method}_trainer"]
    )
    order.out.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(order, theirs), name=order.out.name)
    process.start()
    theirs.close()
    try:
        return _followed(process, ours, order, report, ended)
    finally:
        ours.close()  # it waits for no answer then
        process.join(0 if ended() else LINGER_SECONDS)
        process.terminate()  # it keeps a checkpoint
        process.join(STOP_SECONDS)
        process.kill()
        process.join()


def log_of(out: Path) -> Path:
    """Where a trial's process writes what libraries say."""
    return out.parent.with_suffix(".log")


def _followed(
    process: Any, pipe: Connection, order: Order, report: Callable[[int, float], bool], ended: Callable[[], bool]
) -> dict[str, float] | None:
    given_up = False
    while True:
        if ended():
            raise StoppedError(order.out, 0)
        if not pipe.poll(LOOK_SECONDS):
            continue
        try:
            told: Told = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            if process.exitcode in ENDED:
                raise StoppedError(order.out, 0) from None
            raise _died(process.exitcode, order.out) from None
        if told.way is not None:
            given_up = report(*told.way)
            with suppress(BrokenPipeError):  # it has died, which is read next
                pipe.send(given_up)
        elif told.error is not None:
            raise {"InvalidError": InvalidError, "SettingsError": SettingsError}.get(told.error[0], GraftError)(
                told.error[1]
            )
        elif told.stopped and not given_up:  # by a signal, as Ctrl-C reaches all processes of a terminal
            raise StoppedError(order.out, 0)
        else:
            return told.metrics


def _died(code: int | None, out: Path) -> GraftError:
    if code == -signal.SIGKILL:
        return SettingsError(
            "the training was killed by the system, which does that when memory runs out: leave such settings out of the "
            "space, or lower per_device_train_batch_size or max_length"
        )
    return SettingsError(f"the training's process ended with status {code}; {str(log_of(out))!r} says more")


def _work(order: Order, pipe: Connection) -> None:
    """In the child. Ctrl-C reaches all processes of a terminal: here the sweep says when to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    handle = os.open(log_of(order.out), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    with suppress(BrokenPipeError):  # nobody asks any more
        pipe.send(_result(order, pipe))
    pipe.close()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _result(order: Order, pipe: Connection) -> Told:
    try:
        return Told(metrics=_trained(order, pipe))
    except StoppedError:
        return Told(stopped=True)
    except NoRoomError as error:  # which is no fault of the setting
        return Told(error=("GraftError", str(error)))
    except (InvalidError, SettingsError) as error:
        return Told(error=(type(error).__name__, str(error)))
    except GraftError as error:
        return Told(error=("GraftError", str(error)))
    except Exception as error:  # some settings make libraries fail in ways of their own
        traceback.print_exc(file=sys.stderr)
        return Told(error=("SettingsError", f"{type(error).__name__}: {str(error)[:300]}"))


def _trained(order: Order, pipe: Connection) -> dict[str, float]:
    try:
        refuse_here(order.settings.trackers)
    except SettingsError as error:
        raise GraftError(str(error)) from error  # no setting would train
    data, base = _data(order), find_base(order.recipe.model.base, order.models)
    held = runs.finished(order.out, runs.as_parent(order.recipe), (data.learn, data.held_out), base)
    if held is not None:  # by a sweep that was killed before it took note
        return held.metrics
    hopeless = threading.Event()

    def told(percent: int, value: float) -> None:
        try:
            pipe.send(Told(way=(percent, value)))
            given_up = pipe.recv()
        except (EOFError, OSError):  # the sweep is ended, and this with it
            given_up = True
        if given_up:
            hopeless.set()

    hooks = Hooks(cancelled=hopeless.is_set, callbacks=(_on_the_way(order.metric, told),))
    until, emptied = time.monotonic() + LOCK_SECONDS, False
    while True:
        try:
            return train(order.recipe, out=order.out, settings=order.settings, models=order.models, home=order.home,
                         hooks=hooks, data=data).metrics  # fmt: skip
        except ConflictError:
            if emptied:
                raise
            shutil.rmtree(order.out)  # left by a study of that name that is there no more, or half written
            emptied = True
        except LockedError:
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_SECONDS)


def _data(order: Order) -> Split:
    data = read_data(order.recipe)
    if order.fold is None:
        return data
    learn, held_out = fold_rows(data.everything, order.folds, order.seed)[order.fold]
    return Split(data.everything, learn, held_out)


def _on_the_way(metric: str, told: Callable[[int, float], None]) -> Any:
    """-> a callback of the trainer that tells the metric at each evaluation, but the last."""
    from transformers import TrainerCallback

    class OnTheWay(TrainerCallback):  # type: ignore[misc]  # mypy does not read transformers
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if metric in logs and 0 < state.global_step < state.max_steps:
                told(round(100 * state.global_step / state.max_steps), float(logs[metric]))

    return OnTheWay()
