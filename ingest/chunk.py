"""A parsed text -> chunks, each with exact offsets: text[start:end] == chunk.

LlamaIndex' SentenceSplitter decides where to cut. It finds offsets by searching, which goes wrong in repetitive text, so
it is run without overlap and its pieces are laid along the text in order; overlap is added here.
"""

import bisect
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from llama_index.core.node_parser import SentenceSplitter

from ingest.errors import DocumentError
from ingest.language import detect
from ingest.schemas import Chunk, Chunking, Heading, PageSpan, ParsedText, chunk_id

TokenIds = Callable[[str], list[int]]


def split(
    document_id: str, parsed: ParsedText, chunking: Chunking, token_ids: TokenIds, max_tokens: int
) -> list[Chunk]:
    """No chunk is over `chunking.tokens`, nor over `max_tokens`, the embedder's limit less its special tokens."""
    limit = min(chunking.tokens, max_tokens)
    splitter = SentenceSplitter(
        chunk_size=limit, chunk_overlap=0, tokenizer=token_ids, paragraph_separator="\n\n", include_metadata=False
    )
    spans = [
        span
        for start, end in _sections(parsed)
        for span in _lay(parsed.text, start, end, splitter.split_text(parsed.text[start:end]))
    ]
    spans = [part for span in spans for part in _within(parsed.text, *span, limit, token_ids)]
    if chunking.overlap:
        spans = _overlapped(parsed.text, spans, chunking.overlap, limit, token_ids)
    pages, headings = _PageLookup(parsed.pages), _HeadingLookup(parsed.headings)
    seen: Counter[str] = Counter()
    chunks = []
    for ordinal, (start, end) in enumerate(spans):
        text = parsed.text[start:end]
        chunks.append(
            Chunk(
                id=chunk_id(document_id, text, seen[text]),
                ordinal=ordinal,
                text=text,
                start=start,
                end=end,
                page=pages.at(start),
                heading=headings.at(end - 1),  # only leading headings lie inside a chunk
                language=detect(text),
            )
        )
        seen[text] += 1
    return chunks


def _sections(parsed: ParsedText) -> list[tuple[int, int]]:
    """Cuts at every heading; a heading without a body of its own stays with what follows it."""
    starts = sorted({0, *(heading.start for heading in parsed.headings), len(parsed.text)})
    sections: list[tuple[int, int]] = []
    pending = None
    for start, end in pairwise(starts):
        begin = start if pending is None else pending
        body = parsed.text[start:end].strip()
        if "\n" not in body and end < len(parsed.text):
            pending = begin
            continue
        sections.append((begin, end))
        pending = None
    if pending is not None:
        sections.append((pending, len(parsed.text)))
    return sections


def _lay(text: str, start: int, end: int, pieces: list[str]) -> list[tuple[int, int]]:
    """Lays the pieces along text[start:end] in order; between two of them there is white space only."""
    spans, at = [], start
    for piece in pieces:
        found = text.find(piece, at, end)
        if found < 0 or text[at:found].strip():
            raise DocumentError("chunk", f"the splitter's pieces do not follow the text at code point {at}")
        at = found + len(piece)
        spans.append((found, at))
    return spans


def _within(text: str, start: int, end: int, limit: int, token_ids: TokenIds) -> list[tuple[int, int]]:
    """The splitter counts pieces one by one; what is over the limit as a whole is halved."""
    if len(token_ids(text[start:end])) <= limit or end - start < 2:
        return [(start, end)]
    middle = text.rfind(" ", start + 1, (start + end) // 2 + 1)
    middle = (start + end) // 2 if middle <= start else middle
    left, right = text[start:middle], text[middle:end]
    left_end, right_start = start + len(left.rstrip()), middle + len(right) - len(right.lstrip())
    return [
        *_within(text, start, left_end, limit, token_ids),
        *_within(text, right_start, end, limit, token_ids),
    ]


def _overlapped(
    text: str, spans: list[tuple[int, int]], overlap: int, limit: int, token_ids: TokenIds
) -> list[tuple[int, int]]:
    """Each chunk begins up to `overlap` tokens earlier, at a word, as far as the limit leaves room."""
    wider = spans[:1]
    for (before, _), (start, end) in pairwise(spans):
        room = min(overlap, limit - len(token_ids(text[start:end])))
        at = start
        while room > 0 and at > before:
            word = max(text.rfind(" ", before, at - 1), text.rfind("\n", before, at - 1)) + 1 or before
            if word < before or len(token_ids(text[word:start])) > room:
                break
            at = word
        wider.append((at, end))
    return wider


class _PageLookup:
    def __init__(self, pages: tuple[PageSpan, ...]) -> None:
        self.pages = pages
        self.starts = [page.start for page in pages]

    def at(self, offset: int) -> int | None:
        place = bisect.bisect_right(self.starts, offset) - 1
        return self.pages[place].number if place >= 0 else None


class _HeadingLookup:
    """-> the heading path at an offset, as "Pumps > Service"."""

    def __init__(self, headings: tuple[Heading, ...]) -> None:
        self.starts = [heading.start for heading in headings]
        self.paths: list[str] = []
        stack: list[Heading] = []
        for heading in headings:
            stack = [*(held for held in stack if held.level < heading.level), heading]
            self.paths.append(" > ".join(held.title for held in stack))

    def at(self, offset: int) -> str | None:
        place = bisect.bisect_right(self.starts, offset) - 1
        return self.paths[place] if place >= 0 else None
