"""A dump (`ingest.parquet`) to and from other vector stores, through LlamaIndex: Chroma, Milvus, Pinecone.

A store is named `chroma:PATH#COLLECTION`, `milvus:FILE_OR_URI#COLLECTION` or `pinecone:INDEX#NAMESPACE`. A chunk becomes a
TextNode that LlamaIndex can query at once; what only we know of it goes along as JSON in its metadata, under `graft`, so
that it comes back as it was. What another program wrote there comes in with what there is: text, embedding, metadata.
"""

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ingest.catalog import Collection
from ingest.errors import GraftError, InvalidError, NotFoundError, SettingsError, UnavailableError
from ingest.index import Point
from ingest.parquet import (
    Kept,
    Tick,
    read_chunks,
    read_documents,
    read_manifest,
    seal,
    unfinished,
    verify,
    write_chunks,
    write_documents,
)
from ingest.pipeline import Cancelled
from ingest.schemas import Frozen, Progress
from ingest.shards import asking
from ingest.store_nodes import Found, Stored, carried, read_node, rebuild, to_node

KINDS = ("chroma", "milvus", "pinecone")
BATCH = 100  # nodes a request
DOCUMENT_BYTES = 12_000  # of a document's JSON: Pinecone takes 40 kB of metadata a vector

Told = Callable[[Progress], None]


class StoreName(NamedTuple):
    kind: str
    place: str
    name: str

    @property
    def is_local(self) -> bool:
        """Whether `place` is a file or folder of this machine."""
        return self.kind == "chroma" or (self.kind == "milvus" and "://" not in self.place)

    @property
    def uri(self) -> str:
        return f"{self.kind}://{quote(self.name or 'default')}"


class PushReport(Frozen):
    """`left_out`: documents without chunks, and documents too large to go along."""

    chunks: int
    left_out: int
    seconds: float


class PullReport(Frozen):
    """`foreign`: chunks that something else wrote, whose offsets point into a text joined from them."""

    documents: int
    chunks: int
    foreign: int
    seconds: float


def is_store(name: str) -> bool:
    return name.split(":", 1)[0] in KINDS and ":" in name


def parse_store(name: str) -> StoreName:
    """Raises InvalidError."""
    kind, _, rest = name.partition(":")
    place, mark, collection = rest.rpartition("#")
    if kind not in KINDS or not mark or not place or (not collection and kind != "pinecone"):
        forms = "chroma:PATH#COLLECTION, milvus:FILE_OR_URI#COLLECTION or pinecone:INDEX#NAMESPACE"
        raise InvalidError(f"{name!r} names no store; write {forms}")
    return StoreName(kind, place, collection)


def push(
    folder: Path, target: str, *, progress: Told = lambda _: None, cancelled: Callable[[], bool] = lambda: False
) -> PushReport:
    """The chunks of a dump into a store; those it holds under the same ids are replaced. Texts of documents stay behind.

    Raises InvalidError (a damaged dump, no such store), SettingsError (a package or key is missing), UnavailableError.
    """
    start = time.perf_counter()
    where, manifest = parse_store(target), read_manifest(folder)
    tick = asking(cancelled)
    for shard in manifest.shards:
        verify(folder, shard, tick)
    chunks = [shard for shard in manifest.shards if shard.holds_chunks]
    collection = manifest.collection.model_dump_json()
    done = 0
    with _said(target), tempfile.TemporaryDirectory() as scratch, closing(_database(Path(scratch))) as database:
        documents = (folder / one.file for one in manifest.shards if one not in chunks)
        left_out = _spool_documents(database, documents, tick)
        with _opened(where, manifest.dimension or 1) as store:
            for shard in chunks:
                for points in read_chunks(folder / shard.file, manifest.dimension or 1):
                    tick()
                    _replace(where, store, [to_node(one, _document(database, one), collection) for one in points])
                    done += len(points)
                    progress(Progress(chunks=done, current=shard.file))
    return PushReport(chunks=done, left_out=left_out, seconds=round(time.perf_counter() - start, 3))


