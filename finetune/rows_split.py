"""Rows in two: those that train, and those that say when to stop. No document, prompt or question is on both sides."""

import random
from collections.abc import Iterable

from eval.groups import connected
from finetune.rows_lines import line_of, rows_of
from finetune.schemas import Row, Rows, SftRow
from ingest.errors import InvalidError


def split_rows(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """-> (train, held out), about `share` of the rows held out, the same ones for the same rows and seed.

    Rows that name a common document, or ask the same, stay together, also through others. Where they all hang together,
    or in groups that are much larger than the share, nothing is held out: the train side is never empty.
    """
    order = _groups(rows, seed)
    wanted = min(max(1, round(share * len(rows.rows))), len(rows.rows) - 1) if share > 0 else 0
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held and wanted and len(order) > 1:
        smallest = min(order, key=len)
        if len(smallest) <= max(2 * wanted, len(rows.rows) // 3):
            held.update(smallest)
    return _part(rows, (at for at in range(len(rows.rows)) if at not in held)), _part(rows, sorted(held))


def fold_rows(rows: Rows, count: int, seed: int) -> list[tuple[Rows, Rows]]:
    """-> `count` times (train, held out): each row is held out once. What stays together is as in `split_rows`.

    Raises InvalidError where there are too few groups.
    """
    order = sorted(_groups(rows, seed), key=len, reverse=True)
    if len(order) < count:
        raise InvalidError(
            f"{rows.name!r} has {len(order)} groups of rows that share no document and no question: that makes no {count} "
            "folds; lower --folds"
        )
    folds: list[set[int]] = [set() for _ in range(count)]
    for group in order:
        min(folds, key=len).update(group)
    everything = range(len(rows.rows))
    return [(_part(rows, (at for at in everything if at not in held)), _part(rows, sorted(held))) for held in folds]


def normal(text: str) -> str:
    """What counts as the same text: without case and runs of blanks."""
    return " ".join(text.casefold().split())


def prompt_text(row: Row) -> str:
    """What asks: the prompt, or all that stands before the last answer."""
    messages = row.prompt[:-1] if isinstance(row, SftRow) and not row.completion else row.prompt
    return normal("\n".join(f"{one.role}: {one.content}" for one in messages))


def asked(row: Row) -> set[str]:
    """The texts by which a row is the same question as another: its prompt, and the question that it was made of."""
    return {prompt_text(row), *([f"question: {normal(row.source.question)}"] if row.source.question else [])}


def _groups(rows: Rows, seed: int) -> list[list[int]]:
    """-> the places of rows that stay together, shuffled; the same ones for the same rows and seed."""
    groups = connected(
        [[*asked(row), *(("document", document) for document in row.source.documents)] for row in rows.rows]
    )
    order = sorted(groups, key=lambda group: line_of(rows.rows[group[0]]))
    random.Random(seed).shuffle(order)
    return order


def _part(rows: Rows, chosen: Iterable[int]) -> Rows:
    at = list(chosen)
    places = tuple(rows.places[one] for one in at) if rows.places else ()
    part = rows_of([rows.rows[one] for one in at], places, rows.name, rows.prompt_version)
    return part.model_copy(update={"left_out": rows.left_out})
