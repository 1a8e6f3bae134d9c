"""Answer text + passages -> sentences and verified citations. Pure functions, of any language.

A sentence is supported by the span of a passage that holds its numbers and most of its content words; the best such span
is its quote. Names with digits (P-17, H75) must stand in the passage, its heading or its context, wherever that is.
A `[n]` that the model wrote is kept only when passage n supports the sentence, or the part that it stands behind, at least
loosely. What of a passage speaks to the model supports nothing.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from ingest.schemas import Hit
from service.guard import is_instruction, stated
from service.numerals import in_words, plain
from service.refusal import claims_nothing
from service.schemas import Citation, Sentence, Unsupported
from service.sentences import Content as Content
from service.sentences import content as content
from service.sentences import split_sentences as split_sentences
from service.sentences import statements

MATCH_SHARE = 0.75  # of a sentence's content words, for a citation that the model did not write
MODEL_SHARE = 0.3  # for one that it wrote
SPAN_SENTENCES = 2  # a quote is at most this many sentences of the passage

_MARKER = re.compile(r"\[(\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)\]")
_NOBODY: frozenset[str] = frozenset()


class Cited(NamedTuple):
    sentences: tuple[Sentence, ...]
    citations: tuple[Citation, ...]


class _Read(NamedTuple):
    """A passage, read once for all sentences of the answer: its names, (start, end, content) of its statements, and the
    `[n]` that it holds itself, as a paper does.
    """

    names: frozenset[str]
    statements: list[tuple[int, int, Content]]
    markers: frozenset[str]


class _Support(NamedTuple):
    share: float
    start: int  # of the span, in the passage
    end: int
    held: Content


class _Source(NamedTuple):
    n: int  # of the passage
    support: _Support
    by: Literal["model", "match"]


class _Claim(NamedTuple):
    """A sentence, or the part of one, with the passages that the model named for it."""

    said: Content
    named: tuple[int, ...]


def cite(answer: str, passages: Sequence[Hit], guarded: bool = True) -> Cited:
    """`passages`: what the prompt held, in its order; passage n is passages[n - 1]. `guarded`: see `_read`."""
    citations: dict[tuple[int, int, int], Citation] = {}
    first_of_passage: set[int] = set()
    sentences = []
    extra = len(passages)
    read = [_read(passage.text, passage.heading, passage.context, guarded) for passage in passages]
    for start, end in split_sentences(answer):
        text = answer[start:end]
        sources, unsupported = _examined(text, read)
        cited = []
        for n, support, by in sources:
            key = (n, support.start, support.end)
            if key not in citations:
                number = n
                if n in first_of_passage:
                    extra += 1
                    number = extra
                first_of_passage.add(n)
                citations[key] = _citation(number, passages[n - 1], support, by)
            cited.append(citations[key].n)
        sentences.append(
            Sentence(
                text=text,
                start=start,
                end=end,
                citations=tuple(dict.fromkeys(cited)),
                supported=unsupported is None,
                unsupported=unsupported,
            )
        )
    return Cited(tuple(sentences), tuple(citations.values()))


def _examined(sentence: str, passages: Sequence[_Read]) -> tuple[list[_Source], Unsupported | None]:
    """-> where a sentence has it from, and what of it stands in none of its sources."""
    bare = _MARKER.sub("", sentence)
    if claims_nothing(bare) or not re.search(r"\w", bare):
        return [], None
    whole = _said(bare)
    held_by_others = _NOBODY.union(*(passage.markers for passage in passages))
    claims = _claims(sentence, held_by_others)
    sources, lost = _named(whole, claims, passages)
    if not sources:
        sources = _matched(whole, passages)
    return sources, _missing(whole, sources, lost, passages)


def _claims(sentence: str, of_passages: frozenset[str]) -> list[_Claim]:
    """The parts of a sentence that end in markers; `of_passages` are no markers of the answer's own, but copied."""
    claims: list[_Claim] = []
    start, before = 0, ""
    for marker in _MARKER.finditer(sentence):
        between = sentence[start : marker.start()]
        named = tuple(int(n) for n in re.findall(r"\d+", marker[1]))
        if marker.group() in of_passages:
            continue
        if claims and not between.strip(" ,，、"):
            claims[-1] = _Claim(claims[-1].said, claims[-1].named + named)
        else:
            before = _MARKER.sub("", between)
            claims.append(_Claim(_said(before), named))
        start = marker.end()
    return claims


