"""The headings and pages of a parsed text: its sections, and what stands above an offset."""

import bisect
from itertools import pairwise

from ingest.schemas import Heading, PageSpan, ParsedText


def sections(parsed: ParsedText) -> list[tuple[int, int]]:
    """Cuts at every heading, and tiles the text; a heading without a body of its own stays with what follows it."""
    titled = {heading.start for heading in parsed.headings}
    starts = sorted({0, *titled, len(parsed.text)})
    found: list[tuple[int, int]] = []
    pending = None
    for start, end in pairwise(starts):
        begin = start if pending is None else pending
        body = parsed.text[start:end].strip()
        if end < len(parsed.text) and (not body or (start in titled and "\n" not in body)):
            pending = begin
            continue
        found.append((begin, end))
        pending = None
    if pending is not None:
        found.append((pending, len(parsed.text)))
    return found


class Pages:
    def __init__(self, pages: tuple[PageSpan, ...]) -> None:
        self.pages = pages
        self.starts = [page.start for page in pages]

    def at(self, offset: int) -> int | None:
        """The number of the page at an offset."""
        place = bisect.bisect_right(self.starts, offset) - 1
        return self.pages[place].number if place >= 0 else None


class Headings:
    """Heading paths, as "Pumps > Service"."""

    def __init__(self, parsed: ParsedText) -> None:
        self.starts = [heading.start for heading in parsed.headings]
        self.paths: list[str] = []
        stack: list[Heading] = []
        for heading in parsed.headings:
            stack = [*(held for held in stack if held.level < heading.level), heading]
            self.paths.append(" > ".join(held.title for held in stack))
        spans = pairwise([*self.starts, len(parsed.text)])
        # headings that the next one follows at once
        self._bare = ["\n" not in parsed.text[start:end].strip() for start, end in spans]
        self._bare_start = not parsed.text[: self.starts[0] if self.starts else 0].strip()

    def of(self, start: int, end: int) -> str | None:
        """The path above a span. The headings that the span begins with are above the rest of it."""
        place = bisect.bisect_right(self.starts, start) - 1
        while place + 1 < len(self.starts) and self.starts[place + 1] < end:
            if not (self._bare[place] if place >= 0 else self._bare_start):
                break
            place += 1
        return self.paths[place] if place >= 0 else None
