"""A person looks at rows one after the other and accepts, edits or rejects each.

A decision is a line of FILE.review.jsonl, on the disk before the next row is shown. It hangs on the row's hash: it holds when the
file is extended or put in another order, and not for a row that was changed.
"""

import hashlib
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from eval.case_rows import reason, refuse
from finetune.rows_lines import line_of
from finetune.rows_messages import Unfit
from finetune.rows_trl import trl_row
from finetune.schemas import Message, PreferenceRow, PromptRow, Row, Rows
from ingest.catalog import now
from ingest.errors import InvalidError, NotFoundError
from ingest.schemas import Frozen

Verdict = Literal["accept", "edit", "reject"]
WORDS = {"accept": "accepted", "edit": "edited", "reject": "rejected", "undecided": "undecided"}
HELP = "a accept, e edit, r reject, s skip, b back, f in full, q quit"


class Decision(Frozen):
    """`row`: SHA-256 of the row's line; `edited`: the line that stands in its place."""

    row: str
    verdict: Verdict
    edited: dict[str, Any] | None = None
    place: str = ""
    at: datetime


class Reviewed(NamedTuple):
    """`rows`: those accepted, and those edited as they are now, in the file's order; `counts`: by verdict, and "undecided"."""

    rows: tuple[Row, ...]
    counts: Mapping[str, int]


class Terminal(NamedTuple):
    """How a person is asked. `show`: (row, place, number, of how many, its decision, in full); `key`: the next key, "" at the
    end; `edit`: a changed row, or None where nothing changed (raises Unfit); `tell`: a line.
    """

    show: Callable[[Row, str, int, int, Decision | None, bool], None]
    key: Callable[[], str]
    edit: Callable[[Row], Row | None]
    tell: Callable[[str], None]


def decisions_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.review.jsonl")


def key_of(row: Row) -> str:
    return hashlib.sha256(line_of(row).encode()).hexdigest()


def read_decisions(path: Path) -> dict[str, Decision]:
    """-> by the row, its last one. A last line that was cut off by a kill is no decision. Raises InvalidError."""
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidError(f"{str(path)!r} is not text in UTF-8: move it away to begin anew") from error
    except OSError as error:
        raise InvalidError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    found: dict[str, Decision] = {}
    refused: list[str] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # behind the last line end there is only what was cut off
        if line.strip():
            try:
                decision = Decision.model_validate_json(line)
            except ValidationError as error:
                refused.append(f"{path.name}:{number}: {reason(error)}")
            else:
                found[decision.row] = decision
    refuse(path, refused)
    return found


