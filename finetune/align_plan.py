"""What an alignment is asked for, and the recipe of each of its trainings. Light."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.arguments import refuse_unknown
from finetune.recipe import Recipe, Trained, read_recipe, with_settings
from ingest.errors import InvalidError
from ingest.schemas import Frozen

By = Literal["dpo", "ppo"]
RECIPES = {"sft": "sft-lora", "reward": "reward", "dpo": "dpo-lora", "ppo": "ppo", "judge": "reward"}
LINES: dict[By, tuple[str, ...]] = {"dpo": ("sft", "dpo", "judge"), "ppo": ("sft", "reward", "ppo", "judge")}
ROWS = "rows"  # folder of the parts of the pairs


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
    """-> by step, with where its rows and what it goes on from will be. Raises InvalidError."""
    given = _by_step(wanted)
    found: dict[str, Recipe] = {}
    for step in LINES[wanted.by]:
        recipe = read_recipe(RECIPES[step], _placed(step, out))
        base = wanted.base or recipe.model.base
        recipe = with_settings(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": base})}), given[step]
        )
        if step in ("dpo", "ppo"):  # the matrices are what the supervised run made them
            trained = found["sft"].trained.model_dump(exclude_unset=True) | {"parent": out / "sft"}
            recipe = recipe.model_copy(update={"trained": Trained.model_validate(trained)})
        refuse_unknown(recipe)
        found[step] = recipe
    return found


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
        step, dot, rest = setting.partition("=")[0].partition(".")
        if not dot or step not in RECIPES:
            for own in given.values():
                own.append(setting)
            continue
        if step not in line and step != "reward":
            raise InvalidError(f"--set {setting!r}: by {wanted.by} the steps are {', '.join(line)}")
        if step in ("dpo", "ppo") and rest.removeprefix("trained.") in Trained.model_fields:
            raise InvalidError(f"--set {setting!r}: {step} goes on from the supervised adapter, so set sft.{rest}")
        given[step].append(setting.partition(".")[2])
    return given | {"judge": [*given["reward"], *(one for one in given["judge"] if one not in given["reward"])]}
