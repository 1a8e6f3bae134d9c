"""One run, from a recipe to a folder with tuned weights, their curve and their manifest.

What every method shares: the base, the rows, the folder, the callbacks, how a run ends early and what is left of it. The methods
themselves are modules of their names. Light until `train` runs: the training stack is loaded inside.
"""

import importlib.util
import logging
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune import runs
from finetune.arguments import refuse_unknown
from finetune.base_folder import find_base
from finetune.full_disk import writing
from finetune.hooks import SILENT, Hooks, StoppedError
from finetune.recipe import Recipe
from finetune.rows import read_rows, split_rows
from finetune.rows_lines import rows_of
from finetune.schemas import Manifest, Rows
from finetune.settings import FinetuneSettings
from ingest.errors import InvalidError, SettingsError
from service.tuning import TuneProgress

if TYPE_CHECKING:
    from finetune.progress import ProgressCallback
    from finetune.run import Outcome, Run

logger = logging.getLogger(__name__)
NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "CUDA out of memory")


class Split(NamedTuple):
    """`held_out`: of `eval_data`, else a share of `everything`, which is then what `learn` is not."""

    everything: Rows
    learn: Rows
    held_out: Rows


def train(
    recipe: Recipe,
    *,
    out: Path,
    settings: FinetuneSettings,
    models: Path,
    home: Path,
    hooks: Hooks = SILENT,
    restart: bool = False,
    data: Split | None = None,
) -> Manifest:
    """Trains into `out`, or goes on with the unfinished run of the same recipe and rows that is there. `home`: where the dtype
    probe is kept. `data`: of `read_data`, where it has been read. Raises StoppedError when it is cancelled; InvalidError,
    ConflictError, LockedError, NoRoomError, SettingsError.
    """
    require_stack()
    refuse_unknown(recipe)
    runs.manifests_before(recipe)  # one that cannot be read is said now, not when all is trained
    recipe = runs.as_parent(recipe)
    quiet()
    started = time.perf_counter()
    base, (everything, learn, held_out) = find_base(recipe.model.base, models), data or read_data(recipe)
    with runs.claimed(out), writing(out), advised(recipe):
        resume_from = _begin(out, recipe, (learn, held_out), base, restart)
        if resume_from is not None:
            started -= runs.spent_until(out, runs.step_of(resume_from))
        hooks.progress(TuneProgress(stage="loading"))
        run, callback = _prepare(recipe, base, learn, held_out, out, settings, hooks, home, resume_from, started)
        trained = _trained(run, callback)
        if callback.stopped:
            raise StoppedError(out, trained.trainer.state.global_step)
        if not runs.writes():
            return _manifest(run, everything, trained, started)
        state = trained.trainer.state
        hooks.progress(TuneProgress(stage="saving", step=state.global_step, steps=state.max_steps))
        return _saved(run, everything, trained, started)


