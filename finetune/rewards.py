"""What an answer is worth: plain functions over answers and what is known of their prompts, for training as for measuring.

Graded by the functions that `eval` and the service grade with: there is no second F1, and no second reading of a citation.
Light: only `reward_model` loads a model, when it is called.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eval.answer_metrics import answer_scores, cmrc_words, is_refusal, markers, plain
from eval.grounding import ground
from eval.schemas import Case
from finetune.recipe import Rewards
from finetune.schemas import Known, Message, PromptRow, RewardName, Rows
from ingest.errors import InvalidError
from ingest.schemas import Hit
from service.cite import cite
from service.generate import strip_thinking

LONG = 200  # words from which on an answer is not short at all
SHOWN = 120  # characters of a prompt or an answer in an error


class Sample(Known):
    """An answer to a prompt, without thinking, and what is known of it."""

    prompt: tuple[Message, ...]
    answer: str


Reward = Callable[[Sequence[Sample]], list[float]]


def sample_of(row: PromptRow, answer: str) -> Sample:
    """`answer`: as it was generated, without the token that ends it."""
    known = {name: getattr(row.known, name) for name in Known.model_fields}
    return Sample(prompt=row.prompt, answer=strip_thinking(answer).strip(), **known)


def exact_match(samples: Sequence[Sample]) -> list[float]:
    """1 where the words are a gold answer's; where none is in the passages, 1 for a refusal."""
    return [_graded(one, "exact_match") for one in samples]


def token_f1(samples: Sequence[Sample]) -> list[float]:
    """As SQuAD and CMRC have it; where none is in the passages, 1 for a refusal."""
    return [_graded(one, "f1") for one in samples]


def refusal_right(samples: Sequence[Sample]) -> list[float]:
    """1 for a refusal where no passage answers, and for what is none where one does. Saying nothing is neither."""
    return [float(bool(one.answer) and _refused(one) == one.refuse) for one in samples]


def citation_correct(samples: Sequence[Sample]) -> list[float]:
    """0 to 1: the share of the claims that a citation which the answer wrote supports, times the share of its citations that are
    of gold passages, where these are known. Where no passage answers, 1 for a refusal. An answer that cites nothing gets 0.
    """
    return [_cited(one) for one in samples]


def short(samples: Sequence[Sample]) -> list[float]:
    """1 for few words, down to 0 at LONG of them; 0 for none, since nothing is no answer."""
    return [max(1 - len(_words(one.answer)) / LONG, 0.0) if one.answer else 0.0 for one in samples]


def reward_model(folder: Path, base: Path, dtype: str) -> Reward:
    """What a reward model says. `base`: the folder of the model that is trained, whose tokenizer it must have. Raises
    NotFoundError, InvalidError.
    """
    from finetune.reward_model import load_reward_model

    model = load_reward_model(folder, base, dtype)
    return lambda samples: model.score([(one.prompt, one.answer) for one in samples])


PLAIN: dict[RewardName, Reward] = {
    "citation_correct": citation_correct,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "short": short,
    "refusal_right": refusal_right,
}


def named(rewards: Rewards, base: Path, dtype: str) -> dict[str, Reward]:
    """-> what a recipe asks for, by name, without weights. Loads the reward model where it counts. Raises as `reward_model`."""
    found: dict[str, Reward] = {}
    for name in rewards.rewards:
        if name == "reward_model":
            assert rewards.reward_model is not None  # the recipe has seen to it
            found[name] = reward_model(rewards.reward_model, base, dtype)
        else:
            found[name] = PLAIN[name]
    return found


def scored(rewards: Mapping[str, Reward], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """-> by name, one number a sample. Raises InvalidError for what is no number, naming the reward and the sample."""
    return {name: checked(name, reward, samples) for name, reward in rewards.items()}


def combined(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    """-> the weighted sum. `weights`: of the same names. Raises InvalidError as `scored`, when it is called."""

    def total(samples: Sequence[Sample]) -> list[float]:
        parts = scored(rewards, samples)
        return [sum(weights[name] * parts[name][at] for name in parts) for at in range(len(samples))]

    return total


def checked(name: str, reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """-> what `reward` says. Raises InvalidError."""
    values = list(reward(samples))
    if len(values) != len(samples):
        raise InvalidError(
            f"reward {name!r} gave {len(values)} numbers for {len(samples)} answers: it must give one each"
        )
    for value, one in zip(values, samples, strict=True):
        if not math.isfinite(value):
            asked = (one.question or one.prompt[-1].content)[-SHOWN:]
            raise InvalidError(
                f"reward {name!r} is {value} for the answer {one.answer[:SHOWN]!r} to {asked!r}: mend the reward, or leave that "
                "prompt out"
            )
    return values


def check_known(names: Sequence[str], rows: Rows) -> None:
    """Raises InvalidError for the first prompt of which a reward lacks what it is computed from."""
    places = rows.places or tuple(f"row {at + 1}" for at in range(len(rows.rows)))
    for row, place in zip(rows.rows, places, strict=True):
        if not isinstance(row, PromptRow) or row.known.refuse:
            continue
        if "citation_correct" in names and not row.known.passages:
            raise InvalidError(
                f"{place}: reward 'citation_correct' needs the passages that the prompt numbers, and none are known: give them "
                "as known.passages, or take rows of `graft dataset raft`"
            )
        for name in ("exact_match", "token_f1"):
            if name in names and not row.known.answers:
                raise InvalidError(f"{place}: reward {name!r} needs a right answer: give known.answers, or drop it")


def _graded(one: Sample, name: str) -> float:
    case = Case(id="", question=one.question or "", answers=one.answers, answerable=not one.refuse)
    refused = _refused(one)
    if one.refuse:
        return float(refused)
    scores, _ = answer_scores(case, one.answer, refused)
    return scores.get(name, scores.get("accuracy", 0.0))  # a yes or no has no other


def _refused(one: Sample) -> bool:
    return is_refusal(one.answer, "")


def _cited(one: Sample) -> float:
    if one.refuse:
        return float(_refused(one))
    if not markers(one.answer):
        return 0.0
    hits = [_hit(n, text) for n, text in enumerate(one.passages, 1)]
    found = cite(one.answer, hits)
    wrote = {citation.n for citation in found.citations if citation.by == "model"}
    sentences = [
        said.model_copy(update={"citations": tuple(n for n in said.citations if n in wrote)})
        for said in found.sentences
    ]
    citations = [citation for citation in found.citations if citation.n in wrote]
    relevant = [n in one.gold for n in range(1, len(hits) + 1)] if one.gold else None
    scores = ground(sentences, citations, hits, relevant).scores
    return scores.get("citation_recall", 0.0) * scores.get("gold_citation", 1.0 if relevant is None else 0.0)


def _hit(n: int, text: str) -> Hit:
    """A passage as the service has it found; each is a document of its own."""
    return Hit(chunk_id=str(n), document_id=str(n), path=str(n), text=text, start=0, end=len(text), score=1.0)


def _words(text: str) -> list[str]:
    """Without the markers of citations; of Chinese, each character."""
    return cmrc_words(plain(text))
