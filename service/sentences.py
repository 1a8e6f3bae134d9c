"""The sentences of a text, and what each says: its words, numbers and names. Pure functions, of any language.

Prompt versions choose a passage's best sentence with these, so what they give for a text never changes.
"""

import re
from functools import lru_cache
from typing import NamedTuple

_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？；]+[”’」』）]*|\n{2,}|\n(?=[ \t]*(?:[-*•#|]|\d+[.)])[ \t])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|approx|no|nos|fig|dr|mr|mrs|ms|st|vol|art|sec)|\b[A-Z]|^\s*\d+)\.$", re.I
)
_NAME = re.compile(
    r"(?<![^\W_])[A-Za-z]+(?:-?\d+[A-Za-z0-9]*)+(?![^\W_])|(?<![^\W_])[A-Za-z]+-(?:[A-Za-z0-9]+-)*\d+(?![^\W_])"
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"[^\W\d_]+", re.UNICODE)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_STOP_WORDS = """
a an the this that these those it its he she they them we you i his her their our your is are was were be
been being am do does did has have had having can could may might must shall should will would of in on at
to for from by with as into onto about than then so if and or but not no nor only also very just there here
which who whom whose what when where why how all any both each more most other some such own same out up
down over under again once per according based passage text document answer question yes
"""
_STOP = frozenset(_STOP_WORDS.split())


class Content(NamedTuple):
    """What a text says, apart from its grammar: words (lightly stemmed; pairs of characters where words are not spaced),
    numbers (without thousands separators) and names with digits (lower case, without hyphens).
    """

    words: frozenset[str]
    numbers: frozenset[str]
    names: frozenset[str]


_NOBODY: frozenset[str] = frozenset()
NOTHING = Content(_NOBODY, _NOBODY, _NOBODY)


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


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - (len(piece) - len(piece.rstrip()))
