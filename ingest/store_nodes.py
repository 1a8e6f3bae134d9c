"""Chunks as LlamaIndex's TextNodes, and nodes as chunks: those that we wrote exactly, others with what there is.

What only we know of a chunk is JSON in its node's metadata, under `graft`; a document's first chunk also carries what is
known of the document and of its collection.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.catalog import Document, now
from ingest.errors import InvalidError
from ingest.index import Point, chunk_payload, folders, sparse_document
from ingest.language import detect
from ingest.parquet import Kept, as_json
from ingest.schemas import Chunk, PageSpan, ParsedText, chunk_id, document_id

OURS = "graft"  # the key of a node's metadata that holds a payload as JSON
INTERNAL = {OURS, "_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id", "id", "text", "embedding"}
KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")  # of metadata that every store takes
PATHS = ("file_path", "path", "file_name", "filename", "source", "url", "title")  # what readers call it


class Found(NamedTuple):
    """A node as a store gives it."""

    id: str
    text: str | None
    metadata: dict[str, Any]
    dense: Any


class Stored(NamedTuple):
    """A node as it is put in order: `document` names its document, `place` its place there. `dense`: float32, as bytes."""

    document: str
    place: int
    id: str
    text: str
    metadata: str
    dense: bytes


# chunks as nodes


def to_node(point: Point, document: str | None, collection: str) -> Any:
    """A TextNode. `document`, where it is known, and `collection` are JSON, and go along with a document's first chunk."""
    from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

    payload = point.payload
    carried: dict[str, Any] = {"payload": {key: one for key, one in payload.items() if key not in {"text", "folders"}}}
    if payload["ordinal"] == 0:
        carried["collection"] = json.loads(collection)
        if document:
            carried["document"] = json.loads(document)
    plain = {key: payload[key] for key in ("path", "page", "heading", "language") if payload.get(key) is not None}
    for key, value in payload.get("metadata", {}).items():
        if KEY.fullmatch(key) and key not in INTERNAL | plain.keys() and value is not None:
            plain[key] = value if isinstance(value, str | int | float) else as_json(value)
    metadata = {**plain, "acl": as_json(payload.get("acl", [])), OURS: as_json(carried)}
    return TextNode(
        id_=point.id,
        text=payload["text"],
        embedding=point.dense.tolist(),
        metadata=metadata,
        start_char_idx=payload["start"],
        end_char_idx=payload["end"],
        excluded_llm_metadata_keys=[key for key in metadata if key not in {"path", "page", "heading"}],
        excluded_embed_metadata_keys=list(metadata),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=payload["document_id"])},
    )


def read_node(found: Found, number: int) -> Stored:
    """`number`: how many came before it; its place, where nothing says another. Raises InvalidError."""
    from llama_index.core.vector_stores.utils import metadata_dict_to_node

    place: int | None = None
    if "_node_content" in found.metadata:
        node: Any = metadata_dict_to_node(found.metadata, text=found.text)
        text, metadata, document, place = node.get_content(), node.metadata, node.ref_doc_id, node.start_char_idx
    else:
        text = found.metadata.get("text") if found.text is None else found.text
        references = (found.metadata.get(key) for key in ("ref_doc_id", "doc_id", "document_id"))
        document = next((one for one in references if one and one != "None"), None)
        metadata = {key: value for key, value in found.metadata.items() if key == OURS or key not in INTERNAL}
    if found.dense is None or text is None:
        raise InvalidError(f"node {found.id!r} has no {'text' if text is None else 'embedding'}; it cannot be searched")
    if OURS in metadata:
        payload = json.loads(metadata[OURS])["payload"]
        document, place = payload["document_id"], payload["ordinal"]
    name = str(document or _path(metadata) or found.id)
    dense = np.asarray(found.dense, dtype=np.float32).tobytes()
    return Stored(name, number if place is None else place, found.id, text, as_json(metadata), dense)


def carried(metadata: str) -> dict[str, Any] | None:
    """What `to_node` put into a node's metadata; None: something else wrote it."""
    ours = json.loads(metadata).get(OURS)
    return None if ours is None else dict(json.loads(ours))


