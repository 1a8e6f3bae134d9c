"""Rows as the lines of a file, in TRL's formats, with `source` beside them. Their digest is that of these lines."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.schemas import KtoRow, Message, PreferenceRow, PromptRow, Row, Rows
from ingest.files import write_whole


def line_of(row: Row) -> str:
    """As JSON, without a line end."""
    fields: dict[str, Any]
    if isinstance(row, PreferenceRow):
        fields = {"prompt": _plain(row.prompt), "chosen": _plain(row.chosen), "rejected": _plain(row.rejected)}
    elif isinstance(row, KtoRow):
        fields = {"prompt": _plain(row.prompt), "completion": _plain(row.completion), "label": row.label}
    elif isinstance(row, PromptRow):
        fields = {"prompt": _plain(row.prompt), "known": row.known.model_dump(mode="json", exclude_defaults=True)}
    elif row.completion:
        fields = {"prompt": _plain(row.prompt), "completion": _plain(row.completion)}
    else:
        fields = {"messages": _plain(row.prompt)}
    if source := row.source.model_dump(mode="json", exclude_defaults=True):
        fields["source"] = source
    return json.dumps(fields, ensure_ascii=False)


def digest_of(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) of the rows' lines: that of the file that `write_rows` writes, unless it is packed."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{line_of(row)}\n".encode())
    return digest.hexdigest()


def rows_of(rows: Sequence[Row], places: Sequence[str] = (), name: str = "", prompt_version: str | None = None) -> Rows:
    return Rows(
        rows=tuple(rows), digest=digest_of(rows), places=tuple(places), name=name, prompt_version=prompt_version
    )


def write_rows(rows: Sequence[Row], path: Path) -> str:
    """-> their digest. The file is whole or not there; one that ends in .gz is packed. Raises OSError."""
    content = "".join(f"{line_of(row)}\n" for row in rows).encode()
    write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return digest_of(rows)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in messages]
