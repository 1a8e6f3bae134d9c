"""What was asked and answered, what users said of it, and what jobs were run. Interactions and feedback are append-only."""

import hashlib
import uuid
from datetime import datetime
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    ForeignKey,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    select,
)
from sqlalchemy import update as sql_update
from sqlalchemy.exc import IntegrityError

from ingest.catalog import now
from ingest.db import Utc, metadata
from ingest.errors import ConflictError, NotFoundError
from ingest.schemas import Frozen, Hit, Progress, Report
from service.tuning import LossPoint, TuneProgress, TuneResult, Wait

Source = Literal["user", "eval", "bench"]
JobKind = Literal["ingest", "reindex", "dump", "load", "tune"]

interactions = Table(
    "interactions",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("created_at", Utc, nullable=False, index=True),
    Column("principal", String(128), nullable=False),
    Column("source", String(16), nullable=False),
    Column("collection", String(64), nullable=False),
    Column("collections", JSON(none_as_null=True)),
    Column("index_fingerprint", String(64), nullable=False),
    Column("question", Text, nullable=False),
    Column("turns", JSON, nullable=False),
    Column("search", Text),
    Column("filters", JSON, nullable=False),
    Column("hits", JSON, nullable=False),
    Column("prompt_version", String(64), nullable=False),
    Column("passages", Integer, nullable=False),
    Column("base_model", String(512)),
    Column("adapter", String(128)),
    Column("sampling", JSON, nullable=False),
    Column("answer", Text, nullable=False),
    Column("said", Text),
    Column("sentences", JSON),
    Column("citations", JSON, nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("usage", JSON, nullable=False),
    Column("timings_ms", JSON, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("created_at", Utc, nullable=False),
    Column("interaction_id", ForeignKey("interactions.id"), nullable=False, index=True),
    Column("principal", String(128), nullable=False),
    Column("rating", String(8)),
    Column("comment", Text),
    Column("correction", Text),
    Column("idempotency_key", String(256)),
    Column("body_hash", String(64), nullable=False),
    UniqueConstraint("principal", "idempotency_key", name="uq_feedback_idempotency"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("created_at", Utc, nullable=False),
    Column("principal", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("report", JSON),
    Column("tuning", JSON(none_as_null=True)),
    Column("curve", JSON(none_as_null=True)),
    Column("waiting", JSON(none_as_null=True)),
    Column("result", JSON(none_as_null=True)),
    Column("error", Text),
)


class Turn(Frozen):
    """An earlier turn of the conversation."""

    role: Literal["user", "assistant"]
    content: str = Field(max_length=32_000)


class Interaction(Frozen):
    """One question and what became of it: enough to build its prompt again, token for token.

    `passages` is how many of `hits` the prompt held, from the first; the prompt is `service.prompt.build` of
    `prompt_version`, `question`, `turns` and those. `answer` is what was shown; `said`, where that is something else, what
    the model had said by then. `sentences` are those of `answer`; null before they were kept.
    `collections` are all that were asked, where they are several; the answer was made by the settings of the first, which is
    `collection`, and each of `hits` names its own. `search` is what was searched for, where that was not the question alone.
    """

    id: str
    created_at: datetime
    principal: str
    source: Source
    collection: str
    collections: tuple[str, ...] | None = None
    index_fingerprint: str
    question: str
    turns: tuple[Turn, ...] = ()
    search: str | None = None
    filters: dict[str, Any] = {}
    hits: tuple[Hit, ...] = ()
    prompt_version: str
    passages: int = 0
    base_model: str | None = None
    adapter: str | None = None
    sampling: dict[str, Any] = {}
    answer: str = ""
    said: str | None = None
    sentences: list[dict[str, Any]] | None = None
    citations: list[dict[str, Any]] = []
    finish_reason: str
    usage: dict[str, int] = {}
    timings_ms: dict[str, float] = {}


class Feedback(Frozen):
    rating: Literal["up", "down"] | None = None
    comment: str | None = None
    correction: str | None = None


class JobRecord(Frozen):
    """A job's request and what it has said so far; its state is the job engine's (`service.jobs`).

    Of a training: `tuning` is how far it is, `curve` its losses so far, `waiting` what it waits for.
    """

    id: str
    created_at: datetime
    principal: str
    kind: JobKind
    payload: dict[str, Any]
    progress: Progress = Progress()
    report: Report | None = None
    tuning: TuneProgress | None = None
    curve: tuple[LossPoint, ...] | None = None
    waiting: Wait | None = None
    result: TuneResult | None = None
    error: str | None = None


class Records:
    """Reads and writes the records. Calls block; every call is a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def add_interaction(self, interaction: Interaction) -> None:
        with self.engine.begin() as connection:
            values = interaction.model_dump(mode="json") | {"created_at": interaction.created_at}
            connection.execute(insert(interactions).values(**values))

    def interaction(self, identity: str, principal: str) -> Interaction:
        """Raises NotFoundError, also when it is another principal's."""
        query = select(interactions).where(interactions.c.id == identity, interactions.c.principal == principal)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no interaction {identity!r} of yours")
        return Interaction.model_validate(dict(row))

    def add_feedback(self, interaction_id: str, principal: str, given: Feedback, key: str | None) -> str:
        """-> its id. The same idempotency key gives the same id; with another body it raises ConflictError."""
        self.interaction(interaction_id, principal)
        digest = hashlib.sha256(f"{interaction_id}:{given.model_dump_json()}".encode()).hexdigest()
        row = {
            "id": str(uuid.uuid4()),
            "created_at": now(),
            "interaction_id": interaction_id,
            "principal": principal,
            "idempotency_key": key,
            "body_hash": digest,
            **given.model_dump(),
        }
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(feedback).values(**row))
            return str(row["id"])
        except IntegrityError:
            with self.engine.connect() as connection:
                held = connection.execute(
                    select(feedback.c.id, feedback.c.body_hash).where(
                        feedback.c.principal == principal, feedback.c.idempotency_key == key
                    )
                ).one()
            if held.body_hash != digest:
                raise ConflictError(f"Idempotency-Key {key!r} was used for other feedback; choose a new one") from None
            return str(held.id)

    def feedback_of(self, interaction_id: str) -> list[dict[str, Any]]:
        columns = (feedback.c.id, feedback.c.created_at, feedback.c.rating, feedback.c.comment, feedback.c.correction)
        query = select(*columns).where(feedback.c.interaction_id == interaction_id).order_by(feedback.c.created_at)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def add_job(self, job: JobRecord) -> int:
        """-> how many jobs there are with it."""
        with self.engine.begin() as connection:
            connection.execute(insert(jobs).values(**job.model_dump(mode="json") | {"created_at": job.created_at}))
            return connection.execute(select(func.count()).select_from(jobs)).scalar_one()

    def job(self, identity: str) -> JobRecord:
        """Raises NotFoundError."""
        with self.engine.connect() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == identity)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no job {identity!r}")
        return JobRecord.model_validate(dict(row))

    def job_ids(self, collection: str | None, limit: int) -> list[str]:
        """The latest first; of one collection, or of all."""
        query = select(jobs.c.id).order_by(jobs.c.created_at.desc()).limit(limit)
        if collection is not None:
            query = query.where(jobs.c.payload["collection"].as_string() == collection)
        with self.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def questions(self, collection: str, limit: int) -> list[str]:
        """Asked of a collection by its users, without repetition, the latest first."""
        query = (
            select(interactions.c.question)
            .where(interactions.c.collection == collection, interactions.c.source == "user")
            .group_by(interactions.c.question)
            .order_by(func.max(interactions.c.created_at).desc())
            .limit(limit)
        )
        with self.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def set_job(self, identity: str, **columns: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(sql_update(jobs).where(jobs.c.id == identity).values(**columns))