def rebuild(rows: Sequence[Stored], collection: str, uri: str) -> tuple[Kept, list[Point]]:
    """A document and its chunks from all of its nodes, in order. `uri`: its own, when nothing says another.

    Its text is joined from the chunks, and it is marked so that the next ingest of its file reads it again.
    """
    ours = carried(rows[0].metadata)
    points = [_own_point(row) for row in rows] if ours else _foreign_points(rows, document_id(collection, uri, 0))
    known = (ours or {}).get("document")
    if known is None:
        first = points[0].payload
        known = {
            "id": first["document_id"], "collection": collection, "uri": uri, "first_uri": uri, "path": first["path"],
            "acl": first["acl"], "given_acl": first["acl"] or None, "metadata": first["metadata"], "state": "done",
        }  # fmt: skip
    unread = {"size": 0, "stamp": 0, "content_hash": ""}
    languages = Counter(str(point.payload["language"]) for point in points)
    document = Document.model_validate({**known, **unread, "chunks": len(points), "languages": languages})
    parsed = ParsedText(text=_joined(points), mime=document.mime or "text/plain", pages=_pages(points))
    stands = {"text_hash": parsed.content_address(), "indexed_at": document.indexed_at or now()}
    return (document.model_copy(update=stands), parsed), points


def _own_point(row: Stored) -> Point:
    ours = carried(row.metadata)
    if ours is None:
        raise InvalidError(
            f"node {row.id!r} of document {row.document!r} was written by something else; delete it there"
        )
    payload = ours["payload"]
    context = payload.get("context")
    searched = f"{context}\n{row.text}" if context else row.text
    payload = {**payload, "text": row.text, "folders": folders(payload["path"])}
    return Point(row.id, _vector(row.dense), sparse_document(searched), payload)


def _foreign_points(rows: Sequence[Stored], document: str) -> list[Point]:
    """Offsets point into the texts joined by empty lines."""
    seen = Counter[str]()
    points, start = [], 0
    for ordinal, row in enumerate(rows):
        metadata = json.loads(row.metadata)
        page = next(
            (int(one) for one in (metadata.get("page"), metadata.get("page_label")) if str(one).isdigit()), None
        )
        chunk = Chunk(
            id=chunk_id(document, row.text, seen[row.text]),
            ordinal=ordinal,
            text=row.text,
            start=start,
            end=start + len(row.text),
            page=page,
            heading=None,
            language=detect(row.text),
        )
        seen[row.text] += 1
        start = chunk.end + 2
        path = (_path(metadata) or row.document).lstrip("/")
        payload = chunk_payload(chunk, document, path, (), metadata, "")
        del payload["fingerprint"]  # nobody knows
        points.append(Point(chunk.id, _vector(row.dense), sparse_document(row.text), payload))
    return points


def _path(metadata: dict[str, Any]) -> str | None:
    return next((metadata[key] for key in PATHS if isinstance(metadata.get(key), str)), None)


def _joined(points: list[Point]) -> str:
    """A text in which every chunk stands at its offsets; what lay between them is line breaks."""
    pieces, end = [], 0
    for payload in sorted((point.payload for point in points), key=lambda one: (one["start"], one["end"])):
        if payload["end"] > end:
            pieces.append("\n" * (payload["start"] - end) + payload["text"][max(0, end - payload["start"]) :])
            end = payload["end"]
    return "".join(pieces)


def _pages(points: list[Point]) -> tuple[PageSpan, ...]:
    spans: dict[int, tuple[int, int]] = {}
    for payload in (point.payload for point in points):
        number = payload.get("page")
        if number is not None:
            start, end = spans.get(number, (payload["start"], payload["end"]))
            spans[number] = min(start, payload["start"]), max(end, payload["end"])
    return tuple(PageSpan(number=number, start=start, end=end) for number, (start, end) in sorted(spans.items()))


def _vector(dense: bytes) -> NDArray[np.float32]:
    return np.frombuffer(dense, dtype=np.float32)
