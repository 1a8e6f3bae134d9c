"""A parsed text -> chunks, each with exact offsets: text[start:end] == chunk.

A strategy cuts the text into pieces; what all chunks have in common is done here: the limit, overlap, pages, headings,
languages and ids.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from ingest.chunk_code import by_code
from ingest.chunk_header import Headers
from ingest.chunk_outline import Headings, Pages
from ingest.chunk_piece import Budget, Piece, halved, load_nltk, trimmed
from ingest.chunk_semantic import by_meaning
from ingest.chunk_table import by_table
from ingest.chunk_text import by_heading, by_hierarchy, by_page, by_sentence, by_token
from ingest.embed import TokenCounter, Vectors
from ingest.errors import DocumentError, SettingsError
from ingest.language import detect
from ingest.schemas import Chunk, Chunking, ParsedText, chunk_id

_GAP = re.compile("[ \n]")
Embed = Callable[[Sequence[str]], Vectors]


def split(
    document_id: str,
    parsed: ParsedText,
    chunking: Chunking,
    count: TokenCounter,
    embed: Embed | None = None,
    *,
    path: str = "",
) -> list[Chunk]:
    """No chunk's context and text are over `chunking.tokens`, nor over `count.max_tokens`, the embedder's limit less its
    special tokens. `embed` is needed by the strategy `semantic`, which raises SettingsError without it. `path`: of the
    document, for `chunking.headers`.
    """
    load_nltk()
    budget = inner = Budget(min(chunking.tokens, count.max_tokens), chunking.overlap, count.ids)
    headers = Headers(parsed, path, budget) if chunking.headers else None
    if headers:
        inner = Budget(budget.limit - headers.reserved, chunking.overlap, count.ids)
    found = _checked(parsed.text, _pieces(parsed, chunking, inner, embed))
    headed = map(headers.over, found) if headers else found
    pieces = [part for piece in headed for part in _within(parsed.text, piece, budget)]
    pages, headings = Pages(parsed.pages), Headings(parsed)
    starts = _overlapped(parsed.text, pieces, budget) if chunking.overlap else [piece.start for piece in pieces]
    seen: Counter[str] = Counter()
    chunks = []
    for ordinal, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
        text = parsed.text[start : piece.end]
        chunk = Chunk(
            id="",
            ordinal=ordinal,
            text=text,
            start=start,
            end=piece.end,
            page=pages.at(start),
            heading=headings.of(piece.start, piece.end),
            language=detect(text),
            context=piece.context,
            parent=piece.parent,
        )
        searched = chunk.searched
        chunks.append(chunk.model_copy(update={"id": chunk_id(document_id, searched, seen[searched])}))
        seen[searched] += 1
    return chunks


def _pieces(parsed: ParsedText, chunking: Chunking, budget: Budget, embed: Embed | None) -> Iterator[Piece]:
    match chunking.strategy:
        case "sentence":
            return by_sentence(parsed, budget)
        case "token":
            return by_token(parsed, budget)
        case "heading":
            return by_heading(parsed, budget)
        case "semantic":
            if embed is None:
                raise SettingsError("the chunking strategy 'semantic' compares sentences: give `split` an embedder")
            return by_meaning(parsed, budget, embed)
        case "hierarchical":
            return by_hierarchy(parsed, budget, chunking)
        case "code":
            return by_code(parsed, budget)
        case "table":
            return by_table(parsed, budget)
        case "page":
            return by_page(parsed, budget)


def _checked(text: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces without the white space around them, and none that is nothing else. Raises DocumentError for lost text."""
    at = 0
    for piece in pieces:
        start, end = trimmed(text, piece.start, piece.end)
        if start >= end:
            continue
        if start < at or text[at:start].strip():
            raise DocumentError("chunk", f"the pieces do not follow the text at code point {at}; please report this")
        at = end
        yield piece._replace(start=start, end=end)
    if text[at:].strip():
        raise DocumentError("chunk", f"the text from code point {at} is in no piece; please report this")


def _within(text: str, piece: Piece, budget: Budget) -> list[Piece]:
    spans = halved(text, piece.start, piece.end, lambda part: budget.fits(part, piece.context))
    parts = [piece._replace(start=start, end=end) for start, end in spans]
    if piece.context is None:
        return parts
    return [
        part if budget.fits(text[part.start : part.end], part.context) else part._replace(context=None)
        for part in parts
    ]


def _overlapped(text: str, pieces: Sequence[Piece], budget: Budget) -> list[int]:
    """-> where each piece begins with its overlap: up to `budget.overlap` tokens earlier, at a word, as far as the limit
    and the piece's floor leave room.
    """
    starts = [piece.start for piece in pieces[:1]]
    for before, piece in pairwise(pieces):
        floor = max(before.start, piece.floor)
        own = text[piece.start : piece.end]
        room = min(budget.overlap, budget.room(piece.context) - budget.count(own)) if floor < piece.start else 0
        start = _earlier(text, floor, piece.start, room, budget) if room > 0 else piece.start
        starts.append(start if budget.fits(text[start : piece.end], piece.context) else piece.start)
    return starts


def _earlier(text: str, floor: int, start: int, room: int, budget: Budget) -> int:
    """The first beginning of a word from which text[:start] is at most `room` tokens."""
    words = [floor, *(match.end() for match in _GAP.finditer(text, floor, start - 1))]
    low, high = 0, len(words)  # words[high:] fit
    while low < high:
        middle = (low + high) // 2
        if budget.count(text[words[middle] : start]) <= room:
            high = middle
        else:
            low = middle + 1
    return words[high] if high < len(words) else start
