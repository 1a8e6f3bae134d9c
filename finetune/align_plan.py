"""What an alignment is asked for, and the recipe of each of its trainings. Light."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.arguments import refuse_unknown
from finetune.ppo_settings import read_settings
from finetune.recipe import Recipe, Trained, read_recipe, with_base, with_settings
from ingest.errors import InvalidError
from ingest.schemas import Frozen

By = Literal["dpo", "ppo"]
RECIPES = {"sft": "sft-lora", "reward": "reward", "dpo": "dpo-lora", "ppo": "ppo", "judge": "reward"}
LINES: dict[By, tuple[str, ...]] = {"dpo": ("sft", "dpo", "judge"), "ppo": ("sft", "reward", "ppo", "judge")}
ROWS = "rows"  # folder of the parts of the pairs
ELSEWHERE = {  # settings of a recipe that the line makes
    "data": "the rows are parts of PAIRS",
    "eval_data": "the rows are parts of PAIRS",
    "base": "give --base",
    "reward_model": "it is the one of the step reward",
}


class Alignment(Frozen):
    """What is asked for. `settings`: as "sft.learning_rate=1e-4", of a step's recipe; without a step, of every one's."""

    pairs: Path
    helpful: Path  # rows that measure whether it still answers questions
    mix: Path | None = None  # rows that are imitated beside the chosen answers
    by: By = "dpo"
    base: str | None = None
    settings: tuple[str, ...] = ()
    held_out: float = Field(default=0.2, gt=0, lt=1)  # share of the pairs
    most_pairs: int = Field(default=400, ge=1)  # held-out ones that are compared
    most_prompts: int = Field(default=100, ge=1)  # of them, that are answered
    most_helpful: int = Field(default=200, ge=1)
    tokens: int = Field(default=96, ge=1)  # of an answer
    margin: float = Field(default=0.02, ge=0)  # of F1, that may be lost
    seed: int = 17


def recipes_of(wanted: Alignment, out: Path) -> dict[str, Recipe]:
    """-> by step, with where its rows and what it goes on from will be. Raises InvalidError, naming the step."""
    given = _by_step(wanted)
    found: dict[str, Recipe] = {}
    for step in LINES[wanted.by]:
        try:
            found[step] = _recipe(step, wanted.base, given[step], out, found)
        except InvalidError as error:
            raise InvalidError(f"step {step}: {error}") from error
    return found


def _recipe(step: str, base: str | None, settings: list[str], out: Path, found: dict[str, Recipe]) -> Recipe:
    """`found`: of the steps before it. Raises InvalidError."""
    recipe = read_recipe(RECIPES[step], _placed(step, out))
    recipe = with_settings(with_base(recipe, base) if base else recipe, settings)
    trained = recipe.trained
    if step in ("dpo", "ppo"):
        trained = _going_on(found["sft"].trained, out / "sft", 0.0 if step == "ppo" else trained.lora_dropout)
    elif trained.parent is not None:
        trained = trained.model_copy(update={"parent": trained.parent.absolute()})
    recipe = recipe.model_copy(update={"trained": trained})
    refuse_unknown(recipe)
    if step == "ppo":
        read_settings(recipe.training)
    return recipe


def _going_on(supervised: Trained, folder: Path, dropout: float) -> Trained:
    """The matrices are what the supervised run made them; what is dropped by chance is each run's own, and nothing in PPO."""
    held = supervised.model_dump(exclude_unset=True) | {"parent": folder, "lora_dropout": dropout}
    return Trained.model_validate(held)


def _placed(step: str, out: Path) -> tuple[str, ...]:
    file = {"sft": "sft.jsonl", "judge": "pairs-b.jsonl"}.get(step, "pairs-a.jsonl")
    data = f"data={_quoted(out / ROWS / file)}"
    reward = ("rewards={reward_model=1.0}", f"reward_model={_quoted(out / 'reward')}")
    return (data, *reward) if step == "ppo" else (data,)


def _quoted(path: Path) -> str:
    """As TOML has it."""
    return json.dumps(str(path), ensure_ascii=False)


def _by_step(wanted: Alignment) -> dict[str, list[str]]:
    """-> the settings of each step; a judge has those of a reward model, and its own."""
    line = LINES[wanted.by]
    given: dict[str, list[str]] = {step: [] for step in RECIPES}
    for setting in wanted.settings:
        key = setting.partition("=")[0].strip()
        if said := ELSEWHERE.get(key.rpartition(".")[2]):
            raise InvalidError(f"--set {setting!r}: {said}")
        step, dot, rest = key.partition(".")
        if not dot or step not in RECIPES:
            for own in given.values():
                own.append(setting)
            continue
        if step not in line and step != "reward":
            raise InvalidError(f"--set {setting!r}: by {wanted.by} the steps are {', '.join(line)}")
        field = rest.removeprefix("trained.")
        if step in ("dpo", "ppo") and field in Trained.model_fields and (step, field) != ("dpo", "lora_dropout"):
            raise InvalidError(f"--set {setting!r}: {step} goes on from the supervised adapter, so set sft.{field}")
        given[step].append(setting.partition(".")[2])
    return given | {"judge": [*given["reward"], *(one for one in given["judge"] if one not in given["reward"])]}
