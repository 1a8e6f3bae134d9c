"""Question -> hits, of what the principal may see: embed, search both sides, fuse, rerank; parts give way to their parents."""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.catalog import Catalog, Collection
from ingest.embed import Embedder, index_fingerprint, load_embedder
from ingest.errors import NotFoundError
from ingest.index import Filter, Index, search
from ingest.language import reads
from ingest.schemas import Hit
from ingest.settings import IngestSettings
from service.rerank import Reranker
from service.schemas import FilterValue

RERANKED = 20  # hits that the cross-encoder reads
SEARCHED = 2000  # parts that are looked at, at most, until their parents are as many as asked for
KEPT_CHARS = 32_000_000  # of the texts that parents are read from, at most


class Found(NamedTuple):
    collection: Collection
    hits: list[Hit]
    timings_ms: dict[str, float]


class Retriever:
    """Blocks; the service calls it in a thread. Models are loaded when a collection first needs them, and kept."""

    def __init__(self, catalog: Catalog, index: Index, settings: IngestSettings, reranker: str) -> None:
        self.catalog = catalog
        self.index = index
        self.settings = settings
        self._reranker_name = reranker
        self._embedders: dict[str, Embedder] = {}
        self._reranker: Reranker | None = None
        self._loading = threading.Lock()
        self._texts = _Texts(catalog)

    def embedder(self, name: str) -> Embedder:
        """Raises SettingsError."""
        if name not in self._embedders:
            with self._loading:
                if name not in self._embedders:
                    self._embedders[name] = load_embedder(name, self.settings, threads=1)  # one question is short work
        return self._embedders[name]

    def retrieve(
        self,
        question: str,
        collection_name: str,
        filters: Mapping[str, FilterValue | list[FilterValue]],
        groups: frozenset[str] | None,
        top_k: int | None,
        by_document: bool = False,
    ) -> Found:
        """`groups`: those of the principal, None for one who may see all. Raises NotFoundError."""
        collection = self.catalog.collection(collection_name)
        limit = top_k or collection.retrieval.top_k
        embedder = self.embedder(collection.embedder)
        start = time.perf_counter()
        # where the embedder is not the one any more that the collection was embedded with, its vectors say nothing
        is_same = index_fingerprint(embedder, collection.chunking) == collection.fingerprint
        dense = embedder.embed_query(question) if is_same and reads(embedder.languages, question) else None
        embedded = time.perf_counter()
        wanted = collection.retrieval.candidates if by_document else limit
        wanted = max(wanted, RERANKED) if collection.retrieval.rerank else wanted
        where = _filter(filters, groups)
        hits = self._searched(collection, dense, question, where, wanted)
        searched = time.perf_counter()
        timings = {"embed": _ms(start, embedded), "search": _ms(embedded, searched), "rerank": 0.0}
        if collection.retrieval.rerank and hits:
            hits = self._reranked(question, hits)
            timings["rerank"] = _ms(searched, time.perf_counter())
        if by_document:
            hits = _best_of_documents(hits)
        return Found(collection, [self._widened(hit) for hit in hits[:limit]], timings)

    def _searched(
        self, collection: Collection, dense: NDArray[np.float32] | None, question: str, where: Filter, wanted: int
    ) -> list[Hit]:
        """The best `wanted` hits. Of a hierarchical collection they are of as many parents, each by its best part."""
        by_parent = collection.chunking.strategy == "hierarchical"
        asked = max(wanted, collection.retrieval.candidates) if by_parent else wanted
        while True:
            hits = search(self.index, collection.index, dense, question, where, collection.retrieval, asked)
            best = _best_of_parents(hits)
            if not by_parent or len(best) >= wanted or len(hits) < asked or asked >= SEARCHED:
                return best[:wanted]
            asked = min(2 * asked, SEARCHED)

    def _widened(self, hit: Hit) -> Hit:
        """A part with its parent's text and place; page and heading stay those of the part. Where the kept text is not the
        one that its offsets point into (it is being ingested again), the part stays as it is.
        """
        if hit.parent is None:
            return hit
        start, end = hit.parent.start, hit.parent.end
        try:
            text = self._texts.of(hit.document_id)
        except NotFoundError:  # deleted since the search
            return hit
        if text[hit.start : hit.end] != hit.text or not start <= hit.start <= hit.end <= end <= len(text):
            return hit
        return hit.model_copy(update={"text": text[start:end], "start": start, "end": end})

    def _reranked(self, question: str, hits: list[Hit]) -> list[Hit]:
        if self._reranker is None:
            with self._loading:
                self._reranker = self._reranker or Reranker(self._reranker_name, self.settings)
        return [*self._reranker.rerank(question, hits[:RERANKED]), *hits[RERANKED:]]


def _filter(filters: Mapping[str, FilterValue | list[FilterValue]], groups: frozenset[str] | None) -> Filter:
    must: dict[str, Sequence[FilterValue]] = {}
    for field, value in filters.items():
        values = value if isinstance(value, list) else [value]
        if field == "path":
            must["folders"] = [str(one).removeprefix("./").rstrip("/") for one in values]
        else:
            must[field] = values
    return Filter(must, groups)


def _best_of_documents(hits: list[Hit]) -> list[Hit]:
    best: dict[str, Hit] = {}
    for hit in hits:
        best.setdefault(hit.document_id, hit)
    return list(best.values())


def _best_of_parents(hits: list[Hit]) -> list[Hit]:
    """A hit without a parent stands for itself."""
    best: dict[object, Hit] = {}
    for hit in hits:
        best.setdefault((hit.document_id, hit.parent) if hit.parent else hit.chunk_id, hit)
    return list(best.values())


class _Texts:
    """The kept texts of the documents last answered from. Keyed by content, so a document that was ingested again is read
    again.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._held: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, document_id: str) -> str:
        """Raises NotFoundError."""
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


def _ms(start: float, end: float) -> float:
    return round((end - start) * 1000, 3)
