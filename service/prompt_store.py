"""Prompt versions that users add, and which version each collection answers with.

A version, NAME-1, NAME-2, ..., is a row that is never changed. A collection's pointer is the last of its moves, which are
only ever appended, as the adapters' are; one that was never moved is the prompt that the collection came with.
"""

import hashlib
import re
import threading
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    RowMapping,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    select,
)
from sqlalchemy.exc import IntegrityError

from ingest.catalog import Collection, now
from ingest.db import Utc, metadata
from ingest.errors import ConflictError, InvalidError, NotFoundError
from service.prompt import CURRENT, built_in, built_in_versions, source_of
from service.schemas import PromptMove, PromptView
from service.template import Template

AUTO = "auto"  # what fits the model that answers
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_NUMBERED = re.compile(r".*-\d+")
_RESERVED = frozenset({AUTO, "refusal", "moves"})

prompts = Table(
    "prompts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("source", Text, nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("principal", String(128), nullable=False),
    UniqueConstraint("name", "digest", name="uq_prompts_digest"),
)

moves = Table(
    "prompt_moves",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("at", Utc, nullable=False),
    Column("principal", String(128), nullable=False),
    Column("collection", String(64), nullable=False),
    Column("previous", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("from_version", String(64), nullable=False),
    Column("to_version", String(64), nullable=False),
    UniqueConstraint("collection", "previous", name="uq_prompt_moves_previous"),
)


class PromptStore:
    """Calls block; every call is a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._templates: dict[str, Template] = {}
        self._moving = threading.Lock()

    # versions

    def add(self, name: str, source: str, principal: str) -> tuple[PromptView, bool]:
        """-> the version, and whether it is new: a content that the name has already is the version that it was.

        Raises InvalidError.
        """
        if not _NAME.fullmatch(name) or _NUMBERED.fullmatch(name) or name in _RESERVED:
            raise InvalidError(
                f"prompt name {name!r} does not fit: small letters, digits and hyphens, a letter first, at most 40, no "
                "number at the end, which is the version's"
            )
        if name in _own_names():
            raise InvalidError(f"{name!r} is graft's own prompt; give yours a name of its own, as 'my-{name}'")
        digest = hashlib.sha256(Template.of(source).model_dump_json().encode()).hexdigest()
        while True:
            with self.engine.connect() as connection:
                held = connection.execute(
                    select(prompts).where(prompts.c.name == name, prompts.c.digest == digest)
                ).mappings().first()  # fmt: skip
                last = connection.execute(select(func.max(prompts.c.number)).where(prompts.c.name == name)).scalar()
            if held:
                return _as_view(held), False
            row = {
                "name": name,
                "number": (last or 0) + 1,
                "digest": digest,
                "source": source,
                "created_at": now(),
                "principal": principal,
            }
            try:
                with self.engine.begin() as connection:
                    connection.execute(insert(prompts).values(**row))
                return _as_view(row), True
            except IntegrityError:
                continue  # somebody else took the number, or added the same: look again

    def versions(self, name: str | None = None) -> list[PromptView]:
        """All, or those of a name, or the one of that version; the product's own first, then by name, oldest first.

        Raises NotFoundError.
        """
        with self.engine.connect() as connection:
            rows = connection.execute(select(prompts).order_by(prompts.c.name, prompts.c.number)).mappings()
            found = [*map(_as_own, built_in_versions()), *map(_as_view, rows)]
        wanted = [one for one in found if name in (None, one.name, one.version)]
        if not wanted:
            raise NotFoundError(f"there is no prompt {name!r}; there are {_listed(found)}")
        return wanted

    def template(self, version: str) -> Template:
        """Raises NotFoundError."""
        if version in built_in_versions():
            return built_in(version)
        if version not in self._templates:
            (view,) = self.versions(version)[:1]
            if view.version != version:
                raise NotFoundError(
                    f"there is no prompt version {version!r}; the newest of that name is {view.version!r}"
                )
            self._templates[version] = Template.of(view.source)
        return self._templates[version]

    def resolved(self, wanted: str) -> str:
        """-> "auto", or the version that a name stands for now: its newest, of the product's own the one that "auto" takes.

        Raises InvalidError, with those that there are.
        """
        if wanted == AUTO or wanted in CURRENT:
            return CURRENT.get(wanted, AUTO)
        try:
            return self.versions(wanted)[-1].version
        except NotFoundError as error:
            raise InvalidError(f"{error}, or 'auto'") from error

    # pointers

    def pointer(self, collection: Collection) -> str:
        """-> "auto" or the version that answers for a collection."""
        with self.engine.connect() as connection:
            last = _last(connection, collection.name)
        return str(last["to_version"]) if last else collection.prompt

    def use(self, collection: Collection, version: str, principal: str) -> PromptMove | None:
        """Moves the pointer; None where it is there already. `version`: as `resolved` gives it."""
        with self._moving:
            if self.pointer(collection) == version:
                return None
            return self._move("use", collection, version, principal)

    def roll_back(self, collection: Collection, principal: str) -> PromptMove:
        """Undoes the last move that was not undone. Raises ConflictError when there is none."""
        with self._moving:
            stack = [collection.prompt]
            for move in self.moves(collection.name):
                if move.kind == "use":
                    stack.append(move.to_version)
                else:
                    stack.pop()
            if len(stack) < 2:
                raise ConflictError(f"no move of the prompt of collection {collection.name!r} is left to roll back")
            return self._move("rollback", collection, stack[-2], principal)

    def moves(self, collection: str) -> list[PromptMove]:
        """Oldest first."""
        query = select(moves).where(moves.c.collection == collection).order_by(moves.c.seq)
        with self.engine.connect() as connection:
            return [_as_move(row) for row in connection.execute(query).mappings()]

    def _move(self, kind: str, collection: Collection, to: str, principal: str) -> PromptMove:
        while True:
            try:
                with self.engine.begin() as connection:
                    last = _last(connection, collection.name)
                    row = {
                        "at": now(),
                        "principal": principal,
                        "collection": collection.name,
                        "previous": last["seq"] if last else 0,
                        "kind": kind,
                        "from_version": last["to_version"] if last else collection.prompt,
                        "to_version": to,
                    }
                    inserted = connection.execute(insert(moves).values(**row)).inserted_primary_key
                    assert inserted is not None
                    return _as_move({**row, "seq": inserted[0]})
            except IntegrityError:
                continue  # another process moved the same pointer first: this move follows that one


def _last(connection: Connection, collection: str) -> RowMapping | None:
    query = select(moves).where(moves.c.collection == collection).order_by(moves.c.seq.desc()).limit(1)
    return connection.execute(query).mappings().first()


def _own_names() -> set[str]:
    return {version.rpartition("-")[0] for version in built_in_versions()}


def _listed(found: list[PromptView]) -> str:
    return ", ".join(one.version for one in found)


def _as_own(version: str) -> PromptView:
    name, _, number = version.rpartition("-")
    return PromptView(version=version, name=name, number=int(number), source=source_of(version), built_in=True)


def _as_view(row: Mapping[Any, Any]) -> PromptView:
    fields = {key: row[key] for key in ("name", "number", "source", "created_at", "principal")}
    return PromptView(version=f"{row['name']}-{row['number']}", built_in=False, **fields)


def _as_move(row: Mapping[Any, Any]) -> PromptMove:
    return PromptMove.model_validate({key: row[key] for key in PromptMove.model_fields})
