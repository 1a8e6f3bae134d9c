"""Dialogues as one text, as Anthropic's hh-rlhf has them: "\\n\\nHuman: ...\\n\\nAssistant: ...".

Bai et al., 2022 (arXiv 2204.05862). Two turns of the same speaker are one message of two paragraphs. A pair in which a person
preferred that nothing is said has no answer to learn: it is left out and named, since nobody mends a published file.
"""

import re

from finetune.rows_messages import Unfit, messages_of
from finetune.schemas import Message

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class LeftOut(Unfit):
    """Why a row is passed over, without a fault that somebody could mend."""


def is_dialogue(text: str) -> bool:
    return text.startswith("\n\nHuman:")


def dialogue(text: str, field: str) -> tuple[Message, ...]:
    """An end that only asks for the answer is left out of a prompt. Raises Unfit."""
    parts = _TURN.split(text)
    found: list[tuple[str, str]] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        role = _ROLES[speaker]
        if found and found[-1][0] == role:
            found[-1] = (role, f"{found[-1][1]}\n\n{said.strip()}".strip())
        else:
            found.append((role, said.strip()))
    if field == "prompt" and found[-1] == ("assistant", ""):
        found.pop()
    return messages_of([{"role": role, "content": said} for role, said in found], field)


def answered(messages: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    """The same. Raises LeftOut where the assistant's last turn is there and empty."""
    if messages[-1].role == "assistant" and not messages[-1].content:
        raise LeftOut(f"{field}: the assistant says nothing")
    return messages
