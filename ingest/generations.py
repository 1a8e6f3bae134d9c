"""The indexes that a collection has had: built beside the live one, flipped to, kept for a way back, dropped.

Which one is live is said by the collection's own row alone, so that a flip is one transaction and no question meets a
mixture. A collection that was never built anew has no rows here.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import JSON, Column, Engine, String, Table, delete, insert, select, update

from ingest.catalog import Collection, collections, documents, index_name, now
from ingest.db import Utc, metadata
from ingest.errors import ConflictError, NotFoundError
from ingest.schemas import Chunking, Comparison, Frozen

GenerationState = Literal["building", "ready", "live", "retired"]

generations = Table(
    "generations",
    metadata,
    Column("collection", String(64), primary_key=True),
    Column("fingerprint", String(64), primary_key=True),
    Column("embedder", String(512), nullable=False),
    Column("chunking", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("retired_at", Utc),
    Column("comparison", JSON(none_as_null=True)),
)


class Generation(Frozen):
    """`comparison`: with the live one at the time, over sample questions."""

    collection: str
    fingerprint: str
    embedder: str
    chunking: Chunking
    state: GenerationState
    created_at: datetime
    retired_at: datetime | None = None
    comparison: Comparison | None = None

    @property
    def index(self) -> str:
        return index_name(self.collection, self.fingerprint)


class Generations:
    """Every call is a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def of(self, collection: Collection) -> list[Generation]:
        """Oldest first, the live one among them."""
        query = (
            select(generations).where(generations.c.collection == collection.name).order_by(generations.c.created_at)
        )
        with self.engine.connect() as connection:
            found = [Generation.model_validate(dict(row)) for row in connection.execute(query).mappings()]
        if not any(one.fingerprint == collection.fingerprint for one in found):
            found = [_live(collection), *found]
        return [_by_collection(one, collection.fingerprint) for one in found]

    def generation(self, collection: Collection, fingerprint: str) -> Generation:
        """`fingerprint` may be its first characters. Raises NotFoundError, ConflictError."""
        found = [one for one in self.of(collection) if one.fingerprint.startswith(fingerprint)]
        if not found:
            raise NotFoundError(
                f"collection {collection.name!r} has no index {fingerprint!r}; `graft collections indexes` lists them"
            )
        if len(found) > 1:
            raise ConflictError(f"{fingerprint!r} is the beginning of {len(found)} indexes; give more of it")
        return found[0]

    def begin(self, new: Generation) -> None:
        """It is being built, from nothing or anew."""
        with self.engine.begin() as connection:
            _replace(connection, new)

    def ready(self, generation: Generation, comparison: Comparison) -> None:
        self._set(generation, state="ready", comparison=comparison.model_dump())

    def flip(self, live: Collection, new: Generation, counts: Mapping[str, tuple[int, dict[str, int]]]) -> None:
        """Makes `new` the one that answers. `counts`: chunks and languages by document, as they are in it."""
        settings = {
            "embedder": new.embedder,
            "chunking": new.chunking.model_dump(mode="json"),
            "fingerprint": new.fingerprint,
        }
        with self.engine.begin() as connection:
            old = next((one for one in self.of(live) if one.fingerprint == live.fingerprint), _live(live))
            _replace(connection, old.model_copy(update={"state": "retired", "retired_at": now()}))
            _replace(connection, new.model_copy(update={"state": "live", "retired_at": None}))
            connection.execute(update(collections).where(collections.c.name == live.name).values(**settings))
            for document, (chunks, languages) in counts.items():
                connection.execute(
                    update(documents).where(documents.c.id == document).values(chunks=chunks, languages=languages)
                )

    def forget(self, collection: str, fingerprint: str | None = None) -> None:
        """One, or all of a collection that is gone."""
        where = generations.c.collection == collection
        if fingerprint is not None:
            where &= generations.c.fingerprint == fingerprint
        with self.engine.begin() as connection:
            connection.execute(delete(generations).where(where))

    def _set(self, generation: Generation, **values: Any) -> None:
        where = (generations.c.collection == generation.collection) & (
            generations.c.fingerprint == generation.fingerprint
        )
        with self.engine.begin() as connection:
            connection.execute(update(generations).where(where).values(**values))


def _replace(connection: Any, new: Generation) -> None:
    where = (generations.c.collection == new.collection) & (generations.c.fingerprint == new.fingerprint)
    connection.execute(delete(generations).where(where))
    values = new.model_dump(mode="json") | {"created_at": new.created_at, "retired_at": new.retired_at}
    connection.execute(insert(generations).values(**values))


def _by_collection(held: Generation, live: str) -> Generation:
    """The collection's row decides which one is live: it may have been set otherwise while it was empty."""
    if held.fingerprint == live:
        return held.model_copy(update={"state": "live"})
    return held.model_copy(update={"state": "retired"}) if held.state == "live" else held


def _live(collection: Collection) -> Generation:
    return Generation(
        collection=collection.name,
        fingerprint=collection.fingerprint,
        embedder=collection.embedder,
        chunking=collection.chunking,
        state="live",
        created_at=collection.created_at,
    )
