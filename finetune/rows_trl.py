"""A row of TRL's formats: messages; prompt and completion; chosen and rejected; prompt, completion and label. And those of
hh-rlhf, whose two texts hold the whole dialogue. Source: TRL's "Dataset formats and types".

Texts without roles become a message of the user and one of the assistant, so that they are trained as they are served.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from eval.case_rows import reason
from finetune.rows_messages import (
    Unfit,
    check_conversation,
    check_text_only,
    kind_of,
    messages_of,
    prompt_of,
    reply_of,
    text_of,
)
from finetune.schemas import Known, KtoRow, Message, PreferenceRow, PromptRow, Provenance, Row, SftRow
from finetune.transcripts import answered, dialogue, is_dialogue

KNOWN = """a row has one of
  messages
  prompt and completion; with a label, true or false, for kto
  chosen and rejected, with or without prompt, for dpo and reward
  prompt alone, for grpo and ppo; with `known`, what rewards are computed from
  instruction and output (alpaca), or conversations (sharegpt)"""


def trl_row(row: dict[str, Any]) -> Row:
    """Raises Unfit."""
    check_text_only(row)
    source = source_of(row)
    if "chosen" in row or "rejected" in row:
        return _preference(row, source)
    if "completion" in row:
        _needs(row, "prompt")
        return pair(prompt_of(row["prompt"]), reply_of(row["completion"], "completion"), source, row)
    if "messages" in row:
        found = messages_of(row["messages"], "messages")
        if isinstance(row.get("label"), bool):
            return kto(found[:-1], found[-1:], row["label"], source, ("messages", "messages"))
        check_conversation(found, (), ("messages", "messages"))
        return SftRow(prompt=found, source=source)
    if "prompt" in row:
        return _prompt(row, source)
    if "text" in row:
        raise Unfit("plain text has no answer to learn: give messages, or prompt and completion")
    raise Unfit(f"its keys are {', '.join(map(repr, row)) or 'none'}, which is no row to train on")


def pair(
    prompt: tuple[Message, ...], reply: tuple[Message, ...], source: Provenance, row: Mapping[str, Any]
) -> SftRow | KtoRow:
    """Prompt and completion, of KTO where there is a label. Raises Unfit."""
    if "label" in row:
        return kto(prompt, reply, row["label"], source, ("prompt", "completion"))
    check_conversation(prompt, reply, ("prompt", "completion"))
    return SftRow(prompt=prompt, completion=reply, source=source)


def kto(
    prompt: tuple[Message, ...], reply: tuple[Message, ...], label: Any, source: Provenance, fields: tuple[str, str]
) -> KtoRow:
    """Raises Unfit."""
    if not isinstance(label, bool):
        raise Unfit(f"label is {kind_of(label)}, not true or false")
    if not prompt:
        raise Unfit(f"{fields[0]}: one message is no prompt with an answer")
    check_conversation(prompt, reply, fields)
    _one(reply, fields[1])
    return KtoRow(prompt=prompt, completion=reply, label=label, source=source)


def preference(
    prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...], source: Provenance
) -> PreferenceRow:
    """Raises Unfit."""
    if chosen == rejected:
        raise Unfit("chosen and rejected are the same")
    check_conversation(prompt, chosen, ("prompt", "chosen"))
    check_conversation(prompt, rejected, ("prompt", "rejected"))
    _one(chosen, "chosen")
    _one(rejected, "rejected")
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, source=source)


def _prompt(row: dict[str, Any], source: Provenance) -> PromptRow:
    """Raises Unfit."""
    asked = row["prompt"]
    messages = dialogue(asked, "prompt") if isinstance(asked, str) and is_dialogue(asked) else prompt_of(asked)
    check_conversation(messages, (Message(role="assistant", content="-"),), ("prompt", "answer"))
    try:
        return PromptRow(prompt=messages, known=Known.model_validate(row.get("known", {})), source=source)
    except ValidationError as error:
        raise Unfit(f"known: {reason(error)}") from error


def source_of(row: Mapping[str, Any]) -> Provenance:
    """The field `source` where it is ours; a text there is somebody else's. Raises Unfit."""
    value = row.get("source")
    if not isinstance(value, dict):
        return Provenance()
    try:
        return Provenance.model_validate(value)
    except ValidationError as error:
        raise Unfit(f"source: {reason(error)}") from error


def _preference(row: dict[str, Any], source: Provenance) -> PreferenceRow:
    _needs(row, "chosen", "rejected")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unfit(f"chosen is {kind_of(chosen)} and rejected {kind_of(rejected)}")
    if isinstance(chosen, str):
        chosen, rejected = text_of(chosen, "chosen"), text_of(rejected, "rejected")
        if chosen == rejected:
            raise Unfit("chosen and rejected are the same")
        if is_dialogue(chosen) and is_dialogue(rejected):
            wanted, unwanted = dialogue(chosen, "chosen"), dialogue(rejected, "rejected")
            return _parted(answered(wanted, "chosen"), answered(unwanted, "rejected"), source)
        if prompt is None:
            prompt, chosen, rejected = _parted_text(chosen, rejected)
        asked = dialogue(prompt, "prompt") if isinstance(prompt, str) and is_dialogue(prompt) else prompt_of(prompt)
        return preference(asked, reply_of(chosen, "chosen"), reply_of(rejected, "rejected"), source)
    wanted, unwanted = reply_of(chosen, "chosen"), reply_of(rejected, "rejected")
    if prompt is None or (wanted[0].role != "assistant" and isinstance(prompt, str)):  # the prompt stands in both
        return _parted(wanted, unwanted, source)
    return preference(prompt_of(prompt), wanted, unwanted, source)


def _parted(chosen: tuple[Message, ...], rejected: tuple[Message, ...], source: Provenance) -> PreferenceRow:
    """The prompt is what both begin with."""
    if chosen == rejected:
        raise Unfit("chosen and rejected are the same")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise Unfit("there is no prompt: chosen and rejected begin with different messages")
    if shared == min(len(chosen), len(rejected)):
        raise Unfit("one of chosen and rejected is the beginning of the other, so there is no second answer")
    return preference(chosen[:shared], chosen[shared:], rejected[shared:], source)


def _parted_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """-> the words that both begin with, and the rest of each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not chosen[shared - 1].isspace() and chosen.isascii():  # no word is cut
        shared -= 1
    if not chosen[:shared].strip():
        raise Unfit("there is no prompt, and chosen and rejected have no beginning in common")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _one(reply: tuple[Message, ...], field: str) -> None:
    if len(reply) > 1:
        raise Unfit(
            f"{field} has {len(reply)} messages behind the prompt, and what is compared is one answer of the assistant"
        )


def _needs(row: Mapping[str, Any], *fields: str) -> None:
    for one in fields:
        if one not in row:
            raise Unfit(f"it has no {one}")
