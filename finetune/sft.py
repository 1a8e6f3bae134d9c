"""Supervised fine-tuning: the next-token loss on the answers alone.

With `packing`, short rows share a sequence, best fit first. Each keeps its own positions, by which attention is kept within it:
flash attention, sdpa and eager all do that (transformers.masking_utils).
"""

from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from finetune import chat, methods
from finetune.arguments import arguments
from finetune.run import Outcome, Run, fitting, trainer_of
from finetune.schemas import Rows, SftRow


def sft(run: Run) -> Outcome:
    """Raises InvalidError, SettingsError."""
    args = arguments(SFTConfig, run)
    set_seed(args.seed)
    learn, left_out = _dataset(run, run.learn, args.max_length)
    held_out = _dataset(run, run.held_out, args.max_length)[0] if run.held_out.rows else None
    trained = run.recipe.trained
    model = methods.load_base(run.base, trained, run.dtype, run.recipe.model.attn_implementation)
    model = methods.apply(model, trained)
    trainer = trainer_of(_Trainer, run, model=model, args=args, train_dataset=learn, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    return Outcome(trainer, left_out)


def _dataset(run: Run, rows: Rows, most: int | None) -> tuple[Dataset, int]:
    """-> input_ids and labels, each (tokens,) a row."""
    found = [row for row in rows.rows if isinstance(row, SftRow)]
    places = rows.places or tuple(f"row {at + 1}" for at in range(len(found)))
    encoded = [chat.encode(run.chat, row, place) for row, place in zip(found, places, strict=True)]
    chat.check(run.chat, found, encoded, places)
    kept, left_out = fitting(encoded, places, lambda one: len(one.ids), most)
    return Dataset.from_list([{"input_ids": one.ids, "labels": one.labels()} for one in kept]), left_out


class _Trainer(SFTTrainer):  # type: ignore[misc]  # mypy does not read TRL
    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is the manifest."""
