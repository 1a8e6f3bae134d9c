"""One model of an alignment, measured: how likely it finds the answers that people compared, and what it answers itself.

What comes out is kept in a file, so that a run that is ended measures nothing twice. Imports torch.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from finetune import check_peft, methods
from finetune.align_figures import Held, Measured, Odds
from finetune.chat import Chat, encode_reply, prompt_ids
from finetune.check_engine import Answered
from finetune.declines import Request
from finetune.generate import greedy
from finetune.reward_model import RewardModel
from finetune.schemas import PreferenceRow, PromptRow, Rows
from ingest.errors import InvalidError
from service.base_model import window

LONGEST = 2048  # tokens of a prompt with its answer; longer ones are left out and counted
Progress = Callable[[int, int], None]  # of how many, how many are done comes first
Kept = TypeVar("Kept", PreferenceRow, PromptRow)


class Most(NamedTuple):
    """Cases of each kind; tokens of an answer."""

    pairs: int
    prompts: int
    helpful: int
    tokens: int


def choose(
    pairs: Rows,
    helpful: Rows,
    requests: Sequence[Request],
    chat: Chat,
    base: Path,
    most: Most,
    seed: int,
) -> Held:
    """Which cases are taken goes with chance. Raises InvalidError."""
    longest = min(window(base) or LONGEST, LONGEST)
    compared = {
        place: row for place, row in zip(pairs.places, pairs.rows, strict=True) if isinstance(row, PreferenceRow)
    }
    known = {
        f"helpful {place}": row
        for place, row in zip(helpful.places, helpful.rows, strict=True)
        if isinstance(row, PromptRow) and row.known.answers
    }
    if not known:
        raise InvalidError(
            f"{helpful.name!r} holds no row with an answer to compare with: give rows of questions that are answered, as "
            "`graft dataset raft` makes them"
        )

    def fits(name: str, row: PreferenceRow | PromptRow | Request) -> bool:
        answers = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else ()
        said = max((len(encode_reply(chat, row.prompt, one, name).answer) for one in answers), default=0)
        return len(prompt_ids(chat, row.prompt)) + max(said, most.tokens) <= longest

    taken, left_out = _drawn(compared, most.pairs, seed, fits)
    questions, others = _drawn(known, most.helpful, seed, fits)
    asked = {one.id: one for one in requests}
    fitting = all(fits(name, one) for name, one in asked.items())
    for name, given in ((pairs.name, taken), (helpful.name, questions), ("the requests", fitting)):
        if not given:
            raise InvalidError(
                f"the model's window of {longest} tokens has no room for {name!r} with answers of {most.tokens}: lower --tokens, "
                "or give shorter rows"
            )
    prompts = dict(list(taken.items())[: most.prompts])
    return Held(taken, prompts, asked, questions, left_out + others)


def measured(model: object, chat: Chat, held: Held, tokens: int, progress: Progress) -> Measured:
    """Raises InvalidError where the model gives no probabilities."""
    asked = held.asked()
    steps = len(held.pairs) + len(asked)
    odds = measured_odds(model, chat, held.pairs, lambda done: progress(done, steps))
    prompts = [prompt_ids(chat, messages) for messages in asked.values()]
    said = greedy(model, chat, prompts, tokens, lambda done: progress(len(odds) + done, steps))
    return Measured(odds=odds, answers=dict(zip(asked, said, strict=True)))


def measured_odds(
    model: object, chat: Chat, pairs: dict[str, PreferenceRow], progress: Callable[[int], None]
) -> dict[str, Odds]:
    found = {}
    for name, row in pairs.items():
        replies = [encode_reply(chat, row.prompt, one, name) for one in (row.chosen, row.rejected)]
        answers = [Answered(tuple(reply.answer), ()) for reply in replies]
        chosen, rejected = check_peft.log_probabilities(model, [reply.prompt for reply in replies], answers)
        sums = _finite(name, {"chosen": math.fsum(chosen), "rejected": math.fsum(rejected)})
        found[name] = Odds(**sums, chosen_tokens=len(chosen), rejected_tokens=len(rejected))
        progress(len(found))
    return found


def load(adapter: Path | None, base: Path, dtype: str) -> object:
    """-> a model that answers, on a GPU where there is one. Raises NotFoundError, InvalidError."""
    model = methods.load_tuned(adapter, base, dtype) if adapter else methods.load_plain(base, dtype)
    return model.to("cuda") if torch.cuda.is_available() else model


def judged(model: RewardModel, held: Held, answers: Mapping[str, str]) -> dict[str, float]:
    """-> the score of each answer to a held-out prompt. Raises InvalidError."""
    scores = model.score([(row.prompt, answers[name]) for name, row in held.prompts.items()])
    return _finite("a reward", dict(zip(held.prompts, scores, strict=True)))


def judged_pairs(model: RewardModel, held: Held) -> dict[str, float]:
    """-> by how much each held-out pair's chosen answer scores above the rejected one: how far a judge can be trusted."""
    chosen = model.score([(row.prompt, row.chosen[-1].content) for row in held.pairs.values()])
    rejected = model.score([(row.prompt, row.rejected[-1].content) for row in held.pairs.values()])
    margins = {name: one - other for name, one, other in zip(held.pairs, chosen, rejected, strict=True)}
    return _finite("a reward", margins)


def _finite(what: str, numbers: dict[str, float]) -> dict[str, float]:
    """-> the same. Raises InvalidError."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise InvalidError(
                f"{what}: {name} is {value}, so the model computes no numbers: lower the learning_rate of its training, or set "
                "dtype=float32, and begin anew with --restart"
            )
    return numbers


def _drawn(
    rows: dict[str, Kept], most: int, seed: int, fits: Callable[[str, Kept], bool]
) -> tuple[dict[str, Kept], int]:
    """-> at most so many that fit, and how many of those that were looked at do not."""
    kept: dict[str, Kept] = {}
    left_out = 0
    for name in random.Random(seed).sample(sorted(rows), len(rows)):
        if len(kept) == most:
            break
        if fits(name, rows[name]):
            kept[name] = rows[name]
        else:
            left_out += 1
    return kept, left_out
