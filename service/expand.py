"""What was found -> what is answered from: a part's parent, its neighbours, and no text twice.

Texts and offsets come from the kept text. A hit whose own text no longer stands at its offsets there (its document is being
ingested again) stays as it was found.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ingest.catalog import Catalog
from ingest.errors import NotFoundError
from ingest.schemas import Hit

KEPT_CHARS = 32_000_000  # of the texts that spans are read from, at most


class Texts:
    """The kept texts of the documents last answered from. Keyed by content, so a document that was ingested again is read
    again.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._held: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, documents: Iterable[str]) -> dict[str, str]:
        """By document; without those that were deleted."""
        found = {}
        for document in dict.fromkeys(documents):
            with suppress(NotFoundError):
                found[document] = self._of(document)
        return found

    def _of(self, document_id: str) -> str:
        address = self._catalog.document(document_id).text_hash or ""
        with self._lock:
            if address in self._held:
                self._held.move_to_end(address)
                return self._held[address]
        text = self._catalog.text(document_id).text
        if self._catalog.document(document_id).text_hash == address:  # it was not exchanged meanwhile
            with self._lock:
                self._held[address] = text
                while len(self._held) > 1 and sum(map(len, self._held.values())) > KEPT_CHARS:
                    self._held.popitem(last=False)
        return text


def places(hits: Iterable[Hit], neighbours: int) -> dict[str, set[int]]:
    """-> by document, the ordinals of the hits' neighbours, as `Index.at` takes them."""
    wanted: dict[str, set[int]] = {}
    for hit in hits:
        if hit.ordinal is not None:
            around = range(max(0, hit.ordinal - neighbours), hit.ordinal + neighbours + 1)
            wanted.setdefault(hit.document_id, set()).update(set(around) - {hit.ordinal})
    return {document: ordinals for document, ordinals in wanted.items() if ordinals}


def widened(hit: Hit, text: str, near: Sequence[Mapping[str, Any]] = ()) -> Hit:
    """A part with the text and place of its parent and of its neighbours among `near` (as `Index.at` gives them). Page,
    heading and scores stay those of the part. `text`: of its document.
    """
    start, end = hit.start, hit.end
    if text[start:end] != hit.text:
        return hit
    if hit.parent is not None and hit.parent.start <= start <= end <= hit.parent.end <= len(text):
        start, end = hit.parent.start, hit.parent.end
    start, end = min(start, _before(hit, text, near)), max(end, _after(hit, text, near))
    return hit.model_copy(update={"text": text[start:end], "start": start, "end": end})


def _before(hit: Hit, text: str, near: Sequence[Mapping[str, Any]]) -> int:
    """Where the chunks in front of a hit begin, as far as they follow each other without a gap."""
    start, ordinal = hit.start, (hit.ordinal or 0) - 1
    while (one := _stands(text, ordinal, near)) and one["start"] <= start and not text[one["end"] : start].strip():
        start, ordinal = one["start"], ordinal - 1
    return start


def _after(hit: Hit, text: str, near: Sequence[Mapping[str, Any]]) -> int:
    end, ordinal = hit.end, (hit.ordinal or 0) + 1
    while (one := _stands(text, ordinal, near)) and one["end"] >= end and not text[end : one["start"]].strip():
        end, ordinal = one["end"], ordinal + 1
    return end


def _stands(text: str, ordinal: int, near: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The chunk at a place of the document, if its text is there."""
    of_ordinal = (one for one in near if one["ordinal"] == ordinal)
    return next((one for one in of_ordinal if text[one["start"] : one["end"]] == one["text"]), None)


def merged(hits: Sequence[Hit], texts: Mapping[str, str]) -> list[Hit]:
    """Hits of a document that overlap become one, in the place and with the scores of the best of them. `texts`: by
    document; hits of others, and those that do not stand in theirs, stay as they are.
    """
    standing = [
        place for place, hit in enumerate(hits) if texts.get(hit.document_id, "")[hit.start : hit.end] == hit.text
    ]
    groups = [[place] for place in range(len(hits)) if place not in standing]
    end, document = 0, ""
    for place in sorted(standing, key=lambda place: (hits[place].document_id, hits[place].start)):
        hit = hits[place]
        if hit.document_id == document and hit.start < end:
            groups[-1].append(place)
            end = max(end, hit.end)
        else:
            groups.append([place])
            end, document = hit.end, hit.document_id
    groups.sort(key=min)
    return [_union([hits[place] for place in sorted(group)], texts) for group in groups]


def _union(hits: Sequence[Hit], texts: Mapping[str, str]) -> Hit:
    best = hits[0]
    if len(hits) == 1:
        return best
    start, end = min(hit.start for hit in hits), max(hit.end for hit in hits)
    return best.model_copy(update={"text": texts[best.document_id][start:end], "start": start, "end": end})
