"""Rows of LLaMA-Factory: alpaca and sharegpt, for answers, preferences and KTO, as an entry of dataset_info.json says.

Source: LLaMA-Factory 0.9.5, data/README.md, src/llamafactory/data/parser.py and converter.py. As there, every answer of a
conversation is learned, and a column that `columns` does not name is not read.
"""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from eval.case_rows import load_json, reason
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
from finetune.rows_trl import kto, preference, source_of
from finetune.schemas import Message, Provenance, Row, SftRow
from ingest.errors import InvalidError
from ingest.schemas import Frozen

INFO = "dataset_info.json"
_NAME = re.compile(r"(.+?)\[:(\d+)\]")
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


class Columns(Frozen):
    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(Frozen):
    role_tag: str | None = None
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    observation_tag: str | None = None
    function_tag: str | None = None
    system_tag: str | None = None


class Entry(Frozen):
    """A data set of dataset_info.json."""

    file_name: str
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    num_samples: Annotated[int, Field(ge=1)] | None = None
    columns: Columns = Columns(prompt="instruction", query="input", response="output", messages="conversations")
    tags: Tags = Tags(
        role_tag="from", content_tag="value", user_tag="human", assistant_tag="gpt", observation_tag="observation",
        function_tag="function_call", system_tag="system",
    )  # fmt: skip
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    revision: str | None = None


class Named(NamedTuple):
    """An entry, and what of it is read: its first `limit` rows; None: all."""

    name: str
    entry: Entry
    files: tuple[Path, ...]
    limit: int | None


def split_spec(path: Path) -> tuple[Path, str | None]:
    """ "DIR/dataset_info.json#a,b[:16]" -> (the file, "a,b[:16]"); a plain path has no names."""
    file, mark, names = str(path).partition(".json#")
    return (Path(f"{file}.json"), names) if mark else (path, None)


def entries(info: Path, names: str) -> list[Named]:
    """`names`: with commas between them, each with or without "[:N]". Raises InvalidError, OSError."""
    content = load_json(info)
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise InvalidError(f"{str(info)!r} is no dataset_info.json: it has to be an object of data sets by name")
    chosen = [one.strip() for one in names.split(",")]
    wrong: list[str] = []
    found: list[Named] = []
    for one in chosen:
        cut = _NAME.fullmatch(one)
        name, limit = (cut[1], int(cut[2])) if cut else (one, None)
        said = _read_entry(info, content, name)
        if isinstance(said, str):
            wrong.append(said)
        else:
            found.append(Named(name, *said, limit))
    if wrong:
        raise InvalidError(f"{str(info)!r}: " + "; ".join(wrong))
    return found


def is_dataset_info(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(one, dict) and ("file_name" in one or _remote(one)) for one in content.values())
    )


def local_names(content: Mapping[str, Any]) -> str:
    """Those of a dataset_info.json whose rows are in a file."""
    return ", ".join(name for name, one in content.items() if "file_name" in one and not _remote(one)) or "none"


def sampled(named: Named, rows: list[Any]) -> list[Any]:
    """The rows that its `num_samples` draws, always the same, then the first of these up to its limit; in their order."""
    wanted = named.entry.num_samples
    if wanted is not None and wanted < len(rows):
        rows = [rows[at] for at in sorted(random.Random(0).sample(range(len(rows)), wanted))]
    return rows[: named.limit]


def looks_like_factory(row: Mapping[str, Any]) -> Entry | None:
    """-> how to read a row without a dataset_info.json, by its keys."""
    defaults = Entry(file_name="-")
    extras = {name: name for name in ("system", "history", "tools", "images", "videos", "audios") if name in row}
    if pair := "chosen" in row and "rejected" in row:
        extras |= {"chosen": "chosen", "rejected": "rejected"}
    tag = next((one for one in ("kto_tag", "label") if isinstance(row.get(one), bool)), None)
    if tag:
        extras["kto_tag"] = tag
    if "conversations" in row:
        formatting: Literal["alpaca", "sharegpt"] = "sharegpt"
    elif "instruction" in row and ("output" in row or pair):
        formatting = "alpaca"
    else:
        return None
    columns = defaults.columns.model_copy(update=extras)
    return defaults.model_copy(update={"formatting": formatting, "ranking": pair, "columns": columns})


def factory_row(row: Mapping[str, Any], entry: Entry) -> Row:
    """Raises Unfit."""
    columns = entry.columns
    check_text_only({name: row.get(getattr(columns, name) or "") for name in ("tools", "images", "videos", "audios")})
    source = source_of(row)
    return _alpaca(row, entry, source) if entry.formatting == "alpaca" else _sharegpt(row, entry, source)


def _alpaca(row: Mapping[str, Any], entry: Entry, source: Provenance) -> Row:
    columns = entry.columns
    asked = "\n".join(filter(None, (_text(row, columns.prompt, "prompt"), _text(row, columns.query))))
    before = _history(row.get(columns.history or ""))
    prompt = (*_system(_text(row, columns.system)), *before, Message(role="user", content=asked))
    if entry.ranking:
        chosen, rejected = _text(row, columns.chosen, "chosen"), _text(row, columns.rejected, "rejected")
        return preference(prompt, reply_of(chosen, "chosen"), reply_of(rejected, "rejected"), source)
    reply = reply_of(_text(row, columns.response, "response"), columns.response or "response")
    if columns.kto_tag:
        return kto(prompt, reply, row.get(columns.kto_tag), source, ("prompt", columns.response or "response"))
    return _answers(prompt, reply, source, ("prompt", columns.response or "response"))


