"""A reward model from preferences: the chosen answer's score is to lie above the rejected one's.

The loss is Bradley and Terry's, 1952: -log sigmoid(score of the chosen - score of the rejected), on a LoRA and a head of one
output, as Ouyang et al., 2022 (arXiv 2203.02155) have it. Held-out pairs say how often it agrees, how sure it may be of
itself, and whether it goes by length.
"""

from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from finetune import chat, methods, runs
from finetune.arguments import arguments
from finetune.reward_model import RewardModel, padding, with_head
from finetune.reward_report import draw_calibration, judge
from finetune.rows_split import prompt_text
from finetune.run import Outcome, Run, fitting, trainer_of
from finetune.schemas import PreferenceRow, Rows
from ingest.errors import InvalidError

CALIBRATION = "calibration.png"


def reward(run: Run) -> Outcome:
    """Raises InvalidError, SettingsError."""
    trained = run.recipe.trained
    if trained.weights not in {"lora", "qlora"}:
        raise InvalidError(
            f"a reward model trains as a LoRA with a head, not as {trained.weights!r}: set weights to lora or qlora"
        )
    args = arguments(RewardConfig, run)
    set_seed(args.seed)
    learn, left_out = _dataset(run, run.learn, args.max_length)
    held_out = _dataset(run, run.held_out, args.max_length)[0] if run.held_out.rows else None
    model = methods.load_base(run.base, trained, run.dtype, run.recipe.model.attn_implementation, scores=True)
    model = methods.apply(with_head(model), trained)
    run.chat.tokenizer.pad_token = run.chat.tokenizer.convert_ids_to_tokens(padding(run.chat))
    trainer = trainer_of(_Trainer, run, model=model, args=args, train_dataset=learn, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    return Outcome(trainer, left_out, _judged(run, trainer.model, held_out) if held_out else {})


def _dataset(run: Run, rows: Rows, most: int | None) -> tuple[Dataset, int]:
    """-> chosen_ids and rejected_ids, each (tokens,) a row, prompt and answer; where the answers start, and the prompt's text."""
    found = [row for row in rows.rows if isinstance(row, PreferenceRow)]
    places = rows.places or tuple(f"row {at + 1}" for at in range(len(found)))
    pairs = []
    for row, place in zip(found, places, strict=True):
        chosen = chat.encode_reply(run.chat, row.prompt, row.chosen, place)
        rejected = chat.encode_reply(run.chat, row.prompt, row.rejected, place)
        pair = {"chosen_ids": chosen.prompt + chosen.answer, "rejected_ids": rejected.prompt + rejected.answer}
        pairs.append({**pair, "prompt": prompt_text(row)})
    kept, left_out = fitting(pairs, places, lambda one: max(len(one["chosen_ids"]), len(one["rejected_ids"])), most)
    return Dataset.from_list(kept), left_out


def _judged(run: Run, model: Any, held_out: Dataset) -> dict[str, float]:
    """Also draws the calibration, where this process writes."""
    chosen, rejected = list(held_out["chosen_ids"]), list(held_out["rejected_ids"])
    scores = RewardModel(model, run.chat).score_tokens([*chosen, *rejected])
    margins = [high - low for high, low in zip(scores[: len(chosen)], scores[len(chosen) :], strict=True)]
    found = judge(margins, list(map(len, chosen)), list(map(len, rejected)), list(held_out["prompt"]))
    if runs.writes():
        draw_calibration(found, run.out / CALIBRATION)
    return found.metrics()


class _Trainer(RewardTrainer):  # type: ignore[misc]  # mypy does not read TRL
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """They are tokens already, as serving has them, and none is too long."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is the manifest."""
