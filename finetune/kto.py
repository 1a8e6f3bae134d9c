"""Kahneman-Tversky optimisation: answers that are wanted become likelier, others less, without pairs.

Ethayarajh et al., 2024 (arXiv 2402.01306). How far the model has moved is estimated on answers to other prompts of the
same batch, so batches have at least two rows and stay as they are once they are drawn. The reference is as in `finetune.dpo`.
"""

import random
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import KTOConfig, KTOTrainer

from finetune import chat
from finetune.arguments import arguments
from finetune.reference import trained_beside_reference
from finetune.run import Outcome, Run, fitting
from finetune.schemas import KtoRow, Rows
from ingest.errors import InvalidError


def kto(run: Run) -> Outcome:
    """Raises InvalidError, SettingsError."""
    args = arguments(KTOConfig, run)
    if args.per_device_train_batch_size < 2:
        raise InvalidError("KTO needs batches of two rows or more: set per_device_train_batch_size to 2 at least")
    set_seed(args.seed)
    learn, left_out = _dataset(run, run.learn, args)
    held_out = _dataset(run, run.held_out, args)[0] if run.held_out.rows else None
    return Outcome(trained_beside_reference(_Trainer, run, args, learn, held_out), left_out)


def _dataset(run: Run, rows: Rows, args: Any) -> tuple[Dataset, int]:
    """-> prompt_ids, completion_ids and KL_completion_ids, each (tokens,) a row, and the label. In a random order,
    since the trainer keeps it.
    """
    found = [row for row in rows.rows if isinstance(row, KtoRow)]
    places = rows.places or tuple(f"row {at + 1}" for at in range(len(found)))
    encoded = []
    for row, place in zip(found, places, strict=True):
        reply = chat.encode_reply(run.chat, row.prompt, row.completion, place)
        encoded.append({"prompt_ids": reply.prompt, "completion_ids": reply.answer, "label": row.label})
    kept, left_out = fitting(encoded, places, _tokens, args.max_length)
    random.Random(args.seed).shuffle(kept)
    size = args.per_device_train_batch_size
    if args.loss_type != "apo_zero_unpaired":  # it alone estimates nothing on other prompts
        for start in range(0, len(kept), size):
            batch = kept[start : start + size]
            for at, one in enumerate(batch):  # the first takes the last one's; one that is alone, the row's before it
                one["KL_completion_ids"] = (batch[at - 1] if len(batch) > 1 else kept[start - 1])["completion_ids"]
    return Dataset.from_list(kept), left_out


def _tokens(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + len(row["completion_ids"])


class _Trainer(KTOTrainer):  # type: ignore[misc]  # mypy does not read TRL
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """They are tokens already, as serving has them, with answers to other prompts beside them."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is the manifest."""
