"""What an answer says where an embedder does not read the question, or a part of its collection."""

import time
from collections.abc import Mapping
from typing import NamedTuple

from ingest.catalog import Catalog, Collection
from ingest.language import detect, name_of, reads, unread

FRESH_SECONDS = 1.0
SHARE_OF_TIME = 0.01  # that counting may take, at most: a count holds so much longer as it took


class _Count(NamedTuple):
    chunks: Mapping[str, int]
    until: float


class LanguageNotes:
    """Counts a collection's languages by its catalog rows, and keeps the count for as long as it is fresh."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._counts: dict[str, _Count] = {}

    def of(self, collection: Collection, languages: tuple[str, ...], question: str) -> list[str]:
        """`languages`: those of the collection's embedder; ("*",) reads all."""
        if "*" in languages:
            return []
        notes = []
        if not reads(languages, question):
            asked = name_of(detect(question))
            notes.append(f"the question is {asked}, which {collection.embedder} does not read: only BM25 was searched")
        if said := unread(self._chunks(collection.name), languages):
            known = ", ".join(map(name_of, languages))
            notes.append(f"{said}; {collection.embedder} reads {known}: only BM25 finds them")
        return [f"{collection.name}: {note}" for note in notes]

    def _chunks(self, name: str) -> Mapping[str, int]:
        """-> chunks by language."""
        held = self._counts.get(name)
        started = time.monotonic()
        if held is None or held.until < started:
            chunks = self._catalog.languages(name)
            took = time.monotonic() - started
            held = _Count(chunks, time.monotonic() + max(FRESH_SECONDS, took / SHARE_OF_TIME))
            self._counts[name] = held
        return held.chunks