def require_stack() -> None:
    """Raises SettingsError where training is not installed."""
    missing = [name for name in ("torch", "transformers", "trl", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"training needs {', '.join(missing)}, which are not installed: run `make train`")


def read_data(recipe: Recipe) -> Split:
    """Raises InvalidError."""
    if recipe.data.data is None:
        raise InvalidError(f"recipe {recipe.name!r} names no rows: give them with --data FILE")
    everything = read_rows(recipe.data.data, recipe.method)
    most = recipe.data.max_rows
    if most is not None and most < len(everything.rows):
        drawn = sorted(random.Random(recipe.seed).sample(range(len(everything.rows)), most))  # files go by subject
        rows = [everything.rows[at] for at in drawn]
        places = [everything.places[at] for at in drawn] if everything.places else []
        everything = rows_of(rows, places, everything.name, everything.prompt_version)
    if recipe.data.eval_data is not None:
        learn, held_out = everything, read_rows(recipe.data.eval_data, recipe.method)
    else:
        learn, held_out = split_rows(everything, recipe.data.held_out, recipe.seed)
    if not learn.rows:
        raise InvalidError(f"{str(recipe.data.data)!r} holds no row to train on")
    return Split(everything, learn, held_out)


def _begin(out: Path, recipe: Recipe, rows: tuple[Rows, Rows], base: Path, restart: bool) -> Path | None:
    """-> the checkpoint to go on from: of several processes one looks and makes room, the others wait for it."""
    if runs.processes() == 1:
        return runs.begin(out, recipe, rows, base, restart)
    from accelerate import PartialState

    together = PartialState()
    found = runs.begin(out, recipe, rows, base, restart) if runs.writes() else None
    together.wait_for_everyone()
    return found if runs.writes() else runs.last_checkpoint(out)


def _prepare(
    recipe: Recipe,
    base: Path,
    learn: Rows,
    held_out: Rows,
    out: Path,
    settings: FinetuneSettings,
    hooks: Hooks,
    home: Path,
    resume_from: Path | None,
    started: float,
) -> tuple["Run", "ProgressCallback"]:
    """-> the run with everything settled, and the callback that can end it."""
    import torch

    from finetune import hardware
    from finetune.arguments import refuse_early
    from finetune.chat import read_chat
    from finetune.progress import ProgressCallback
    from finetune.run import Run

    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = hardware.training_dtype(home, settings.threads)
    callback = ProgressCallback(hooks, out / runs.LOG, started)
    if resume_from is not None and runs.writes():
        runs.keep_log_until(out, runs.step_of(resume_from))
    run = Run(
        recipe=recipe,
        base=base,
        out=out,
        chat=read_chat(base),
        learn=learn,
        held_out=held_out,
        dtype=dtype,
        trackers=settings.trackers,
        callbacks=[callback, *_trackers(out, settings), *_early_stopping(recipe, held_out), *hooks.callbacks],
        resume_from=resume_from,
    )
    refuse_early(run)
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    logger.info("training", extra={"recipe": said, "base": str(base), "dtype": dtype, "rows": len(learn.rows)})
    hardware.reset_peak_memory()
    return run, callback


def _trained(run: "Run", callback: "ProgressCallback") -> "Outcome":
    """By the recipe's method, while signals end it after the step that is under way."""
    with ended_by_signals(callback.stop), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers
        match run.recipe.method:
            case "sft":
                from finetune.sft import sft

                return sft(run)
            case "dpo":
                from finetune.dpo import dpo

                return dpo(run)
            case "kto":
                from finetune.kto import kto

                return kto(run)
            case "reward":
                from finetune.reward import reward

                return reward(run)
            case "grpo":
                from finetune.grpo import grpo

                return grpo(run)
            case "ppo":
                from finetune.ppo import ppo

                return ppo(run)


def quiet() -> None:
    """The libraries' own bars and notes stay out of the progress that is shown."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _saved(run: "Run", everything: Rows, trained: "Outcome", started: float) -> Manifest:
    from finetune import methods
    from finetune.curve import write_curve

    methods.save(trained.trainer.model, run.recipe.trained, run.out, run.base)
    write_curve(_points(trained.trainer.state.log_history), run.out)
    manifest = _manifest(run, everything, trained, started)
    runs.finish(run.out, manifest)
    return manifest


def _manifest(run: "Run", everything: Rows, trained: "Outcome", started: float) -> Manifest:
    from finetune.manifest import manifest_of

    return manifest_of(run, everything, trained, time.perf_counter() - started)


def _points(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: value for key, value in one.items() if isinstance(value, (int, float))} for one in log]


def _trackers(out: Path, settings: FinetuneSettings) -> list[Any]:
    """TensorBoard's files lie in the run's folder; the others find their places by their own variables."""
    if "tensorboard" not in settings.trackers or not runs.writes():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(out / "tensorboard")))]


def _early_stopping(recipe: Recipe, held_out: Rows) -> list[Any]:
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(recipe.data.patience)] if held_out.rows and recipe.data.patience else []


@contextmanager
def ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the run with a checkpoint; a second Ctrl-C ends it at once. Elsewhere than in the main thread the
    caller says when.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ended(number: int, _: Any) -> None:
        signal.signal(number, before[number])
        stop()

    for number in before:
        signal.signal(number, ended)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def advised(recipe: Recipe) -> Iterator[None]:
    """Out of memory ends with what helps. Raises SettingsError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in NO_MEMORY):
            raise
        from finetune.memory import advice

        raise SettingsError(f"out of memory: {advice(recipe)}") from error
