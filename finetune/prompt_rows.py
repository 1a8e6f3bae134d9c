"""Prompts for reinforcement learning, from rows that were made for other methods: what they teach becomes what is known."""

import re
from collections.abc import Sequence

from eval.answer_metrics import is_refusal, markers, plain
from finetune.rows_lines import rows_of
from finetune.schemas import Known, Message, PreferenceRow, PromptRow, Row, Rows, SftRow

AS_PROMPTS = (PromptRow, SftRow, PreferenceRow)
_PASSAGE = re.compile(r"^\[(\d{1,3})\] (.*?)(?=\n\n\[\d|\n\nQuestion: )", re.M | re.S)


def prompts_of(rows: Rows) -> Rows:
    """Of a preference its prompt, what was chosen being right; of a conversation its last answer's prompt."""
    made = [_prompt(row) for row in rows.rows]
    return rows_of(made, rows.places, rows.name, rows.prompt_version)


def passages_of(prompt: Sequence[Message]) -> dict[int, str]:
    """-> the numbered passages that a prompt of ours shows, by number; none of a prompt that shows them otherwise."""
    return {int(n): text for n, text in _PASSAGE.findall(prompt[-1].content)}


def question_of(prompt: Sequence[Message]) -> str:
    """What is asked behind the passages; the whole message where there are none."""
    return prompt[-1].content.rpartition("Question: ")[2]


def _prompt(row: Row) -> PromptRow:
    if isinstance(row, PromptRow):
        return row
    if isinstance(row, PreferenceRow):
        return _known(row, row.prompt, row.chosen[-1].content)
    if row.completion:
        return _known(row, row.prompt, row.completion[-1].content)
    last = max(at for at, one in enumerate(row.prompt) if one.role == "assistant")
    return _known(row, row.prompt[:last], row.prompt[last].content)


def _known(row: Row, prompt: tuple[Message, ...], right: str) -> PromptRow:
    held = passages_of(prompt)
    passages = tuple(held[n] for n in sorted(held)) if sorted(held) == list(range(1, len(held) + 1)) else ()
    refuse = is_refusal(right, "")
    known = Known(
        question=row.source.question or question_of(prompt),
        answers=() if refuse else (plain(right),),
        passages=passages,
        gold=() if refuse else tuple(n for n in dict.fromkeys(markers(right)) if n <= len(passages)),
        refuse=refuse,
    )
    return PromptRow(prompt=prompt, known=known, source=row.source)
