"""Settings of a training recipe searched as one space: each trial trains, and its value is a metric of held-out rows.

The rows that are held out are the same for all trials; with folds, each trial trains once a fold, and its value is the mean.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from eval.samplers import Sampler
from eval.space import Space
from eval.study import Attempt, PrunedError, Search, Study, Trial, best_of, check_name, search, study_name
from finetune import runs, trial
from finetune.arguments import refuse_unknown
from finetune.base_folder import find_base
from finetune.hardware import total_memory
from finetune.memory import advice, estimate
from finetune.recipe import SECTIONS, Recipe, put_setting, recipe_of, with_settings
from finetune.recipe_file import recipe_toml, toml_of
from finetune.rows_split import fold_rows
from finetune.schemas import Method, Rows
from finetune.settings import FinetuneSettings
from finetune.train import read_data
from ingest.errors import InvalidError, NotFoundError, SettingsError
from ingest.runtime import has_gpu
from ingest.schemas import Frozen
from service.base_model import read_base

SEARCHED_DATA = {"patience"}  # of [data]: all else decides what is held out
METRIC: dict[Method, str] = {"grpo": "eval_reward", "ppo": "held_out_reward"}  # where nothing is said; else the loss
LOWER = re.compile(r"(?<![a-z])(loss|error|kl|perplexity)(?![a-z])")


class Plan(NamedTuple):
    """`recipe`: with its rows and base. `folds` 0: what the recipe holds out. `storage`: of the study; None: beside its runs.
    `folder`: of studies.
    """

    recipe: Recipe
    space: Space
    folder: Path
    trials: int
    sampler: Sampler = "tpe"
    metric: str = "eval_loss"
    folds: int = 0
    prune: bool = False
    seed: int = 0
    name: str | None = None
    storage: Path | str | None = None
    workers: int = 1


class Swept(Frozen):
    """`best`: the recipe with the best setting; `weights`: where its run is, on the machine that trained it; null both where no
    trial has a value.
    """

    study: Study
    metric: str
    folds: int
    rows: str
    best: dict[str, Any] | None
    weights: Path | None


def sweep(
    plan: Plan,
    settings: FinetuneSettings,
    models: Path,
    home: Path,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Swept:
    """Raises InvalidError for what cannot be searched, and what `search` and `train` do."""
    refuse_unknown(plan.recipe)
    check_space(plan.recipe, plan.space)
    rows, digest = _check_data(plan)
    about = _about(plan, digest, models)
    name = plan.name or study_name(plan.recipe.name, [about, _plain(plan.space), plan.sampler, plan.seed])
    check_name(name)
    out = _made(plan.folder / f"{name}.runs")
    ending = threading.Event()
    asked = Search(plan.trials, plan.sampler, plan.storage or plan.folder, name, plan.seed, about,
                   minimize=lower_is_better(plan.metric), prune=plan.prune, shared=True, ended=ending.is_set)  # fmt: skip
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // plan.workers)
    settings = settings.model_copy(update={"threads": threads})

    def objective(attempt: Attempt) -> float:
        recipe = recipe_at(plan.recipe, attempt.setting)
        _check_memory(recipe, find_base(recipe.model.base, models), rows, settings.memory_share / plan.workers)
        order = trial.Order(recipe, out, settings, models, home, plan.metric, plan.seed)
        try:
            return _value(attempt, plan, out, order, ending.is_set)
        except NotFoundError as error:
            if any(one.value is not None for one in list(seen.values())):
                raise InvalidError(str(error)) from error  # of this setting alone
            raise

    seen: dict[int, Trial] = {}
    tidying = threading.Lock()

    def done(one: Trial) -> None:
        with tidying:
            seen[one.number] = one
            _tidy(out, seen, asked.minimize)
        on_trial(one)

    study = _worked(plan, objective, asked, done, ending)
    if study.best is None:
        return Swept(study=study, metric=plan.metric, folds=plan.folds, rows=digest, best=None, weights=None)
    _keep(out, study)
    found = recipe_at(plan.recipe, study.best.setting).model_dump(mode="json", exclude_unset=True)
    kept = out / _folder(study.best.number)
    return Swept(study=study, metric=plan.metric, folds=plan.folds, rows=digest, best=found,
                 weights=kept if kept.is_dir() else None)  # fmt: skip


def check_space(recipe: Recipe, space: Space) -> None:
    """Raises InvalidError for a key that a recipe has not or that is there twice, or that changes what is held out."""
    seen: dict[tuple[str, str], str] = {}
    for key in space:
        content: dict[str, Any] = {}
        try:
            put_setting(content, f"{key}=0")
            ((section, fields),) = content.items()
            (field,) = fields
            if section == "training":
                refuse_unknown(recipe.model_copy(update={"training": fields}))
            elif field not in SECTIONS[section].model_fields:
                raise InvalidError(f"[{section}] has {', '.join(SECTIONS[section].model_fields)}")
        except InvalidError as error:
            raise InvalidError(f"--space {key!r}: {error}") from error
        if (before := seen.setdefault((section, field), key)) != key:
            raise InvalidError(f"--space {before!r} and {key!r} are the same; leave one out")
        if section == "data" and field not in SEARCHED_DATA:
            raise InvalidError(
                f"--space {key!r} changes which rows are held out, and trials would not compare; leave it out"
            )


def recipe_at(recipe: Recipe, setting: Mapping[str, Any]) -> Recipe:
    """Raises InvalidError for a setting that the recipe refuses."""
    found = with_settings(recipe, [f"{key}={toml_of(value)}" for key, value in setting.items()])
    refuse_unknown(found)
    return found


def lower_is_better(metric: str) -> bool:
    return LOWER.search(metric) is not None


def best_recipe(swept: Swept) -> str:
    """-> the best setting as a recipe file. Raises InvalidError where no trial has a value."""
    best = swept.study.best
    if best is None or swept.best is None:
        first = swept.study.trials[0].error if swept.study.trials else "nothing was tried"
        raise InvalidError(f"no trial has a value, so there is no best setting; the first: {first}")
    over = f", mean of {swept.folds} folds" if swept.folds else ""
    comments = [
        f"The best of {len(swept.study.trials)} trials of study {swept.study.name}: {swept.metric} {best.value:.6g}{over}, in "
        f"trial {best.number + 1}.",
        f"Searched ({swept.study.sampler}): {', '.join(swept.study.space)}.",
    ]
    return recipe_toml(recipe_of(swept.best), comments)


def _worked(
    plan: Plan,
    objective: Callable[[Attempt], float],
    asked: Search,
    done: Callable[[Trial], None],
    ending: threading.Event,
) -> Study:
    """Each worker is a thread, and each of its trials a process."""
    with ThreadPoolExecutor(plan.workers, "trials") as pool:
        try:
            workers = [pool.submit(search, plan.space, objective, asked, done) for _ in range(plan.workers)]
            ended = wait(workers, return_when=FIRST_EXCEPTION).done
        finally:
            ending.set()  # a worker that has ended by itself does not look
        for one in ended:  # not of those that end because another has failed
            if (error := one.exception()) is not None:
                raise error
        return workers[0].result()


def _value(attempt: Attempt, plan: Plan, out: Path, order: trial.Order, ended: Callable[[], bool]) -> float:
    """Raises PrunedError, InvalidError, SettingsError; NotFoundError without the metric, StoppedError when the sweep is ended."""
    folder = out / _folder(attempt.number)
    if not plan.folds:
        found = trial.run(order._replace(out=folder / "run"), attempt.report, ended)
        if found is None:
            raise PrunedError("worse than the median of the trials before it at the same point")
        return _metric(found, plan.metric)
    values: list[float] = []
    for fold in range(plan.folds):
        each = order._replace(out=folder / f"fold-{fold + 1}", fold=fold, folds=plan.folds)
        values.append(_metric(trial.run(each, lambda *_: False, ended) or {}, plan.metric))
        if fold + 1 < plan.folds and attempt.report(fold + 1, fmean(values)):
            raise PrunedError(f"the mean of {fold + 1} folds was worse than the median of the trials before it")
    return fmean(values)


def _metric(found: Mapping[str, float], metric: str) -> float:
    """Raises NotFoundError."""
    if metric not in found:
        held = sorted(name for name in found if name.startswith(("eval_", "held_out_", "accuracy", "calibration")))
        raise NotFoundError(f"the training has no {metric!r}; --metric takes {', '.join(held) or 'what is held out'}")
    return found[metric]


def _check_memory(recipe: Recipe, base: Path, rows: Rows, share: float) -> None:
    """On a CPU, whose system ends any process when memory runs out; a GPU says it by itself. Raises SettingsError."""
    with suppress(InvalidError, ValueError, TypeError):  # an unknown base's size; what training will refuse
        found, most = estimate(recipe, base, rows), total_memory() * share
        if not has_gpu() and found.bytes > most:
            raise SettingsError(
                f"the training takes about {found.bytes / 2**30:.1f} GiB, and here it may take {most / 2**30:.1f}: "
                f"{advice(recipe, found)}"
            )


def _made(folder: Path) -> Path:
    """Raises InvalidError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidError(f"the folder {str(folder)!r} cannot be made: {error.strerror}; set GRAFT_HOME") from error
    return folder