def pull(
    source: str,
    folder: Path,
    *,
    collection: Collection | None = None,
    rows_per_shard: int = 10_000,
    progress: Told = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> PullReport:
    """A store into a dump. BM25 vectors are computed from the texts; documents are rebuilt from their chunks, and marked
    so that the next ingest of their files reads them again, without embedding anything again.

    `collection`: how the vectors were made, where the store does not say (only what `push` wrote does). Raises as `push`,
    NotFoundError (the store holds no such collection), ConflictError (the folder holds something else).
    """
    start = time.perf_counter()
    where, tick = parse_store(source), asking(cancelled)
    with (
        unfinished(folder),
        tempfile.TemporaryDirectory() as scratch,
        closing(_database(Path(scratch))) as database,
    ):
        with _said(source):
            said, foreign, count = _spool_nodes(database, where, progress, tick)
        settings = said or collection
        if settings is None:
            raise InvalidError(
                f"{source!r} does not say which embedder made its vectors; name a collection that is set to the same one"
            )
        dimension, fingerprint = _write(database, where, folder, settings, rows_per_shard, tick)
        manifest = seal(folder, settings, fingerprint, dimension, tick)
    seconds = round(time.perf_counter() - start, 3)
    return PullReport(documents=manifest.documents, chunks=count, foreign=foreign, seconds=seconds)


def _spool_documents(database: sqlite3.Connection, files: Iterable[Path], tick: Tick) -> int:
    """-> how many do not go along."""
    left_out = 0
    for file in files:
        for rows in read_documents(file):
            tick()
            listed = [(one.id, one.model_dump_json(exclude_defaults=True)) for one, _ in rows if one.chunks]
            small = [(identity, content) for identity, content in listed if len(content.encode()) <= DOCUMENT_BYTES]
            left_out += len(rows) - len(small)
            database.executemany("INSERT INTO documents VALUES (?, ?)", small)
    return left_out


def _document(database: sqlite3.Connection, chunk: Point) -> str | None:
    """The JSON of a first chunk's document."""
    if chunk.payload["ordinal"] != 0:
        return None
    row = database.execute("SELECT document FROM documents WHERE id = ?", (chunk.payload["document_id"],)).fetchone()
    return row[0] if row else None


def _spool_nodes(
    database: sqlite3.Connection, where: StoreName, progress: Told, tick: Tick
) -> tuple[Collection | None, int, int]:
    """-> the collection that the nodes came from, where they say; foreign nodes; all nodes."""
    collection: Collection | None = None
    foreign = count = 0
    for batch in _scan(where):
        tick()
        for found in batch:
            row = read_node(found, count)
            ours = carried(row.metadata)
            if ours is None:
                foreign += 1
            elif collection is None and "collection" in ours:
                collection = Collection.model_validate(ours["collection"])
            database.execute("INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?)", row)
            count += 1
        progress(Progress(chunks=count, current=where.name))
    return collection, foreign, count


def _write(
    database: sqlite3.Connection,
    where: StoreName,
    folder: Path,
    collection: Collection,
    rows_per_shard: int,
    tick: Tick,
) -> tuple[int | None, str | None]:
    """Writes shards, document by document. -> dimension, embedder's fingerprint."""
    rows = database.execute(
        "SELECT document, place, id, text, metadata, dense FROM nodes ORDER BY document, place, rowid"
    )
    dimension: int | None = None
    fingerprint: str | None = None
    kept: list[Kept] = []
    points: list[Point] = []
    number = 0
    for name, own in groupby(map(Stored._make, rows), key=lambda row: row.document):
        tick()
        document, new = rebuild(list(own), collection.name, f"{where.uri}/{quote(name)}")
        dimension = dimension or new[0].dense.shape[0]
        other = next((point for point in new if point.dense.shape[0] != dimension), None)
        if other is not None:
            raise InvalidError(
                f"node {other.id!r} has {other.dense.shape[0]} dimensions, others {dimension}; delete it"
            )
        fingerprint = fingerprint or new[0].payload.get("fingerprint")
        kept.append(document)
        points += new
        if len(points) >= rows_per_shard:
            _write_pair(folder, number, points, kept, dimension)
            kept, points, number = [], [], number + 1
    if points and dimension:
        _write_pair(folder, number, points, kept, dimension)
    return dimension, fingerprint


def _write_pair(folder: Path, number: int, points: list[Point], kept: list[Kept], dimension: int) -> None:
    pages = (points[start : start + 1000] for start in range(0, len(points), 1000))
    write_chunks(folder / f"chunks-{number:05}.parquet", pages, dimension)
    write_documents(folder / f"documents-{number:05}.parquet", [kept])


def _database(folder: Path) -> sqlite3.Connection:
    """What must be put in order on the way lies on disk, not in memory."""
    database = sqlite3.connect(folder / "spool.db", check_same_thread=False)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("CREATE TABLE documents (id TEXT PRIMARY KEY, document TEXT)")
    database.execute("CREATE TABLE nodes (document TEXT, place INTEGER, id TEXT, text TEXT, metadata TEXT, dense BLOB)")
    database.execute("CREATE INDEX ordered ON nodes (document, place)")
    return database


# the stores


@contextmanager
def _opened(where: StoreName, dimension: int) -> Iterator[Any]:
    """LlamaIndex's vector store, created where it is not there."""
    with _packages():
        match where.kind:
            case "chroma":
                from llama_index.vector_stores.chroma import ChromaVectorStore

                with closing(_chroma(where)) as client:
                    cosine = {"hnsw": {"space": "cosine"}}
                    held = client.get_or_create_collection(where.name, embedding_function=None, configuration=cosine)
                    yield ChromaVectorStore(chroma_collection=held)
            case "milvus":
                from llama_index.vector_stores.milvus import MilvusVectorStore

                store = MilvusVectorStore(
                    uri=where.place,
                    token=os.environ.get("MILVUS_TOKEN", ""),
                    collection_name=where.name,
                    dim=dimension,
                    upsert_mode=True,
                    similarity_metric="COSINE",
                    use_async_client=False,
                )
                with closing(store.client):
                    yield store
            case _:
                from llama_index.vector_stores.pinecone import PineconeVectorStore

                yield PineconeVectorStore(pinecone_index=_pinecone(where), namespace=where.name)


def _replace(where: StoreName, store: Any, nodes: list[Any]) -> None:
    if where.kind == "chroma":  # it leaves what it has under an id as it is
        store.delete_nodes([node.node_id for node in nodes])
    store.add(nodes)


def _scan(where: StoreName) -> Iterator[list[Found]]:
    with _packages():
        match where.kind:
            case "chroma":
                yield from _scan_chroma(where)
            case "milvus":
                yield from _scan_milvus(where)
            case _:
                yield from _scan_pinecone(where)


def _scan_chroma(where: StoreName) -> Iterator[list[Found]]:
    from chromadb.errors import NotFoundError as Missing

    if not Path(where.place).is_dir():
        raise NotFoundError(f"there is no Chroma folder {where.place!r}")
    with closing(_chroma(where)) as client:
        try:
            held = client.get_collection(where.name, embedding_function=None)
        except Missing as error:
            raise NotFoundError(f"{where.place!r} holds no collection {where.name!r}") from error
        offset = 0
        while True:
            got = held.get(include=["embeddings", "documents", "metadatas"], limit=BATCH, offset=offset)
            if not got["ids"]:
                return
            offset += len(got["ids"])
            yield [
                Found(identity, text, dict(metadata or {}), dense)
                for identity, text, metadata, dense in zip(
                    got["ids"], got["documents"], got["metadatas"], got["embeddings"], strict=True
                )
            ]


def _scan_milvus(where: StoreName) -> Iterator[list[Found]]:
    from pymilvus import MilvusClient

    if "://" not in where.place and not Path(where.place).exists():
        raise NotFoundError(f"there is no Milvus file {where.place!r}")
    with closing(MilvusClient(uri=where.place, token=os.environ.get("MILVUS_TOKEN", ""))) as client:
        if not client.has_collection(where.name):
            raise NotFoundError(f"{where.place!r} holds no collection {where.name!r}")
        client.load_collection(where.name)
        with closing(client.query_iterator(where.name, batch_size=BATCH, output_fields=["*"])) as rows:
            while batch := rows.next():
                yield [
                    Found(str(row["id"]), row.get("text"), dict(row, embedding=None), row.get("embedding"))
                    for row in batch
                ]


def _scan_pinecone(where: StoreName) -> Iterator[list[Found]]:
    index = _pinecone(where)
    for page in index.list(namespace=where.name):
        ids = [one if isinstance(one, str) else one.id for one in page]
        got = index.fetch(ids=ids, namespace=where.name).vectors
        yield [
            Found(identity.rpartition("#")[2], None, dict(got[identity].metadata or {}), got[identity].values)
            for identity in ids
            if identity in got
        ]


def _chroma(where: StoreName) -> Any:
    import chromadb
    from chromadb.config import Settings

    return chromadb.PersistentClient(path=where.place, settings=Settings(anonymized_telemetry=False))


def _pinecone(where: StoreName) -> Any:
    """The key is in PINECONE_API_KEY; PINECONE_CONTROLLER_HOST names another server than Pinecone's own."""
    from pinecone import Pinecone

    if not os.environ.get("PINECONE_API_KEY"):
        raise SettingsError("PINECONE_API_KEY is not set; set it to a key of the project that holds the index")
    return Pinecone().index(where.place)


@contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SettingsError(
            f"the package {error.name!r} is missing; `.venv/bin/pip install 'graft[stores]'` brings it"
        ) from error


@contextmanager
def _said(store: str) -> Iterator[None]:
    """The stores raise what they like; it becomes an error of ours that names the store."""
    try:
        yield
    except (GraftError, Cancelled):
        raise
    except Exception as error:
        raise UnavailableError(
            f"{store!r} did not do as it was asked: {type(error).__name__}: {error}"[:600]
        ) from error