def keep(path: Path, decision: Decision) -> None:
    """Appends, and returns when it is on the disk. Raises InvalidError."""
    line = f"{decision.model_dump_json(exclude_defaults=True)}\n".encode()
    try:
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_cut_off(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InvalidError(f"the decision cannot be kept in {str(path)!r}: {error.strerror}") from error


def reviewed(rows: Rows, decisions: Mapping[str, Decision]) -> Reviewed:
    """Raises InvalidError for an edited row that is none."""
    kept: list[Row] = []
    counts = {"accept": 0, "edit": 0, "reject": 0, "undecided": 0}
    for row in rows.rows:
        decision = decisions.get(key_of(row))
        counts[decision.verdict if decision else "undecided"] += 1
        if decision and decision.verdict == "accept":
            kept.append(row)
        elif decision and decision.verdict == "edit":
            kept.append(_edited(decision))
    return Reviewed(tuple(kept), counts)


def review(rows: Rows, path: Path, terminal: Terminal, again: bool = False) -> dict[str, Decision]:
    """Asks for each row without a decision (`again`: for each) until the end or `q`. -> all decisions. Raises InvalidError."""
    decisions = read_decisions(path)
    places = rows.places or tuple(f"row {number}" for number, _ in enumerate(rows.rows, 1))
    keys = [key_of(row) for row in rows.rows]
    first = {key: at for at, key in reversed(list(enumerate(keys)))}  # the same row twice is asked for once
    waiting = [at for at in first.values() if again or keys[at] not in decisions]
    waiting.sort()
    at = 0
    while at < len(waiting):
        row, place, key = rows.rows[waiting[at]], places[waiting[at]], keys[waiting[at]]
        terminal.show(row, place, at + 1, len(waiting), decisions.get(key), False)
        moved, decision = _asked(row, key, place, terminal, (at + 1, len(waiting), decisions.get(key)))
        if moved == "quit":
            break
        if decision:
            keep(path, decision)
            decisions[key] = decision
        at = max(0, at - 1) if moved == "back" else at + 1
    return decisions


def _asked(
    row: Row, key: str, place: str, terminal: Terminal, shown: tuple[int, int, Decision | None]
) -> tuple[Literal["on", "back", "quit"], Decision | None]:
    """Until a key says where to go on."""
    while True:
        pressed = terminal.key()
        if pressed in ("", "q"):
            return "quit", None
        if pressed == "b":
            return "back", None
        if pressed == "s":
            return "on", None
        if pressed in ("a", "r"):
            verdict: Verdict = "accept" if pressed == "a" else "reject"
            return "on", Decision(row=key, verdict=verdict, place=place, at=now())
        if pressed == "f":
            terminal.show(row, place, *shown, True)
        elif pressed == "e":
            try:
                edited = terminal.edit(row)
            except Unfit as error:
                terminal.tell(f"the edited row does not fit, and is as it was: {error}")
                continue
            if edited is not None and edited != row:
                line = json.loads(line_of(edited))
                return "on", Decision(row=key, verdict="edit", edited=line, place=place, at=now())
            terminal.tell("nothing was changed")
        else:
            terminal.tell(HELP)


def with_answer(row: Row, text: str) -> Row:
    """The row with another answer, the chosen one of a preference. Raises Unfit."""
    answer_of(row)
    fields = json.loads(line_of(row))
    name = "chosen" if isinstance(row, PreferenceRow) else "completion" if "completion" in fields else "messages"
    fields[name][-1]["content"] = text
    return _fitting(fields, row)


def answer_of(row: Row) -> Message:
    """What `with_answer` replaces. Raises Unfit."""
    if isinstance(row, PromptRow):
        raise Unfit("a prompt has no answer: the model writes it")
    return row.chosen[-1] if isinstance(row, PreferenceRow) else (row.completion or row.prompt)[-1]


def edited_by(command: str, row: Row) -> Row | None:
    """The row as YAML in an editor; None where it was left as it is. Raises Unfit, NotFoundError."""
    fields = json.loads(line_of(row))
    fields.pop("source", None)
    before = yaml.dump(fields, Dumper=_Blocks, allow_unicode=True, sort_keys=False, width=110)
    with tempfile.TemporaryDirectory(prefix="graft-review-") as folder:
        file = Path(folder) / "row.yaml"
        file.write_text(before, encoding="utf-8")
        try:
            code = subprocess.run([*shlex.split(command), str(file)], check=False).returncode
            after = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise NotFoundError(
                f"the editor {command!r} cannot be used ({error}); set EDITOR to one that is there"
            ) from error
    if code:
        raise Unfit(f"the editor ended with status {code}")
    if after == before:
        return None
    try:
        changed = yaml.safe_load(after)
    except yaml.YAMLError as error:
        raise Unfit(f"it is not YAML any more: {' '.join(str(error).split())}") from error
    if not isinstance(changed, dict):
        raise Unfit("it has no fields any more")
    return _fitting(changed, row)


def _fitting(fields: dict[str, Any], row: Row) -> Row:
    """With the source of `row`, and of its kind. Raises Unfit."""
    found = trl_row({**fields, "source": row.source.model_dump(mode="json", exclude_defaults=True)})
    if type(found) is not type(row):
        raise Unfit("it is a row of another kind now")
    return found


def _edited(decision: Decision) -> Row:
    try:
        return trl_row(decision.edited or {})
    except (Unfit, ValidationError) as error:
        raise InvalidError(
            f"the edited row of {decision.place!r} does not fit: {error}; review it again with --again"
        ) from error


def _drop_cut_off(file: Any) -> None:
    """What stands behind the last line end was cut off by a kill."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


class _Blocks(yaml.SafeDumper):
    """Texts of several lines as blocks, so that they are edited as they are read."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)


def keys_of(stream: Any) -> Iterator[str]:
    """Keys that come through a pipe: each sign but line ends and blanks."""
    while sign := stream.read(1):
        if not sign.isspace():
            yield sign


def typed_answer(stream: Any, tell: Callable[[str], None], piped: bool) -> str:
    """A line, in which \\n stands for a line end; through a pipe, the rest of the key's line, or else the next one."""
    tell("the new answer, on one line (\\n for a line end); an empty one leaves it as it is:")
    line = stream.readline()
    if piped and line == "\n":
        line = stream.readline()
    return str(line).strip().replace("\\n", "\n")


def summary(counts: Mapping[str, int]) -> str:
    """As "3 accepted, 1 edited, 2 rejected, 18 undecided"."""
    return ", ".join(f"{counts[key]} {word}" for key, word in WORDS.items())
