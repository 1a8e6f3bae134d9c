"""A data set as it is kept: rows, and a card written last that names them by a hash. And what must never be in one."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from eval.answer_metrics import rouge_words
from eval.schemas import DataSet
from finetune.rows import write_rows
from finetune.schemas import PreferenceRow, PromptRow, Row, who_may_see
from ingest.catalog import now
from ingest.errors import ConflictError
from ingest.files import write_whole
from ingest.schemas import Frozen

RUN = 13  # words in a row that no row shares with a held-out document (Brown et al., 2020, appendix C)
_SIGN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # half a word: most Chinese ones have two characters


class Card(Frozen):
    """What a data set is. `sources`: of its questions, as {"name", "sha256", "licence"}; `left_out`: rows by the reason."""

    name: str
    digest: str
    created_at: datetime
    rows: int
    kinds: dict[str, int]
    method: str
    prompt_version: str | None
    made_by: dict[str, Any]
    sources: tuple[dict[str, str], ...]
    documents: int
    acl: tuple[str, ...] | None
    left_out: dict[str, int]
    held_out: dict[str, Any]


def freeze(
    rows: Sequence[Row],
    path: Path,
    *,
    method: str,
    prompt_version: str | None,
    made_by: Mapping[str, Any],
    sources: Sequence[dict[str, str]] = (),
    left_out: Mapping[str, int] | None = None,
    held_out: Mapping[str, Any] | None = None,
) -> Card:
    """Writes `path` and its card. Raises ConflictError where another data set is kept there, OSError."""
    refuse_existing(path)
    digest = write_rows(rows, path)
    card = Card(
        name=path.stem,
        digest=digest,
        created_at=now(),
        rows=len(rows),
        kinds=dict(Counter(row.source.kind or "row" for row in rows)),
        method=method,
        prompt_version=prompt_version,
        made_by=dict(made_by),
        sources=tuple(sources),
        documents=len({one for row in rows for one in row.source.documents}),
        acl=who_may_see(row.source.acl for row in rows),
        left_out=dict(left_out or {}),
        held_out=dict(held_out or {}),
    )
    write_whole(card_of(path), card.model_dump_json(indent=1) + "\n")
    return card


def refuse_existing(path: Path) -> None:
    """Raises ConflictError."""
    if path.exists() or card_of(path).exists():
        raise ConflictError(f"{str(path)!r} is there already, and a data set never changes: choose another name")


def card_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.card.json")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_leaks(rows: Sequence[Row], held_out: Iterable[DataSet]) -> tuple[list[Row], dict[str, int]]:
    """-> (rows that share nothing with what is held out, how many did by the reason).

    A row shares a question, or RUN words in a row with a document that a held-out question is about.
    """
    questions: set[str] = set()
    runs: set[int] = set()
    for dataset in held_out:
        questions |= {_plain(case.question) for case in dataset.cases}
        for document in dataset.documents:
            runs |= set(_runs(f"{document.title} {document.text}"))
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        if row.source.question and _plain(row.source.question) in questions:
            left_out["its question is held out"] += 1
        elif any(run in runs for text in _texts(row) for run in _runs(text)):
            left_out["it shows text of a held-out document"] += 1
        else:
            kept.append(row)
    return kept, dict(left_out)


def described(held_out: Iterable[DataSet]) -> dict[str, Any]:
    """What was held out, for a card: how much, and its hash."""
    found: dict[str, Any] = {}
    for one in held_out:
        said = json.dumps([sorted(case.id for case in one.cases), sorted(document.id for document in one.documents)])
        found[one.name] = {
            "questions": len(one.cases),
            "documents": len(one.documents),
            "sha256": hashlib.sha256(said.encode()).hexdigest(),
        }
    return found


def _texts(row: Row) -> Iterator[str]:
    yield from (message.content for message in row.prompt if message.role != "system")
    if isinstance(row, PromptRow):
        yield from row.known.answers
        return
    ends = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else (row.completion,)
    yield from (message.content for messages in ends for message in messages)


def _runs(text: str) -> Iterator[int]:
    """From each word on as many as make RUN, whatever stands before them."""
    found, end, halves = rouge_words(text), 0, 0
    for at, word in enumerate(found):
        while halves < 2 * RUN:
            if end == len(found):
                return
            halves += _halves(found[end])
            end += 1
        yield hash(tuple(found[at:end]))
        halves -= _halves(word)


def _halves(word: str) -> int:
    return 1 if _SIGN.match(word) else 2


def _plain(text: str) -> str:
    return " ".join(rouge_words(text))
