"""Preference rows from answers' rows: what is right and cited, against what is wrong, uncited, or answered without support."""

import random
import re
from collections.abc import Iterator, Sequence

from eval.answer_metrics import contains, markers, plain
from finetune.prompt_rows import passages_of, question_of
from finetune.schemas import FAULTS, Fault, Message, PreferenceRow, SftRow
from service.refusal import is_refusal, refusal

_NUMBER = re.compile(r"\d[\d,.]*\d|\d")
_NAME = re.compile(r"(?:[A-Z][\w’'-]+(?: (?:of|the|and|de) (?=[A-Z]))?[ ]?){1,4}")
_DECIDED = re.compile(r"(?:is|are|was|were|do|does|did|can|could|should|will|would|has|have|had)\b", re.I)


def preference_rows(
    rows: Sequence[SftRow], seed: int, every: bool = False, faults: Sequence[Fault] = FAULTS
) -> list[PreferenceRow]:
    """One of each row that has passages and an answer; which of `faults` is rejected goes with chance; with `every`, one of
    each that fits. `source.kind` names it: "wrong" (another passage's words, cited), "uncited", "miscited", "refused" though
    the answer is there, or "unsupported" where it is not.
    """
    chance = random.Random(seed)
    found = []
    for row in rows:
        rejected = [one for one in _rejected(row, chance) if one[0] in faults]
        for kind, words in rejected if every else [chance.choice(rejected)] if rejected else []:
            found.append(
                PreferenceRow(
                    prompt=row.prompt,
                    chosen=row.completion,
                    rejected=(Message(role="assistant", content=words),),
                    source=row.source.model_copy(update={"kind": kind}),
                )
            )
    return found


def _rejected(row: SftRow, chance: random.Random) -> Iterator[tuple[Fault, str]]:
    if not row.completion:
        return
    said = row.completion[-1].content
    passages, question = passages_of(row.prompt), question_of(row.prompt)
    if not passages:
        return
    if is_refusal(said):
        for n, text in chance.sample(sorted(passages.items()), len(passages)):
            words = chance.choice(("Yes", "No")) if _DECIDED.match(question) else _span(text, "", question, chance)
            if words:
                yield "unsupported", f"{words} [{n}]"
                return
        return
    answer, cited = plain(said), markers(said)
    others = [n for n in passages if n not in cited]
    yield "uncited", answer
    yield "refused", refusal(question)
    if others:
        n = chance.choice(others)
        if not contains(passages[n], [answer]):
            yield "miscited", f"{answer} [{n}]"
        if span := _span(passages[n], answer, question, chance):
            yield "wrong", f"{span} [{n}]"


def _span(text: str, answer: str, question: str, chance: random.Random) -> str | None:
    """Words of `text` of the kind that was asked for, which are neither the answer nor in the question."""
    numbers = bool(_NUMBER.search(answer)) or bool(re.match(r"(?:how many|how much|when|what year)", question, re.I))
    found = [one.strip() for one in (_NUMBER if numbers else _NAME).findall(text)]
    fitting = [
        one
        for one in dict.fromkeys(found)
        if len(one) > (0 if numbers else 3) and one not in question and one != answer
    ]
    return chance.choice(fitting) if fitting else None
