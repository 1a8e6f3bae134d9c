"""Training rows from files: TRL's formats, hh-rlhf, LLaMA-Factory's (`DATASET_INFO.json#NAME`), question sets that `eval` reads.

Every row that does not fit is named with its line and the reason, all of them in one go.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from eval.case_rows import LISTED, lines, load_json, reason, refuse
from finetune.prompt_rows import AS_PROMPTS, prompts_of
from finetune.rows_factory import (
    Entry,
    entries,
    factory_row,
    is_dataset_info,
    local_names,
    looks_like_factory,
    sampled,
    split_spec,
)
from finetune.rows_lines import digest_of as digest_of
from finetune.rows_lines import line_of as line_of
from finetune.rows_lines import rows_of
from finetune.rows_lines import write_rows as write_rows
from finetune.rows_messages import Unfit, kind_of
from finetune.rows_questions import question_rows
from finetune.rows_split import split_rows as split_rows
from finetune.rows_trl import KNOWN, trl_row
from finetune.schemas import ROW_OF, Method, PromptRow, Row, Rows
from finetune.transcripts import LeftOut
from ingest.errors import InvalidError
from service.prompt import CURRENT

FITS: dict[type[Any], Method] = {kind: method for method, kind in reversed(ROW_OF.items())}  # the first of those
PATHS = "give a .jsonl or .json file (also .gz), or DATASET_INFO.json#NAME"


class Place(NamedTuple):
    """A line of a file, or, in a JSON list, a row; from 1."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file} {self.unit} {self.number}"


class Read(NamedTuple):
    """What a file holds: the rows that fit, and why the others do not."""

    rows: Rows
    refused: tuple[tuple[Place, str], ...]


def read_rows(path: Path, method: Method, prompt_version: str | None = None) -> Rows:
    """`prompt_version`: of the prompts that are made for question sets; None: the current one. Raises InvalidError."""
    found = read_all(path, method, prompt_version)
    refuse_all(path, found.refused)
    if ROW_OF[method] is not PromptRow:
        return found.rows
    return prompts_of(found.rows).model_copy(update={"left_out": found.rows.left_out})


def read_all(path: Path, method: Method | None = None, prompt_version: str | None = None) -> Read:
    """What fits and what does not; `method` None: rows of the commonest kind fit. Raises InvalidError where none can be read."""
    file, names = split_spec(path)
    _check_file(path, file)
    card = _card(file) if names is None else {}
    try:
        read = list(_entries(file, names) if names is not None else _items(file, prompt_version or CURRENT["cited"]))
    except OSError as error:
        raise InvalidError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    left_out = tuple(f"{place}: {row}" for place, row in read if isinstance(row, LeftOut))
    read = [(place, row) for place, row in read if not isinstance(row, LeftOut)]
    if not read:
        raise InvalidError(f"{str(path)!r} holds no row")
    fitting, refused = _sorted_out(path, read, method)
    version = card.get("prompt_version")
    if read[0][0].unit == "question":
        version = prompt_version or CURRENT["cited"]
    name = card.get("name") or names or file.name.partition(".")[0]
    rows = rows_of([row for _, row in fitting], [str(place) for place, _ in fitting], name, version)
    if card and not refused:
        _check_digest(path, card, rows)
    return Read(rows.model_copy(update={"left_out": left_out}), tuple(refused))


def refuse_all(path: Path, refused: Sequence[tuple[Place, str]]) -> None:
    """Raises InvalidError when there is anything: the first with their reasons, the rest by their numbers."""
    try:
        refuse(path, [f"{place}: {why}" for place, why in refused])
    except InvalidError as error:
        rest = f": {_numbers([place for place, _ in refused[LISTED:]])}" if len(refused) > LISTED else ""
        known = f"\n{KNOWN}" if any("no row to train on" in why for _, why in refused) else ""
        next_step = f"\nmend them, or `graft dataset inspect {path} --fitting OUT.jsonl` writes the rows that fit"
        raise InvalidError(f"{error}{rest}{known}{next_step}") from None


def _check_file(path: Path, file: Path) -> None:
    if file.is_dir():
        info = file / "dataset_info.json"
        raise InvalidError(f"{str(path)!r} is a folder; {f'name an entry: {info}#NAME' if info.is_file() else PATHS}")
    if not file.exists():
        raise InvalidError(f"there is no file {str(file)!r}; {PATHS}")


def _entries(info: Path, names: str) -> Iterator[tuple[Place, Row | Unfit]]:
    for named in entries(info, names):
        values = [one for file in named.files for one in _values(file)]
        yield from ((place, _made(value, named.entry)) for place, value in sampled(named, values))


