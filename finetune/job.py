"""A part of a training job, in a process of its own: memory is given back with it, and what it dies of kills no worker.

`python -m finetune.job` reads an order, a line of JSON, and writes what it says, one line each (`Said`). A further line asks it
to stop; when its input ends its worker is gone, and so is it at once. The parts are two processes, so that the engine that
checks an adapter has the memory that the training had.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import Any, Literal, TextIO

from finetune import runs
from finetune.arguments import refuse_unknown
from finetune.cli_options import finetune_settings
from finetune.hooks import Hooks, StoppedError
from finetune.recipe import Recipe, read_recipe, with_base
from finetune.room import room_for, service_of
from finetune.schemas import Manifest
from finetune.train import train
from ingest.errors import GraftError, InvalidError, LockedError, UnavailableError
from ingest.schemas import Frozen
from ingest.settings import IngestSettings
from service.cli_options import ingest_settings, service_settings
from service.schemas_adapters import ActivateRequest, RegisterRequest
from service.tuning import POINTS, LossPoint, TunePayload, TuneProgress, TuneResult, Wait, Waiting, thinned

logger = logging.getLogger(__name__)
LOOK_SECONDS = 2.0  # between two looks at what is waited for
AWAY_SECONDS = 600.0  # for which the engine and the service may go away while an adapter is brought to them


class Order(Frozen):
    """`holder`: of the engine's pause, if it is paused."""

    part: Literal["train", "finish"]
    payload: TunePayload
    out: Path
    holder: str


class Said(Frozen):
    """One of these at a time."""

    progress: TuneProgress | None = None
    point: LossPoint | None = None
    waits: Wait | None = None
    result: TuneResult | None = None
    error: str | None = None
    stopped: bool = False


class Job:
    """`stop` is set when the run is to end with a checkpoint."""

    def __init__(self, order: Order, say: Callable[[Said], None], stop: threading.Event) -> None:
        self.order = order
        self.payload = order.payload
        self.say = say
        self.stop = stop
        self.ingest: IngestSettings = ingest_settings()
        self.settings = finetune_settings()
        self._checked = False

    def train(self) -> None:
        """Raises GraftError; StoppedError, with a checkpoint kept."""
        if (self.order.out / runs.MANIFEST).exists():
            return
        recipe = runs.as_parent(self._recipe())
        refuse_unknown(recipe)  # before anything is waited for
        runs.manifests_before(recipe)
        for point in logged(self.order.out):
            self.say(Said(point=point))
        holder = self.order.holder if self.payload.pause_engine else None
        with room_for(recipe, holder, self.settings, self.ingest, self._wait):
            hooks = Hooks(self._progress, self.stop.is_set, (_points_to(self.say),))
            while True:
                self._unless_stopped()
                try:
                    out, models, home = self.order.out, self.ingest.models, self.ingest.home
                    train(recipe, out=out, settings=self.settings, models=models, home=home, hooks=hooks)
                    return
                except LockedError:  # by one that was cancelled, and has not stopped yet
                    self._wait()

    def finish(self) -> TuneResult:
        """Checks, registers and activates, as it is asked, also when the engine or the service is gone for a while. Raises
        GraftError.
        """
        out, payload = self.order.out, self.payload
        manifest = runs.read_manifest(out)
        if not (payload.check or payload.register_it):
            return self._result(None)
        if not manifest.servable:
            return self._not_servable(manifest)
        end: float | None = None
        while True:
            try:
                return self._brought(self._engine(), manifest)
            except UnavailableError as error:
                end = end or time.monotonic() + AWAY_SECONDS
                if time.monotonic() > end:
                    raise
                self._wait("service", f"the adapter is checked and registered when this is over: {error}")

    def _brought(self, url: str, manifest: Manifest) -> TuneResult:
        """The adapter to the engine and the service. Raises GraftError; UnavailableError where they are gone."""
        out, payload = self.order.out, self.payload
        with service_of(self.ingest.home) as client:
            self._progress(_checking(manifest))
            if payload.check and not self._checked:
                self._unless_stopped()
                self._check(url)
                self._checked = True
            if not payload.register_it:
                return self._result(None)
            self._unless_stopped()
            label = payload.label or payload.recipe
            name = client.register_adapter(RegisterRequest(path=str(out), label=label)).name
            if payload.activate:
                self._unless_stopped()
                fields = {"collection": payload.collection} if payload.collection else {}
                client.activate_adapter(name, ActivateRequest(why=f"trained as {payload.run}", **fields))
        return self._result(name, live=payload.activate)

    def _recipe(self) -> Recipe:
        """Its base, where it names none, is the model that is served."""
        payload = self.payload
        recipe = read_recipe(payload.recipe, (*payload.settings, f"data={payload.data}"))
        return recipe if recipe.model.base else with_base(recipe, service_settings(None).model)

    def _progress(self, at: TuneProgress) -> None:
        self.say(Said(progress=at))

    def _unless_stopped(self) -> None:
        """Raises StoppedError: what was cancelled does nothing more that others see."""
        if self.stop.is_set():
            raise StoppedError(self.order.out, 0)

    def _wait(self, waiting_for: Waiting | None = None, hint: str = "") -> None:
        """A moment; says what for. Raises StoppedError."""
        if waiting_for is not None:
            self.say(Said(waits=Wait(waiting_for=waiting_for, hint=hint)))
        if self.stop.wait(LOOK_SECONDS):
            raise StoppedError(self.order.out, 0)

    def _check(self, url: str) -> None:
        """Raises InvalidError when the adapter does not pass."""
        from finetune.check import check_adapter, record

        checked = check_adapter(
            self.order.out, url=url, settings=service_settings([]), ingest=self.ingest, threads=self.settings.threads
        )
        record(self.order.out, checked)
        if not checked.passed:
            raise InvalidError(
                f"the adapter in {str(self.order.out)!r} was trained, and did not pass its check: {checked.why_not}"
            )

    def _engine(self) -> str:
        """-> the URL of the service's engine, once it answers and is given adapters. Raises StoppedError."""
        while True:
            try:
                with service_of(self.ingest.home) as client:  # looked for anew: it may come back elsewhere
                    found = client.ready().dependencies
                engine, adapters = found["engine"], found["adapters"]
                if engine.state == adapters.state == "ok":
                    return service_settings(None).llm_url or engine.detail
                hint = f"the engine takes the adapter when it is ready: {(engine if engine.state != 'ok' else adapters).detail}"
            except UnavailableError as error:
                hint = str(error)
            self._wait("service", hint)

    def _not_servable(self, manifest: Manifest) -> TuneResult:
        """Raises InvalidError when it was to answer."""
        why = f"it was not registered: {manifest.why_not}; `graft export` makes what the engine loads, where that is possible"
        if self.payload.activate:
            raise InvalidError(f"the training is in {str(self.order.out)!r}, but {why}")
        return self._result(None, notes=(why,))

    def _result(self, adapter: str | None, live: bool = False, notes: tuple[str, ...] = ()) -> TuneResult:
        out = self.order.out
        manifest = runs.read_manifest(out).model_dump(mode="json")
        return TuneResult(folder=str(out), adapter=adapter, live=live, manifest=manifest, notes=notes)


