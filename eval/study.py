"""A study: a space searched by trials, with Optuna. It does not know what is tuned: whatever gives a number for a setting.

The same name goes on where it was, also after a kill, and with one worker ends as if it had never been killed: the sampler of
each trial is seeded by the study's seed and the trial's number, and a trial that was under way is done again as the same trial.
"""

import hashlib
import json
import logging
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.samplers import STARTUP, Sampler, sampler_of
from eval.space import Dimension, Setting, Space, distributions, grid, setting_of, within
from eval.study_storage import BEAT, OWNER, Opened, held, lives, opened, own, said
from ingest.errors import GraftError, InvalidError, SettingsError
from ingest.schemas import Frozen

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)
Objective = Callable[[Setting], float]
TRIALS = 10_000  # of a study, at most
LOOK_SECONDS = 0.5  # between two looks at trials of other workers
WHY = {"FAIL": "refused", "PRUNED": "pruned"}  # the attribute that says why, by a trial's state
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Trial(Frozen):
    """`value` null: the setting was refused, or the trial ended as hopeless (`pruned`), for the reason `error`.

    `intermediate`: what it told on its way, by step.
    """

    number: int
    setting: Setting
    value: float | None
    error: str = ""
    seconds: float = 0.0
    pruned: bool = False
    intermediate: dict[int, float] = {}


class Study(Frozen):
    """`best`: the trial of the best value, the first of equal ones; null when there is none."""

    name: str
    sampler: Sampler
    seed: int
    space: Space
    trials: tuple[Trial, ...]
    best: Trial | None
    minimize: bool = False


class Attempt(NamedTuple):
    """A trial that is under way. `report`: told a value on the way and its step, says whether to give up."""

    number: int
    setting: Setting
    report: Callable[[int, float], bool]


class PrunedError(GraftError):
    """The trial is hopeless, as `report` said."""


class Search(NamedTuple):
    """`storage`: a folder, of its file `NAME.study`; a file; a database's URL; None: in memory. `context`: what else a value
    depends on, as the data and the metric. `starts` are tried first, unless they lie outside of the space. `prune`: a trial that
    is worse than the median of those before it, at the same step, is hopeless. `shared`: other processes may be at the study too.
    `ended`: asked before each trial, whether to leave the rest.
    """

    trials: int
    sampler: Sampler = "tpe"
    storage: Path | str | None = None
    name: str = "study"
    seed: int = 0
    context: Mapping[str, Any] = {}
    starts: Sequence[Setting] = ()
    minimize: bool = False
    prune: bool = False
    shared: bool = False
    ended: Callable[[], bool] = lambda: False


