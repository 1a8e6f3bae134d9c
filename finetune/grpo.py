"""Group relative policy optimisation: of several answers to a prompt, those that are worth more than their mean become likelier.

Shao et al., 2024 (arXiv 2402.03300). The answers are the model's own, sampled as it trains; what they are worth is said by
`finetune.rewards`. The KL divergence is to where the run began: the same weights with the adapter off, the adapter that the
run goes on from, or where whole weights train a second copy of the base.
"""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from finetune import methods
from finetune.arguments import arguments
from finetune.chat import prompt_ids
from finetune.rewards import Reward, check_known, checked, named, sample_of
from finetune.run import Outcome, Run, fitting_prompts, trainer_of
from finetune.schemas import Message, PromptRow, Rows
from ingest.errors import InvalidError

SHOWN = 10  # places of prompts that were left out


def grpo(run: Run) -> Outcome:
    """Raises InvalidError, SettingsError."""
    args = arguments(GRPOConfig, run)
    weights = run.recipe.reward.rewards
    args.reward_weights = list(weights.values())
    set_seed(args.seed)
    rows: list[PromptRow] = []
    learn, left_out = _dataset(run, run.learn, args, rows)
    held_out = _dataset(run, run.held_out, args, rows)[0] if run.held_out.rows else None
    prompts = args.generation_batch_size // args.num_generations
    if len(learn) < prompts:
        raise InvalidError(
            f"a step takes {prompts} prompts (batch size x accumulation / num_generations), and {len(learn)} fit: give more "
            "rows, or lower gradient_accumulation_steps"
        )
    rewards = [_told(name, reward, rows) for name, reward in named(run.recipe.reward, run.base, run.dtype).items()]
    trained = run.recipe.trained
    model = methods.load_base(run.base, trained, run.dtype, run.recipe.model.attn_implementation)
    trainer = trainer_of(
        _trainer_for(run),
        run,
        model=methods.apply(model, trained),
        reward_funcs=rewards,
        args=args,
        train_dataset=learn,
        eval_dataset=held_out,
    )
    copied = "ref" in getattr(trainer.model, "peft_config", {})
    if copied and trained.parent is None:
        trainer.model.delete_adapter("ref")  # TRL's copy of a new adapter: with the adapter off, the base says the same
    trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if copied and trained.parent is not None:
        trainer.model.delete_adapter("ref")
    return Outcome(trainer, len(left_out), notes=_notes(left_out))


def _dataset(run: Run, rows: Rows, args: Any, known: list[PromptRow]) -> tuple[Dataset, tuple[str, ...]]:
    """-> the messages of each prompt, and its place in `known`, to which the prompts are added; the places of those that do not
    fit.
    """
    check_known(tuple(run.recipe.reward.rewards), rows)
    kept, left_out = fitting_prompts(run, rows, args.max_completion_length)
    start = len(known)
    known += [row for row, _ in kept]
    messages = [[one.model_dump() for one in row.prompt] for row, _ in kept]
    return Dataset.from_list([{"prompt": one, "row": at} for at, one in enumerate(messages, start)]), left_out


def _notes(left_out: Sequence[str]) -> tuple[str, ...]:
    some = ", ".join(left_out[:SHOWN]) + (", ..." if len(left_out) > SHOWN else "")
    return (f"too long to leave room for an answer, and left out: {some}",) if left_out else ()


def _told(name: str, reward: Reward, rows: Sequence[PromptRow]) -> Callable[..., list[float]]:
    """-> the reward as TRL asks for it; TRL would take what is no number for an answer that is not to count."""

    def worth(completions: Sequence[list[dict[str, str]]], row: Sequence[int], **_: Any) -> list[float]:
        answers = [sample_of(rows[at], said[-1]["content"]) for at, said in zip(row, completions, strict=True)]
        return checked(name, reward, answers)

    worth.__name__ = name
    return worth


class _Epochs(RepeatSampler):  # type: ignore[misc]  # mypy does not read TRL
    """Each epoch has an order of its own, by its number: TRL's depends on how many this process has begun, so that a run which
    goes on in a later one would see the prompts of the first again.
    """

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


def _trainer_for(run: Run) -> type[Any]:
    class Trainer(GRPOTrainer):  # type: ignore[misc]  # mypy does not read TRL
        def _tokenize_prompts(
            self, prompts: list[list[dict[str, str]]]
        ) -> tuple[list[list[int]], None, dict[str, Any]]:
            """As serving sends them: without thinking, by the base's own template."""
            messages = [[Message.model_validate(one) for one in prompt] for prompt in prompts]
            return [prompt_ids(run.chat, one) for one in messages], None, {}

        def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
            held = super()._get_train_sampler(dataset)
            return _Epochs(
                held.data_source, held.mini_repeat_count, held.batch_size, held.repeat_count, held.shuffle, held.seed
            )

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """Ours is the manifest."""

    return Trainer
