"""Strategies for running text: by sentence, by tokens, by heading, by page, and small chunks within wider parents."""

from collections.abc import Iterator
from itertools import pairwise

from llama_index.core.node_parser import TokenTextSplitter

from ingest.chunk_outline import Headings, sections
from ingest.chunk_piece import Budget, Piece, halved, lay, sentence_spans, stretches, trimmed
from ingest.schemas import Chunking, ParsedText, Span


def by_sentence(parsed: ParsedText, budget: Budget) -> Iterator[Piece]:
    """Whole sentences, as many as fit; never over a heading into the next section."""
    for section in sections(parsed):
        for start, end in sentence_spans(parsed.text, *section, budget.fill(), budget):
            yield Piece(start, end)


def by_token(parsed: ParsedText, budget: Budget) -> Iterator[Piece]:
    """Windows of equal size, cut at words: LlamaIndex' TokenTextSplitter."""

    def tokens(text: str) -> range:
        return range(budget.count(text) or bool(text.strip()))  # pieces of no tokens would be repeated

    splitter = TokenTextSplitter(
        chunk_size=budget.fill(), chunk_overlap=0, tokenizer=tokens, include_metadata=False, keep_whitespaces=False
    )
    for stretch in stretches(parsed.text, 0, len(parsed.text)):
        for start, end in lay(parsed.text, *stretch, splitter.split_text(parsed.text[slice(*stretch)])):
            yield Piece(start, end)


def by_heading(parsed: ParsedText, budget: Budget) -> Iterator[Piece]:
    """One chunk a section, under the path of its headings; sections are never merged, long ones are cut by sentence."""
    headings = Headings(parsed)
    for section in sections(parsed):
        path = headings.of(*section)
        context = budget.trim(path) if path else None
        start, end = trimmed(parsed.text, *section)
        if budget.fits(parsed.text[start:end], context):
            yield Piece(start, end, context, floor=start)
            continue
        for part in sentence_spans(parsed.text, start, end, budget.fill(context), budget):
            yield Piece(*part, context, floor=start)


def by_page(parsed: ParsedText, budget: Budget) -> Iterator[Piece]:
    """One chunk a page, cut by sentence where it is over the limit; a text without pages is cut by sentence."""
    if not parsed.pages:
        yield from by_sentence(parsed, budget)
        return
    starts = [0, *(page.start for page in parsed.pages[1:]), len(parsed.text)]
    for start, end in pairwise(starts):
        start, end = trimmed(parsed.text, start, end)
        if budget.fits(parsed.text[start:end]):
            yield Piece(start, end, floor=start)
            continue
        for part in sentence_spans(parsed.text, start, end, budget.fill(), budget):
            yield Piece(*part, floor=start)


def by_hierarchy(parsed: ParsedText, budget: Budget, chunking: Chunking) -> Iterator[Piece]:
    """Small chunks by sentence, each within a parent of at most `parent_tokens` (else four times `tokens`)."""
    for parent in _parents(parsed, chunking.parent_tokens or 4 * chunking.tokens, budget):
        start, end = trimmed(parsed.text, parent[0][0], parent[-1][1])
        for section in parent:
            for part in sentence_spans(parsed.text, *section, budget.fill(), budget):
                yield Piece(*part, parent=Span(start=start, end=end), floor=start)


def _parents(parsed: ParsedText, most: int, budget: Budget) -> Iterator[list[tuple[int, int]]]:
    """-> the sections of each parent: neighbours, as many as fit, but of one chapter: a heading that outranks the parent's
    first one begins another parent, and one of the same rank does after lower ones.

    A section that is over `most` tokens is cut by sentence; each part is a parent.
    """
    text = parsed.text
    levels = {heading.start: heading.level for heading in parsed.headings}
    run: list[tuple[int, int]] = []
    rank = lowest = held = 0
    for start, end in sections(parsed):
        tokens, level = budget.count(text[start:end]), levels.get(start, 7)
        if run and (held + tokens > most or level < rank or level == rank < lowest):
            yield run
            run = []
        if tokens > most:
            for part in sentence_spans(text, start, end, most, budget):
                yield from ([one] for one in halved(text, *part, lambda piece: budget.count(piece) <= most))
            continue
        if not run:
            rank = lowest = level
            held = 0
        run.append((start, end))
        held += tokens
        lowest = max(lowest, level)
    if run:
        yield run
