"""One model of an alignment, measured: how likely it finds the answers that people compared, and what it answers itself.

What comes out is kept in a file, so that a run that is ended measures nothing twice. Imports torch.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from finetune import check_peft, methods
from finetune.align_figures import Held, Odds
from finetune.chat import Chat, encode_reply, prompt_ids
from finetune.check_engine import Answered
from finetune.declines import Request
from finetune.generate import greedy
from finetune.reward_model import RewardModel
from finetune.schemas import PreferenceRow, PromptRow, Rows
from finetune.shape import window
from ingest.errors import InvalidError

LONGEST = 2048  # tokens of a prompt with its answer; longer ones are left out and counted
Tell = Callable[[str], None]
Kept = TypeVar("Kept", PreferenceRow, PromptRow)


def choose(
    pairs: Rows,
    helpful: Rows,
    requests: Sequence[Request],
    chat: Chat,
    base: Path,
    most: tuple[int, int, int, int],
    seed: int,
) -> Held:
    """`most`: (pairs, prompts, helpful rows, tokens of an answer). Which ones are taken goes with chance. Raises InvalidError."""
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

    def fits(row: PreferenceRow | PromptRow) -> bool:
        answers = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else ()
        said = max((len(encode_reply(chat, row.prompt, one).answer) for one in answers), default=0)
        return len(prompt_ids(chat, row.prompt)) + max(said, most[3]) <= longest

    taken, left_out = _drawn(compared, most[0], seed, fits)
    questions, others = _drawn(known, most[2], seed, fits)
    for name, given in ((pairs.name, taken), (helpful.name, questions)):
        if not given:
            raise InvalidError(f"all held-out rows of {name!r} are longer than {longest} tokens: give shorter ones")
    prompts = dict(list(taken.items())[: most[1]])
    return Held(taken, prompts, {one.id: one for one in requests}, questions, left_out + others)


def measured_odds(model: object, chat: Chat, pairs: dict[str, PreferenceRow]) -> dict[str, Odds]:
    found = {}
    for name, row in pairs.items():
        replies = [encode_reply(chat, row.prompt, one, name) for one in (row.chosen, row.rejected)]
        answers = [Answered(tuple(reply.answer), ()) for reply in replies]
        chosen, rejected = check_peft.log_probabilities(model, [reply.prompt for reply in replies], answers)
        found[name] = Odds(
            chosen=math.fsum(chosen),
            rejected=math.fsum(rejected),
            chosen_tokens=len(chosen),
            rejected_tokens=len(rejected),
        )
    return found


def measured_answers(model: object, chat: Chat, held: Held, tokens: int, tell: Tell) -> dict[str, str]:
    asked = held.asked()
    prompts = [prompt_ids(chat, messages) for messages in asked.values()]
    said = greedy(model, chat, prompts, tokens, lambda done: tell(f"answered {done} of {len(prompts)}"))
    return dict(zip(asked, said, strict=True))


def load(adapter: Path | None, base: Path, dtype: str) -> object:
    """-> a model that answers, on a GPU where there is one. Raises NotFoundError, InvalidError."""
    model = methods.load_tuned(adapter, base, dtype) if adapter else methods.load_plain(base, dtype)
    return model.to("cuda") if torch.cuda.is_available() else model


def judged(model: RewardModel, held: Held, answers: Mapping[str, str]) -> dict[str, float]:
    """-> the score of each answer to a held-out prompt."""
    scores = model.score([(row.prompt, answers[name]) for name, row in held.prompts.items()])
    return dict(zip(held.prompts, scores, strict=True))


def judged_pairs(model: RewardModel, held: Held) -> dict[str, float]:
    """-> by how much each held-out pair's chosen answer scores above the rejected one: how far a judge can be trusted."""
    chosen = model.score([(row.prompt, row.chosen[-1].content) for row in held.pairs.values()])
    rejected = model.score([(row.prompt, row.rejected[-1].content) for row in held.pairs.values()])
    return {name: one - other for name, one, other in zip(held.pairs, chosen, rejected, strict=True)}


def _drawn(rows: dict[str, Kept], most: int, seed: int, fits: Callable[[Kept], bool]) -> tuple[dict[str, Kept], int]:
    """-> at most so many that fit, and how many of those that were looked at do not."""
    kept: dict[str, Kept] = {}
    left_out = 0
    for name in random.Random(seed).sample(sorted(rows), len(rows)):
        if len(kept) == most:
            break
        if fits(rows[name]):
            kept[name] = rows[name]
        else:
            left_out += 1
    return kept, left_out
