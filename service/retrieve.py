"""Question -> hits, of what the principal may see: embed, search both sides, fuse, rerank, diversify; parts give way to
their parents and neighbours. In one collection or several, each searched by its own settings.

Several lists become one by what can be compared. Cosines of one embedder can, so collections that share one are fused as if
they were one; BM25 weighs a word by its own index, so those scores are scaled within each. What is left, lists of different
embedders or of BM25 alone, is fused by rank. With reranking the cross-encoder then compares all of it.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.catalog import Catalog, Collection
from ingest.embed import Embedder, index_fingerprint, load_embedder
from ingest.errors import ConflictError, InvalidError, NotFoundError
from ingest.generations import Generations
from ingest.index import Candidates, Filter, Index, candidates, fetch, ranked, sparse_query
from ingest.language import reads
from ingest.query_adapter import QueryAdapter, changed_at, check_fits, load_query_adapter
from ingest.schemas import Hit, Retrieval
from ingest.settings import IngestSettings
from service.expand import Texts, merged, places, widened
from service.languages import LanguageNotes
from service.lists import best_of_documents, best_of_parents, fused
from service.mmr import POOL, diversified
from service.rerank import Reranker
from service.rewrite import FollowUp, once, shared, with_cited
from service.schemas import FilterValue

SEARCHED = 2000  # parts that are looked at, at most, until their parents are as many as asked for
SEEN = 50  # chunks of a document among which one is looked for by its own words


class Found(NamedTuple):
    """`collections`: as they were named. `reranked`: hits that the cross-encoder read. `notes`: of languages not read."""

    collections: tuple[Collection, ...]
    hits: list[Hit]
    timings_ms: dict[str, float]
    reranked: int = 0
    notes: tuple[str, ...] = ()

    @property
    def collection(self) -> Collection:
        """The first: an answer's prompt, adapter and the like are its."""
        return self.collections[0]


class _Asked(NamedTuple):
    """A collection as it is searched. `scale`: equal where dense scores can be compared."""

    collection: Collection
    retrieval: Retrieval
    dense: NDArray[np.float32] | None
    scale: object


