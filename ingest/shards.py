"""An index out to a folder of Parquet shards and in again: to move it, to back it up, to take in what others embedded.

Both hold some hundred chunks in memory, and the ids of the documents, however large the index is. What is deleted meanwhile
is left out; other changes are not looked for: run them where no ingest job writes to the collection.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import select

from ingest.catalog import Catalog, Collection, Document
from ingest.catalog import documents as documents_table
from ingest.errors import ConflictError, InvalidError, NotFoundError
from ingest.index import Index, Point
from ingest.parquet import (
    MANIFEST,
    Kept,
    Manifest,
    Shard,
    Tick,
    as_json,
    batches,
    chunk_schema,
    document_schema,
    finished,
    read_chunks,
    read_documents,
    read_manifest,
    replace,
    seal,
    unfinished,
    verify,
    writable,
    write_chunks,
    write_documents,
)
from ingest.pipeline import Cancelled
from ingest.progress import Meter
from ingest.schemas import NAMESPACE, Frozen, ParsedText, Progress, chunk_id, document_id

PAGE = 1000  # chunks of a row group
GROUP_ROWS, GROUP_BYTES = 256, 4 * 2**20  # of documents a row group
SHARD_BYTES = 64 * 2**20  # of documents a shard
OCCURRENCES = 2000  # of one text in a document, looked up when a chunk gets a new id

Told = Callable[[Progress], None]


class DumpReport(Frozen):
    documents: int
    chunks: int
    shards: int
    bytes: int
    seconds: float


class LoadReport(Frozen):
    """`resumed`: shards that an earlier run had loaded. `deleted`: chunks of earlier versions of the documents.
    `left_out`: chunks whose document is not in the dump, so that nobody could delete them, or was deleted by its id."""

    documents: int
    chunks: int
    shards: int
    resumed: int
    deleted: int
    left_out: int
    seconds: float


def dump(
    catalog: Catalog,
    index: Index,
    collection: Collection,
    folder: Path,
    *,
    rows_per_shard: int = 10_000,
    resume: bool = False,
    progress: Told = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> DumpReport:
    """The collection's live index and documents, into an empty folder or that of a dump that was broken off.

    `resume`: a finished dump of this very collection in `folder` is the one that was asked for. `Progress.files` counts
    documents. Raises ConflictError (the folder holds something else), UnavailableError (it cannot be written), Cancelled.
    """
    start = time.perf_counter()
    manifest = finished(folder, collection) if resume else None
    if manifest is not None:
        return _dumped(manifest, start)
    meter, tick = Meter(), asking(cancelled)

    def told(documents: int, chunks: int, file: str) -> None:
        tick()
        progress(meter.progress(documents, 0, chunks, file))

    first, _ = index.scan(collection.index, None, 1)
    dimension = first[0].dense.shape[0] if first else None
    with unfinished(folder):
        ids = [identity for identity, _ in _listed(catalog, collection.name, tick)]
        chunks = 0
        if dimension is not None:
            chunks = _dump_chunks(index, collection.index, folder, dimension, rows_per_shard, told)
        _dump_documents(_kept(catalog, ids, tick), folder, rows_per_shard, chunks, told)
        fingerprint = first[0].payload.get("fingerprint") if first else None
        manifest = seal(folder, collection, fingerprint, dimension, tick)
    return _dumped(manifest, start)


def asking(cancelled: Callable[[], bool]) -> Tick:
    """Raises Cancelled once `cancelled` says so, or what that raises."""

    def tick() -> None:
        if cancelled():
            raise Cancelled

    return tick


def _dumped(manifest: Manifest, start: float) -> DumpReport:
    return DumpReport(
        documents=manifest.documents,
        chunks=manifest.chunks,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        seconds=round(time.perf_counter() - start, 3),
    )


def _dump_chunks(
    index: Index, name: str, folder: Path, dimension: int, rows_per_shard: int, told: Callable[[int, int, str], None]
) -> int:
    written, number = 0, 0
    offset: str | None = None
    more = True

    def pages(file: str) -> Iterator[list[Point]]:
        nonlocal written, offset, more
        left = rows_per_shard
        while left and more:
            points, offset = index.scan(name, offset, min(PAGE, left))
            more = offset is not None
            left -= len(points)
            written += len(points)
            told(0, written, file)
            yield points

    while more:
        file = folder / f"chunks-{number:05}.parquet"
        write_chunks(file, pages(file.name), dimension)
        number += 1
    return written


def _dump_documents(
    rows: Iterator[Kept],
    folder: Path,
    rows_per_shard: int,
    chunks: int,
    told: Callable[[int, int, str], None],
) -> None:
    number = written = 0
    following = next(rows, None)

    def groups(file: str) -> Iterator[list[Kept]]:
        nonlocal following, written
        in_shard, weight = 0, 0
        while following is not None and in_shard < rows_per_shard and weight < SHARD_BYTES:
            group: list[Kept] = []
            before = weight
            while following is not None and len(group) < GROUP_ROWS and weight - before < GROUP_BYTES:
                group.append(following)
                weight += len(following[1].text) if following[1] else 0
                following = next(rows, None)
            in_shard, written = in_shard + len(group), written + len(group)
            told(written, chunks, file)
            yield group

    while following is not None:
        file = folder / f"documents-{number:05}.parquet"
        write_documents(file, groups(file.name))
        number += 1


def _kept(catalog: Catalog, ids: Sequence[str], tick: Tick) -> Iterator[Kept]:
    """Without those that were deleted meanwhile."""
    for identity in ids:
        tick()
        text = None
        with suppress(NotFoundError):
            text = catalog.text(identity)  # before the document: a deletion between the two is seen
        try:
            document = catalog.document(identity)
        except NotFoundError:
            continue
        if document.state != "removed":
            yield document, text


def _listed(catalog: Catalog, collection: str, tick: Tick) -> Iterator[tuple[str, str]]:
    """-> (id, URI) of each document, by path. In one query: what is deleted between two would shift the second one."""
    row = documents_table.c
    query = select(row.id, row.uri).where(row.collection == collection, row.state != "removed")
    with catalog.engine.connect() as connection:
        for identity, uri in connection.execute(query.order_by(row.path, row.id)):
            tick()
            yield identity, uri


def _removed(catalog: Catalog, ids: set[str]) -> set[str]:
    """-> those that were deleted by their id."""
    row = documents_table.c
    with catalog.engine.connect() as connection:
        return set(connection.execute(select(row.id).where(row.id.in_(ids), row.state == "removed")).scalars())


def load(
    catalog: Catalog,
    index: Index,
    folder: Path,
    collection: Collection,
    *,
    home: Path,
    progress: Told = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> LoadReport:
    """A dump into `collection`, as it is in the catalog; documents of the same ids that it holds are replaced.

    Every shard is checked before anything is written. What is loaded is noted below `home`/loads, and the next call goes
    on from there after a kill. A document that was deleted by its id stays out. In a collection of another name than the
    dumped one's, documents and chunks get the ids that an ingest into it would have given them. Raises ConflictError
    (other vectors or chunks, or documents in the way), InvalidError (a damaged dump), NotFoundError (none),
    UnavailableError, Cancelled.
    """
    start = time.perf_counter()
    manifest = read_manifest(folder)
    _check_fits(manifest, collection, index)
    done, tick = _Done(home, folder, collection), asking(cancelled)
    loaded = sum(one.rows for one in manifest.shards if one.holds_chunks and done.has(one.file))
    if index.count(collection.index) < loaded - done.left_out:
        done.forget()  # the index is not the one that was loaded into
    left = [shard for shard in manifest.shards if not done.has(shard.file)]
    for shard in left:
        verify(folder, shard, tick)
    chunks = [shard for shard in manifest.shards if shard.holds_chunks]
    documents = [shard for shard in manifest.shards if not shard.holds_chunks]
    loading = _Loading(catalog, index, folder, manifest, collection, progress, tick)
    loading.left_out = done.left_out
    loading.identify(documents)
    if manifest.dimension is not None:
        index.create(collection.index, manifest.dimension)
    steps: list[tuple[str, Callable[[Shard], None], Shard]] = [
        *[(f"begin {shard.file}", loading.begin, shard) for shard in documents],
        *[(shard.file, loading.upsert, shard) for shard in chunks],
        *[(shard.file, loading.finish, shard) for shard in documents],
    ]
    for name, step, shard in steps:
        if not done.has(name):
            step(shard)
            index.flush(collection.index)
            done.add(name, loading.left_out)
        loading.passed(name, shard)
    done.forget()
    return LoadReport(
        documents=manifest.documents,
        chunks=manifest.chunks,
        shards=len(manifest.shards),
        resumed=len(manifest.shards) - len(left),
        deleted=loading.deleted,
        left_out=loading.left_out,
        seconds=round(time.perf_counter() - start, 3),
    )


def _check_fits(manifest: Manifest, collection: Collection, index: Index) -> None:
    """Raises ConflictError, and InvalidError when the dump lacks its documents."""
    dumped = manifest.collection
    if dumped.fingerprint != collection.fingerprint:
        theirs, ours = (
            f"{one.embedder!r}, {one.chunking.model_dump_json(exclude_none=True)}, fingerprint {one.fingerprint[:12]}"
            for one in (dumped, collection)
        )
        raise ConflictError(
            f"the dump was embedded and split by {theirs}; collection {collection.name!r} by {ours}; "
            "load it into a new collection, then `graft reindex` that one"
        )
    held, _ = index.scan(collection.index, None, 1)
    if held and manifest.dimension is not None and held[0].dense.shape[0] != manifest.dimension:
        raise ConflictError(
            f"the dump's vectors have {manifest.dimension} dimensions, those of collection {collection.name!r} "
            f"{held[0].dense.shape[0]}; load it into a new collection"
        )
    if manifest.chunks and not manifest.documents:
        raise InvalidError("the dump has chunks and no documents; write their documents-*.parquet, and seal it again")


class _Done:
    """The steps of a load that are on disk, and the chunks that they left out: a JSON file, named by the manifest and by what
    it is loaded into."""

    def __init__(self, home: Path, folder: Path, collection: Collection) -> None:
        name = hashlib.sha256((folder / MANIFEST).read_bytes())
        name.update(f"{collection.index} {collection.created_at.isoformat()}".encode())
        self.file = home / "loads" / f"{name.hexdigest()[:32]}.json"
        self.steps: list[str] = []
        self.left_out = 0
        with suppress(FileNotFoundError, ValueError):
            noted = json.loads(self.file.read_text())
            self.steps, self.left_out = noted["loaded"], noted.get("left_out", 0)

    def has(self, step: str) -> bool:
        return step in self.steps

    def add(self, step: str, left_out: int) -> None:
        self.steps.append(step)
        self.left_out = left_out
        with writable(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace(self.file, as_json({"loaded": self.steps, "left_out": self.left_out}))

    def forget(self) -> None:
        self.steps, self.left_out = [], 0
        self.file.unlink(missing_ok=True)


class _Loading:
    """The steps of one load. A document says `writing` from before its first chunk is written until all are."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        folder: Path,
        manifest: Manifest,
        collection: Collection,
        progress: Told,
        tick: Tick,
    ) -> None:
        self.catalog = catalog
        self.index = index
        self.folder = folder
        self.manifest = manifest
        self.collection = collection
        self.progress = progress
        self.tick = tick
        self.names = _Names(manifest.collection.name != collection.name)
        self.deleted = self.left_out = self.shards = self.loaded = 0
        self.meter = Meter()
        self.meter.files_total = len(manifest.shards)
        self.meter.begin(sum(shard.bytes for shard in manifest.shards))

    def identify(self, shards: Sequence[Shard]) -> None:
        """Gives documents their new ids. Raises ConflictError when one would be there twice."""
        held = {uri: identity for identity, uri in _listed(self.catalog, self.collection.name, self.tick)}
        old, new = self.manifest.collection.name, self.collection.name
        for shard in shards:
            columns = ("document_id", "uri", "first_uri")
            for batch in batches(self.folder / shard.file, document_schema(), 10_000, columns):
                for row in batch.to_pylist():
                    self.tick()
                    identity = row["document_id"]
                    if old != new:
                        identity = _new_id(identity, row["first_uri"], old, new)
                    self.names.documents[row["document_id"]] = identity
                    if held.get(row["uri"], identity) != identity:
                        raise ConflictError(
                            f"collection {new!r} holds {row['uri']!r} as document {held[row['uri']]!r} already; "
                            "delete that one first, or load the dump into a collection of another name"
                        )

    def begin(self, shard: Shard) -> None:
        for rows in self._rows(shard):
            self.catalog.finish(
                [(one.model_copy(update={"state": "writing"}), text) for one, text in rows if one.chunks or text]
            )

    def upsert(self, shard: Shard) -> None:
        assert self.manifest.dimension is not None
        for points in read_chunks(self.folder / shard.file, self.manifest.dimension):
            others = {point.payload.get("fingerprint") for point in points} - {self.manifest.embedder_fingerprint}
            if others:
                raise InvalidError(
                    f"shard {shard.file!r} has vectors of another embedder, {others.pop()!r}; leave it out"
                )
            known = self._known(points)
            if known:
                self.index.upsert(self.collection.index, known)
            self.left_out += len(points) - len(known)
            self.loaded += len(known)
            self._told(shard)

    def _known(self, points: Sequence[Point]) -> list[Point]:
        """As they go into the index: without those that no document stands for any more."""
        known = []
        for point in points:
            self.tick()
            if self.names.knows(point):
                known.append(self.names.point(point))
        removed = _removed(self.catalog, {point.payload["document_id"] for point in known})
        return [point for point in known if point.payload["document_id"] not in removed]

    def finish(self, shard: Shard) -> None:
        if self.index.count(self.collection.index) != self.manifest.chunks:
            self._delete_old(shard)
        for rows in self._rows(shard):
            for removed in self.catalog.finish([(one, None) for one, _ in rows]):
                self.tick()
                ids = sorted(self.index.ids(self.collection.index, removed))
                self.index.delete(self.collection.index, ids)
                self.left_out += len(ids)

    def passed(self, step: str, shard: Shard) -> None:
        if step == shard.file:
            self.shards += 1
            self.meter.bytes += shard.bytes
            self._told(shard)

    def _rows(self, shard: Shard) -> Iterator[list[Kept]]:
        for rows in read_documents(self.folder / shard.file):
            self._told(shard)
            yield [(self._own(document, text), text) for document, text in rows]

    def _own(self, document: Document, text: ParsedText | None) -> Document:
        own = {
            "id": self.names.documents[document.id],
            "collection": self.collection.name,
            "text_hash": text.content_address() if text else None,
        }
        return document.model_copy(update=own)

    def _delete_old(self, shard: Shard) -> None:
        """Of documents that the index held in another version, the chunks that are not in the dump."""
        name = self.collection.index
        old: dict[str, set[str]] = {}
        for rows in self._rows(shard):
            for document, _ in rows:
                self.tick()
                ids = self.index.ids(name, document.id)
                if len(ids) != document.chunks:
                    old[document.id] = ids
        schema = chunk_schema(self.manifest.dimension or 0)
        columns = ("document_id", "chunk_id", "text", "context")
        for one in self.manifest.shards if old else ():
            for batch in batches(self.folder / one.file, schema, PAGE, columns) if one.holds_chunks else ():
                for row in batch.to_pylist():
                    self.tick()
                    held = old.get(self.names.documents.get(row["document_id"], ""))
                    if held is not None:
                        held.discard(self.names.chunk(row["chunk_id"], row))
        for ids in old.values():
            self.tick()
            self.index.delete(name, sorted(ids))
            self.deleted += len(ids)

    def _told(self, shard: Shard) -> None:
        self.tick()
        self.progress(self.meter.progress(self.shards, 0, self.loaded, shard.file))