def run_study(
    space: Space,
    objective: Objective,
    trials: int,
    sampler: Sampler = "tpe",
    storage: Path | str | None = None,
    name: str = "study",
    seed: int = 0,
    context: Mapping[str, Any] | None = None,
    starts: Sequence[Setting] = (),
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Study:
    """`search`, for what has one number at its end, and is better when it is higher."""
    asked = Search(trials, sampler, storage, name, seed, context or {}, starts)
    return search(space, lambda attempt: objective(attempt.setting), asked, on_trial)


def search(
    space: Space,
    objective: Callable[[Attempt], float],
    asked: Search,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Study:
    """Searches until `trials` have come to an end, those of earlier calls and of other workers counted; a grid ends with its last
    point. `on_trial` is told of those that were done here.

    An InvalidError or SettingsError of the objective refuses that setting alone; any other error ends the search, which can be
    gone on with. A setting that a sampler comes back to has the value that it had.

    Raises InvalidError when an earlier study of that name searched something else, LockedError while another process holds it,
    UnavailableError where its database does not answer.
    """
    check_name(asked.name)
    if not 1 <= asked.trials <= TRIALS:
        raise InvalidError(f"{asked.trials} trials: 1 to {TRIALS} can be asked for")
    points = _points(space, asked)
    with opened(asked.storage, asked.name, asked.minimize, asked.shared) as at:
        at.study.pruner = _pruner(asked.prune)
        with at.turn():
            _same(at.study, _about(space, asked), asked)
        while not asked.ended():
            with at.turn():
                trial = _next(at, space, asked, points)
            if trial is not None:
                on_trial(_try(at, trial, space, objective))
            elif all(one.state.is_finished() for one in at.study.get_trials(deepcopy=False)):
                break
            else:
                time.sleep(LOOK_SECONDS)  # another worker is at the last ones, or has died at them
        done = _trials(at.study, space)
    best = best_of(done, asked.minimize)
    return Study(name=asked.name, sampler=asked.sampler, seed=asked.seed, space=space, trials=tuple(done), best=best,
                 minimize=asked.minimize)  # fmt: skip


def check_name(name: str) -> None:
    """Raises InvalidError."""
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"study name {name!r}: use letters, digits, '.', '_' and '-', 64 at most, a letter or digit first"
        )


def study_name(label: str, about: Any) -> str:
    """-> a name for a study that was given none: the same search has the same, so that it goes on after a kill."""
    plain = "".join(one if one.isascii() and one.isalnum() else "-" for one in label)[:32].strip("-") or "sweep"
    return f"{plain}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}"


def best_of(trials: Iterable[Trial], minimize: bool = False) -> Trial | None:
    return min((one for one in trials if one.value is not None), key=lambda one: rank(one, minimize), default=None)


def rank(trial: Trial, minimize: bool = False) -> tuple[bool, float, int]:
    """To sort by, the best first, those without a value last."""
    value = trial.value if trial.value is not None else 0.0
    return trial.value is None, value if minimize else -value, trial.number


def _points(space: Space, asked: Search) -> list[Setting]:
    """-> the settings that are tried before the sampler is asked; of a grid all."""
    if asked.sampler != "grid":
        return [one for one in asked.starts if within(space, one)]
    points = grid(space)
    random.Random(asked.seed).shuffle(points)
    return points


def _pruner(prune: bool) -> "optuna.pruners.BasePruner":
    from optuna.pruners import MedianPruner, NopPruner

    return MedianPruner(n_startup_trials=STARTUP // 2) if prune else NopPruner()


def _about(space: Mapping[str, Dimension], asked: Search) -> dict[str, Any]:
    dimensions = {key: dimension.model_dump(mode="json") for key, dimension in space.items()}
    about = {"space": dimensions, "sampler": asked.sampler, "seed": asked.seed, "context": dict(asked.context)}
    return dict(json.loads(json.dumps(about, sort_keys=True)))


def _same(study: "optuna.Study", about: Mapping[str, Any], asked: Search) -> None:
    """Raises InvalidError."""
    before = study.user_attrs.get("about")
    if before is None and study.get_trials(deepcopy=False):
        raise InvalidError(
            f"study {asked.name!r} in {said(asked.storage, asked.name)} is another program's. Choose another name"
        )
    if before is None:
        study.set_user_attr("about", about)
        return
    then, now = _flat(before), _flat(about)
    if changed := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        told = "; ".join(f"{key} was {json.dumps(then.get(key))}, now {json.dumps(now.get(key))}" for key in changed)
        where = f", or delete {said(asked.storage, asked.name)}" if isinstance(asked.storage, Path) else ""
        raise InvalidError(f"study {asked.name!r} is of something else: {told}. Choose another name{where}")


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    space = {f"--space {key}": one for key, one in about["space"].items()}
    return {**space, **about["context"], "sampler": about["sampler"], "seed of the search": about["seed"]}


def _next(at: Opened, space: Space, asked: Search, points: Sequence[Setting]) -> "optuna.Trial | None":
    """-> a trial that is now ours: one whose worker has died, else a new one; None where there is none left to take."""
    import optuna

    study, now = at.study, at.clock()
    before = study.get_trials(deepcopy=False)
    left = next((one for one in before if not one.state.is_finished() and not lives(one.user_attrs, now)), None)
    if left is None and len(before) >= asked.trials:
        return None
    number = len(before) if left is None else left.number
    taken = [one.params for one in before]
    fixed = next((one for one in points if one not in taken), None)
    if left is not None and left.params.keys() == space.keys():
        fixed = left.params  # it was settled before its worker died
    if left is None and fixed is None and asked.sampler == "grid":
        return None
    study.sampler = sampler_of(asked.sampler, space, asked.seed, number, fixed)
    trial = study.ask() if left is None else optuna.Trial(study, left._trial_id)
    for key, one in distributions(space).items():
        trial._suggest(key, one)  # as `ask` does it; what a killed worker had settled stays
    trial.set_user_attr(BEAT, now)
    trial.set_user_attr(OWNER, own())
    return trial


def _try(at: Opened, trial: "optuna.Trial", space: Space, objective: Callable[[Attempt], float]) -> Trial:
    """-> the trial as it ended; where it was taken for dead, as whoever took it over has ended it."""
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        _end(at, trial, space, objective)
    except UpdateFinishedTrialError:
        logger.warning("a trial was ended by another worker", extra={"trial": trial.number})
    return next(one for one in _trials(at.study, space) if one.number == trial.number)


def _end(at: Opened, trial: "optuna.Trial", space: Space, objective: Callable[[Attempt], float]) -> None:
    from optuna.trial import TrialState

    done = [one for one in _trials(at.study, space) if one.number < trial.number]
    setting = setting_of(space, trial.params)
    start = time.perf_counter()
    value, state = None, TrialState.FAIL
    with held(trial, at.clock):
        try:
            value = _value(objective, Attempt(trial.number, setting, _report(trial)), done)
            state = TrialState.COMPLETE
        except PrunedError as error:
            trial.set_user_attr("pruned", str(error))
            state = TrialState.PRUNED
        except (InvalidError, SettingsError) as error:
            trial.set_user_attr("refused", str(error))
        except BaseException:
            with suppress(Exception):  # what ended it is told, not what a database that is away says of it
                trial.set_user_attr(OWNER, None)  # whoever comes next does it again
            raise
    trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
    at.study.tell(trial, value, state, skip_if_finished=True)


def _value(objective: Callable[[Attempt], float], attempt: Attempt, done: Sequence[Trial]) -> float:
    """Raises InvalidError, PrunedError, and what the objective does."""
    same = next((one for one in done if one.setting == attempt.setting), None)
    if same is None:
        value = float(objective(attempt))
        if not math.isfinite(value):
            raise InvalidError(f"its value is {value}, which compares with nothing")
        return value
    if same.pruned:
        raise PrunedError(same.error)
    if same.value is None:
        raise InvalidError(same.error)
    return same.value


def _report(trial: "optuna.Trial") -> Callable[[int, float], bool]:
    told = set(trial.storage.get_trial(trial._trial_id).intermediate_values)  # by a worker that was killed

    def report(step: int, value: float) -> bool:
        if step not in told:
            trial.report(value, step)
            told.add(step)
        return trial.should_prune()

    return report


def _trials(study: "optuna.Study", space: Space) -> list[Trial]:
    """Those that came to an end: with a value, pruned, or refused."""
    return [
        Trial(
            number=one.number,
            setting=setting_of(space, one.params),
            value=one.value if one.state.name == "COMPLETE" else None,
            error=one.user_attrs.get(WHY.get(one.state.name, ""), ""),
            seconds=one.user_attrs.get("seconds", 0.0),
            pruned=one.state.name == "PRUNED",
            intermediate={step: told for step, told in one.intermediate_values.items() if math.isfinite(told)},
        )
        for one in study.get_trials(deepcopy=False)
        if one.state.is_finished()
    ]