def _points_to(say: Callable[[Said], None]) -> Any:
    """-> a callback of the trainer that says each loss as it is logged."""
    from transformers import TrainerCallback

    class Points(TrainerCallback):  # type: ignore[misc]  # mypy does not read transformers
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            losses = {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
            if losses:
                say(Said(point=LossPoint(step=state.global_step, **losses)))

    return Points()


def logged(out: Path) -> list[LossPoint]:
    """-> what an earlier process logged of this run, at most POINTS."""
    found = []
    with suppress(OSError):
        for line in (out / runs.LOG).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a kill may have cut the last one off
                logged = json.loads(line)
                found.append(LossPoint(step=logged["step"], loss=logged.get("loss"), eval_loss=logged.get("eval_loss")))
    found = [point for point in found if point.loss is not None or point.eval_loss is not None]
    while len(found) > POINTS:
        found = thinned(found)
    return found


def _checking(manifest: Manifest) -> TuneProgress:
    steps, of = int(manifest.metrics.get("steps", 0)), manifest.metrics.get
    return TuneProgress(stage="checking", step=steps, steps=steps, loss=of("loss"), eval_loss=of("eval_loss"))


def main() -> None:
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is nothing that we say
    orders = os.fdopen(0, "rb", buffering=0)  # a buffer's lock, held by a reading thread, would abort the end
    order = Order.model_validate_json(orders.readline())
    say, stop = _writer(said), threading.Event()
    threading.Thread(target=_obey, args=(orders, stop), daemon=True, name="orders").start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        job = Job(order, say, stop)
        if order.part == "train":
            job.train()
        else:
            say(Said(result=job.finish()))
    except StoppedError:
        say(Said(stopped=True))
    except GraftError as error:
        say(Said(error=str(error)))
    except Exception as error:
        logger.exception("the job failed")
        say(Said(error=f"{type(error).__name__}: {error}"[:500]))


def _writer(out: TextIO) -> Callable[[Said], None]:
    lock = threading.Lock()

    def say(said: Said) -> None:
        with lock:
            out.write(said.model_dump_json(exclude_none=True) + "\n")
            out.flush()

    return say


def _obey(orders: RawIOBase, stop: threading.Event) -> None:
    while orders.readline():
        stop.set()
    os._exit(1)  # the worker is gone, and another may do this job already


if __name__ == "__main__":
    main()
