"""Recipes of the models that find passages: an embedder, a reranker, a map of questions' vectors. TOML, as the others are."""

import tomllib
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from finetune.recipe import put_setting
from ingest.errors import InvalidError, NotFoundError
from ingest.schemas import Frozen

_FILES = Path(__file__).parent / "recipes" / "retrieval"
RetrievalMethod = Literal["embedder", "reranker", "query-adapter"]
Penalty = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RetrievalModel(Frozen):
    """`base`: what is tuned, or whose vectors are moved: a folder, or a name; None: the one that is in use. `frozen_layers`: so
    many of the lowest, and the word vectors, stay as they are.
    """

    base: str | None = None
    frozen_layers: int = Field(default=0, ge=0)


class RetrievalData(Frozen):
    """Shares of the questions, by document: `held_out` decides whether the result is taken and is seen by nothing else; `stop`
    says when to stop, or how far to go.
    """

    held_out: float = Field(default=0.2, gt=0, lt=0.9)
    stop: float = Field(default=0.1, ge=0, lt=0.5)
    max_rows: int | None = Field(default=None, ge=4)  # questions
    max_tokens: int | None = Field(default=None, ge=16)  # of a text while it trains; None: all that the model reads
    patience: int = Field(default=3, ge=0)  # evaluations without a better one; 0: no early stopping

    @model_validator(mode="after")
    def _some_to_learn_from(self) -> Self:
        if self.held_out + self.stop >= 1:
            raise ValueError("held_out and stop together leave no question to learn from: their sum must be below 1")
        return self


class Mining(Frozen):
    """Hard negatives are what our own search finds first and no judgement names. `negatives`: of a question. Of the first `depth`
    hits those are left out that lie more than `most_above` (cosine) above the best relevant passage: they may well be relevant.
    """

    negatives: int = Field(default=4, ge=0, le=50)
    depth: int = Field(default=50, ge=1, le=1000)
    most_above: float = Field(default=0.05, ge=0, allow_inf_nan=False)


class Moving(Frozen):
    """Of a query adapter. `scale`: of cosines in the softmax; None: the one that suits the vectors as they are. `penalties`: on
    the squared distance to the identity; the one with the lowest loss on the stopping questions is taken. `pool`: passages that
    each question is told from, at most.
    """

    scale: float | None = Field(default=None, gt=0, le=1000)
    penalties: tuple[Penalty, ...] = Field(default=(30.0, 10.0, 3.0, 1.0, 0.3), min_length=1)
    steps: int = Field(default=60, ge=1)
    pool: int = Field(default=4096, ge=16)


class RetrievalRecipe(Frozen):
    """`training`: fields of sentence-transformers' training arguments, by their own names."""

    name: str
    method: RetrievalMethod
    model: RetrievalModel = RetrievalModel()
    data: RetrievalData = RetrievalData()
    mining: Mining = Mining()
    adapter: Moving = Moving()
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        wrong = sorted(set(NOT_OF[self.method]) & self.model_fields_set)
        if wrong:
            raise ValueError(f"method = {self.method!r} has no [{wrong[0]}]")
        if self.method == "query-adapter":
            given = {*self.training, *self.model.model_fields_set, *self.data.model_fields_set}
            if others := sorted(given - {"seed", "base", "held_out", "stop", "max_rows"}):
                raise ValueError(f"method = {self.method!r} has no {others[0]!r}")
        if self.method == "reranker" and self.mining.negatives == 0:
            raise ValueError("a reranker learns to tell passages apart: mining.negatives must be at least 1")
        return self

    @property
    def seed(self) -> int:
        """Raises InvalidError."""
        given = self.training.get("seed", 17)
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < 2**32:
            raise InvalidError(
                f"training argument seed = {given!r} does not fit: give a whole number from 0 to 2**32 - 1"
            )
        return given


NOT_OF: dict[RetrievalMethod, tuple[str, ...]] = {
    "embedder": ("adapter",),
    "reranker": ("adapter",),
    "query-adapter": ("mining",),
}
SECTIONS: dict[str, type[Frozen]] = {
    "model": RetrievalModel,
    "data": RetrievalData,
    "mining": Mining,
    "adapter": Moving,
}


@cache
def retrieval_recipes() -> tuple[str, ...]:
    """The product's own, by name."""
    return tuple(sorted(path.stem for path in _FILES.glob("*.toml")))


def is_retrieval(name: str | None) -> bool:
    """Whether a recipe's name, or the method in a file of one's own, is one of these. A file that cannot be read is not."""
    if name is None or not name.endswith(".toml"):
        return name in retrieval_recipes()
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8")).get("method") in get_args(RetrievalMethod)
    except (OSError, ValueError):
        return False


def read_retrieval_recipe(name: str, settings: Sequence[str] = ()) -> RetrievalRecipe:
    """As `recipe.read_recipe`. Raises NotFoundError, InvalidError."""
    path = Path(name) if name.endswith(".toml") else _FILES / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"there is no recipe {name!r}; there are {', '.join(retrieval_recipes())}") from error
    except ValueError as error:
        raise InvalidError(f"recipe {name!r} is not valid TOML: {error}") from error
    for setting in settings:
        put_setting(content, setting, SECTIONS)
    try:
        return RetrievalRecipe.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InvalidError(f"recipe {name!r} does not fit: {said}") from error


def about(name: str) -> str:
    """-> the first sentence of a recipe's comment."""
    lines = (_FILES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    said = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return said.partition(". ")[0].rstrip(".")