class _Names:
    """`documents`: the ids of the dump's documents -> those that they get; the same ones unless `renames`."""

    def __init__(self, renames: bool) -> None:
        self.documents: dict[str, str] = {}
        self._renames = renames
        self._places: dict[tuple[str, str], dict[str, int]] = {}

    def knows(self, point: Point) -> bool:
        return point.payload["document_id"] in self.documents

    def point(self, point: Point) -> Point:
        if not self._renames:
            return point
        payload = {**point.payload, "document_id": self.documents[point.payload["document_id"]]}
        return point._replace(id=self.chunk(point.id, point.payload), payload=payload)

    def chunk(self, identity: str, payload: dict[str, Any]) -> str:
        """See `chunk_id`: the place of the chunk among those of the same text is found by trying."""
        if not self._renames:
            return identity
        old, context = payload["document_id"], payload.get("context")
        searched = f"{context}\n{payload['text']}" if context else payload["text"]
        if len(self._places) > OCCURRENCES:
            self._places.clear()
        places = self._places.setdefault((old, searched), {})
        while identity not in places and len(places) < OCCURRENCES:
            places[chunk_id(old, searched, len(places))] = len(places)
        if identity in places:
            return chunk_id(self.documents[old], searched, places[identity])
        return str(uuid.uuid5(NAMESPACE, f"{self.documents[old]}:{identity}"))  # not one of ours


def _new_id(identity: str, first_uri: str, old: str, new: str) -> str:
    """The id that an ingest into collection `new` would give to a document that had `identity` in `old`."""
    for n in range(1000):
        if document_id(old, first_uri, n) == identity:
            return document_id(new, first_uri, n)
    return document_id(new, identity, 0)  # not one of ours
