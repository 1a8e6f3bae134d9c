"""Answer text + passages -> sentences and verified citations. Pure functions, of any language.

A sentence is supported by the span of a passage that holds its numbers and most of its content words; the best such span
is its quote. Names with digits (P-17, H75) must stand in the passage, its heading or its context, wherever that is.
A `[n]` that the model wrote is kept only when passage n supports the sentence at least loosely.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from ingest.schemas import Hit
from service.schemas import Citation, Sentence

MATCH_SHARE = 0.75  # of a sentence's content words, for a citation that the model did not write
MODEL_SHARE = 0.3  # for one that it wrote
SPAN_SENTENCES = 2  # a quote is at most this many sentences of the passage

_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？；]+[”’」』）]*|\n{2,}|\n(?=[ \t]*(?:[-*•#|]|\d+[.)])[ \t])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|approx|no|nos|fig|dr|mr|mrs|ms|st|vol|art|sec)|\b[A-Z]|^\s*\d+)\.$", re.I
)
_MARKER = re.compile(r"\[(\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)\]")
_NAME = re.compile(
    r"(?<![^\W_])[A-Za-z]+(?:-?\d+[A-Za-z0-9]*)+(?![^\W_])|(?<![^\W_])[A-Za-z]+-(?:[A-Za-z0-9]+-)*\d+(?![^\W_])"
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"[^\W\d_]+", re.UNICODE)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_STOP = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "it",
        "its",
        "he",
        "she",
        "they",
        "them",
        "we",
        "you",
        "i",
        "his",
        "her",
        "their",
        "our",
        "your",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "am",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "having",
        "can",
        "could",
        "may",
        "might",
        "must",
        "shall",
        "should",
        "will",
        "would",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "from",
        "by",
        "with",
        "as",
        "into",
        "onto",
        "about",
        "than",
        "then",
        "so",
        "if",
        "and",
        "or",
        "but",
        "not",
        "no",
        "nor",
        "only",
        "also",
        "very",
        "just",
        "there",
        "here",
        "which",
        "who",
        "whom",
        "whose",
        "what",
        "when",
        "where",
        "why",
        "how",
        "all",
        "any",
        "both",
        "each",
        "more",
        "most",
        "other",
        "some",
        "such",
        "own",
        "same",
        "out",
        "up",
        "down",
        "over",
        "under",
        "again",
        "once",
        "per",
        "according",
        "based",
        "passage",
        "text",
        "document",
        "answer",
        "question",
        "yes",
    ]
)


class Cited(NamedTuple):
    sentences: tuple[Sentence, ...]
    citations: tuple[Citation, ...]


class Content(NamedTuple):
    """What a text says, apart from its grammar: words (lightly stemmed; pairs of characters where words are not spaced),
    numbers (without thousands separators) and names with digits (lower case, without hyphens).
    """

    words: frozenset[str]
    numbers: frozenset[str]
    names: frozenset[str]


_NOBODY: frozenset[str] = frozenset()
NOTHING = Content(_NOBODY, _NOBODY, _NOBODY)


class _Read(NamedTuple):
    """A passage, read once for all sentences of the answer: its names, and (start, end, content) of its statements."""

    names: frozenset[str]
    statements: list[tuple[int, int, Content]]


class _Support(NamedTuple):
    share: float
    start: int  # of the span, in the passage
    end: int


def cite(answer: str, passages: Sequence[Hit]) -> Cited:
    """`passages`: what the prompt held, in its order; passage n is passages[n - 1]."""
    citations: dict[tuple[int, int, int], Citation] = {}
    first_of_passage: set[int] = set()
    sentences = []
    extra = len(passages)
    read = [_read(passage.text, passage.heading, passage.context) for passage in passages]
    for start, end in split_sentences(answer):
        text = answer[start:end]
        cited = []
        for n, support, by in _supports(text, read):
            key = (n, support.start, support.end)
            if key not in citations:
                number = n
                if n in first_of_passage:
                    extra += 1
                    number = extra
                first_of_passage.add(n)
                citations[key] = _citation(number, passages[n - 1], support, by)
            cited.append(citations[key].n)
        sentences.append(Sentence(text=text, start=start, end=end, citations=tuple(cited)))
    return Cited(tuple(sentences), tuple(citations.values()))


def split_sentences(text: str) -> list[tuple[int, int]]:
    """-> (start, end) of each sentence, without the white space around it. A marker after the full stop belongs to it."""
    spans, start = [], 0
    for match in _END.finditer(text):
        if match.group().startswith(".") and _ABBREVIATION.search(text[start : match.end()]):
            continue
        end = match.end()
        markers = re.match(r"(?:\s*\[\d{1,3}(?:\s*,\s*\d{1,3})*\])+", text[end:])
        end += markers.end() if markers else 0
        if end > start:
            spans.append((start, end))
            start = end
    spans.append((start, len(text)))
    trimmed = ((*_trim(text, start, end),) for start, end in spans)
    return [(start, end) for start, end in trimmed if end > start]


def statements(text: str, heading: str | None) -> list[tuple[int, int]]:
    """-> (start, end) of the sentences that state something: no headings, no questions, no headings in front of them."""
    titles = set((heading or "").split(" > "))
    found = []
    for start, end in split_sentences(text):
        for line in text[start:end].splitlines(keepends=True):
            title = line.strip().lstrip("#").strip()
            if not (line.startswith("#") or title in titles):
                break
            start += len(line)
        start, end = _trim(text, min(start, end), end)
        if end > start and text[end - 1] not in "?？":
            found.append((start, end))
    return found


def _supports(sentence: str, passages: Sequence[_Read]) -> Iterator[tuple[int, _Support, Literal["model", "match"]]]:
    named = {int(n) for marker in _MARKER.findall(sentence) for n in re.findall(r"\d+", marker)}
    said = content(_MARKER.sub("", sentence))
    written = []
    for n in sorted(named):
        if 1 <= n <= len(passages):
            support = _best_span(said, passages[n - 1])
            if support and support.share >= MODEL_SHARE:
                written.append((n, support))
    if written:
        yield from ((n, support, "model") for n, support in written)
        return
    found = [(n, _best_span(said, passage)) for n, passage in enumerate(passages, 1)]
    supported = [(n, support) for n, support in found if support and support.share >= MATCH_SHARE]
    if supported:
        n, support = max(supported, key=lambda one: (round(one[1].share, 3), -one[0]))
        yield n, support, "match"


def _best_span(said: Content, passage: _Read) -> _Support | None:
    """-> the shortest span of whole sentences with the largest share of the content words, all numbers held; or None."""
    if not any(said) or not said.names <= passage.names:
        return None
    best: _Support | None = None
    for width in range(1, SPAN_SENTENCES + 1):
        for first in range(len(passage.statements) - width + 1):
            span = passage.statements[first : first + width]
            if not said.numbers <= frozenset().union(*(held.numbers for _, _, held in span)):
                continue
            words = frozenset().union(*(held.words for _, _, held in span))
            share = len(said.words & words) / len(said.words) if said.words else 1.0
            if best is None or share > best.share + 1e-9:
                best = _Support(share, span[0][0], span[-1][1])
    return best


@lru_cache(maxsize=2048)  # the same passages answer many questions
def _read(text: str, heading: str | None, context: str | None) -> _Read:
    stated = [(start, end, content(text[start:end])) for start, end in statements(text, heading)]
    above = content(f"{heading or ''}\n{context or ''}").names
    names = above.union(*(held.names for _, _, held in stated))
    return _Read(names, stated)


def content(text: str) -> Content:
    names, numbers = _NOBODY, _NOBODY
    if _DIGIT.search(text):
        names = frozenset(name.replace("-", "").lower() for name in _NAME.findall(text))
        text = _NAME.sub(" ", text)
        numbers = frozenset(number.replace(",", "") for number in _NUMBER.findall(text))
    words = frozenset(stem for word in _WORD.findall(text.lower()) for stem in _stems(word))
    return Content(words, numbers, names)


@lru_cache(maxsize=65536)
def _stems(word: str) -> tuple[str, ...]:
    """-> what a run of letters counts as: nothing, a stem, or the pairs of its characters."""
    if not word.isascii() and _CJK.search(word):
        return tuple(word[at : at + 2] for at in range(max(1, len(word) - 1)))
    if word in _STOP:
        return ()
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return (word[: -len(ending)].rstrip("e"),)
    return (word.rstrip("e") if len(word) > 3 else word,)


def _citation(n: int, hit: Hit, support: _Support, by: Literal["model", "match"]) -> Citation:
    return Citation(
        n=n,
        document_id=hit.document_id,
        path=hit.path,
        page=hit.page,
        heading=hit.heading,
        quote=hit.text[support.start : support.end],
        start=hit.start + support.start,
        end=hit.start + support.end,
        score=round(support.share, 3),
        by=by,
    )


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - (len(piece) - len(piece.rstrip()))
