"""What the product asks of a vector index, and how dense and sparse candidates are fused.

Two engines answer this protocol: Qdrant in the process (`index_edge`) and a Qdrant server (`index_server`). A point's id is
its chunk's id; its vectors are `dense` (cosine) and `bm25` (sparse, weighted by IDF in the engine).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from qdrant_edge import Bm25, Bm25Config, SnowballLanguage, SnowballParams, TokenizerType

from ingest.schemas import Chunk, Hit, Retrieval, SparseVector

DENSE, SPARSE = "dense", "bm25"
KEYWORD_FIELDS = ("document_id", "folders", "language", "acl")
AVERAGE_TOKENS = 150  # words of a default chunk; BM25 normalises lengths by it


class Point(NamedTuple):
    id: str
    dense: NDArray[np.float32]
    sparse: SparseVector
    payload: dict[str, Any]


class Filter(NamedTuple):
    """All of `must` (field -> any of its values), and visible to `groups` (None: whatever its access list)."""

    must: Mapping[str, Sequence[str | int | bool]] = {}
    groups: frozenset[str] | None = None


class Candidates(NamedTuple):
    """(point id, score), best first, by each side."""

    dense: list[tuple[str, float]]
    sparse: list[tuple[str, float]]


class Index(Protocol):
    """Calls block. Names are made by `Collection.index`. An index that does not exist answers as an empty one."""

    def create(self, name: str, dimension: int) -> None: ...

    def drop(self, name: str) -> None: ...

    def upsert(self, name: str, points: Sequence[Point]) -> None: ...

    def set_payloads(self, name: str, payloads: Iterable[tuple[str, dict[str, Any]]]) -> None: ...

    def delete(self, name: str, ids: Sequence[str]) -> None: ...

    def ids(self, name: str, document_id: str) -> set[str]: ...

    def search(
        self, name: str, dense: NDArray[np.float32] | None, sparse: SparseVector | None, where: Filter, limit: int
    ) -> Candidates: ...

    def payloads(self, name: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]: ...

    def scan(self, name: str, offset: str | None, limit: int) -> tuple[list[Point], str | None]:
        """-> up to `limit` points by id, from the id `offset` (None: the first), and the offset of the next (None: no more).

        Dense vectors come as they are stored: at length 1.
        """
        ...

    def count(self, name: str) -> int: ...

    def names(self) -> list[str]:
        """The indexes that exist, in order."""
        ...

    def flush(self, name: str) -> None: ...

    def close(self) -> None: ...


def indexes_of(index: Index, collection: str) -> list[str]:
    """Names of all indexes of a collection: the live one, those kept and those being built."""
    return [name for name in index.names() if name.rpartition(".")[0] == collection]


def delete_documents(index: Index, collection: str, documents: Sequence[str]) -> None:
    """Their chunks, from every index of the collection."""
    for name in indexes_of(index, collection) if documents else []:
        for document in documents:
            index.delete(name, sorted(index.ids(name, document)))
        index.flush(name)


@lru_cache(maxsize=1)
def _bm25() -> Bm25:
    """Words of any language: runs of Chinese are segmented, English words stemmed."""
    stemmer = SnowballParams(SnowballLanguage.English)
    return Bm25(
        Bm25Config(
            k=0.9,
            b=0.4,
            avg_len=AVERAGE_TOKENS,
            tokenizer=TokenizerType.Multilingual,
            language="english",
            stemmer=stemmer,
        )
    )


def sparse_document(text: str) -> SparseVector:
    vector = _bm25().embed_document(text)
    return SparseVector(indices=vector.indices, values=vector.values)


def sparse_query(text: str) -> SparseVector:
    vector = _bm25().embed_query(text)
    return SparseVector(indices=vector.indices, values=vector.values)


def folders(path: str) -> list[str]:
    """The path and every folder above it, up to a URL's host, which makes a path prefix a keyword match."""
    scheme, mark, rest = path.rpartition("://")
    parts = rest.split("/")
    return [scheme + mark + "/".join(parts[:end]) for end in range(len(parts), 0, -1) if parts[end - 1]]


def chunk_payload(
    chunk: Chunk, document_id: str, path: str, acl: Sequence[str], metadata: Mapping[str, Any], fingerprint: str
) -> dict[str, Any]:
    """`fingerprint`: of the embedder that made its vector."""
    return {
        "document_id": document_id,
        "path": path,
        "folders": folders(path),
        "acl": list(acl),
        "metadata": dict(metadata),
        "fingerprint": fingerprint,
        **chunk.model_dump(exclude={"id"}, exclude_none=True),
    }


def fuse(candidates: Candidates, dense_weight: float) -> list[tuple[str, float]]:
    """-> (id, score 0 to 1), best first: scores of each side scaled to 0..1 over its candidates, then weighted.

    A point that one side does not name scores 0 there. Ties fall to the id, so an answer is reproducible.
    """
    weights = ((candidates.dense, dense_weight), (candidates.sparse, 1 - dense_weight))
    fused: dict[str, float] = {}
    for side, weight in weights:
        if not side or weight == 0:
            continue
        low, high = side[-1][1], side[0][1]
        for point, score in side:
            scaled = (score - low) / (high - low) if high > low else 1.0
            fused[point] = fused.get(point, 0.0) + weight * scaled
    return sorted(fused.items(), key=lambda one: (-one[1], one[0]))


def search(
    index: Index,
    name: str,
    dense: NDArray[np.float32] | None,
    question: str,
    where: Filter,
    retrieval: Retrieval,
    limit: int,
) -> list[Hit]:
    """The hybrid search: both sides in one batch, fused, the payloads of the best fetched. `dense` None: BM25 alone."""
    candidates = index.search(name, dense, sparse_query(question), where, max(retrieval.candidates, limit))
    ranked = fuse(candidates, retrieval.dense_weight if dense is not None else 0.0)[:limit]
    by_dense, by_sparse = dict(candidates.dense), dict(candidates.sparse)
    payloads = index.payloads(name, [point for point, _ in ranked])
    hits = []
    for point, score in ranked:
        payload = payloads.get(point)
        if payload is None:  # deleted since the search
            continue
        kept = {key: value for key, value in payload.items() if key not in {"folders", "acl", "ordinal"}}
        scores = {"dense_score": by_dense.get(point), "sparse_score": by_sparse.get(point), "score": score}
        hits.append(Hit.model_validate({"chunk_id": point, **kept, **scores}))
    return hits
