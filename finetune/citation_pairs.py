"""Preference rows by the service's own check of citations: of several answers to one prompt, what its passages support against
what they do not.

The check is that of serving (`finetune.rewards.citation_correct`, over `service.cite`), so what is learned is what users are
shown. Whether a supported answer is the right one, it cannot know; pairs that know it are made by `finetune.preferences`.
"""

import random
from collections.abc import Sequence
from itertools import product

from eval.answer_metrics import is_refusal, markers
from finetune.prompt_rows import passages_of, question_of
from finetune.rewards import Sample, citation_correct
from finetune.schemas import Message, PreferenceRow, SftRow
from ingest.errors import InvalidError

SUPPORTED, UNSUPPORTED = 1.0, 0.5  # of `citation_correct`: from where on, and up to where; between them nothing is said
MOST = 4  # pairs of a prompt, so that one with many answers does not outweigh the others


def citation_pairs(rows: Sequence[SftRow], places: Sequence[str], seed: int) -> list[PreferenceRow]:
    """`rows`: an answer each, several to a prompt. -> pairs of answers to the same prompt; `source.kind` names the fault of the
    rejected one: "refused", "uncited" or "unsupported". Raises InvalidError, by its place, for a prompt without numbered
    passages, and for a row without a completion.
    """
    samples = [_sample(row, place) for row, place in zip(rows, places, strict=True)]
    groups: dict[tuple[Message, ...], dict[str, float]] = {}
    for one, worth in zip(samples, citation_correct(samples), strict=True):
        groups.setdefault(one.prompt, {})[one.answer] = worth
    sources, chance, found = {row.prompt: row.source for row in rows}, random.Random(seed), list[PreferenceRow]()
    for prompt, answers in groups.items():
        better = [said for said, worth in answers.items() if worth >= SUPPORTED]
        worse = [said for said, worth in answers.items() if worth <= UNSUPPORTED and said]
        pairs = list(product(better, worse))
        for chosen, rejected in chance.sample(pairs, min(MOST, len(pairs))):
            source = sources[prompt].model_copy(update={"kind": _fault(rejected)})
            chosen_one, rejected_one = (Message(role="assistant", content=one) for one in (chosen, rejected))
            found.append(PreferenceRow(prompt=prompt, chosen=(chosen_one,), rejected=(rejected_one,), source=source))
    return found


def _sample(row: SftRow, place: str) -> Sample:
    if not row.completion:
        raise InvalidError(f"{place}: an answer to check is a row with prompt and completion")
    passages = passages_of(row.prompt)
    if sorted(passages) != list(range(1, len(passages) + 1)) or not passages:
        raise InvalidError(
            f"{place}: the prompt shows no passages numbered from [1] on, so that no citation can be checked: give rows of "
            "prompts that the service builds"
        )
    return Sample(
        prompt=row.prompt,
        answer=row.completion[-1].content.strip(),
        question=row.source.question or question_of(row.prompt),
        passages=tuple(passages[n] for n in sorted(passages)),
    )


def _fault(answer: str) -> str:
    if is_refusal(answer, ""):
        return "refused"
    return "unsupported" if markers(answer) else "uncited"
