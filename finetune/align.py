"""Alignment to what people prefer, as one line: imitate the answers they chose, then learn from their comparisons, then measure.

Ouyang et al., 2022 (arXiv 2203.02155), by PPO against a reward model; or by DPO, which needs none (Rafailov et al., 2023). The
pairs are parted by what is asked: half A is learned from, half B trains a second reward model, the judge, which no training sees,
and the rest measures. Each training has its own folder; what is finished there is kept, so a line that was ended goes on.

out/align.json        what is aligned to what; out/rows/: the parts
out/sft, reward, dpo or ppo, judge    trainings
out/measures/         each model's answers and probabilities
out/report.html, report.json          written last
"""

import gc
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune import align_figures, runs
from finetune.align_figures import STAGES, Aligned, Held, Measured, Stage, Step
from finetune.align_plan import LINES, RECIPES, ROWS, Alignment, recipes_of
from finetune.align_report import write_report
from finetune.base_folder import find_base
from finetune.declines import requests
from finetune.hooks import SILENT, Hooks
from finetune.human_pairs import Parts, chosen_answers, part, read_pairs
from finetune.recipe import Recipe
from finetune.rows import read_rows
from finetune.rows_lines import rows_of, write_rows, write_whole
from finetune.rows_split import asked
from finetune.schemas import Manifest, Rows
from finetune.settings import FinetuneSettings
from finetune.train import read_data, require_stack, train
from ingest.catalog import now
from ingest.errors import ConflictError, InvalidError
from service.base_model import read_base

if TYPE_CHECKING:
    from finetune.chat import Chat

logger = logging.getLogger(__name__)
DOES = {
    "sft": "imitates the answers that people chose, half A",
    "reward": "reward model of half A",
    "dpo": "prefers the chosen answers, half A",
    "ppo": "its own answers to the prompts of half A, against that reward model",
    "judge": "reward model of half B, which measures",
}
ASKED, MEASURES, REPORT, PAGE = "align.json", "measures", "report.json", "report.html"


class _Line(NamedTuple):
    """What all steps share."""

    asked: Alignment
    out: Path
    base: Path
    recipes: Mapping[str, Recipe]
    settings: FinetuneSettings
    models: Path
    home: Path
    hooks: Hooks
    tell: Callable[[str], None]


def align(
    wanted: Alignment,
    *,
    out: Path,
    settings: FinetuneSettings,
    models: Path,
    home: Path,
    hooks: Hooks = SILENT,
    tell: Callable[[str], None] = logger.info,
    restart: bool = False,
) -> Aligned:
    """Trains and measures into `out`, or goes on there. `tell`: what is begun. Raises StoppedError when a training is cancelled;
    InvalidError, ConflictError, LockedError, SettingsError, UnavailableError.
    """
    require_stack()
    recipes = recipes_of(wanted, out)
    parts = part(read_pairs(wanted.pairs), wanted.held_out, wanted.seed)
    helpful = read_rows(wanted.helpful, "ppo")
    mix = _without(read_rows(wanted.mix, "sft"), helpful) if wanted.mix else None
    base = find_base(recipes["sft"].model.base, models)
    with runs.claimed(out):
        _begin(out, _identity(wanted, recipes, parts, helpful, mix, base, out), restart)
        _write_parts(out / ROWS, parts, mix)
        line = _Line(wanted, out, base, recipes, settings, models, home, hooks, tell)
        steps = [_trained(line, name) for name in LINES[wanted.by]]
        return _measured(line, parts, helpful, steps)


def _without(mix: Rows, helpful: Rows) -> Rows:
    """-> the rows that ask nothing of what measures, and show none of its documents. Raises InvalidError where none is left."""
    questions = {text for row in helpful.rows for text in asked(row)}
    documents = {document for row in helpful.rows for document in row.source.documents}
    kept = [
        at
        for at, row in enumerate(mix.rows)
        if not (asked(row) & questions or documents.intersection(row.source.documents))
    ]
    if not kept:
        raise InvalidError(f"every row of {mix.name!r} is also in {helpful.name!r}, which measures: give other rows")
    return rows_of([mix.rows[at] for at in kept], [mix.places[at] for at in kept], mix.name, mix.prompt_version)


