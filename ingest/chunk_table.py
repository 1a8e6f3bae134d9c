"""The strategy `table`: Markdown tables are cut between rows, and each part has the table's header in front of it."""

import re
from collections.abc import Iterator

from ingest.chunk_outline import sections
from ingest.chunk_piece import Budget, Piece, pack, sentence_spans, trimmed
from ingest.schemas import ParsedText

_RUN = re.compile(r"^[ \t]*\|[^\n]*(?:\n[ \t]*\|[^\n]*)*+", re.MULTILINE)
_RULE = re.compile(r"\s*:?-+:?\s*")
_CELL = re.compile(r"(?<!\\)\|")


def by_table(parsed: ParsedText, budget: Budget) -> Iterator[Piece]:
    """Rows stay whole; one that is over the limit is cut between cells, and a cell that is over it by sentence.

    The text outside of tables is cut by sentence; a heading that a table follows at once goes with the table's first rows.
    """
    for section in sections(parsed):
        start, end = section
        for table in _tables(parsed.text, *section):
            lead = parsed.text[start : table[0]].strip()
            titled = start == section[0] and "\n" not in lead and parsed.headings and lead
            if not titled:
                yield from _prose(parsed.text, start, table[0], budget)
            yield from _rows(parsed.text, start if titled else table[0], table, budget)
            start = table[-1]
        yield from _prose(parsed.text, start, end, budget)


def _prose(text: str, start: int, end: int, budget: Budget) -> Iterator[Piece]:
    start, end = trimmed(text, start, end)
    for part in sentence_spans(text, start, end, budget.fill(), budget):
        yield Piece(*part, floor=start)


def _tables(text: str, start: int, end: int) -> Iterator[list[int]]:
    """-> where each line of a table begins, and its end. The second line of a table is a rule: |---|---|."""
    for run in _RUN.finditer(text, start, end):
        breaks = (run.start() + match.end() for match in re.finditer("\n", run.group()))
        lines = [run.start(), *breaks, run.end()]
        if len(lines) > 2 and _is_rule(text[lines[1] : lines[2]]):
            yield lines


def _is_rule(line: str) -> bool:
    return all(_RULE.fullmatch(cell) for cell in line.strip().strip("|").split("|"))


def _rows(text: str, start: int, table: list[int], budget: Budget) -> Iterator[Piece]:
    """`start`: where the part with the header begins, which has no context: it holds the header."""
    header, rows, end = text[table[0] : table[2]].rstrip(), table[2:-1], table[-1]
    first = next(pack(text, [start, *rows[1:], end], budget.room(), budget))
    if not budget.fits(text[slice(*first)]):  # the header and one row are too much: the header stands alone
        first = (start, rows[0] if rows else end)
    for part in _fitting(text, *first, None, budget):
        yield Piece(*part, floor=part[0])
    if first[1] == end:
        return
    if budget.count(header) > budget.limit // 3:
        header = header.split("\n", 1)[0]
    context = budget.trim(header)
    left = [at for at in rows if at >= first[1]]
    for span in pack(text, [*left, end], budget.room(context), budget):
        for part in _fitting(text, *span, context, budget):
            yield Piece(*part, context, floor=part[0])


def _fitting(text: str, start: int, end: int, context: str | None, budget: Budget) -> Iterator[tuple[int, int]]:
    """A span as it is, else its cells, as many together as fit."""
    if budget.fits(text[start:end], context):
        yield start, end
        return
    inner = (match.start() for match in _CELL.finditer(text, start + 1, end))
    for cell in pack(text, [start, *inner, end], budget.room(context), budget):
        if budget.fits(text[slice(*cell)], context):
            yield cell
        else:
            yield from sentence_spans(text, *cell, budget.room(context), budget)
