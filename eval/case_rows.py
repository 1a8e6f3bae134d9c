"""Rows of a data set's files, plain or gzipped. What does not fit is noted with its file and line, and refused in one go."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ingest.errors import InvalidError

Row = TypeVar("Row", bound=BaseModel)
LISTED = 20  # reasons that are told


class Loose(BaseModel):
    """A row of somebody else's: fields that are not known are left alone, and a number may stand for an id."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """-> (number from 1, line) of those that are not blank. Raises InvalidError, OSError."""
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidError(f"{str(path)!r} cannot be read: {error}") from error


def rows(path: Path, kind: type[Row], refused: list[str]) -> Iterator[tuple[str, Row]]:
    """-> (place as "queries.jsonl:7", row) of a JSONL file; what does not fit is added to `refused`."""
    for number, line in lines(path):
        place = f"{path.name}:{number}"
        try:
            row = kind.model_validate_json(line)
        except ValidationError as error:
            refused.append(f"{place}: {reason(error)}")
        else:
            yield place, row


def load_json(path: Path) -> Any:
    """Raises InvalidError, OSError."""
    try:
        with _opened(path) as file:
            return json.load(file)
    except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidError(f"{str(path)!r} is not JSON: {error}") from error


def reason(error: ValidationError) -> str:
    return "; ".join(
        f"{place(one['loc'])}: {one['msg']}" if one["loc"] else one["msg"]
        for one in error.errors(include_url=False, include_input=False)
    )


def place(where: Sequence[str | int]) -> str:
    """As "data[3].paragraphs[0].context"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def refuse(path: Path, refused: Sequence[str]) -> None:
    """Raises InvalidError when there is anything."""
    if refused:
        more = f"\n  and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
        said = "".join(f"\n  {one}" for one in refused[:LISTED])
        rows = "1 row does" if len(refused) == 1 else f"{len(refused)} rows do"
        raise InvalidError(f"{str(path)!r} is not read, for {rows} not fit:{said}{more}")


def _opened(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")
