"""What a recipe file gets: everything that is settled before a model is loaded. And the last touches to a trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from finetune.answer_positions import score_answers_only
from finetune.chat import Chat
from finetune.recipe import Recipe
from finetune.schemas import Rows
from ingest.errors import InvalidError

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


class Trained(NamedTuple):
    """`trainer` holds the weights to keep: the best on the held-out part, else the last. `left_out`: rows over `max_length`."""

    trainer: Any
    left_out: int


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
