"""What is indexed: collections, their documents, and the kept texts. The checkpoint of every ingest job.

The chunks themselves are known to the index alone; a document's row is `writing` from before its first chunk is written
until after its last old one is gone, so that a killed job is seen and finished by the next one. The indexes that a
collection has had (its generations) are in `ingest.generations`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Integer,
    RowMapping,
    String,
    Table,
    cast,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from ingest.db import Compressed, Utc, metadata
from ingest.errors import ConflictError, NotFoundError
from ingest.schemas import Chunking, Frozen, Labels, ParsedText, Retrieval

# skipped: no text is read from files of its kind; removed: deleted by its id, and kept out while its file is there
State = Literal["writing", "done", "failed", "skipped", "removed"]

collections = Table(
    "collections",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("embedder", String(512), nullable=False),
    Column("chunking", JSON, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("retrieval", JSON, nullable=False),
    Column("prompt", String(64), nullable=False),
    Column("threshold", Float),
    Column("created_at", Utc, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("collection", String(64), nullable=False, index=True),
    Column("uri", String(4096), nullable=False),
    Column("first_uri", String(4096), nullable=False, index=True),
    Column("path", String(4096), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("stamp", BigInteger, nullable=False),
    Column("content_hash", String(64), nullable=False),
    Column("text_hash", String(64), index=True),
    Column("mime", String(128)),
    Column("state", String(16), nullable=False),
    Column("stage", String(16)),
    Column("reason", String(2000)),
    Column("chunks", Integer, nullable=False, default=0),
    Column("pages", Integer),
    Column("languages", JSON, nullable=False),
    Column("acl", JSON, nullable=False),
    Column("given_acl", JSON(none_as_null=True)),
    Column("own_acl", JSON(none_as_null=True)),
    Column("metadata", JSON, nullable=False),
    Column("properties", JSON, nullable=False),
    Column("sidecar", JSON(none_as_null=True)),
    Column("indexed_at", Utc),
)

texts = Table(
    "texts",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("parsed", Compressed, nullable=False),
)


class Collection(Frozen):
    """How a set of documents is embedded, split, searched and answered from.

    `fingerprint` stands for embedder and chunking; `threshold` is null until somebody calibrates it.
    """

    name: str
    embedder: str
    chunking: Chunking
    fingerprint: str
    retrieval: Retrieval = Retrieval()
    prompt: str
    threshold: float | None = None
    created_at: datetime

    @property
    def index(self) -> str:
        """The name that the index knows it by."""
        return index_name(self.name, self.fingerprint)


class Document(Frozen):
    """One source file of a collection, as it was when it was last read. An archive is one without text.

    `stamp` and `size` change with the content: nanoseconds of modification, or a hash of what a store calls its version.
    Labels come from an ingest job (`given_acl`, `metadata`), from the file (`own_acl`, `properties`: title, authors, front
    matter, ...) and from its `sidecar`; `acl` and `labels()` are what holds. Of access lists the most particular one
    holds: the sidecar's, else the file's own, else the job's. Of metadata, the sidecar's over the job's over the file's.
    """

    id: str
    collection: str
    uri: str
    first_uri: str
    path: str
    size: int
    stamp: int
    content_hash: str
    text_hash: str | None = None
    mime: str | None = None
    state: State
    stage: str | None = None
    reason: str | None = None
    chunks: int = 0
    pages: int | None = None
    languages: dict[str, int] = {}
    acl: tuple[str, ...] = ()
    given_acl: tuple[str, ...] | None = None
    own_acl: tuple[str, ...] | None = None
    metadata: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    sidecar: Labels | None = None
    indexed_at: datetime | None = None

    def labels(self) -> dict[str, Any]:
        return {**self.properties, **self.metadata, **(self.sidecar.metadata if self.sidecar else {})}

    def relabelled(self, **changes: Any) -> "Document":
        """A copy with `changes`, and the access list that follows from them."""
        new = self.model_copy(update=changes)
        stated = (new.sidecar.acl if new.sidecar else None, new.own_acl, new.given_acl)
        acl = next((one for one in stated if one is not None), ())
        return new.model_copy(update={"acl": tuple(sorted(acl))})


class Catalog:
    """Reads and writes the catalog. One instance a process; every call is a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    # collections

    def collections(self) -> list[Collection]:
        with self.engine.connect() as connection:
            rows = connection.execute(select(collections).order_by(collections.c.name)).mappings()
            return [Collection.model_validate(dict(row)) for row in rows]

    def collection(self, name: str) -> Collection:
        """Raises NotFoundError."""
        with self.engine.connect() as connection:
            row = connection.execute(select(collections).where(collections.c.name == name)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no collection {name!r}; GET /collections lists them, an ingest creates one")
        return Collection.model_validate(dict(row))

    def put_collection(self, collection: Collection) -> None:
        """Creates or replaces. Raises ConflictError when another embedder or chunking meets indexed documents."""
        values = collection.model_dump(mode="json", exclude={"created_at"})
        with self.engine.begin() as connection:
            held = connection.execute(
                select(collections.c.fingerprint).where(collections.c.name == collection.name)
            ).scalar()
            if held is None:
                try:
                    connection.execute(insert(collections).values(**values, created_at=collection.created_at))
                except IntegrityError as error:  # two first ingests at once: the other one has just made it
                    raise ConflictError(f"collection {collection.name!r} is being created; try again") from error
                return
            if held != collection.fingerprint and _count(connection, collection.name):
                raise ConflictError(
                    f"collection {collection.name!r} holds documents under another embedder or chunking; "
                    f"`graft reindex {collection.name}` (POST /collections/{collection.name}/reindex) builds it anew"
                )
            connection.execute(update(collections).where(collections.c.name == collection.name).values(**values))

    def delete_collection(self, name: str) -> None:
        with self.engine.begin() as connection:
            held = _text_hashes(connection, documents.c.collection == name)
            connection.execute(delete(documents).where(documents.c.collection == name))
            connection.execute(delete(collections).where(collections.c.name == name))
            _drop_unused(connection, held)

    # documents

    def documents(
        self,
        collection: str,
        groups: frozenset[str] | None = None,
        limit: int | None = None,
        offset: int = 0,
        *,
        path: str | None = None,
        state: State | None = None,
    ) -> list[Document]:
        """By path. `groups`: only what a member of these may see (None: all). `path`: this one, or those in this folder.

        `state` None: of every state but removed.
        """
        where = documents.c.state != "removed" if state is None else documents.c.state == state
        query = (
            select(documents)
            .where(documents.c.collection == collection, where)
            .order_by(documents.c.path, documents.c.id)
        )
        if path is not None:
            folder = path.rstrip("/") + "/"
            below = func.substr(documents.c.path, 1, len(folder)) == folder  # LIKE ignores case on SQLite
            query = query.where((documents.c.path == path) | below)
        if groups is None:
            query = query.limit(limit).offset(offset)
        with self.engine.connect() as connection:
            found = [_document(row) for row in connection.execute(query).mappings()]
        if groups is None:
            return found
        visible = [one for one in found if not one.acl or groups & set(one.acl)]
        return visible[offset : None if limit is None else offset + limit]

    def document(self, document_id: str) -> Document:
        """Raises NotFoundError."""
        with self.engine.connect() as connection:
            row = connection.execute(select(documents).where(documents.c.id == document_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no document {document_id!r}; GET /documents lists them")
        return _document(row)

    def stamps(self, collection: str, under: Sequence[str]) -> dict[str, RowMapping]:
        """-> by URI, the columns that tell whether a file changed, for all documents at or below one of the URIs `under`."""
        columns = documents.c
        query = select(
            columns.id, columns.uri, columns.path, columns.size, columns.stamp, columns.content_hash, columns.state,
            columns.given_acl, columns.metadata, columns.sidecar, columns.reason,
        ).where(columns.collection == collection)  # fmt: skip
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return {row["uri"]: row for row in rows if any(is_below(row["uri"], uri) for uri in under)}

    def ids_first_seen_at(self, collection: str, uri: str) -> set[str]:
        query = select(documents.c.id).where(documents.c.collection == collection, documents.c.first_uri == uri)
        with self.engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def count(self, collection: str) -> dict[str, int]:
        """-> documents by state, and `chunks`."""
        with self.engine.connect() as connection:
            by_state = connection.execute(
                select(documents.c.state, func.count(), func.sum(documents.c.chunks))
                .where(documents.c.collection == collection)
                .group_by(documents.c.state)
            ).all()
        counts: dict[str, int] = {state: number for state, number, _ in by_state}
        return counts | {"chunks": sum(chunks or 0 for _, _, chunks in by_state)}

    def languages(self, collection: str) -> dict[str, int]:
        """-> chunks by language."""
        said = cast(documents.c.languages, String)  # few documents differ in it, so the database does most of the work
        query = select(said, func.count()).where(documents.c.collection == collection, documents.c.state == "done")
        counts: Counter[str] = Counter()
        with self.engine.connect() as connection:
            for languages, number in connection.execute(query.group_by(said)):
                counts.update({language: number * chunks for language, chunks in json.loads(languages).items()})
        return dict(counts)

    def put(self, rows: Iterable[Document], restore: bool = False) -> set[str]:
        """Inserts or replaces documents, in one transaction. -> ids of those written: without `restore`, what was removed
        stays removed.
        """
        written = set()
        with self.engine.begin() as connection:
            for row in rows:
                state = connection.execute(select(documents.c.state).where(documents.c.id == row.id)).scalar()
                if state != "removed" or restore:
                    connection.execute(delete(documents).where(documents.c.id == row.id))
                    connection.execute(insert(documents).values(**row.model_dump()))
                    written.add(row.id)
        return written

    def unsettle(self, ids: Sequence[str]) -> None:
        """They are about to be deleted: whatever happens, the next job looks at them again."""
        with self.engine.begin() as connection:
            for start in range(0, len(ids), 500):
                batch = documents.c.id.in_(ids[start : start + 500])
                connection.execute(update(documents).where(batch, documents.c.state == "done").values(state="writing"))

    def touch(self, stamps: Iterable[tuple[str, int, int]]) -> None:
        """Files that were rewritten with the same bytes: (document, size, stamp)."""
        with self.engine.begin() as connection:
            for document_id, size, stamp in stamps:
                connection.execute(
                    update(documents).where(documents.c.id == document_id).values(size=size, stamp=stamp)
                )

    def is_removed(self, document_id: str) -> bool:
        """Whether it was deleted by its id, or is gone altogether."""
        query = select(documents.c.state).where(documents.c.id == document_id)
        with self.engine.connect() as connection:
            return connection.execute(query).scalar() in {None, "removed"}

    def remove(self, ids: Sequence[str]) -> None:
        """Their texts go; a row that says so stays, which keeps the files out of the next job."""
        emptied: dict[str, Any] = {
            "state": "removed",
            "text_hash": None,
            "chunks": 0,
            "pages": None,
            "languages": {},
            "properties": {},
        }
        with self.engine.begin() as connection:
            for start in range(0, len(ids), 500):
                batch = documents.c.id.in_(ids[start : start + 500])
                held = _text_hashes(connection, batch)
                connection.execute(update(documents).where(batch).values(**emptied))
                _drop_unused(connection, held)

    def finish(self, rows: Iterable[tuple[Document, ParsedText | None]]) -> list[str]:
        """Records documents as they now stand, and keeps their texts; texts that nothing points to any more go.

        -> ids of those that were removed meanwhile: they stay removed.
        """
        removed: list[str] = []
        with self.engine.begin() as connection:
            held: set[str] = set()
            for row, parsed in rows:
                state = connection.execute(select(documents.c.state).where(documents.c.id == row.id)).scalar()
                if state == "removed":
                    removed.append(row.id)
                    continue
                if parsed is not None:
                    _keep_text(connection, str(row.text_hash), parsed)
                held |= _text_hashes(connection, documents.c.id == row.id)
                connection.execute(delete(documents).where(documents.c.id == row.id))
                connection.execute(insert(documents).values(**row.model_dump()))
            _drop_unused(connection, held)
        return removed

    def forget(self, ids: Sequence[str]) -> None:
        with self.engine.begin() as connection:
            for start in range(0, len(ids), 500):
                batch = documents.c.id.in_(ids[start : start + 500])
                held = _text_hashes(connection, batch)
                connection.execute(delete(documents).where(batch))
                _drop_unused(connection, held)

    def text(self, document_id: str) -> ParsedText:
        """The kept text that offsets point into. Raises NotFoundError."""
        query = select(texts.c.parsed).join(documents, documents.c.text_hash == texts.c.hash)
        with self.engine.connect() as connection:
            parsed = connection.execute(query.where(documents.c.id == document_id)).scalar()
        if parsed is None:
            raise NotFoundError(f"there is no text of document {document_id!r}; GET /documents/{document_id} says why")
        return ParsedText.model_validate_json(parsed)


def index_name(collection: str, fingerprint: str) -> str:
    return f"{collection}.{fingerprint[:12]}"


def is_below(uri: str, under: str) -> bool:
    """Whether `uri` is `under`, lies in that folder, or is a part of that file: a member of an archive ("!/"), a reader's
    document ("#"). Both marks are percent-encoded in names.
    """
    return uri.startswith(under) and (uri[len(under) :][:1] in {"", "/", "!", "#"} or under.endswith("/"))


def now() -> datetime:
    return datetime.now(UTC)


def _document(row: RowMapping) -> Document:
    return Document.model_validate(dict(row))


def _count(connection: Connection, collection: str) -> int:
    return connection.execute(
        select(func.count()).select_from(documents).where(documents.c.collection == collection)
    ).scalar_one()


def _text_hashes(connection: Connection, where: ColumnElement[bool]) -> set[str]:
    return {address for address in connection.execute(select(documents.c.text_hash).where(where)).scalars() if address}


def _keep_text(connection: Connection, address: str, parsed: ParsedText) -> None:
    """A job of another collection may be keeping the same text."""
    inserting = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    if connection.execute(select(texts.c.hash).where(texts.c.hash == address)).scalar() is None:
        row = inserting(texts).values(hash=address, parsed=parsed.model_dump_json())
        connection.execute(row.on_conflict_do_nothing())


def _drop_unused(connection: Connection, addresses: set[str]) -> None:
    for address in addresses:
        used = select(documents.c.id).where(documents.c.text_hash == address)
        connection.execute(delete(texts).where(texts.c.hash == address, ~used.exists()))
