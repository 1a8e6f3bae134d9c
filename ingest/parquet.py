"""The open form of an index: a folder of Parquet shards and a manifest. What is in them, how they are written and read.

`chunks-*.parquet` and `documents-*.parquet` have the columns of `chunk_schema` and `document_schema`, which docs/moving.md
explains; `manifest.json` is written last, and a folder without one is no dump. Nothing here knows a catalog or an index, so
that any machine that has embedded something can write shards.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from ingest.catalog import Collection, Document, now
from ingest.errors import ConflictError, InvalidError, NotFoundError, UnavailableError
from ingest.index import Point, chunk_payload
from ingest.schemas import Chunk, Frozen, ParsedText, Span, SparseVector

MANIFEST, UNFINISHED = "manifest.json", ".unfinished"
SHARD = re.compile(r"(chunks|documents)-[A-Za-z0-9_-]+\.parquet")
BLOCK = 2**20  # bytes hashed between two ticks
BATCH = 128  # chunks read in one go: a request of some megabytes to a server, whatever the dimension

Kept = tuple[Document, ParsedText | None]
Tick = Callable[[], None]  # called several times a second; what it raises ends the work


class Shard(Frozen):
    file: str
    rows: int
    bytes: int
    sha256: str

    @property
    def holds_chunks(self) -> bool:
        return self.file.startswith("chunks-")


class Manifest(Frozen):
    """`collection` as it was dumped. `dimension` of the dense vectors, null without chunks. `embedder_fingerprint` null:
    the chunks were written before it was kept, or by somebody else."""

    format: Literal["graft-index"] = "graft-index"
    version: Literal[1] = 1
    created_at: datetime
    collection: Collection
    embedder_fingerprint: str | None
    dimension: int | None
    documents: int
    chunks: int
    shards: tuple[Shard, ...]


CHUNK_COLUMNS = {
    "document_id": pa.string(),
    "path": pa.string(),
    "chunk_id": pa.string(),
    "ordinal": pa.int32(),
    "text": pa.string(),
    "start": pa.int64(),
    "end": pa.int64(),
    "page": pa.int32(),
    "heading": pa.string(),
    "language": pa.string(),
    "context": pa.string(),
    "parent_start": pa.int64(),
    "parent_end": pa.int64(),
    "acl": pa.list_(pa.string()),
    "metadata": pa.string(),
    "sparse_indices": pa.list_(pa.uint32()),
    "sparse_values": pa.list_(pa.float32()),
    "fingerprint": pa.string(),
    "extra": pa.string(),
}
DOCUMENT_COLUMNS = {
    "document_id": pa.string(),
    "uri": pa.string(),
    "first_uri": pa.string(),
    "path": pa.string(),
    "size": pa.int64(),
    "content_hash": pa.string(),
    "mime": pa.string(),
    "state": pa.string(),
    "chunks": pa.int32(),
    "acl": pa.list_(pa.string()),
    "document": pa.string(),
    "text": pa.string(),
}
PLAIN = (
    "document_id",
    "path",
    "ordinal",
    "text",
    "start",
    "end",
    "page",
    "heading",
    "language",
    "context",
    "fingerprint",
)
IN_COLUMNS = {*PLAIN, "folders", "acl", "metadata", "parent"}  # of a payload; what else it holds goes to `extra`
TYPED = ("uri", "first_uri", "path", "size", "content_hash", "mime", "state", "chunks")  # of a document


def chunk_schema(dimension: int) -> pa.Schema:
    return pa.schema({**CHUNK_COLUMNS, "dense": pa.list_(pa.float32(), dimension)})


def document_schema() -> pa.Schema:
    return pa.schema(DOCUMENT_COLUMNS)


# writing


def write_chunks(file: Path, pages: Iterable[Sequence[Point]], dimension: int) -> None:
    """One shard, a row group for each page of points. Raises UnavailableError when it cannot be written."""
    with _shard(file, chunk_schema(dimension)) as writer:
        for page in pages:
            writer.write_batch(_chunk_batch(page, dimension))


def write_documents(file: Path, pages: Iterable[Sequence[Kept]]) -> None:
    """One shard, a row group for each page of rows. Raises UnavailableError when it cannot be written."""
    with _shard(file, document_schema()) as writer:
        for page in pages:
            rows = [
                {
                    **{name: getattr(document, name) for name in TYPED},
                    "document_id": document.id,
                    "acl": list(document.acl),
                    "document": document.model_dump_json(),
                    "text": parsed.model_dump_json() if parsed else None,
                }
                for document, parsed in page
            ]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=document_schema()))


def seal(
    folder: Path,
    collection: Collection,
    embedder_fingerprint: str | None,
    dimension: int | None,
    tick: Tick = lambda: None,
) -> Manifest:
    """Writes the manifest over all shards in `folder`, whoever wrote them; from now on it is a dump.

    `tick` is called while it hashes; when it raises, there is no manifest yet.
    """
    with writable(folder):
        files = sorted(file for file in folder.iterdir() if SHARD.fullmatch(file.name))
        shards = tuple(
            Shard(
                file=file.name,
                rows=pq.read_metadata(file).num_rows,
                bytes=file.stat().st_size,
                sha256=_sha256(file, tick),
            )
            for file in files
        )
        manifest = Manifest(
            created_at=now(),
            collection=collection,
            embedder_fingerprint=embedder_fingerprint,
            dimension=dimension,
            documents=sum(shard.rows for shard in shards if not shard.holds_chunks),
            chunks=sum(shard.rows for shard in shards if shard.holds_chunks),
            shards=shards,
        )
        replace(folder / MANIFEST, manifest.model_dump_json(indent=2))
    return manifest


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """The folder to write a dump into, emptied of one that was broken off; a mark is in it until the dump is done.

    Raises ConflictError when it holds anything else, or another process is dumping into it.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = {file.name for file in folder.iterdir()}
    if MANIFEST in held:
        raise ConflictError(f"{str(folder)!r} holds a finished dump already; name another folder, or delete that one")
    ours = {name for name in held if SHARD.fullmatch(name.removesuffix(".part"))} | {UNFINISHED, MANIFEST + ".part"}
    if held - ours or (held and UNFINISHED not in held):
        other = min(held - ours or held)
        raise ConflictError(f"{str(folder)!r} holds {other!r}, which is of no broken-off dump; name an empty folder")
    with writable(folder):
        mark = os.open(folder / UNFINISHED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(f"another dump is being written into {str(folder)!r}; name another folder") from error
        for name in held - {UNFINISHED}:
            (folder / name).unlink()
        yield
        (folder / UNFINISHED).unlink(missing_ok=True)
    finally:
        os.close(mark)


def finished(folder: Path, collection: Collection) -> Manifest | None:
    """The manifest of a dump of `collection` that is whole, by the sizes of its shards; a kill may have left its mark there.

    None: there is none, or one of another collection, or a damaged one.
    """
    try:
        manifest = read_manifest(folder)
        whole = all((folder / one.file).stat().st_size == one.bytes for one in manifest.shards)
    except (NotFoundError, InvalidError, OSError):
        return None
    dumped = manifest.collection
    same = (dumped.name, dumped.fingerprint, dumped.created_at)
    if not whole or same != (collection.name, collection.fingerprint, collection.created_at):
        return None
    with writable(folder):
        (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns an OSError into an UnavailableError that names the folder."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        raise UnavailableError(
            f"{str(folder)!r} cannot be written ({said}); make room there, then run it again"
        ) from error


def replace(file: Path, content: str) -> None:
    """All of it or nothing, and on disk. Raises OSError."""
    part = file.with_name(file.name + ".part")
    with part.open("w", encoding="utf-8") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
    part.replace(file)


def _chunk_batch(points: Sequence[Point], dimension: int) -> pa.RecordBatch:
    payloads = [point.payload for point in points]
    parents = [payload.get("parent") or {} for payload in payloads]
    others = [{key: value for key, value in payload.items() if key not in IN_COLUMNS} for payload in payloads]
    dense = np.concatenate([point.dense for point in points]) if points else np.empty(0)
    columns: dict[str, Any] = {
        **{name: [payload.get(name) for payload in payloads] for name in PLAIN},
        "chunk_id": [point.id for point in points],
        "parent_start": [parent.get("start") for parent in parents],
        "parent_end": [parent.get("end") for parent in parents],
        "acl": [payload.get("acl", []) for payload in payloads],
        "metadata": [as_json(payload.get("metadata", {})) for payload in payloads],
        "dense": pa.FixedSizeListArray.from_arrays(pa.array(dense, type=pa.float32()), dimension),
        "sparse_indices": [point.sparse.indices for point in points],
        "sparse_values": [point.sparse.values for point in points],
        "extra": [as_json(other) if other else None for other in others],
    }
    schema = chunk_schema(dimension)
    return pa.record_batch([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


@contextmanager
def _shard(file: Path, schema: pa.Schema) -> Iterator[Any]:
    """A Parquet writer under a temporary name; on disk under its own once all is written."""
    part = file.with_name(file.name + ".part")
    repeated = ["document_id", "path", "heading", "language", "context", "metadata", "fingerprint"]
    try:
        with writable(file.parent):
            with part.open("wb") as sink:
                with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=repeated) as writer:
                    yield writer
                sink.flush()
                os.fsync(sink.fileno())
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


# reading


def read_manifest(folder: Path) -> Manifest:
    """Raises NotFoundError (no dump there), InvalidError (a damaged or a newer one)."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{str(folder)!r} holds no {MANIFEST}: no dump was finished there; dump it again"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidError(f"{str(file)!r} cannot be read ({error}); copy the dump again") from error
    found = content if isinstance(content, dict) else {}
    if (found.get("format"), found.get("version")) != ("graft-index", 1):
        form = f"{found.get('format')!r}, version {found.get('version')!r}"
        raise InvalidError(f"{str(file)!r} is of format {form}; this release reads 'graft-index', version 1")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(one) for one in first["loc"])
        raise InvalidError(f"{str(file)!r}: {place}: {first['msg']}; copy the dump again") from error
    for shard in manifest.shards:
        if not SHARD.fullmatch(shard.file):
            raise InvalidError(f"{str(file)!r} names {shard.file!r}, which is no name of a shard")
    return manifest


def verify(folder: Path, shard: Shard, tick: Tick = lambda: None) -> None:
    """Raises InvalidError when the shard is missing, or not as the manifest says."""
    file = folder / shard.file
    try:
        size = file.stat().st_size
        intact = size == shard.bytes and _sha256(file, tick) == shard.sha256
    except OSError as error:
        raise InvalidError(f"shard {str(file)!r} cannot be read ({error.strerror}); copy the dump again") from error
    if not intact:
        what = f"it has {size:,} bytes, not {shard.bytes:,}" if size != shard.bytes else "its sha256 is another one"
        raise InvalidError(f"shard {str(file)!r} is damaged: {what}; copy the dump again")


def read_chunks(file: Path, dimension: int) -> Iterator[list[Point]]:
    """A shard's points, up to `BATCH` at a time. Raises InvalidError when a column is missing or of another kind."""
    for batch in batches(file, chunk_schema(dimension), BATCH):
        dense = batch.column("dense").flatten().to_numpy().reshape(-1, dimension)
        rows = batch.drop_columns(["dense"]).to_pylist()
        yield [_point(row, vector) for row, vector in zip(rows, dense, strict=True)]


def read_documents(file: Path) -> Iterator[list[Kept]]:
    """A shard's documents, with their texts where they were kept. Raises InvalidError as `read_chunks`."""
    for batch in batches(file, document_schema(), 64, ("document", "text")):
        try:
            yield [
                (
                    Document.model_validate_json(row["document"]),
                    ParsedText.model_validate_json(row["text"]) if row["text"] else None,
                )
                for row in batch.to_pylist()
            ]
        except ValidationError as error:
            raise InvalidError(f"shard {str(file)!r} has a document of another form: {error.errors()[0]}") from error


def batches(file: Path, schema: pa.Schema, rows: int, columns: Sequence[str] = ()) -> Iterator[Any]:
    """Record batches of up to `rows` rows with `columns` (none: all) of the schema. Raises InvalidError."""
    wanted = pa.schema([schema.field(name) for name in columns]) if columns else schema
    try:
        with pq.ParquetFile(file) as opened:
            missing = [name for name in wanted.names if name not in opened.schema_arrow.names]
            if missing:
                raise InvalidError(f"shard {str(file)!r} has no column {missing[0]!r}; docs/moving.md lists them")
            for batch in opened.iter_batches(batch_size=rows, columns=wanted.names):
                yield batch.select(wanted.names).cast(wanted)
    except (pa.ArrowException, OSError) as error:
        raise InvalidError(f"shard {str(file)!r} cannot be read in its columns: {error}") from error


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _point(row: dict[str, Any], dense: NDArray[np.float32]) -> Point:
    parent = None if row["parent_start"] is None else Span(start=row["parent_start"], end=row["parent_end"])
    fields = ("ordinal", "text", "start", "end", "page", "heading", "language", "context")
    chunk = Chunk(id=row["chunk_id"], parent=parent, **{name: row[name] for name in fields})
    metadata, extra = json.loads(row["metadata"] or "{}"), json.loads(row["extra"] or "{}")
    payload = chunk_payload(chunk, row["document_id"], row["path"], row["acl"] or (), metadata, row["fingerprint"])
    if row["fingerprint"] is None:
        del payload["fingerprint"]
    sparse = SparseVector(indices=row["sparse_indices"], values=row["sparse_values"])
    return Point(chunk.id, dense, sparse, {**payload, **extra})


def _sha256(file: Path, tick: Tick) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            tick()
            digest.update(block)
    return digest.hexdigest()