class Retriever:
    """Blocks; the service calls it in a thread. Models are loaded when a collection first needs them, and kept."""

    def __init__(
        self, catalog: Catalog, index: Index, settings: IngestSettings, reranker: str, rerank_ms: float = 1000
    ) -> None:
        """`rerank_ms`: the time that a question's reranking may take."""
        self.catalog = catalog
        self.index = index
        self.settings = settings
        self._reranker_name = reranker
        self._rerank_seconds = rerank_ms / 1000
        self._embedders: dict[str, Embedder] = {}
        self._query_adapters: dict[tuple[str, int], QueryAdapter] = {}  # by name and time of the file
        self._reranker: Reranker | None = None
        self._loading = threading.Lock()
        self._texts = Texts(catalog)
        self._language_notes = LanguageNotes(catalog)

    def embedder(self, name: str) -> Embedder:
        """Raises SettingsError."""
        if name not in self._embedders:
            with self._loading:
                if name not in self._embedders:
                    self._embedders[name] = load_embedder(name, self.settings, threads=1)  # one question is short work
        return self._embedders[name]

    def query_adapter(self, name: str, embedder: Embedder) -> QueryAdapter:
        """Raises NotFoundError, InvalidError (it is for another embedder)."""
        key = (name, changed_at(name, self.settings))
        if key not in self._query_adapters:
            self._query_adapters[key] = load_query_adapter(name, self.settings)
        check_fits(name, self._query_adapters[key], embedder)
        return self._query_adapters[key]

    def retrieve(
        self,
        question: str,
        names: str | Sequence[str],
        filters: Mapping[str, FilterValue | list[FilterValue]],
        groups: frozenset[str] | None,
        top_k: int | None,
        by_document: bool = False,
        retrieval: Retrieval | None = None,
        follow_up: FollowUp | None = None,
        index: str | None = None,
    ) -> Found:
        """`names`: of one collection or of several. `groups`: those of the principal, None for one who may see all.
        `retrieval`: in place of the collections' settings; of theirs, top_k, reranking and MMR are the first one's. `index`:
        of the one collection, in place of the live one. Raises NotFoundError, ConflictError, InvalidError.
        """
        named = (names,) if isinstance(names, str) else names
        collections = tuple(self.catalog.collection(name) for name in named)
        if index is not None:
            collections = (self._at(collections, index),)
        how = retrieval or collections[0].retrieval
        limit = top_k or how.top_k
        clock = _Clock()
        asked = self._asked(question, collections, retrieval)
        clock.lap("embed")
        where, wanted = _filter(filters, groups), _pool(how, limit, by_document)
        hits = self._searched(asked, question, where, wanted)
        if index is not None and groups is not None:
            hits = self._seen_by(groups, hits)
        if follow_up is not None and follow_up.leans != "no":
            as_is = self._asked(follow_up.question, collections, retrieval)
            hits = shared(follow_up.leans, hits, self._searched(as_is, follow_up.question, where, wanted), wanted)
        cited = self._cited(collections, follow_up.cited, where) if follow_up is not None else []
        if how.rerank:  # read first, and placed by what the cross-encoder finds
            hits = once([*cited, *hits])
        clock.lap("search")
        if how.rerank and hits:
            hits = self._reranked(question, hits, how.rerank_depth)
            clock.lap("rerank")
        reranked = sum(hit.rerank_score is not None for hit in hits)
        if by_document:
            hits = best_of_documents(hits)
        if how.mmr is not None:
            hits = self._diversified(asked, hits[:POOL], how.mmr, limit)
            clock.lap("mmr")
        hits = self._expanded(asked, hits[:limit] if how.rerank else with_cited(hits, cited, limit))
        if any(one.retrieval.neighbours for one in asked):
            clock.lap("expand")
        notes = self._notes(question, collections, retrieval)
        return Found(collections, hits, {"rerank": 0.0, **clock.laps}, reranked, notes)

    def _at(self, collections: Sequence[Collection], index: str) -> Collection:
        """-> the collection as it is with one of its other indexes live. Raises NotFoundError, ConflictError, InvalidError."""
        if len(collections) > 1:
            raise InvalidError(f"index {index!r} is of one collection: name that one alone")
        held = collections[0]
        found = Generations(self.catalog.engine).generation(held, index)
        if found.state == "building":
            raise ConflictError(f"index {index!r} of collection {held.name!r} is still being built; wait for its job")
        changes = {"embedder": found.embedder, "chunking": found.chunking, "fingerprint": found.fingerprint}
        return held.model_copy(update=changes)

    def _seen_by(self, groups: frozenset[str], hits: Sequence[Hit]) -> list[Hit]:
        """An index that is not live has the access lists of the day it was built; what holds are the documents' own."""
        allowed = set[str]()
        for one in {hit.document_id for hit in hits}:
            with suppress(NotFoundError):
                acl = self.catalog.document(one).acl
                allowed |= {one} if not acl or groups & set(acl) else set()
        return [hit for hit in hits if hit.document_id in allowed]

    def _asked(self, question: str, collections: Sequence[Collection], retrieval: Retrieval | None) -> list[_Asked]:
        vectors: dict[tuple[str, str | None], NDArray[np.float32]] = {}  # by embedder and query adapter
        asked = []
        for collection in collections:
            how = retrieval or collection.retrieval
            embedder = self._readable(collection, question) if how.dense_weight > 0 else None
            if embedder is None:
                asked.append(_Asked(collection, how, None, collection.name))
                continue
            adapter = self._adapter(collection, retrieval)[0]
            by = (embedder.fingerprint, how.query_adapter if adapter else None)
            if by not in vectors:
                vector = embedder.embed_query(question)
                vectors[by] = adapter.apply(vector) if adapter else vector
            asked.append(_Asked(collection, how, vectors[by], (*by, how.fusion, how.rrf_k)))
        return asked

    def _adapter(self, collection: Collection, retrieval: Retrieval | None) -> tuple[QueryAdapter | None, str | None]:
        """-> the query adapter, and why the collection's own is not used where it does not fit any more. One that a request
        names is used or refused: raises NotFoundError, InvalidError.
        """
        name = (retrieval or collection.retrieval).query_adapter
        if name is None:
            return None, None
        try:
            return self.query_adapter(name, self.embedder(collection.embedder)), None
        except (NotFoundError, InvalidError) as error:
            if retrieval is not None:
                raise
            back = f"`graft collections query-adapter {collection.name} none` takes it away"
            return None, f"the query adapter of collection {collection.name!r} is not used: {error}; {back}"

    def _notes(self, question: str, collections: Sequence[Collection], retrieval: Retrieval | None) -> tuple[str, ...]:
        """Of the collections whose vectors are searched."""
        dense = [one for one in collections if (retrieval or one.retrieval).dense_weight > 0]
        by_collection = (self._language_notes.of(one, self.embedder(one.embedder).languages, question) for one in dense)
        unfit = (self._adapter(one, retrieval)[1] for one in dense)
        return (*(note for notes in by_collection for note in notes), *(note for note in unfit if note))

    def _readable(self, collection: Collection, question: str) -> Embedder | None:
        """The collection's embedder, where its vectors say something: it is still the one that the collection was embedded
        with, and reads the question's script.
        """
        embedder = self.embedder(collection.embedder)
        is_same = index_fingerprint(embedder, collection.chunking) == collection.fingerprint
        return embedder if is_same and reads(embedder.languages, question) else None

    def _searched(self, asked: Sequence[_Asked], question: str, where: Filter, wanted: int) -> list[Hit]:
        """The best `wanted` hits of all."""
        found = [
            candidates(self.index, one.collection.index, one.dense, question, where, one.retrieval, _first(one, wanted))
            for one in asked
        ]
        lists: list[tuple[object, list[Hit]]] = []
        for one, own in zip(asked, found, strict=True):
            peers = [
                other_found.dense
                for other, other_found in zip(asked, found, strict=True)
                if other is not one and other.scale == one.scale
            ]
            lists.append((one.scale, self._best(one, own, peers, question, where, wanted)))
        return fused(lists)[:wanted]

    def _best(
        self,
        one: _Asked,
        found: Candidates,
        peers: Sequence[Sequence[tuple[str, float]]],
        question: str,
        where: Filter,
        wanted: int,
    ) -> list[Hit]:
        """A collection's best `wanted` hits. Of a hierarchical one they are of as many parents, each by its best part.

        `peers`: dense candidates of the collections that it is fused with as one.
        """
        name = one.collection.index
        by_parent = one.collection.chunking.strategy == "hierarchical"
        asked = _first(one, wanted)
        while True:
            among = sorted((pair for side in (found.dense, *peers) for pair in side), key=_score) if peers else ()
            order = ranked(found, one.retrieval, one.dense is not None, among)
            hits = fetch(self.index, name, order[:asked], found)
            best = best_of_parents(hits)
            if not by_parent or len(best) >= wanted or len(hits) < asked or asked >= SEARCHED:
                return [hit.model_copy(update={"collection": one.collection.name}) for hit in best[:wanted]]
            asked = min(2 * asked, SEARCHED)
            found = candidates(self.index, name, one.dense, question, where, one.retrieval, asked)

    def _cited(self, collections: Sequence[Collection], chunks: Sequence[str], where: Filter) -> list[Hit]:
        """Those of the chunks that are still there, and that a search with this filter may find."""
        found: dict[str, Hit] = {}
        for collection in collections if chunks else ():
            for hit in fetch(self.index, collection.index, [(chunk, 0.0) for chunk in chunks], Candidates([], [])):
                documents = where.must.get("document_id", (hit.document_id,))
                only = Filter({**where.must, "document_id": [hit.document_id]}, where.groups)
                seen = self.index.search(collection.index, None, sparse_query(hit.text), only, SEEN)
                if hit.document_id in documents and any(hit.chunk_id == chunk for chunk, _ in seen.sparse):
                    found[hit.chunk_id] = hit.model_copy(update={"collection": collection.name})
        return [found[chunk] for chunk in chunks if chunk in found]

    def _reranked(self, question: str, hits: list[Hit], depth: int) -> list[Hit]:
        if self._reranker is None:
            with self._loading:
                self._reranker = self._reranker or Reranker(self._reranker_name, self.settings, self._rerank_seconds)
        return [*self._reranker.rerank(question, hits[:depth]), *hits[depth:]]

    def _diversified(self, asked: Sequence[_Asked], hits: Sequence[Hit], balance: float, limit: int) -> list[Hit]:
        spaces: dict[str, dict[str, NDArray[np.float32]]] = {}  # vectors of different embedders are not compared
        for one in asked:
            own = [hit.chunk_id for hit in hits if hit.collection == one.collection.name]
            spaces.setdefault(one.collection.embedder, {}).update(self.index.vectors(one.collection.index, own))
        return diversified(hits, list(spaces.values()), balance, limit)

    def _expanded(self, asked: Sequence[_Asked], hits: list[Hit]) -> list[Hit]:
        reach = {one.collection.name: one.retrieval.neighbours for one in asked}
        texts = self._texts.of(hit.document_id for hit in hits if hit.parent or reach[hit.collection or ""])
        near: dict[str, list[dict[str, Any]]] = {}
        for one in asked:
            own = [hit for hit in hits if hit.collection == one.collection.name] if one.retrieval.neighbours else []
            for chunk in self.index.at(one.collection.index, places(own, one.retrieval.neighbours)) if own else ():
                near.setdefault(str(chunk["document_id"]), []).append(chunk)
        wide = [
            widened(hit, texts[hit.document_id], near.get(hit.document_id, ())) if hit.document_id in texts else hit
            for hit in hits
        ]
        return merged(wide, texts) if any(reach.values()) else wide


class _Clock:
    """`laps`: milliseconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = round((now - self._last) * 1000, 3)
        self._last = now


def _score(pair: tuple[str, float]) -> float:
    return -pair[1]


def _pool(how: Retrieval, limit: int, by_document: bool) -> int:
    """How many hits are looked for, so that `limit` are left at the end."""
    most = [limit]
    if by_document:
        most.append(how.candidates)
    if how.rerank:
        most.append(how.rerank_depth)
    if how.mmr is not None:
        most.append(min(how.candidates, POOL))
    return max(most)


def _first(one: _Asked, wanted: int) -> int:
    """Parts that are asked for at first."""
    by_parent = one.collection.chunking.strategy == "hierarchical"
    return max(wanted, one.retrieval.candidates) if by_parent else wanted


def _filter(filters: Mapping[str, FilterValue | list[FilterValue]], groups: frozenset[str] | None) -> Filter:
    must: dict[str, Sequence[FilterValue]] = {}
    for field, value in filters.items():
        values = value if isinstance(value, list) else [value]
        if field == "path":
            must["folders"] = [str(one).removeprefix("./").rstrip("/") for one in values]
        else:
            must[field] = values
    return Filter(must, groups)
