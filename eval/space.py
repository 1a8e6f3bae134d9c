"""A space of settings: keys, and what each may be. It is data, and does not know what is tuned: retrieval, a training recipe,
anything that has a setting.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError, model_validator

from ingest.errors import InvalidError
from ingest.schemas import Frozen

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = StrictBool | StrictInt | StrictFloat | StrictStr
Setting = dict[str, Value]

KEYS, CHOICES, POINTS = 40, 200, 10_000  # at most: of a space, of a key, of a grid
WHOLE = 2**53  # up to which a float, as studies keep them, tells whole numbers apart
RANGE = re.compile(r"(?P<low>[^:]+)\.\.(?P<high>[^:]+?)(?::(?P<how>.+))?")


class Int(Frozen):
    """low, low + step, ... up to high. `log`: as of `Float`."""

    kind: Literal["int"] = "int"
    low: Annotated[int, Field(ge=-WHOLE, le=WHOLE)]
    high: Annotated[int, Field(ge=-WHOLE, le=WHOLE)]
    step: Annotated[int, Field(ge=1)] = 1
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"{self.low} is above {self.high}")
        if self.log and (self.low <= 0 or self.step != 1):
            raise ValueError("a logarithmic range begins above 0 and has no step")
        return self


class Float(Frozen):
    """`log`: its logarithm is searched evenly, so that 1e-5 to 1e-4 gets as many trials as 1e-4 to 1e-3."""

    kind: Literal["float"] = "float"
    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"{self.low:g} is above {self.high:g}")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"{self.low:g} to {self.high:g} is too wide")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range begins above 0 and has no step")
        return self


class Choice(Frozen):
    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[Value, ...], Field(min_length=1, max_length=CHOICES)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.values)) != len(self.values):  # 1, 1.0 and true are the same to who compares settings
            raise ValueError("a value is there twice")
        if not all(math.isfinite(one) for one in self.values if isinstance(one, float)):
            raise ValueError("nan and inf are no values")
        return self


Dimension = Annotated[Int | Float | Choice, Field(discriminator="kind")]
Space = dict[str, Dimension]
_DIMENSION: TypeAdapter[Int | Float | Choice] = TypeAdapter(Dimension)


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


def within(space: Mapping[str, Dimension], setting: Setting) -> bool:
    """Whether it is a point of the space."""
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


def setting_of(space: Mapping[str, Dimension], params: Mapping[str, Any]) -> Setting:
    """-> the values that a sampler chose, as they would be written."""
    return {
        key: _plain(params[key]) if isinstance(one, Float) and one.step else params[key] for key, one in space.items()
    }


def distributions(space: Mapping[str, Dimension]) -> "dict[str, BaseDistribution]":
    """As Optuna has them."""
    return {key: _distribution(dimension) for key, dimension in space.items()}


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
        table = tomllib.loads(file.read_text(encoding="utf-8"))
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
    """A range of whole numbers, unless one of its numbers has a point."""
    numbers = [fields.get(key) for key in ("low", "high", "step") if key in fields]
    whole = all(isinstance(one, int) for one in numbers)
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
    count = min(_steps(dimension.low, dimension.high, step), POINTS) + 1
    if isinstance(dimension, Int):
        return [dimension.low + place * dimension.step for place in range(count)]
    return [_plain(dimension.low + place * step) for place in range(count)]


def _steps(low: float, high: float, step: float) -> int:
    """-> how many lie between the two."""
    return int((high - low) / step + 1e-9)


def _plain(value: float) -> float:
    """Without what adding up steps leaves in the last digits."""
    return float(f"{value:.12g}")


def _distribution(dimension: Int | Float | Choice) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    low, high, step = dimension.low, dimension.high, dimension.step
    if isinstance(dimension, Int):
        return IntDistribution(
            dimension.low, dimension.low + (dimension.high - dimension.low) // dimension.step * dimension.step,
            log=dimension.log, step=dimension.step,
        )  # fmt: skip
    if step is not None:  # Optuna wants the last step to end at the end
        high = _plain(low + _steps(low, high, step) * step)
    return FloatDistribution(low, high, log=dimension.log, step=step)
