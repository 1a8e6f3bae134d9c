"""Question -> hits, of what the principal may see: embed, search both sides, fuse, rerank."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ingest.catalog import Catalog, Collection
from ingest.embed import Embedder, load_embedder
from ingest.index import Filter, Index, search
from ingest.language import reads
from ingest.schemas import Hit
from ingest.settings import IngestSettings
from service.rerank import Reranker
from service.schemas import FilterValue

RERANKED = 20  # hits that the cross-encoder reads


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
        dense = embedder.embed_query(question) if reads(embedder.languages, question) else None
        embedded = time.perf_counter()
        wanted = collection.retrieval.candidates if by_document else limit
        wanted = max(wanted, RERANKED) if collection.retrieval.rerank else wanted
        where = _filter(filters, groups)
        hits = search(self.index, collection.index, dense, question, where, collection.retrieval, wanted)
        searched = time.perf_counter()
        timings = {"embed": _ms(start, embedded), "search": _ms(embedded, searched), "rerank": 0.0}
        if collection.retrieval.rerank and hits:
            hits = self._reranked(question, hits)
            timings["rerank"] = _ms(searched, time.perf_counter())
        if by_document:
            hits = _best_of_documents(hits)
        return Found(collection, hits[:limit], timings)

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


def _ms(start: float, end: float) -> float:
    return round((end - start) * 1000, 3)
