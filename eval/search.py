"""A space of settings, and a study that searches it with Optuna. Both are plain: the space is data, the study a function.

It does not know what is tuned: retrieval, a training recipe, anything whose setting gives a number, higher is better. A
study is one SQLite file; the same name goes on where it was, also after a kill, and ends as if it had never been killed,
since the sampler of each trial is seeded by the study's seed and the trial's number.
"""

import itertools
import json
import math
import random
import re
import sqlite3
import time
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError, model_validator

from ingest.errors import InvalidError, LockedError, SettingsError
from ingest.schemas import Frozen

if TYPE_CHECKING:
    import optuna

Value = StrictBool | StrictInt | StrictFloat | StrictStr
Setting = dict[str, Value]
Sampler = Literal["tpe", "random", "grid"]
Objective = Callable[[Setting], float]

KEYS, CHOICES, POINTS, TRIALS = 40, 200, 10_000, 10_000  # at most: of a space, of a key, of a grid, of a study
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RANGE = re.compile(r"(?P<low>[^:]+)\.\.(?P<high>[^:]+?)(?::(?P<how>.+))?")


class Int(Frozen):
    """low, low + step, ... up to high."""

    kind: Literal["int"] = "int"
    low: int
    high: int
    step: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"{self.low} is above {self.high}")
        return self


class Float(Frozen):
    """`log`: its logarithm is searched evenly, so that 1e-5 to 1e-4 gets as many trials as 1e-4 to 1e-3."""

    kind: Literal["float"] = "float"
    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    step: Annotated[float, Field(gt=0)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"{self.low:g} is above {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range begins above 0 and has no step")
        return self


class Choice(Frozen):
    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[Value, ...], Field(min_length=1, max_length=CHOICES)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({(type(one), one) for one in self.values}) != len(self.values):
            raise ValueError("a value is there twice")
        return self


Dimension = Annotated[Int | Float | Choice, Field(discriminator="kind")]
Space = dict[str, Dimension]
_DIMENSION: TypeAdapter[Int | Float | Choice] = TypeAdapter(Dimension)


class Trial(Frozen):
    """`value` null: the setting was refused, for the reason `error`."""

    number: int
    setting: Setting
    value: float | None
    error: str = ""
    seconds: float = 0.0


class Study(Frozen):
    """`best`: the trial of the highest value, the first of equal ones; null when every setting was refused."""

    name: str
    sampler: Sampler
    seed: int
    space: Space
    trials: tuple[Trial, ...]
    best: Trial | None


def parse_space(given: Sequence[str]) -> Space:
    """Each is a TOML file, or `key=low..high`, `low..high:step`, `low..high:log`, or `key=a,b,c`. Raises InvalidError.

    In the file a key is such a range as a string, a list of values, or a table as {low = 1, high = 9, log = true}.
    """
    space: Space = {}
    for one in given:
        key, equals, text = one.partition("=")
        parts = {key.strip(): _of_text(one, text.strip())} if equals else _of_file(Path(one))
        if twice := sorted(space.keys() & parts):
            raise InvalidError(f"the space has {twice[0]!r} twice; leave one out")
        space |= parts
    if not 0 < len(space) <= KEYS:
        raise InvalidError(
            f"a space has 1 to {KEYS} keys, this one {len(space)}; write --space key=low..high or key=a,b,c"
        )
    return space


def grid(space: Mapping[str, Dimension]) -> list[Setting]:
    """All points, in order. Raises InvalidError for a range without steps, or too many points."""
    sides = {key: _points(key, dimension) for key, dimension in space.items()}
    if (count := math.prod(map(len, sides.values()))) > POINTS:
        raise InvalidError(f"the grid has {count} points, {POINTS} are searched at most; take larger steps, or tpe")
    return [dict(zip(sides, point, strict=True)) for point in itertools.product(*sides.values())]


