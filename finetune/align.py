"""Alignment to what people prefer, as one line: imitate the answers they chose, then learn from their comparisons, then measure.

Ouyang et al., 2022 (arXiv 2203.02155), by PPO against a reward model; or by DPO, which needs none (Rafailov et al., 2023). The
pairs are parted by what is asked: half A is learned from, half B trains a second reward model, the judge, and the rest
measures. Each training has its own folder; what is finished there is kept, so a line that was ended goes on.
"""

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune import align_figures, runs
from finetune.align_figures import STAGES, Aligned, Held, Measured, Stage, Step
from finetune.align_folder import MEASURES, PAGE, REPORT, begin, identity, write_parts
from finetune.align_plan import LINES, Alignment, recipes_of
from finetune.align_report import write_report
from finetune.base_folder import find_base
from finetune.declines import requests
from finetune.full_disk import writing
from finetune.hooks import SILENT, Hooks
from finetune.human_pairs import Parts, apart, part, read_pairs
from finetune.recipe import Recipe
from finetune.rows import read_rows
from finetune.schemas import Manifest, PromptRow, Rows
from finetune.settings import FinetuneSettings
from finetune.train import read_data, require_stack, train
from ingest.catalog import now
from ingest.errors import InvalidError
from ingest.files import write_whole
from service.base_model import read_base
from service.tuning import TuneProgress

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


class _Given(NamedTuple):
    """The rows. `mix`: those that are imitated beside the pairs' answers."""

    parts: Parts
    helpful: Rows
    mix: Rows | None


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
    out = out.absolute()
    recipes = recipes_of(wanted, out)
    given = _read(wanted)
    base = find_base(recipes["sft"].model.base, models)
    runs.manifests_before(recipes["sft"])
    line = _Line(wanted, out, base, recipes, settings, models, home, hooks, tell)
    held, chat = _held(line, given)  # now: what cannot be measured is not trained for
    with runs.claimed(out), writing(out):
        same = identity(wanted, recipes, given.parts, given.mix, given.helpful, requests(), base)
        begin(out, same, restart)
        write_parts(out, given.parts, given.mix)
        steps = [_trained(line, name) for name in LINES[wanted.by]]
        return _measured(line, given, held, chat, steps)


def _read(wanted: Alignment) -> _Given:
    """Nothing that measures is learned: neither what `helpful` and the requests ask, nor, by what is mixed in, what the judge's
    pairs and the held-out ones do. Raises InvalidError.
    """
    helpful = read_rows(wanted.helpful, "ppo")
    asked = [PromptRow(prompt=one.prompt) for one in requests()]
    parts = part(read_pairs(wanted.pairs, [*helpful.rows, *asked]), wanted.held_out, wanted.seed)
    if wanted.mix is None:
        return _Given(parts, helpful, None)
    mix = apart(read_rows(wanted.mix, "sft"), helpful.rows, nearly=False)
    return _Given(parts, helpful, apart(mix, [*asked, *parts.b.rows, *parts.held_out.rows]))


def _held(line: _Line, given: _Given) -> tuple[Held, "Chat"]:
    """-> what all models are measured on. Raises InvalidError, SettingsError."""
    from finetune import align_measure
    from finetune.chat import read_chat

    wanted, chat = line.asked, read_chat(line.base)
    most = align_measure.Most(wanted.most_pairs, wanted.most_prompts, wanted.most_helpful, wanted.tokens)
    held_out = given.parts.held_out
    return align_measure.choose(held_out, given.helpful, requests(), chat, line.base, most, wanted.seed), chat


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
        notes=manifest.notes,
    )


def _measured(line: _Line, given: _Given, held: Held, chat: "Chat", steps: Sequence[Step]) -> Aligned:
    (line.out / MEASURES).mkdir(exist_ok=True)
    measured = {stage: _of_stage(line, stage, chat, held) for stage in STAGES}
    answers = {stage: one.answers for stage, one in measured.items()}
    judge = _of_judge(line, "judge", held, answers)
    own = _of_judge(line, "reward", held, answers) if line.asked.by == "ppo" else None
    figures = align_figures.figures_of(held, measured, judge, own)
    found = Aligned(
        **_about(line, given, held),
        steps=tuple(steps),
        judge_accuracy=align_figures.judge_accuracy(judge["pairs"], held.pairs),
        figures=figures,
        kinds=align_figures.kinds(held.requests, answers),
        words=align_figures.mean_words(answers, list(held.prompts)),
        helpfulness=align_figures.helpfulness(figures, line.asked.margin),
    )
    write_report(found, held, measured, judge, line.out / PAGE)
    write_whole(line.out / REPORT, (found.model_dump_json(indent=1) + "\n").encode())
    return found


def _of_stage(line: _Line, stage: Stage, chat: "Chat", held: Held) -> Measured:
    """-> the model's probabilities and answers, of its file where they are there."""
    from finetune import align_measure
    from finetune.check_peft import computing

    file = line.out / MEASURES / f"{stage}.json"
    if (kept := _kept(file)) is not None:
        return Measured.model_validate(kept)
    adapter = {"before": line.recipes["sft"].trained.parent, "sft": line.out / "sft"}.get(
        stage, line.out / line.asked.by
    )
    line.tell(f"measuring {stage}: {len(held.pairs)} pairs, {len(held.asked())} answers")
    with computing(line.settings.threads):
        model = align_measure.load(adapter, line.base, _dtype(line, "sft"))
        found = align_measure.measured(model, chat, held, line.asked.tokens, _progress(line))
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
    if (kept := _kept(file)) is not None:
        before: dict[str, dict[str, float]] = kept
        return before
    line.tell(f"{name}: scores {len(STAGES) * len(held.prompts)} answers and {len(held.pairs)} pairs")
    with computing(line.settings.threads):
        model = load_reward_model(line.out / name, line.base, _dtype(line, name))
        scores = {str(stage): align_measure.judged(model, held, answers[stage]) for stage in STAGES}
        scores["pairs"] = align_measure.judged_pairs(model, held)
    write_whole(file, json.dumps(scores, indent=1).encode())
    del model
    gc.collect()
    return scores


def _kept(file: Path) -> Any:
    """-> what a measurement left; None where it was not made. Raises InvalidError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InvalidError(
            f"{str(file)!r} is not what was measured ({error}): remove it, and it is made again"
        ) from error


def _progress(line: _Line) -> Callable[[int, int], None]:
    return lambda done, of: line.hooks.progress(TuneProgress(stage="checking", step=done, steps=of))


def _dtype(line: _Line, step: str) -> str:
    """All models that answer are measured in the same one."""
    from finetune.hardware import training_dtype

    asked_for = line.recipes[step].model.dtype
    return training_dtype(line.home, line.settings.threads) if asked_for == "auto" else asked_for


def _about(line: _Line, given: _Given, held: Held) -> dict[str, Any]:
    """-> the fields of `Aligned` that say what was aligned to what."""
    parent, parts, helpful = line.recipes["sft"].trained.parent, given.parts, given.helpful
    counts = {
        "pairs_a": len(parts.a.rows), "pairs_b": len(parts.b.rows), "pairs_held_out": len(parts.held_out.rows),
        "openings": parts.openings, "pairs_left_out": len(parts.a.left_out),
        "mixed": len(given.mix.rows) if given.mix else 0, "mixed_left_out": len(given.mix.left_out) if given.mix else 0,
        "too_long": held.left_out, "pairs": len(held.pairs), "prompts": len(held.prompts),
        "requests": len(held.requests), "helpful": len(held.helpful),
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
