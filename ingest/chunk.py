"""A parsed text -> chunks, each with exact offsets: text[start:end] == chunk.

LlamaIndex' SentenceSplitter decides where to cut. It finds offsets by searching, which goes wrong in repetitive text, so
it is run without overlap and its pieces are laid along the text in order; overlap is added here.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

from llama_index.core.node_parser import SentenceSplitter

from ingest.errors import DocumentError
from ingest.language import detect
from ingest.schemas import Chunk, Chunking, Heading, PageSpan, ParsedText, chunk_id

STRETCH = 100_000  # code points that the splitter gets at once
TokenIds = Callable[[str], list[int]]


def split(
    document_id: str, parsed: ParsedText, chunking: Chunking, token_ids: TokenIds, max_tokens: int
) -> list[Chunk]:
    """No chunk is over `chunking.tokens`, nor over `max_tokens`, the embedder's limit less its special tokens."""
    limit = min(chunking.tokens, max_tokens)
    splitter = SentenceSplitter(
        chunk_size=max(limit - chunking.overlap, limit // 2),
        chunk_overlap=0,
        tokenizer=lambda text: token_ids(text) or [0],  # it repeats pieces of no tokens, such as a lone accent
        paragraph_separator="\n\n",
        include_metadata=False,
    )
    spans = [
        span
        for section in _sections(parsed)
        for start, end in _stretches(parsed.text, *section)
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
    titled = {heading.start for heading in parsed.headings}
    starts = sorted({0, *titled, len(parsed.text)})
    sections: list[tuple[int, int]] = []
    pending = None
    for start, end in pairwise(starts):
        begin = start if pending is None else pending
        body = parsed.text[start:end].strip()
        if end < len(parsed.text) and (not body or (start in titled and "\n" not in body)):
            pending = begin
            continue
        sections.append((begin, end))
        pending = None
    if pending is not None:
        sections.append((pending, len(parsed.text)))
    return sections


def _stretches(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A long section comes in parts: the splitter's memory grows with it, and NLTK gives up after 5 s on one text."""
    while end - start > STRETCH:
        ends = (text.rfind(mark, start + STRETCH // 2, start + STRETCH) + len(mark) for mark in ("\n\n", "\n", " "))
        cut = next((at for at in ends if at > start + STRETCH // 2), start + STRETCH)
        yield start, cut
        start = cut
    yield start, end


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