def _items(file: Path, version: str) -> Iterator[tuple[Place, Row | Unfit]]:
    if ".jsonl" not in file.suffixes and ".json" in file.suffixes and not isinstance(content := _json(file), list):
        if is_dataset_info(content):
            raise InvalidError(
                f"{str(file)!r} names data sets: add #NAME; those with a file are {local_names(content)}"
            )
        for number, row in enumerate(question_rows(file, version), 1):
            yield Place(file.name, number, "question"), row
        return
    yield from ((place, _made(value)) for place, value in _values(file))


def _values(file: Path) -> Iterator[tuple[Place, Any]]:
    """-> what each line, or each row of a JSON list, holds; an Unfit where that is no JSON."""
    if ".jsonl" in file.suffixes:
        for number, line in lines(file):
            yield Place(file.name, number), _parsed(line)
    elif ".json" in file.suffixes:
        content = _json(file)
        if not isinstance(content, list):
            raise InvalidError(f"{str(file)!r} is {kind_of(content)}, not a list of rows")
        yield from ((Place(file.name, number, "row"), value) for number, value in enumerate(content, 1))
    else:
        raise InvalidError(f"{str(file)!r} is of a kind that is not read; {PATHS}")


def _made(value: Any, entry: Entry | None = None) -> Row | Unfit:
    if isinstance(value, Unfit):
        return value
    if not isinstance(value, dict):
        return Unfit(f"it is {kind_of(value)}, not an object")
    try:
        entry = entry or looks_like_factory(value)
        return factory_row(value, entry) if entry else trl_row(value)
    except ValidationError as error:
        return Unfit(reason(error))
    except Unfit as error:
        return error


def _sorted_out(
    path: Path, read: Sequence[tuple[Place, Row | Unfit]], method: Method | None
) -> tuple[list[tuple[Place, Row]], list[tuple[Place, str]]]:
    """-> the rows that fit `method`, and why others do not. Raises InvalidError when all are another method's."""
    kinds = Counter(FITS[type(row)] for _, row in read if not isinstance(row, Unfit))
    wanted = method or (kinds.most_common(1)[0][0] if kinds else "sft")
    taken = AS_PROMPTS if ROW_OF[wanted] is PromptRow else (ROW_OF[wanted],)
    if kinds and not any(isinstance(row, taken) for _, row in read) and kinds.total() == len(read):
        others = " and ".join(kinds)
        raise InvalidError(
            f"{str(path)!r} holds rows for {others}, not for {wanted}: choose a recipe whose method is {others}, or give "
            "other rows"
        )
    fitting: list[tuple[Place, Row]] = []
    refused: list[tuple[Place, str]] = []
    for place, row in read:
        if isinstance(row, Unfit):
            refused.append((place, str(row)))
        elif isinstance(row, PromptRow) and PromptRow not in taken:
            refused.append((place, "it has a prompt and no completion"))
        elif not isinstance(row, taken):
            refused.append((place, f"it is a row for {FITS[type(row)]}, not for {wanted}"))
        else:
            fitting.append((place, row))
    return fitting, refused


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unfit(f"not JSON: {error}")


def _json(file: Path) -> Any:
    try:
        return load_json(file)
    except RecursionError as error:
        raise InvalidError(f"{str(file)!r} is not JSON that can be read: it is nested too deeply") from error


def _card(file: Path) -> dict[str, Any]:
    """What `FILE.card.json` says of a file; empty where there is none. Raises InvalidError."""
    path = file.with_name(f"{file.name}.card.json")
    if not path.is_file():
        return {}
    card = _json(path)
    if not isinstance(card, dict) or not isinstance(card.get("digest"), str):
        raise InvalidError(
            f"{str(path)!r} is no card of a data set: it names no digest; make the data set anew, or remove it"
        )
    return card


def _check_digest(path: Path, card: dict[str, Any], rows: Rows) -> None:
    if card["digest"] != rows.digest:
        raise InvalidError(
            f"{str(path)!r} is not the data set that its card describes: its digest is {rows.digest[:12]}, and the card's "
            f"{card['digest'][:12]}; the rows were changed after it was frozen. Make it anew, or remove the card"
        )


def _numbers(places: Sequence[Place]) -> str:
    """As "rows.jsonl lines 25-40, 44"."""
    said = []
    for (file, unit), group in groupby(places, key=lambda one: (one.file, one.unit)):
        numbers = [one.number for one in group]
        runs = groupby(enumerate(numbers), key=lambda one: one[1] - one[0])
        spans = [[number for _, number in run] for _, run in runs]
        shown = ", ".join(str(one[0]) if len(one) == 1 else f"{one[0]}-{one[-1]}" for one in spans)
        said.append(f"{file} {unit}{'s' if len(numbers) > 1 else ''} {shown}")
    return "; ".join(said)
