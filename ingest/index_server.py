"""A Qdrant server or cluster, through qdrant-client. The server builds its own graph and takes any size.

Eight-bit copies of the vectors are kept in memory and searched; the best are scored with the real ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from ingest.errors import UnavailableError
from ingest.index import DENSE, KEYWORD_FIELDS, OVERSAMPLING, PLACE, SPARSE, Candidates, Filter, Point
from ingest.schemas import SparseVector

Answer = TypeVar("Answer")


class ServerIndex:
    """`client` is any QdrantClient; tests pass its local mode."""

    def __init__(self, client: QdrantClient) -> None:
        self._client = client
        self._known: set[str] = set()

    def create(self, name: str, dimension: int) -> None:
        if self._exists(name):
            return
        _asked(
            lambda: self._client.create_collection(
                name,
                vectors_config={DENSE: models.VectorParams(size=dimension, distance=models.Distance.COSINE)},
                sparse_vectors_config={SPARSE: models.SparseVectorParams(modifier=models.Modifier.IDF)},
                quantization_config=models.ScalarQuantization(
                    scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
                ),
            )
        )
        if self._client.init_options.get("location") != ":memory:":  # local mode has no payload indexes
            for field in KEYWORD_FIELDS:
                _asked(partial(self._client.create_payload_index, name, field, models.PayloadSchemaType.KEYWORD))
        self._known.add(name)

    def drop(self, name: str) -> None:
        self._known.discard(name)
        _asked(lambda: self._client.delete_collection(name))

    def upsert(self, name: str, points: Sequence[Point]) -> None:
        batch = [
            models.PointStruct(
                id=point.id,
                vector={
                    DENSE: point.dense.tolist(),
                    SPARSE: models.SparseVector(indices=point.sparse.indices, values=point.sparse.values),
                },
                payload=point.payload,
            )
            for point in points
        ]
        _asked(lambda: self._client.upsert(name, batch, wait=True))

    def set_payloads(self, name: str, payloads: Iterable[tuple[str, dict[str, Any]]]) -> None:
        operations = [
            models.OverwritePayloadOperation(overwrite_payload=models.SetPayload(payload=payload, points=[point]))
            for point, payload in payloads
        ]
        for start in range(0, len(operations), 100):
            batch = operations[start : start + 100]
            _asked(partial(self._client.batch_update_points, name, batch, wait=True))

    def delete(self, name: str, ids: Sequence[str]) -> None:
        if ids:
            _asked(lambda: self._client.delete(name, models.PointIdsList(points=list(ids)), wait=True))

    def ids(self, name: str, document_id: str) -> set[str]:
        if not self._exists(name):
            return set()
        of_document = models.Filter(
            must=[models.FieldCondition(key="document_id", match=models.MatchValue(value=document_id))]
        )
        found: set[str] = set()
        offset = None
        while True:
            scroll = partial(self._client.scroll, name, of_document, limit=1000, offset=offset)
            records, offset = _asked(partial(scroll, with_payload=False, with_vectors=False))
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
        if not self._exists(name):
            return Candidates([], [])
        condition = _filter(where)
        queries = []
        if dense is not None:
            how = models.QuantizationSearchParams(ignore=not quantized, rescore=True, oversampling=OVERSAMPLING)
            parameters = models.SearchParams(quantization=how)
            queries.append(
                models.QueryRequest(query=dense.tolist(), using=DENSE, filter=condition, limit=limit, params=parameters)
            )
        if sparse is not None and sparse.indices:
            vector = models.SparseVector(indices=sparse.indices, values=sparse.values)
            queries.append(models.QueryRequest(query=vector, using=SPARSE, filter=condition, limit=limit))
        if not queries:
            return Candidates([], [])
        answers = [
            [(str(point.id), point.score) for point in answer.points]
            for answer in _asked(lambda: self._client.query_batch_points(name, queries))
        ]
        return Candidates(answers.pop(0) if dense is not None else [], answers.pop(0) if answers else [])

    def payloads(self, name: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        if not ids or not self._exists(name):
            return {}
        records = _asked(lambda: self._client.retrieve(name, list(ids), with_payload=True))
        return {str(record.id): record.payload or {} for record in records}

    def vectors(self, name: str, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        if not ids or not self._exists(name):
            return {}
        records = _asked(lambda: self._client.retrieve(name, list(ids), with_payload=False, with_vectors=[DENSE]))
        return {str(record.id): _dense(record) for record in records}

    def at(self, name: str, places: Mapping[str, AbstractSet[int]]) -> list[dict[str, Any]]:
        if not places or not self._exists(name):
            return []
        wanted: list[models.Condition] = [
            models.Filter(
                must=[
                    models.FieldCondition(key="document_id", match=models.MatchValue(value=document)),
                    models.FieldCondition(key="ordinal", match=models.MatchAny(any=sorted(ordinals))),
                ]
            )
            for document, ordinals in places.items()
        ]
        most = 2 * sum(map(len, places.values()))  # a document that is being written may have two chunks at a place
        scroll = partial(self._client.scroll, name, models.Filter(should=wanted), limit=most)
        records, _ = _asked(partial(scroll, with_payload=PLACE, with_vectors=False))
        return [record.payload or {} for record in records]

    def scan(self, name: str, offset: str | None, limit: int) -> tuple[list[Point], str | None]:
        if not self._exists(name):
            return [], None
        scroll = partial(self._client.scroll, name, limit=limit, offset=offset)
        records, after = _asked(partial(scroll, with_payload=True, with_vectors=True))
        return [_point(record) for record in records], None if after is None else str(after)

    def count(self, name: str) -> int:
        return int(_asked(lambda: self._client.count(name, exact=True)).count) if self._exists(name) else 0

    def names(self) -> list[str]:
        return sorted(one.name for one in _asked(self._client.get_collections).collections)

    def flush(self, name: str) -> None:
        """Writes are waited for, and the server keeps a write-ahead log."""

    def close(self) -> None:
        self._client.close()

    def _exists(self, name: str) -> bool:
        if name not in self._known and _asked(lambda: self._client.collection_exists(name)):
            self._known.add(name)
        return name in self._known


def _asked(call: Callable[[], Answer]) -> Answer:
    try:
        return call()
    except (ApiException, ResponseHandlingException, UnexpectedResponse, OSError) as error:
        raise UnavailableError(f"the Qdrant server did not answer: {error}; see INGEST_QDRANT_URL") from error


def _dense(record: models.Record) -> NDArray[np.float32]:
    vectors: Any = record.vector
    return np.asarray(vectors[DENSE], dtype=np.float32)


def _point(record: models.Record) -> Point:
    vectors: Any = record.vector
    sparse = vectors.get(SPARSE)  # an empty one may be left out
    return Point(
        str(record.id),
        _dense(record),
        SparseVector(indices=sparse.indices if sparse else [], values=sparse.values if sparse else []),
        record.payload or {},
    )


def _filter(where: Filter) -> models.Filter | None:
    must: list[models.Condition] = []
    for field, values in where.must.items():
        matches = [models.FieldCondition(key=field, match=models.MatchValue(value=value)) for value in values]
        must.append(models.Filter(should=list(matches)))
    if where.groups is not None:
        seen: list[models.Condition] = [models.IsEmptyCondition(is_empty=models.PayloadField(key="acl"))]
        if where.groups:
            named = models.MatchAny(any=sorted(where.groups))
            seen.append(models.FieldCondition(key="acl", match=named))
        must.append(models.Filter(should=seen))
    return models.Filter(must=must) if must else None
