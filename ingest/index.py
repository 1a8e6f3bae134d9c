"""What the product asks of a vector index, and how dense and sparse candidates are fused.

Two engines answer this protocol: Qdrant in the process (`index_edge`) and a Qdrant server (`index_server`). A point's id is
its chunk's id; its vectors are `dense` (cosine) and `bm25` (sparse, weighted by IDF in the engine).
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from qdrant_edge import Bm25, Bm25Config, SnowballLanguage, SnowballParams, TokenizerType

from ingest.schemas import Chunk, Hit, Retrieval, SparseVector

DENSE, SPARSE = "dense", "bm25"
KEYWORD_FIELDS = ("document_id", "folders", "language", "acl")
PLACE = ["document_id", "ordinal", "start", "end", "text"]  # of a payload: where a chunk stands
OVERSAMPLING = 2.0  # quantised candidates that are scored with the real vectors, for each one asked for
AVERAGE_TOKENS = 150  # words of a default chunk; BM25 normalises lengths by it
_DIGIT = re.compile(r"\d")
_NUMBERED = re.compile(r"(?:[a-z]+[-./_])?[a-z]*\d[a-z\d]*(?:[-.,/:_][a-z\d]+)*")
_JOINT = re.compile(r"[-.,/:_]")


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
        self,
        name: str,
        dense: NDArray[np.float32] | None,
        sparse: SparseVector | None,
        where: Filter,
        limit: int,
        quantized: bool = True,
    ) -> Candidates:
        """`quantized`: the dense side reads quantised vectors, and scores the best of them with the real ones."""
        ...

    def payloads(self, name: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]: ...

    def vectors(self, name: str, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The dense ones, by id."""
        ...

    def at(self, name: str, places: Mapping[str, AbstractSet[int]]) -> list[dict[str, Any]]:
        """-> document_id, ordinal, start, end and text of the chunks at these ordinals of these documents, in any order."""
        ...

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


@lru_cache(maxsize=1)
def _bm25_of_numbers() -> Bm25:
    """Of words with digits, which the other one drops: years, part numbers, error codes. Their number says nothing of a
    chunk's length.
    """
    return Bm25(Bm25Config(k=0.9, b=0.0, avg_len=AVERAGE_TOKENS, tokenizer=TokenizerType.Whitespace))


def sparse_document(text: str) -> SparseVector:
    return _joined(_bm25().embed_document(text), _bm25_of_numbers().embed_document(_numbers(text)))


def sparse_query(text: str) -> SparseVector:
    return _joined(_bm25().embed_query(text), _bm25_of_numbers().embed_query(_numbers(text)))


def _numbers(text: str) -> str:
    """-> its words with digits: the parts, and the whole without what joins them ("KX-7124": kx7124, 7124)."""
    if not _DIGIT.search(text):
        return ""
    found: list[str] = []
    for word in _NUMBERED.findall(unicodedata.normalize("NFKC", text).lower()):
        parts = _JOINT.split(word)
        found += [part for part in parts if _DIGIT.search(part)]
        found += ["".join(parts)] if len(parts) > 1 else []
    return " ".join(found)


def _joined(words: Any, numbers: Any) -> SparseVector:
    values = dict(zip(words.indices, words.values, strict=True))
    for index, value in zip(numbers.indices, numbers.values, strict=True):
        values[index] = max(value, values.get(index, 0.0))
    ordered = sorted(values)  # as indexes give them back
    return SparseVector(indices=ordered, values=[values[index] for index in ordered])


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


def fuse(
    candidates: Candidates, dense_weight: float, rrf_k: int | None = None, peers: Sequence[tuple[str, float]] = ()
) -> list[tuple[str, float]]:
    """-> (id, score 0 to 1), best first: each side's values in 0..1, weighted and added.

    The values are its scores scaled over its candidates or, with `rrf_k`, reciprocal ranks (Cormack et al., 2009) in which
    the first has 1. `peers`: the dense candidates, best first, among which this dense side is valued; its own where there
    are none. A point that one side does not name scores 0 there. Ties fall to the id, so an answer is reproducible.
    """
    sides = (
        (candidates.dense, peers or candidates.dense, dense_weight),
        (candidates.sparse, candidates.sparse, 1 - dense_weight),
    )
    fused: dict[str, float] = {}
    for side, among, weight in sides:
        if not side or weight == 0:
            continue
        values = _scaled(among) if rrf_k is None else _reciprocal(among, rrf_k)
        for point, _ in side:
            fused[point] = fused.get(point, 0.0) + weight * values[point]
    return sorted(fused.items(), key=lambda one: (-one[1], one[0]))


def _scaled(side: Sequence[tuple[str, float]]) -> dict[str, float]:
    low, high = side[-1][1], side[0][1]
    return {point: (score - low) / (high - low) if high > low else 1.0 for point, score in side}


def _reciprocal(side: Sequence[tuple[str, float]], k: int) -> dict[str, float]:
    """Equal scores share a rank: their order is the engine's, and means nothing."""
    values: dict[str, float] = {}
    rank, last = 0, None
    for place, (point, score) in enumerate(side, 1):
        rank, last = (rank, last) if score == last else (place, score)
        values[point] = (k + 1) / (k + rank)
    return values


def candidates(
    index: Index,
    name: str,
    dense: NDArray[np.float32] | None,
    question: str,
    where: Filter,
    retrieval: Retrieval,
    limit: int,
) -> Candidates:
    """Both sides in one batch, at least `limit` of each; a side without weight is not asked. `dense` None: BM25 alone."""
    dense = dense if retrieval.dense_weight > 0 else None
    sparse = sparse_query(question) if dense is None or retrieval.dense_weight < 1 else None
    return index.search(name, dense, sparse, where, max(retrieval.candidates, limit), retrieval.quantized)


def ranked(
    found: Candidates, retrieval: Retrieval, is_dense: bool, peers: Sequence[tuple[str, float]] = ()
) -> list[tuple[str, float]]:
    """As `fuse`, by a collection's settings. `is_dense`: the dense side was asked."""
    weight = retrieval.dense_weight if is_dense else 0.0
    return fuse(found, weight, retrieval.rrf_k if retrieval.fusion == "rrf" else None, peers)


def fetch(index: Index, name: str, best: Sequence[tuple[str, float]], found: Candidates) -> list[Hit]:
    """The points of `best` (id, score) with their payloads."""
    by_dense, by_sparse = dict(found.dense), dict(found.sparse)
    payloads = index.payloads(name, [point for point, _ in best])
    hits = []
    for point, score in best:
        payload = payloads.get(point)
        if payload is None:  # deleted since the search
            continue
        kept = {key: value for key, value in payload.items() if key not in {"folders", "acl"}}
        scores = {"dense_score": by_dense.get(point), "sparse_score": by_sparse.get(point), "score": score}
        hits.append(Hit.model_validate({"chunk_id": point, **kept, **scores}))
    return hits


def search(
    index: Index,
    name: str,
    dense: NDArray[np.float32] | None,
    question: str,
    where: Filter,
    retrieval: Retrieval,
    limit: int,
) -> list[Hit]:
    """The hybrid search: both sides, fused, the payloads of the best fetched. `dense` None: BM25 alone."""
    found = candidates(index, name, dense, question, where, retrieval, limit)
    return fetch(index, name, ranked(found, retrieval, dense is not None)[:limit], found)
