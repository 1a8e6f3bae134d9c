"""Qdrant Edge: the engine in this process, one shard folder a collection. The embedded default.

A second opener can harm the first, so a lock of our own is taken before any shard is opened. Edge holds the interpreter
lock during its calls, so upserts are small. The graph is built by `optimize()` alone, which would stop every other thread
for its whole run, so a search reads all vectors: eight-bit ones (TurboQuant, which needs no training and is kept up to date
with every write), of which the best are scored with the real ones. An index made before there were any is read as it is.
"""

import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ingest.errors import LockedError, UnavailableError
from ingest.index import DENSE, KEYWORD_FIELDS, OVERSAMPLING, PLACE, SPARSE, Candidates, Filter, Point
from ingest.schemas import SparseVector

UPSERT_POINTS = 16  # points a call: about 3 ms in which no other Python thread runs


class EdgeIndex:
    """Owns `folder` while open. Raises LockedError when another process does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise LockedError(f"the index in {str(folder)!r} is open in another process; end that one first") from error
        self._shards: dict[str, edge.EdgeShard] = {}
        self._opening = threading.Lock()

    def create(self, name: str, dimension: int) -> None:
        with self._opening:
            if name in self._shards or (self._folder / name / ".ready").exists():
                return
            shutil.rmtree(self._folder / name, ignore_errors=True)  # a creation that was killed
            (self._folder / name).mkdir()
            shard = edge.EdgeShard.create(
                str(self._folder / name),
                edge.EdgeConfig(
                    vectors={
                        DENSE: edge.EdgeVectorParams(
                            size=dimension,
                            distance=edge.Distance.Cosine,
                            quantization_config=edge.TurboQuantQuantizationConfig(bits=edge.TurboQuantBitSize.Bits8),
                        )
                    },
                    sparse_vectors={SPARSE: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
                ),
            )
            for field in KEYWORD_FIELDS:
                shard.update(edge.UpdateOperation.create_field_index(field, edge.PayloadSchemaType.Keyword))
            shard.flush()
            (self._folder / name / ".ready").touch()
            self._shards[name] = shard

    def drop(self, name: str) -> None:
        with self._opening:
            self._shards.pop(name, None)  # not closed here: a search in another thread may still hold it
            (self._folder / name / ".ready").unlink(missing_ok=True)  # first: what is half gone is not opened again
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def upsert(self, name: str, points: Sequence[Point]) -> None:
        shard = self._shard(name)
        for start in range(0, len(points), UPSERT_POINTS):
            batch = [
                edge.Point(
                    point.id,
                    {
                        DENSE: point.dense.tolist(),
                        SPARSE: edge.SparseVector(point.sparse.indices, point.sparse.values),
                    },
                    point.payload,
                )
                for point in points[start : start + UPSERT_POINTS]
            ]
            _write(shard, edge.UpdateOperation.upsert_points(batch))

    def set_payloads(self, name: str, payloads: Iterable[tuple[str, dict[str, Any]]]) -> None:
        shard = self._shard(name)
        for point, payload in payloads:
            _write(shard, edge.UpdateOperation.overwrite_payload([point], payload))

    def delete(self, name: str, ids: Sequence[str]) -> None:
        shard = self._shard(name)
        for start in range(0, len(ids), 500):
            _write(shard, edge.UpdateOperation.delete_points(list(ids[start : start + 500])))

    def ids(self, name: str, document_id: str) -> set[str]:
        shard = self._open(name)
        if shard is None:
            return set()
        of_document = edge.Filter(must=[edge.FieldCondition("document_id", match=edge.MatchValue(document_id))])
        found: set[str] = set()
        offset = None
        while True:
            request = edge.ScrollRequest(
                limit=1000, offset=offset, filter=of_document, with_payload=False, with_vector=False
            )
            records, offset = shard.scroll(request)
            found |= {str(record.id) for record in records}
            if offset is None:
                return found

    def search(
        self,
        name: str,
        dense: NDArray[np.float32] | None,
        sparse: SparseVector | None,
        where: Filter,
        limit: int,
        quantized: bool = True,
    ) -> Candidates:
        shard = self._open(name)
        if shard is None:
            return Candidates([], [])
        condition = _filter(where)
        queries = []
        if dense is not None:
            queries.append(
                edge.QueryRequest(
                    limit=limit,
                    query=edge.Query.Nearest(dense.tolist(), using=DENSE),
                    filter=condition,
                    params=edge.SearchParams(
                        exact=not quantized,
                        quantization=edge.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING),
                    ),
                )
            )
        if sparse is not None and sparse.indices:
            vector = edge.SparseVector(sparse.indices, sparse.values)
            queries.append(
                edge.QueryRequest(limit=limit, query=edge.Query.Nearest(vector, using=SPARSE), filter=condition)
            )
        if not queries:
            return Candidates([], [])
        answers = [
            [(str(point.id), point.score) for point in scored]
            for scored in shard.query_batch(edge.QueryBatchRequest(queries))
        ]
        return Candidates(answers.pop(0) if dense is not None else [], answers.pop(0) if answers else [])

    def payloads(self, name: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        shard = self._open(name)
        if shard is None or not ids:
            return {}
        return {str(record.id): record.payload or {} for record in shard.retrieve(list(ids), True, False)}

    def vectors(self, name: str, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        shard = self._open(name)
        if shard is None or not ids:
            return {}
        records = shard.retrieve(list(ids), False, [DENSE])
        return {str(record.id): _dense(record) for record in records}

    def at(self, name: str, places: Mapping[str, AbstractSet[int]]) -> list[dict[str, Any]]:
        shard = self._open(name)
        if shard is None or not places:
            return []
        wanted: list[Any] = [
            edge.Filter(
                must=[
                    edge.FieldCondition("document_id", match=edge.MatchValue(document)),
                    edge.FieldCondition("ordinal", match=edge.MatchAny(sorted(ordinals))),
                ]
            )
            for document, ordinals in places.items()
        ]
        most = 2 * sum(map(len, places.values()))  # a document that is being written may have two chunks at a place
        records, _ = shard.scroll(
            edge.ScrollRequest(limit=most, filter=edge.Filter(should=wanted), with_payload=PLACE, with_vector=False)
        )
        return [record.payload or {} for record in records]

    def scan(self, name: str, offset: str | None, limit: int) -> tuple[list[Point], str | None]:
        shard = self._open(name)
        if shard is None:
            return [], None
        request = edge.ScrollRequest(limit=limit, offset=offset, with_payload=True, with_vector=True)
        records, after = shard.scroll(request)
        return [_point(record) for record in records], None if after is None else str(after)

    def count(self, name: str) -> int:
        shard = self._open(name)
        return 0 if shard is None else shard.count(edge.CountRequest(exact=True))

    def names(self) -> list[str]:
        return sorted(ready.parent.name for ready in self._folder.glob("*/.ready"))

    def flush(self, name: str) -> None:
        shard = self._open(name)
        if shard is not None:
            shard.flush()

    def close(self) -> None:
        with self._opening:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()
            self._lock.release()

    def _open(self, name: str) -> edge.EdgeShard | None:
        shard = self._shards.get(name)
        if shard is not None:
            return shard
        with self._opening:
            if name not in self._shards:
                if not (self._folder / name / ".ready").exists():
                    return None
                self._shards[name] = edge.EdgeShard.load(str(self._folder / name))
            return self._shards[name]

    def _shard(self, name: str) -> edge.EdgeShard:
        shard = self._open(name)
        if shard is None:
            raise UnavailableError(f"the index {name!r} was dropped while it was being written to")
        return shard


def _write(shard: edge.EdgeShard, operation: edge.UpdateOperation) -> None:
    try:
        shard.update(operation)
    except Exception as error:  # the engine raises one plain kind for everything
        raise UnavailableError(f"the index could not be written: {error}; is the disk full?") from error


def _dense(record: edge.Record) -> NDArray[np.float32]:
    vectors: Any = record.vector
    return np.asarray(vectors[DENSE], dtype=np.float32)


def _point(record: edge.Record) -> Point:
    vectors: Any = record.vector
    sparse = vectors.get(SPARSE)  # an empty one is not kept
    return Point(
        str(record.id),
        _dense(record),
        SparseVector(indices=sparse.indices if sparse else [], values=sparse.values if sparse else []),
        record.payload or {},
    )


def _match(value: str | int | bool) -> edge.MatchValue:
    plain: Any = np.bool_(value) if isinstance(value, bool) else value  # Edge takes Python's own bool for a number
    return edge.MatchValue(plain)


def _filter(where: Filter) -> edge.Filter | None:
    must: list[Any] = [
        edge.Filter(should=[edge.FieldCondition(field, match=_match(value)) for value in values])
        for field, values in where.must.items()
    ]
    if where.groups is not None:
        everybody = edge.IsEmptyCondition("acl")
        named = edge.FieldCondition("acl", match=edge.MatchAny(sorted(where.groups)))
        must.append(edge.Filter(should=[everybody, named] if where.groups else [everybody]))
    return edge.Filter(must=must) if must else None
