"""A recipe: a small TOML file with a method, the weights that train, and training arguments by the trainer's own names.

A key stands in exactly one section, so `--set learning_rate=1e-4` needs no section.
"""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from finetune.schemas import Method, RewardName, Weights
from ingest.errors import InvalidError, NotFoundError
from ingest.schemas import Frozen

_FILES = Path(__file__).parent / "recipes"


BY_REWARD: frozenset[Method] = frozenset({"grpo", "ppo"})  # what learns from rewards of its own answers
_LOW_RANK = frozenset({"r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora", "parent"})
OWN: dict[Weights, frozenset[str]] = {  # fields of `Trained`, by what trains
    "full": frozenset(),
    "layers": frozenset({"layers"}),
    "lora": _LOW_RANK,
    "qlora": _LOW_RANK | {"bits", "double_quant"},
    "ia3": frozenset({"target_modules"}),
    "bottleneck": frozenset({"bottleneck"}),
}


# No kernel of a hub: such a name is code that is fetched and run.
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class Model(Frozen):
    """`base`: a folder, the name of a bundled model or its hub name; None: the model that is served."""

    base: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the faster here, by a short probe
    attn_implementation: Attention | None = None


class Trained(Frozen):
    """Which weights train. Fields of other ways are refused where they are given."""

    weights: Weights = "lora"
    layers: tuple[int, ...] = ()  # layers: their numbers, from 0; negative ones from the end
    r: int = Field(default=16, ge=1, le=512)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False
    bits: Literal[4, 8] = 4  # qlora
    double_quant: bool = True
    bottleneck: int = Field(default=64, ge=1)  # width
    parent: Path | None = None  # an adapter to go on from

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        wrong = sorted(self.model_fields_set - OWN[self.weights] - {"weights"})
        if wrong:
            raise ValueError(f"weights = {self.weights!r} has no {', '.join(wrong)}")
        if self.weights == "layers" and not self.layers:
            raise ValueError("weights = 'layers' needs `layers`, the numbers of those that train")
        return self


class Data(Frozen):
    """`held_out`: share of the rows that stops the training early, drawn by document where rows name them. `max_rows`: so many,
    drawn by the seed.
    """

    data: Path | None = None
    eval_data: Path | None = None
    held_out: float = Field(default=0.1, ge=0, lt=1)
    max_rows: int | None = Field(default=None, ge=1)
    max_prompt_length: int | None = Field(default=None, ge=1)  # tokens; grpo, ppo; None: the window less the answer
    patience: int = Field(default=3, ge=0)  # evaluations without a better one; 0: no early stopping


class Rewards(Frozen):
    """What an answer of the model is worth: the sum of `rewards` (`finetune.rewards`), each with its weight.
    `reward_model`: the folder of one that `graft tune reward` trained, for the reward of that name.
    """

    rewards: dict[RewardName, float] = {}
    reward_model: Path | None = None

    @model_validator(mode="after")
    def _model_where_it_counts(self) -> Self:
        if "reward_model" in self.rewards and self.reward_model is None:
            raise ValueError("rewards name reward_model: set reward_model to the folder that `graft tune reward` wrote")
        if self.reward_model is not None and "reward_model" not in self.rewards:
            raise ValueError("reward_model is given, and rewards give it no weight: add reward_model = 1.0 to them")
        return self


class Recipe(Frozen):
    """`training`: fields of the trainer's arguments (transformers' TrainingArguments, and TRL's for the method)."""

    name: str
    method: Method
    model: Model = Model()
    trained: Trained = Trained()
    data: Data = Data()
    reward: Rewards = Rewards()
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _rewards_where_they_train(self) -> Self:
        if self.method in BY_REWARD and not self.reward.rewards:
            raise ValueError(f"method = {self.method!r} needs rewards, as --set 'rewards={{citation_correct=1.0}}'")
        if self.method not in BY_REWARD and self.reward.rewards:
            raise ValueError(f"method = {self.method!r} learns from rows, and has no rewards")
        return self

    @property
    def seed(self) -> int:
        """Raises InvalidError."""
        return self.whole("seed", 42)  # transformers' own

    def whole(self, name: str, default: int) -> int:
        """-> a training argument that is asked for before a trainer has read it. Raises InvalidError."""
        given = self.training.get(name, default)
        if not isinstance(given, int) or isinstance(given, bool):
            raise InvalidError(f"training argument {name} = {given!r} does not fit: give a whole number")
        return given