def _identity(
    wanted: Alignment,
    recipes: Mapping[str, Recipe],
    parts: Parts,
    helpful: Rows,
    mix: Rows | None,
    base: Path,
    out: Path,
) -> dict[str, Any]:
    """What makes two alignments the same, wherever they lie."""
    own = wanted.model_dump(mode="json", exclude={"pairs", "helpful", "mix", "base", "settings", "margin"})
    settled = {step: runs.settled(recipe) for step, recipe in recipes.items()}
    for one in settled.values():
        del one["model"]["base"]
    digests: dict[str, Any] = {
        "pairs": [one.digest for one in (parts.a, parts.b, parts.held_out)],
        "helpful": helpful.digest,
    }
    digests["mix"] = mix.digest if mix else None
    held = {"asked": own, "recipes": settled, **digests, "base": read_base(str(base.absolute()), None).identity}
    placed: dict[str, Any] = json.loads(json.dumps(held).replace(json.dumps(str(out))[1:-1], "OUT"))
    return placed


def _begin(out: Path, identity: dict[str, Any], restart: bool) -> None:
    """Raises ConflictError where the folder holds something else."""
    if restart and (out / ASKED).exists():
        for name in (ROWS, MEASURES, *RECIPES):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (REPORT, PAGE, ASKED):
            (out / name).unlink(missing_ok=True)
    try:
        held = json.loads((out / ASKED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [path.name for path in out.iterdir() if path.name != runs.LOCK]
        if others:
            raise ConflictError(
                f"{str(out)!r} holds other files, as {min(others)!r}: give an empty folder with --out DIR"
            ) from None
        write_whole(out / ASKED, (json.dumps(identity, indent=1) + "\n").encode())
        return
    except ValueError as error:
        raise InvalidError(f"{str(out / ASKED)!r} cannot be read: {error}; add --restart to begin anew") from error
    differing = [key for key in identity if not isinstance(held, dict) or held.get(key) != identity[key]]
    if differing:
        raise ConflictError(
            f"{str(out)!r} holds an alignment with other {' and '.join(differing)}: add --restart to drop it, or give "
            "another folder with --out DIR"
        )


def _write_parts(folder: Path, parts: Parts, mix: Rows | None) -> None:
    folder.mkdir(exist_ok=True)
    taught = chosen_answers(parts.a)
    for name, rows in (
        ("sft", [*taught.rows, *(mix.rows if mix else ())]),
        ("pairs-a", parts.a.rows),
        ("pairs-b", parts.b.rows),
    ):
        write_rows(rows, folder / f"{name}.jsonl")


def _trained(line: _Line, name: str) -> Step:
    folder = line.out / name
    if (folder / runs.MANIFEST).exists():
        line.tell(f"{name}: kept, {DOES[name]}")
        return _step(name, runs.read_manifest(folder))
    from finetune.hardware import free_memory
    from finetune.memory import check_fits, estimate

    line.tell(f"{name}: {DOES[name]}")
    recipe = line.recipes[name]
    data = read_data(recipe)
    check_fits(estimate(recipe, line.base, data.learn), free_memory(), line.settings.memory_share, recipe)
    manifest = train(
        recipe,
        out=folder,
        settings=line.settings,
        models=line.models,
        home=line.home,
        hooks=line.hooks,
        data=data,
    )
    gc.collect()  # a trainer and its model hold each other
    return _step(name, manifest)


def _step(name: str, manifest: Manifest) -> Step:
    return Step(
        name=name,
        does=DOES[name],
        rows=manifest.rows,
        held_out_rows=manifest.held_out_rows,
        seconds=manifest.seconds,
        metrics=manifest.metrics,
    )


def _measured(line: _Line, parts: Parts, helpful: Rows, steps: Sequence[Step]) -> Aligned:
    from finetune import align_measure
    from finetune.chat import read_chat

    wanted, chat = line.asked, read_chat(line.base)
    (line.out / MEASURES).mkdir(exist_ok=True)
    most = (wanted.most_pairs, wanted.most_prompts, wanted.most_helpful, wanted.tokens)
    held = align_measure.choose(parts.held_out, helpful, requests(), chat, line.base, most, wanted.seed)
    measured = {stage: _of_stage(line, stage, chat, held) for stage in STAGES}
    answers = {stage: one.answers for stage, one in measured.items()}
    judge = _of_judge(line, "judge", held, answers)
    own = _of_judge(line, "reward", held, answers) if wanted.by == "ppo" else None
    figures = align_figures.figures_of(held, measured, judge, own)
    found = Aligned(
        **_about(line, parts, helpful, held),
        steps=tuple(steps),
        judge_accuracy=align_figures.judge_accuracy(judge["pairs"], held.pairs),
        figures=figures,
        kinds=align_figures.kinds(held.requests, answers),
        words=align_figures.mean_words(answers, list(held.prompts)),
        helpfulness=align_figures.helpfulness(figures, wanted.margin),
    )
    write_report(found, held, measured, judge, line.out / PAGE)
    write_whole(line.out / REPORT, (found.model_dump_json(indent=1) + "\n").encode())
    return found


def _of_stage(line: _Line, stage: Stage, chat: "Chat", held: Held) -> Measured:
    """-> the model's probabilities and answers, of its file where they are there."""
    from finetune import align_measure
    from finetune.check_peft import computing

    file = line.out / MEASURES / f"{stage}.json"
    if file.exists():
        return Measured.model_validate_json(file.read_text(encoding="utf-8"))
    adapter = {"before": line.recipes["sft"].trained.parent, "sft": line.out / "sft"}.get(
        stage, line.out / line.asked.by
    )
    line.tell(f"measuring {stage}: {len(held.pairs)} pairs, {len(held.asked())} answers")
    with computing(line.settings.threads):
        model = align_measure.load(adapter, line.base, _dtype(line))
        odds = align_measure.measured_odds(model, chat, held.pairs)
        answers = align_measure.measured_answers(model, chat, held, line.asked.tokens, line.tell)
    found = Measured(odds=odds, answers=answers)
    write_whole(file, found.model_dump_json(indent=1).encode())
    del model
    gc.collect()
    return found


def _of_judge(
    line: _Line, name: str, held: Held, answers: Mapping[Stage, Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """-> by model its answers' scores, and under "pairs" how far the chosen answers of the pairs are above the rejected ones."""
    from finetune import align_measure
    from finetune.check_peft import computing
    from finetune.reward_model import load_reward_model

    file = line.out / MEASURES / f"{name}.json"
    if file.exists():
        kept: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    line.tell(f"{name}: scores {len(STAGES) * len(held.prompts)} answers")
    with computing(line.settings.threads):
        model = load_reward_model(line.out / name, line.base, _dtype(line))
        scores = {str(stage): align_measure.judged(model, held, answers[stage]) for stage in STAGES}
        scores["pairs"] = align_measure.judged_pairs(model, held)
    write_whole(file, json.dumps(scores, indent=1).encode())
    return scores


def _dtype(line: _Line) -> str:
    from finetune.hardware import training_dtype

    asked_for = line.recipes["sft"].model.dtype
    return training_dtype(line.home, line.settings.threads) if asked_for == "auto" else asked_for


def _about(line: _Line, parts: Parts, helpful: Rows, held: Held) -> dict[str, Any]:
    """-> the fields of `Aligned` that say what was aligned to what."""
    parent = line.recipes["sft"].trained.parent
    counts = {
        "pairs_a": len(parts.a.rows), "pairs_b": len(parts.b.rows), "pairs_held_out": len(parts.held_out.rows),
        "openings": parts.openings, "pairs_left_out": len(parts.a.left_out), "too_long": held.left_out,
        "pairs": len(held.pairs), "prompts": len(held.prompts), "requests": len(held.requests),
        "helpful": len(held.helpful),
    }  # fmt: skip
    return {
        "created_at": now(),
        "by": line.asked.by,
        "base": read_base(str(line.base.absolute()), None).identity,
        "began_from": parent.name if parent else None,
        "pairs": parts.held_out.name,
        "pairs_digest": parts.held_out.digest,
        "helpful": helpful.name,
        "helpful_digest": helpful.digest,
        "counts": counts,
        "margin": line.asked.margin,
        "adapter": line.asked.by,
        "settings": line.asked.model_dump(mode="json", exclude={"pairs", "helpful", "mix"}),
    }
