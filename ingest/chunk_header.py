"""What stands above every chunk of a collection with `chunking.headers`: its document's title and its heading path.

A chunk that says "It is changed every 4,000 hours" is then found by the name of the pump that only its title tells.
"""

from pathlib import PurePosixPath

from ingest.chunk_outline import Headings
from ingest.chunk_piece import Budget, Piece
from ingest.schemas import ParsedText


class Headers:
    """Of one document. `reserved`: tokens that the longest of its headers takes, with its line break."""

    def __init__(self, parsed: ParsedText, path: str, budget: Budget) -> None:
        self._title = _title(parsed, path)
        self._headings = Headings(parsed)
        self._budget = budget
        lines = {self._line(heading) for heading in (None, *self._headings.paths)}
        self.reserved = max(budget.count(f"{line}\n") for line in lines if line) if any(lines) else 0

    def over(self, piece: Piece) -> Piece:
        """With its header above the context that it has; one that is a heading path is in the header already."""
        heading = self._headings.of(piece.start, piece.end)
        inner = None if (heading or "").endswith(piece.context or "") else piece.context
        return piece._replace(context="\n".join(filter(None, (self._line(heading), inner))) or None)

    def _line(self, heading: str | None) -> str | None:
        """At most a third of a chunk; of a longer one the end is kept."""
        begins_with_title = f"{heading} > ".casefold().startswith(f"{self._title} > ".casefold())
        parts = [heading] if heading and begins_with_title else [self._title, heading]
        line = " > ".join(filter(None, parts))
        return self._budget.trim(line) if line else None


def _title(parsed: ParsedText, path: str) -> str:
    """The one that the document names, else its path without the suffix, on one line."""
    named = parsed.metadata.get("title")
    title = named if isinstance(named, str) else ""
    return " ".join(title.split()) or (str(PurePosixPath(path).with_suffix("")) if PurePosixPath(path).name else path)
