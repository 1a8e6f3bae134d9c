"""An alignment's folder: what it was begun with, so that the same command goes on there.

What trains may be asked for otherwise as long as it has not begun; what only measures may at any time, and is then measured anew.

out/align.json        what is aligned to what
out/rows/             the parts
out/sft, reward, dpo or ppo, judge    trainings
out/measures/         each model's answers and probabilities
out/report.html, report.json          written last
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.align_plan import RECIPES, ROWS, Alignment
from finetune.declines import Request
from finetune.human_pairs import Parts, chosen_answers
from finetune.recipe import Recipe
from finetune.rows_lines import write_rows
from finetune.schemas import Rows
from ingest.errors import ConflictError, InvalidError
from ingest.files import write_whole
from service.base_model import read_base

ASKED, MEASURES, REPORT, PAGE = "align.json", "measures", "report.json", "report.html"


def identity(
    wanted: Alignment,
    recipes: Mapping[str, Recipe],
    parts: Parts,
    mix: Rows | None,
    helpful: Rows,
    requests: Sequence[Request],
    base: Path,
) -> dict[str, Any]:
    """What makes two alignments the same, wherever they lie. `measured`: what trains nothing."""
    trained: dict[str, Any] = {
        "line": {"by": wanted.by, "held_out": wanted.held_out, "seed": wanted.seed},
        "rows": {
            "pairs": [one.digest for one in (parts.a, parts.b, parts.held_out)],
            "mix": mix.digest if mix else None,
        },
        "base": read_base(str(base.absolute()), None).identity,
        "recipes": {step: _settled(step, recipe) for step, recipe in recipes.items()},
    }
    measured = {
        "most": [wanted.most_pairs, wanted.most_prompts, wanted.most_helpful, wanted.tokens],
        "helpful": helpful.digest,
        "requests": runs.digest_of_identity({"requests": [one.model_dump() for one in requests]}),
    }
    same: dict[str, Any] = json.loads(json.dumps(trained | {"measured": measured}))
    return same


def _settled(step: str, recipe: Recipe) -> dict[str, Any]:
    """Without the places of what other steps of the line make."""
    held = runs.settled(recipe)
    del held["model"]["base"]
    if step in ("dpo", "ppo"):
        held["trained"]["parent"] = "sft"
    if step == "ppo":
        held["reward"]["reward_model"] = "reward"
    return held


def begin(out: Path, wanted: dict[str, Any], restart: bool) -> None:
    """`wanted`: an `identity`. Raises ConflictError where the folder holds something else, InvalidError."""
    if restart and (out / ASKED).exists():
        _drop(out, (ROWS, MEASURES, *RECIPES, REPORT, PAGE, ASKED))
    held = _held(out)
    if held is not None:
        if differing := _differing(out, held, wanted):
            raise ConflictError(
                f"{str(out)!r} holds an alignment with other {' and other '.join(differing)}: add --restart to drop all of it, "
                "or give another folder with --out DIR"
            )
        finished = all((out / step / runs.MANIFEST).exists() for step in wanted["recipes"])
        if held.get("measured") != wanted["measured"] or not finished:
            _drop(out, (MEASURES, REPORT, PAGE))
    if held != wanted:
        write_whole(out / ASKED, (json.dumps(wanted, indent=1) + "\n").encode())


def write_parts(out: Path, parts: Parts, mix: Rows | None) -> None:
    """The rows of each training."""
    folder = out / ROWS
    folder.mkdir(exist_ok=True)
    taught = chosen_answers(parts.a)
    for name, rows in (
        ("sft", [*taught.rows, *(mix.rows if mix else ())]),
        ("pairs-a", parts.a.rows),
        ("pairs-b", parts.b.rows),
    ):
        write_rows(rows, folder / f"{name}.jsonl")


def _held(out: Path) -> dict[str, Any] | None:
    """-> what the folder was begun with; None for an empty one. Raises ConflictError for files of others, InvalidError."""
    try:
        held = json.loads((out / ASKED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [one.name for one in out.iterdir() if one.name != runs.LOCK and not one.name.startswith(f".{ASKED}.")]
        if others:
            raise ConflictError(
                f"{str(out)!r} holds other files, as {min(others)!r}: give an empty folder with --out DIR"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise InvalidError(f"{str(out / ASKED)!r} cannot be read: {error}; add --restart to begin anew") from error
    if not isinstance(held, dict):
        raise InvalidError(f"{str(out / ASKED)!r} is not what `graft align` writes; add --restart to begin anew")
    return held


def _differing(out: Path, held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """-> what has been trained otherwise, in words."""
    begun = [step for step in RECIPES if _has_begun(out / step)]
    if not begun:
        return []
    before = held.get("recipes")
    recipes = before if isinstance(before, dict) else {}
    return [
        *(key for key in ("line", "rows", "base") if held.get(key) != wanted[key]),
        *(f"settings of {step}" for step in begun if recipes.get(step) != wanted["recipes"].get(step)),
    ]


def _has_begun(folder: Path) -> bool:
    return (folder / runs.MANIFEST).exists() or runs.last_checkpoint(folder) is not None


def _drop(out: Path, names: Sequence[str]) -> None:
    for name in names:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