def _check_data(plan: Plan) -> tuple[Rows, str]:
    """-> the rows, and the digest of what is learned and held out. Raises InvalidError."""
    data = read_data(plan.recipe)
    if plan.folds == 1:
        raise InvalidError("--folds 1 would leave nothing to train on: give 2 or more, or leave it out")
    if plan.folds:
        if plan.recipe.data.eval_data is not None:
            raise InvalidError("--folds hold out each row once, and --eval-data others: give one of them")
        fold_rows(data.everything, plan.folds, plan.seed)
        return data.everything, data.everything.digest
    if not data.held_out.rows:
        raise InvalidError(
            f"nothing of {data.everything.name!r} is held out, so trials have no value: give --eval-data FILE, --folds K, or "
            "--set held_out=0.1"
        )
    return data.learn, hashlib.sha256(f"{data.learn.digest} {data.held_out.digest}".encode()).hexdigest()[:16]


def _about(plan: Plan, digest: str, models: Path) -> dict[str, Any]:
    """What makes values comparable, flat, so that what differs is told by its name."""
    held = runs.settled(plan.recipe)
    del held["name"], held["model"]["base"]
    flat = {f"{section}.{key}": value for section, fields in held.items() if isinstance(fields, dict)
            for key, value in fields.items()}  # fmt: skip
    searched = {key.rpartition(".")[2] for key in plan.space}
    about = {key: value for key, value in flat.items() if key.rpartition(".")[2] not in searched}
    base = read_base(str(find_base(plan.recipe.model.base, models).absolute()), None).identity
    return about | {"method": plan.recipe.method, "base": base, "rows": digest, "metric": plan.metric, "folds": plan.folds,
                    "prune": plan.prune}  # fmt: skip


def _tidy(out: Path, seen: Mapping[int, Trial], minimize: bool) -> None:
    """Of what was trained here, the weights of the best trial stay."""
    best = best_of(seen.values(), minimize)
    for number in list(seen):
        if best is None or number != best.number:
            shutil.rmtree(out / _folder(number), ignore_errors=True)


def _keep(out: Path, study: Study) -> None:
    """At the end, when all trials are known, those of earlier calls too."""
    for one in study.trials:
        if study.best is None or one.number != study.best.number:
            shutil.rmtree(out / _folder(one.number), ignore_errors=True)


def _folder(number: int) -> str:
    return f"trial-{number + 1}"


def _plain(space: Space) -> dict[str, Any]:
    return {key: one.model_dump(mode="json") for key, one in space.items()}
