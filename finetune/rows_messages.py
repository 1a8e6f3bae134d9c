"""The messages of a row, checked: text in each, roles in order. What does not fit says why, in words for the row's line."""

import json
from collections.abc import Sequence
from typing import Any

from finetune.schemas import Message

ROLES = ("system", "user", "assistant", "tool")
_AFTER = {  # what may come behind a message
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_MEDIA = ("images", "image", "videos", "audios")


class Unfit(ValueError):
    """Why a row is not taken."""


def prompt_of(value: Any, field: str = "prompt") -> tuple[Message, ...]:
    """A text is what a user says. Raises Unfit."""
    return (Message(role="user", content=value.strip()),) if isinstance(value, str) else messages_of(value, field)


def reply_of(value: Any, field: str) -> tuple[Message, ...]:
    """A text is what the assistant says, a single message a list of one. Raises Unfit."""
    if isinstance(value, str):
        return (Message(role="assistant", content=value.strip()),)
    return messages_of([value] if isinstance(value, dict) else value, field)


def messages_of(value: Any, field: str) -> tuple[Message, ...]:
    """From {"role", "content"}. Raises Unfit."""
    if not isinstance(value, list):
        raise Unfit(f"{field} is {kind_of(value)}, not a list of messages")
    if not value:
        raise Unfit(f"{field} is empty")
    return tuple(_message(one, f"{field}[{at}]") for at, one in enumerate(value))


def check_conversation(prompt: Sequence[Message], reply: Sequence[Message], fields: tuple[str, str]) -> None:
    """`prompt` ends where the assistant is to speak, `reply` begins and ends with it; without a reply, `prompt` holds it. Raises
    Unfit.
    """
    last: str | None = None
    for at, one in enumerate([*prompt, *reply]):
        where = f"{fields[0]}[{at}]" if at < len(prompt) else f"{fields[1]}[{at - len(prompt)}]"
        if reply and at == len(prompt) and one.role != "assistant":
            raise Unfit(f"{where} is the {one.role}'s, and an answer is the assistant's")
        if one.role not in _AFTER[last]:
            before = f"follows one of the {last}" if last else "is the first"
            raise Unfit(f"{where}: roles in wrong order, a message of the {one.role} {before}")
        if not one.content.strip() and one.role != "system":
            raise Unfit(
                f"{where}: {'the answer' if one.role == 'assistant' else f'the message of the {one.role}'} is empty"
            )
        if reply and at == len(prompt) - 1 and one.role not in ("user", "tool"):
            raise Unfit(f"{where}: the prompt ends with a message of the {one.role}, and nothing asks for an answer")
        last = one.role
    if last != "assistant":
        raise Unfit(
            f"{fields[1] if reply else fields[0]} ends with a message of the {last}, and there is no answer to learn"
        )


def check_text_only(row: dict[str, Any]) -> None:
    """Raises Unfit for a row with tools, images, videos or sound."""
    if row.get("tools") and row["tools"] != "[]":
        raise Unfit("it offers tools, and calls of tools are not trained here")
    for one in _MEDIA:
        if row.get(one):
            raise Unfit(f"it has {one}, and only text is trained here")


def kind_of(value: Any) -> str:
    """As JSON calls it."""
    names = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise Unfit(f"{where} is {kind_of(value)}, not a message with role and content")
    role, content = value.get("role"), value.get("content")
    if value.get("tool_calls") or value.get("function_call"):
        raise Unfit(f"{where} calls a tool, and calls of tools are not trained here")
    if "role" not in value or "content" not in value:
        missing = "role" if "role" not in value else "content"
        raise Unfit(f"{where} has no {missing}; its keys are {', '.join(map(str, value)) or 'none'}")
    if role not in ROLES:
        raise Unfit(f"{where}: role {json.dumps(role, ensure_ascii=False)} is none of {', '.join(ROLES)}")
    return Message(role=role, content=text_of(content, where))


def text_of(value: Any, where: str) -> str:
    """A string, or a list of parts that are all text. Raises Unfit."""
    if isinstance(value, list) and value:
        kinds = [one.get("type") if isinstance(one, dict) else None for one in value]
        if all(kind == "text" for kind in kinds):
            return "\n".join(text_of(one.get("text"), where) for one in value)
        other = next((kind for kind in kinds if kind not in (None, "text")), None)
        if other:
            raise Unfit(f"{where} has a part of type {other!r}, and only text is trained here")
    if not isinstance(value, str):
        raise Unfit(f"{where}: its text is {kind_of(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unfit(f"{where}: half a character (a lone surrogate) at {error.start}") from error
    return value