def run_study(
    space: Space,
    objective: Objective,
    trials: int,
    sampler: Sampler = "tpe",
    storage: Path | None = None,
    name: str = "study",
    seed: int = 0,
    context: Mapping[str, Any] | None = None,
    starts: Sequence[Setting] = (),
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Study:
    """Searches until `trials` are done, those of earlier calls counted; a grid ends with its last point.

    `storage`: the folder of its file `NAME.study`; None: in memory. `context`: what else a value depends on, as the data
    and the metric. `starts` are tried first, unless they lie outside of the space. An InvalidError or SettingsError of
    the objective refuses that setting alone; any other error ends the search, which can be gone on with. A setting that a
    sampler comes back to has the value that it had.

    Raises InvalidError when an earlier study of that name searched something else, LockedError while another process is
    at it.
    """
    if not NAME.fullmatch(name):
        raise InvalidError(f"study name {name!r}: use letters, digits, '.', '_' and '-', 64 at most")
    if not 1 <= trials <= TRIALS:
        raise InvalidError(f"{trials} trials: 1 to {TRIALS} can be asked for")
    points = grid(space) if sampler == "grid" else list(starts)
    if sampler == "grid":
        random.Random(seed).shuffle(points)
    about = _about(space, sampler, seed, context or {})
    with _opened(storage, name) as study:
        _same(study, about, name, storage)
        queue = [*_broken_off(study), *(one for one in points if _within(space, one))]
        while len(done := _trials(study)) < trials:
            tried = [one.setting for one in done]
            setting = next((one for one in queue if one not in tried), None)
            if setting is None and sampler == "grid":
                break
            on_trial(_try(study, space, _once(objective, done), setting, _sampler(sampler, seed, len(done))))
        return Study(name=name, sampler=sampler, seed=seed, space=space, trials=tuple(done), best=best_of(done))


def best_of(trials: Iterable[Trial]) -> Trial | None:
    scored = [one for one in trials if one.value is not None]
    return max(scored, key=lambda one: (one.value or 0.0, -one.number), default=None)


def _of_text(whole: str, text: str) -> Int | Float | Choice:
    if not text:
        raise InvalidError(f"--space {whole!r} has no values; write key=low..high or key=a,b,c")
    found = RANGE.fullmatch(text)
    if not found:
        return _checked(whole, {"kind": "choice", "values": [_value(part.strip()) for part in text.split(",")]})
    ends = {side: _value(found[side].strip()) for side in ("low", "high")}
    how: dict[str, Any] = {}
    if found["how"]:
        how = {"log": True} if found["how"] == "log" else {"step": _value(found["how"])}
    return _checked(whole, _range(ends | how))


def _of_file(file: Path) -> Space:
    try:
        table = tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        raise InvalidError(f"--space {str(file)!r} is neither key=values nor a file") from error
    except (OSError, ValueError) as error:
        raise InvalidError(f"space file {str(file)!r} cannot be read: {error}") from error
    return {key: _of_toml(f"{file}: {key}", value) for key, value in _flat(table).items()}


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """[chunking] tokens = ... as "chunking.tokens"; a table with `low` or `values` is a dimension."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        is_table = isinstance(value, dict) and not {"low", "values", "kind"} & value.keys()
        flat |= _flat(value, f"{above}{key}.") if is_table else {f"{above}{key}": value}
    return flat


def _of_toml(whole: str, value: Any) -> Int | Float | Choice:
    if isinstance(value, str):
        return _of_text(whole, value)
    if isinstance(value, list):
        return _checked(whole, {"kind": "choice", "values": value})
    if isinstance(value, dict):
        return _checked(
            whole, value if "kind" in value else _range(value) if "low" in value else {"kind": "choice", **value}
        )
    return _checked(whole, {"kind": "choice", "values": [value]})


def _range(fields: dict[str, Any]) -> dict[str, Any]:
    """A range of whole numbers, unless it is logarithmic or one of its numbers has a point."""
    numbers = [fields.get(key) for key in ("low", "high", "step") if key in fields]
    whole = all(isinstance(one, int) for one in numbers) and not fields.get("log")
    return {"kind": "int" if whole else "float", **fields}


def _checked(whole: str, fields: Mapping[str, Any]) -> Int | Float | Choice:
    try:
        return _DIMENSION.validate_python(fields)
    except ValidationError as error:
        said = "; ".join(f"{one['loc'][-1]}: {one['msg']}" if one["loc"] else one["msg"] for one in error.errors())
        raise InvalidError(f"--space {whole!r} does not fit: {said}") from error


def _value(text: str) -> Value:
    if text in {"true", "false"}:
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _points(key: str, dimension: Int | Float | Choice) -> list[Value]:
    if isinstance(dimension, Choice):
        return list(dimension.values)
    step = dimension.step
    if step is None:
        raise InvalidError(f"a grid needs steps: write {key}={dimension.low:g}..{dimension.high:g}:STEP, or values")
    count = min(int((dimension.high - dimension.low) / step + 1e-9) + 1, POINTS + 1)
    return [round(dimension.low + place * step, 12) for place in range(count)]


def _within(space: Mapping[str, Dimension], setting: Setting) -> bool:
    if setting.keys() != space.keys():
        return False
    for key, dimension in space.items():
        value = setting[key]
        if isinstance(dimension, Choice):
            inside = value in dimension.values
        elif isinstance(value, str) or not dimension.low <= value <= dimension.high:
            inside = False
        else:
            steps = (value - dimension.low) / dimension.step if dimension.step else 0.0
            inside = abs(steps - round(steps)) < 1e-6
        if not inside:
            return False
    return True


def _about(space: Space, sampler: Sampler, seed: int, context: Mapping[str, Any]) -> dict[str, Any]:
    dimensions = {key: dimension.model_dump(mode="json") for key, dimension in space.items()}
    about = {"space": dimensions, "sampler": sampler, "seed": seed, "context": dict(context)}
    return dict(json.loads(json.dumps(about, sort_keys=True)))


@contextmanager
def _opened(folder: Path | None, name: str) -> Any:
    import optuna
    from filelock import FileLock, Timeout

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if folder is None:
        yield optuna.create_study(direction="maximize", study_name=name)
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.study"
    lock = FileLock(f"{file}.lock")
    try:
        with lock.acquire(timeout=0):
            storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": lambda: _connect(file)})
            try:
                yield optuna.create_study(direction="maximize", study_name=name, storage=storage, load_if_exists=True)
            finally:
                storage.remove_session()
                storage.engine.dispose()
    except Timeout as error:
        raise LockedError(f"another process is at study {name!r}; wait for it, or choose another name") from error


def _connect(file: Path) -> sqlite3.Connection:
    """What a trial says is not waited for on its way to the disk: a kill loses nothing, a power cut maybe the last trials."""
    connection = sqlite3.connect(file, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _same(study: "optuna.Study", about: Mapping[str, Any], name: str, folder: Path | None) -> None:
    held = study.user_attrs.get("about")
    if held is None:
        study.set_user_attr("about", about)
        return
    then, now = ({**one.pop("space"), **one.pop("context"), **one} for one in (dict(held), dict(about)))
    if changed := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        said = "; ".join(f"{key} was {json.dumps(then.get(key))}, now {json.dumps(now.get(key))}" for key in changed)
        raise InvalidError(
            f"study {name!r} is of something else: {said}. Choose another name, or delete {folder}/{name}.study"
        )


def _trials(study: "optuna.Study") -> list[Trial]:
    """Those that came to an end: with a value, or refused."""
    return [
        Trial(
            number=place,
            setting=one.user_attrs["setting"],
            value=one.value if one.state.name == "COMPLETE" else None,
            error=one.user_attrs.get("refused", ""),
            seconds=one.user_attrs.get("seconds", 0.0),
        )
        for place, one in enumerate(
            one
            for one in study.get_trials(deepcopy=False)
            if one.state.name == "COMPLETE" or "refused" in one.user_attrs
        )
    ]


def _broken_off(study: "optuna.Study") -> list[Setting]:
    """Settings whose trials were killed or ended by an error: they are tried again, first."""
    import optuna

    left = []
    for one in study.get_trials(deepcopy=False):
        if one.state == optuna.trial.TrialState.RUNNING:
            study.tell(one.number, state=optuna.trial.TrialState.FAIL)
        ended = one.state == optuna.trial.TrialState.COMPLETE or "refused" in one.user_attrs
        if not ended and "setting" in one.user_attrs:
            left.append(dict(one.user_attrs["setting"]))
    return left


def _sampler(kind: Sampler, seed: int, number: int) -> "optuna.samplers.BaseSampler":
    """A grid's points are given one by one, since Optuna's GridSampler takes a killed trial's point for visited."""
    import optuna

    one = random.Random(f"{seed}:{number}").randrange(2**32)
    return optuna.samplers.TPESampler(seed=one) if kind == "tpe" else optuna.samplers.RandomSampler(seed=one)


def _once(objective: Objective, done: Sequence[Trial]) -> Objective:
    def value_of(setting: Setting) -> float:
        same = next((one for one in done if one.setting == setting), None)
        if same is None:
            return objective(setting)
        if same.value is None:
            raise InvalidError(same.error)
        return same.value

    return value_of


def _try(
    study: "optuna.Study",
    space: Space,
    objective: Objective,
    setting: Setting | None,
    sampler: "optuna.samplers.BaseSampler",
) -> Trial:
    import optuna

    with warnings.catch_warnings():  # PartialFixedSampler is called experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.PartialFixedSampler(setting, sampler) if setting else sampler
    trial = study.ask({key: _distribution(dimension) for key, dimension in space.items()})
    chosen: Setting = dict(trial.params)
    trial.set_user_attr("setting", chosen)
    start = time.perf_counter()
    try:
        value = float(objective(chosen))
        if not math.isfinite(value):
            raise InvalidError(f"the objective gave {value}")
    except (InvalidError, SettingsError) as error:
        trial.set_user_attr("refused", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    except BaseException:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    else:
        trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
        study.tell(trial, value)
    return _trials(study)[-1]


def _distribution(dimension: Int | Float | Choice) -> "optuna.distributions.BaseDistribution":
    import optuna

    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    if isinstance(dimension, Int):
        high = dimension.low + (dimension.high - dimension.low) // dimension.step * dimension.step
        return optuna.distributions.IntDistribution(dimension.low, high, step=dimension.step)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