def _sharegpt(row: Mapping[str, Any], entry: Entry, source: Provenance) -> Row:
    columns, tags = entry.columns, entry.tags
    field = columns.messages or "conversations"
    said = _turns(row.get(field), field, tags)
    if not (said and said[0].role == "system"):
        said = (*_system(_text(row, columns.system)), *said)
    if entry.ranking:
        ends = []
        for name in (columns.chosen or "chosen", columns.rejected or "rejected"):
            value = row.get(name)
            ends.append(_turns([value], name, tags) if isinstance(value, dict) else reply_of(value, name))
        return preference(said, ends[0], ends[1], source)
    if columns.kto_tag:
        return kto(said[:-1], said[-1:], row.get(columns.kto_tag), source, (field, f"{field}, last"))
    return _answers(said[:-1], said[-1:], source, (field, f"{field}, last"))


def _answers(
    prompt: tuple[Message, ...], reply: tuple[Message, ...], source: Provenance, fields: tuple[str, str]
) -> SftRow:
    """All answers of a conversation are learned, not its last one alone."""
    if not prompt:
        raise Unfit(f"{fields[0]}: one message is no question with an answer")
    check_conversation(prompt, reply, fields)
    if any(one.role == "assistant" for one in prompt):
        return SftRow(prompt=(*prompt, *reply), source=source)
    return SftRow(prompt=prompt, completion=reply, source=source)


def _turns(value: Any, field: str, tags: Tags) -> tuple[Message, ...]:
    """Raises Unfit."""
    if not isinstance(value, list):
        raise Unfit(f"{field} is {kind_of(value)}, not a list of messages")
    role_key, text_key = tags.role_tag or "from", tags.content_tag or "value"
    roles = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.system_tag: "system",
        tags.observation_tag: "tool",
    }
    messages = []
    for at, one in enumerate(value):
        where = f"{field}[{at}]"
        if not isinstance(one, dict) or role_key not in one or text_key not in one:
            raise Unfit(f"{where} has no {role_key!r} and {text_key!r}; the entry's tags say how they are called")
        role = one[role_key]
        if role is not None and role == tags.function_tag:
            raise Unfit(f"{where} calls a tool, and calls of tools are not trained here")
        if not isinstance(role, str) or role not in roles:
            known = ", ".join(repr(tag) for tag in roles if tag)
            raise Unfit(f"{where}: {role_key} {json.dumps(role, ensure_ascii=False)} is none of {known}")
        messages.append({**one, "role": roles[role], "content": one[text_key]})
    return messages_of(messages, field)


def _history(value: Any) -> list[Message]:
    """Pairs of what was asked and what was answered."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unfit(f"history is {kind_of(value)}, not a list of pairs")
    messages: list[Message] = []
    for at, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unfit(f"history[{at}] is no pair of what was asked and what was answered")
        asked, answered = (text_of(one, f"history[{at}]") for one in pair)
        messages += [*prompt_of(asked), *reply_of(answered, f"history[{at}]")]
    return messages


def _system(text: str) -> tuple[Message, ...]:
    return (Message(role="system", content=text),) if text else ()


def _text(row: Mapping[str, Any], column: str | None, needed: str | None = None) -> str:
    """ "" where there is none. Raises Unfit where it is `needed`."""
    if column is None or column not in row:
        if needed:
            said = f"it has no {column!r}" if column else f"the entry's columns name no {needed}"
            raise Unfit(said)
        return ""
    return "" if row[column] is None and not needed else text_of(row[column], column)


def _read_entry(info: Path, content: Mapping[str, Any], name: str) -> tuple[Entry, tuple[Path, ...]] | str:
    """-> the entry and its files, or what is wrong."""
    value = content.get(name)
    if value is None:
        return f"there is no data set {name!r}; those with a file are {local_names(content)}"
    if remote := _remote(value):
        return f"{name!r} is at {remote} {value[remote]!r}, and nothing is fetched: save it as a file and give its file_name"
    try:
        entry = Entry.model_validate(value)
    except ValidationError as error:
        return f"{name!r}: {reason(error)}"
    file, folder = info.parent / entry.file_name, info.parent.resolve()
    if not file.resolve().is_relative_to(folder):
        return f"{name!r}: its file {entry.file_name!r} lies outside {str(info.parent)!r}, whose files alone are read"
    if not file.exists():
        return f"{name!r}: its file {entry.file_name!r} is not in {str(info.parent)!r}"
    files = tuple(sorted(one for one in file.iterdir() if one.is_file())) if file.is_dir() else (file,)
    return (entry, files) if files else f"{name!r}: folder {entry.file_name!r} is empty"


def _remote(value: Mapping[str, Any]) -> str | None:
    return next((one for one in _REMOTE if value.get(one)), None)
