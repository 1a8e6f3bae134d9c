"""What a recipe file gets: everything that is settled before a model is loaded. And the last touches to a trainer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from finetune.answer_positions import score_answers_only
from finetune.chat import Chat, prompt_ids
from finetune.recipe import Recipe
from finetune.schemas import PromptRow, Rows
from ingest.errors import InvalidError
from service.base_model import window

One = TypeVar("One")


class Run(NamedTuple):
    """`dtype`: float32, bfloat16 or float16. `resume_from`: a checkpoint's folder. `callbacks`: transformers' own kind."""

    recipe: Recipe
    base: Path
    out: Path
    chat: Chat
    learn: Rows
    held_out: Rows
    dtype: str
    trackers: tuple[str, ...]
    callbacks: Sequence[Any]
    resume_from: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


class Outcome(NamedTuple):
    """`trainer` holds the weights to keep: the best on the held-out part, else the last. `left_out`: rows over `max_length`.
    `metrics`: of the method's own, for the manifest. `notes`: what else it should say of the run.
    """

    trainer: Any
    left_out: int
    metrics: Mapping[str, float] = {}
    notes: tuple[str, ...] = ()


def fitting(
    encoded: Sequence[One], places: Sequence[str], length: Callable[[One], int], most: int | None
) -> tuple[list[One], int]:
    """-> those of at most `most` tokens, and how many are longer: an answer that is cut teaches not to end.

    Raises InvalidError where none is left.
    """
    if most is None:
        return list(encoded), 0
    kept = [one for one in encoded if length(one) <= most]
    if encoded and not kept:
        shortest = min(range(len(encoded)), key=lambda at: length(encoded[at]))
        where = places[shortest] if places else f"row {shortest + 1}"
        raise InvalidError(
            f"max_length = {most} leaves no row: the shortest, {where}, has {length(encoded[shortest])} tokens; "
            "raise it with --set max_length=N"
        )
    return kept, len(encoded) - len(kept)


def fitting_prompts(run: Run, rows: Rows, answer: int) -> tuple[list[tuple[PromptRow, list[int]]], tuple[str, ...]]:
    """-> the prompts with their tokens, as serving sends them, and the places of those that are left out: longer than
    `max_prompt_length`, or than what the model's window leaves beside an answer of `answer` tokens. Raises InvalidError where
    none is left.
    """
    found = [row for row in rows.rows if isinstance(row, PromptRow)]
    places = rows.places or tuple(f"row {at + 1}" for at in range(len(found)))
    room = window(run.base)
    limits = [one for one in (run.recipe.data.max_prompt_length, room and room - answer) if one is not None]
    most = min(limits, default=None)
    encoded = [(row, prompt_ids(run.chat, row.prompt)) for row in found]
    fits = [most is None or len(ids) <= most for _, ids in encoded]
    kept = [one for one, fit in zip(encoded, fits, strict=True) if fit]
    if encoded and not kept:
        shortest = min(range(len(encoded)), key=lambda at: len(encoded[at][1]))
        raise InvalidError(
            f"no prompt fits: the shortest, {places[shortest]}, has {len(encoded[shortest][1])} tokens, and it may have {most} "
            f"(max_prompt_length {run.recipe.data.max_prompt_length}, and {room} of the model for it and an answer of {answer}): "
            "raise max_prompt_length, lower the answer's length, or give shorter prompts"
        )
    return kept, tuple(place for place, fit in zip(places, fits, strict=True) if not fit)


def trainer_of(kind: type[Any], run: Run, **parts: Any) -> Any:
    """-> TRL's trainer, ready to train. Raises InvalidError for settings that it refuses."""
    try:
        trainer = kind(processing_class=run.chat.tokenizer, callbacks=list(run.callbacks), **parts)
    except (ValueError, NotImplementedError) as error:
        raise InvalidError(f"recipe {run.recipe.name!r} does not fit: {error}") from error
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # progress is told by ours
    for weight in trainer.model.parameters():
        if weight.requires_grad:  # TRL makes a quantised base's adapters bfloat16, where small steps are rounded away
            weight.data = weight.data.float()
    if trainer.args.device.type == "cpu":
        score_answers_only(trainer.model)
        if getattr(trainer, "ref_model", None) is not None:
            score_answers_only(trainer.ref_model)
    return trainer
