"""Direct preference optimisation: the preferred answer's odds over the rejected one's rise, measured against where it began.

Rafailov et al., 2023 (arXiv 2305.18290). The reference is the same weights with the adapter off, or the adapter that the
run goes on from; where whole weights train, a second, frozen copy of the base.
"""

from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from finetune import chat
from finetune.arguments import arguments
from finetune.reference import trained_beside_reference
from finetune.run import Outcome, Run, fitting
from finetune.schemas import PreferenceRow, Rows


def dpo(run: Run) -> Outcome:
    """Raises InvalidError, SettingsError."""
    args = arguments(DPOConfig, run)
    set_seed(args.seed)
    learn, left_out = _dataset(run, run.learn, args.max_length)
    held_out = _dataset(run, run.held_out, args.max_length)[0] if run.held_out.rows else None
    return Outcome(trained_beside_reference(_Trainer, run, args, learn, held_out), left_out)


def _dataset(run: Run, rows: Rows, most: int | None) -> tuple[Dataset, int]:
    """-> prompt_ids, chosen_ids and rejected_ids, each (tokens,) a row."""
    found = [row for row in rows.rows if isinstance(row, PreferenceRow)]
    places = rows.places or tuple(f"row {at + 1}" for at in range(len(found)))
    pairs = []
    for row, place in zip(found, places, strict=True):
        chosen = chat.encode_reply(run.chat, row.prompt, row.chosen, place)
        rejected = chat.encode_reply(run.chat, row.prompt, row.rejected, place)
        pairs.append({"prompt_ids": chosen.prompt, "chosen_ids": chosen.answer, "rejected_ids": rejected.answer})
    kept, left_out = fitting(pairs, places, _tokens, most)
    return Dataset.from_list(kept), left_out


def _tokens(pair: dict[str, list[int]]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


class _Trainer(DPOTrainer):  # type: ignore[misc]  # mypy does not read TRL
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """They are tokens already, as serving has them; TRL would learn what the template puts after an answer's end, too."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is the manifest."""
