"""What every chunking strategy is made of: a piece of the text, the tokens that it may take, and ways to cut it.

Knows nothing of documents, ids or strategies.
"""

import bisect
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

from llama_index.core.node_parser import SentenceSplitter

from ingest.errors import DocumentError
from ingest.schemas import Span

STRETCH = 100_000  # code points that a splitter gets at once
SHORT = 40  # code points of a text whose count is remembered: a word or a character, which come again and again


@cache
def load_nltk() -> None:
    """NLTK, by which splitters find sentences, takes SciPy and scikit-learn along where they are installed: a second and
    400 MB of each parser for parts of it that are not used here. So it is loaded while there are none to be found.
    """
    hidden = [name for name in ("scipy", "sklearn") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import an ImportError
    try:
        importlib.import_module("nltk")
    finally:
        for name in hidden:
            del sys.modules[name]


class Piece(NamedTuple):
    """text[start:end], which becomes one chunk, or several where it is over the limit.

    `floor`: its overlap with the piece before it begins there at the earliest.
    """

    start: int
    end: int
    context: str | None = None
    parent: Span | None = None
    floor: int = 0


class Budget:
    """The tokens of a chunk, for one text: at most `limit` for context and text together."""

    def __init__(self, limit: int, overlap: int, ids: Callable[[str], list[int]]) -> None:
        self.limit = limit
        self.overlap = overlap
        self._ids = ids
        self._short = lru_cache(maxsize=65_536)(self._counted)
        self.splitter = cache(self._splitter)  # by size

    def count(self, text: str) -> int:
        return self._short(text) if len(text) <= SHORT else self._counted(text)

    def _counted(self, text: str) -> int:
        return len(self._ids(text))

    def fits(self, text: str, context: str | None = None) -> bool:
        return self.count(f"{context}\n{text}" if context else text) <= self.limit

    def room(self, context: str | None = None) -> int:
        """Tokens that a context leaves to the text."""
        return max(1, self.limit - (self.count(f"{context}\n") if context else 0))

    def fill(self, context: str | None = None) -> int:
        """Tokens of text in a chunk before its overlap is added."""
        room = self.room(context)
        return max(room - self.overlap, room // 2, 1)

    def trim(self, context: str) -> str | None:
        """A context of at most a third of the limit: its end, from a line or a heading on, else a word, else a character."""
        most = self.limit // 3
        if self.count(context) <= most:
            return context
        for mark in (r"\n| > ", r"\s+", r"(?s:.)"):
            starts = [match.end() for match in re.finditer(mark, context)]
            place = bisect.bisect_left(starts, True, key=lambda start: self.count(context[start:]) <= most)
            end = context[starts[place] :].strip() if place < len(starts) else ""
            if end:
                return end
        return None

    def _splitter(self, size: int) -> SentenceSplitter:
        return SentenceSplitter(
            chunk_size=size,
            chunk_overlap=0,
            tokenizer=lambda text: range(
                self.count(text) or 1
            ),  # it repeats pieces of no tokens, such as a lone accent
            paragraph_separator="\n\n",
            include_metadata=False,
        )


def sentence_spans(text: str, start: int, end: int, size: int, budget: Budget) -> Iterator[tuple[int, int]]:
    """text[start:end] in parts of about `size` tokens, cut after paragraphs, else sentences, phrases, words.

    LlamaIndex' SentenceSplitter decides where. It finds offsets by searching, which goes wrong in repetitive text, so its
    pieces are laid along the text in order.
    """
    for begin, stop in stretches(text, start, end):
        try:
            pieces = budget.splitter(size).split_text(text[begin:stop])
        except ValueError:  # one character has more tokens than `size`: what is over the limit is halved later
            pieces = [text[begin:stop].strip()]
        yield from lay(text, begin, stop, pieces)


def stretches(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A long text comes in parts: a splitter's memory grows with it, and NLTK gives up after 5 s on one text."""
    while end - start > STRETCH:
        ends = (text.rfind(mark, start + STRETCH // 2, start + STRETCH) + len(mark) for mark in ("\n\n", "\n", " "))
        cut = next((at for at in ends if at > start + STRETCH // 2), start + STRETCH)
        yield start, cut
        start = cut
    yield start, end


def lay(text: str, start: int, end: int, pieces: Iterable[str]) -> list[tuple[int, int]]:
    """Lays the pieces along text[start:end] in order; between two of them there is white space only."""
    spans, at = [], start
    for piece in pieces:
        found = text.find(piece, at, end)
        if found < 0 or text[at:found].strip():
            raise DocumentError("chunk", f"the splitter's pieces do not follow the text at code point {at}")
        at = found + len(piece)
        if piece:
            spans.append((found, at))
    return spans


def pack(text: str, cuts: Sequence[int], size: int, budget: Budget) -> Iterator[tuple[int, int]]:
    """Spans of at most `size` tokens that begin and end at `cuts` (increasing). What is over it between two cuts stays
    alone.
    """
    if len(cuts) < 2:
        return
    start, held = cuts[0], 0
    for at, following in pairwise(cuts):
        tokens = budget.count(text[at:following])
        if at > start and held + tokens > size:
            yield start, at
            start, held = at, 0
        held += tokens
    yield start, cuts[-1]


def halved(text: str, start: int, end: int, fits: Callable[[str], bool]) -> list[tuple[int, int]]:
    """A splitter counts pieces one by one; what does not fit as a whole is halved, at a space if there is one."""
    if end - start < 2 or fits(text[start:end]):
        return [(start, end)]
    middle = text.rfind(" ", start + 1, (start + end) // 2 + 1)
    middle = (start + end) // 2 if middle <= start else middle
    left, right = text[start:middle], text[middle:end]
    left_end, right_start = start + len(left.rstrip()), middle + len(right) - len(right.lstrip())
    return [*halved(text, start, left_end, fits), *halved(text, right_start, end, fits)]


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the white space around it; an empty one where there is nothing else."""
    piece = text[start:end]
    begin = start + len(piece) - len(piece.lstrip())
    return begin, max(begin, end - (len(piece) - len(piece.rstrip())))