def _named(whole: Content, claims: Sequence[_Claim], passages: Sequence[_Read]) -> tuple[list[_Source], bool]:
    """-> the sources that the model named and that say so, and whether it named one that does not. Where it named more
    than one, each has to hold some of the numbers, and they all of them together.
    """
    everyone = sorted({n for claim in claims for n in claim.named})
    known = [n for n in everyone if 1 <= n <= len(passages)]
    found: dict[int, _Support] = {}
    for said, named in claims:
        for n in named:
            if n in known and n not in found:
                tries = [(whole, True), (said, True), (whole, len(known) == 1)]
                supports = (_best_span(text, passages[n - 1], exact) for text, exact in tries)
                enough = next((one for one in supports if one and one.share >= MODEL_SHARE), None)
                if enough:
                    found[n] = enough
    return [_Source(n, found[n], "model") for n in sorted(found)], len(found) < len(everyone)


def _matched(said: Content, passages: Sequence[_Read]) -> list[_Source]:
    """The passage that says it best, where the model named none."""
    found = [(n, _best_span(said, passage)) for n, passage in enumerate(passages, 1)]
    supported = [_Source(n, support, "match") for n, support in found if support and support.share >= MATCH_SHARE]
    return [max(supported, key=lambda one: (round(one.support.share, 3), -one.n))] if supported else []


def _missing(said: Content, sources: Sequence[_Source], lost: bool, passages: Sequence[_Read]) -> Unsupported | None:
    if not sources:
        words = said._replace(numbers=_NOBODY, names=_NOBODY)
        near = (_best_span(words, passage) for passage in passages)
        if words != said and (not words.words or any(one and one.share >= MODEL_SHARE for one in near)):
            return "number"
        return "citation" if lost else "words"
    numbers = _NOBODY.union(*(source.support.held.numbers for source in sources))
    names = _NOBODY.union(*(passages[source.n - 1].names for source in sources))
    if not (said.numbers <= numbers and said.names <= names):
        return "number"
    held = _NOBODY.union(*(source.support.held.words for source in sources))
    if len(said.words & held) < MODEL_SHARE * len(said.words):
        return "words"
    return "citation" if lost else None


def _best_span(said: Content, passage: _Read, exact: bool = True) -> _Support | None:
    """-> the shortest span of whole sentences with the largest share of the content words, all numbers held; or None.

    Not `exact`: some of the numbers are enough, where there are any, and some of the names.
    """
    if not any(said) or not _holds(said.names, passage.names, exact):
        return None
    best: _Support | None = None
    for width in range(1, SPAN_SENTENCES + 1):
        for first in range(len(passage.statements) - width + 1):
            span = passage.statements[first : first + width]
            numbers = _NOBODY.union(*(held.numbers for _, _, held in span))
            if not _holds(said.numbers, numbers, exact):
                continue
            words = _NOBODY.union(*(held.words for _, _, held in span))
            share = len(said.words & words) / len(said.words) if said.words else 1.0
            if best is None or share > best.share + 1e-9:
                best = _Support(share, span[0][0], span[-1][1], Content(words, numbers, _NOBODY))
    return best


def _holds(wanted: frozenset[str], held: frozenset[str], exact: bool) -> bool:
    return wanted <= held or (not exact and bool(wanted & held))


@lru_cache(maxsize=2048)  # the same passages answer many questions
def _read(text: str, heading: str | None, context: str | None, guarded: bool) -> _Read:
    """`guarded`: without what speaks to the model, which is no statement of the document's."""
    spans = statements(text, heading)
    if guarded:
        clipped = ((start, stated(text, start, end)) for start, end in spans)
        spans = [(start, start + len(text[start:end].rstrip())) for start, end in clipped if end > start]
    read = [(start, end, _held(text[start:end])) for start, end in spans]
    above = _NOBODY.union(
        *(content(text).names for text in (heading, context) if text and not (guarded and is_instruction(text)))
    )
    names = above.union(*(held.names for _, _, held in read))
    return _Read(names, read, frozenset(match.group() for match in _MARKER.finditer(text)))


def _said(text: str) -> Content:
    """Of the answer: the numbers that it has to show a source for, also those in words."""
    found = content(plain(text))
    return found._replace(numbers=found.numbers | in_words(text, claimed=True))


def _held(text: str) -> Content:
    """Of a passage: its numbers, however they are written."""
    found = content(plain(text))
    return found._replace(numbers=found.numbers | in_words(text, claimed=False))


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