SECTIONS: dict[str, type[Frozen]] = {"model": Model, "trained": Trained, "data": Data, "reward": Rewards}


def read_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """`name`: of one of the product's, or a TOML file. `settings`: as "max_steps=4", "trained.r=8". Raises NotFoundError,
    InvalidError.
    """
    path = Path(name)
    if not name.endswith(".toml"):
        path = _FILES / f"{name}.toml"
        if (_FILES / "retrieval" / path.name).is_file():
            raise InvalidError(f"recipe {name!r} tunes what finds passages: run `graft tune {name}`, which no job does")
        if name not in recipes():
            raise NotFoundError(f"there is no recipe {name!r}; there are {', '.join(recipes())}, or give a .toml file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"recipe {name!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError(f"recipe {name!r} is not valid TOML: {error}") from error
    _put_settings(content, settings)
    return recipe_of({"name": path.stem, **content})


def recipe_of(content: Mapping[str, Any]) -> Recipe:
    """Raises InvalidError."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        said = "; ".join(map(_said, error.errors()))
        raise InvalidError(f"recipe {content.get('name')!r} does not fit: {said}") from error


def _said(error: Mapping[str, Any]) -> str:
    """One of pydantic's, under the name of its field; what concerns the whole recipe has none."""
    where, what = ".".join(map(str, error["loc"])), str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """As those of `read_recipe`, over one that was read elsewhere. Raises InvalidError."""
    content = recipe.model_dump(exclude_unset=True)
    _put_settings(content, settings)
    return recipe_of(content)


def with_base(recipe: Recipe, base: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": base})})


def about(name: str) -> str:
    """-> the first sentence of a recipe's comment."""
    lines = (_FILES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    said = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return said.partition(". ")[0].rstrip(".")


@cache
def recipes() -> tuple[str, ...]:
    """The product's own, by name."""
    return tuple(sorted(path.stem for path in _FILES.glob("*.toml")))


def _put_settings(content: dict[str, Any], settings: Sequence[str]) -> None:
    """A parent that is set has a rank and an alpha of its own: what the recipe says of them goes, unless it is set as well."""
    given: dict[str, Any] = {}
    for setting in settings:
        put_setting(given, setting)
        put_setting(content, setting)
    own = given.get("trained", {})
    if "parent" in own:
        for name in {"r", "lora_alpha"} - own.keys():
            content["trained"].pop(name, None)


def put_setting(content: dict[str, Any], setting: str, sections: Mapping[str, type[Frozen]] = SECTIONS) -> None:
    """Puts "r=8" or "trained.r=8" into a recipe's content. Raises InvalidError."""
    key, mark, text = setting.partition("=")
    key = key.strip()
    if not mark or not key:
        raise InvalidError(f"--set {setting!r} is not KEY=VALUE")
    section, dot, field = key.partition(".")
    if not dot:
        field = key
        section = next((name for name, fields in sections.items() if key in fields.model_fields), "training")
    if section not in {*sections, "training"}:
        raise InvalidError(f"--set {key!r}: a recipe has the sections {', '.join([*sections, 'training'])}")
    held = content.setdefault(section, {})
    if not isinstance(held, dict):
        raise InvalidError(
            f"a recipe's {section!r} is a table: write [{section}] above its keys, not {section} = {held!r}"
        )
    held[field] = _value(text.strip())


def _value(text: str) -> Any:
    """As TOML has it; what is no TOML value is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)
