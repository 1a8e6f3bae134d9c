"""The adapter registry: immutable versions, one movable pointer for each collection and one for all others.

An adapter's name carries a hash of its weights, configuration and base, and never comes back for another: the engine's
prefix cache is keyed by it. The pointer is the last of its moves, which are only ever appended. Knows nothing of the engine.
"""

import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ingest.catalog import now
from ingest.errors import ConflictError, InvalidError, NotFoundError, SettingsError, UnavailableError
from service.adapter_rows import Adapter as Adapter
from service.adapter_rows import adapters, moves
from service.adapter_rows import standing as standing
from service.base_model import BaseModel
from service.preflight import CONFIG, Limits, take_in, write_config
from service.schemas_adapters import Checked, Move

ALL = ""  # the pointer that every collection without one of its own follows
PROBE_LABEL = "graft-probe"  # of the adapters that an engine is tried with
CHECK_LABEL = "graft-check"  # of those that are compared with PEFT before they are registered
PRODUCT = "graft"  # who registers the adapter that comes with the product


class Registry:
    """Calls block. `folder` is the one that the engine's resolver reads: a registered adapter is a folder of its name."""

    def __init__(self, engine: Engine, folder: Path, at_most: int) -> None:
        self.engine = engine
        self.folder = folder
        self.at_most = at_most
        self._changing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"SERVICE_ADAPTER_FOLDER {str(folder)!r} cannot be made: {error.strerror}") from error
        for unfinished in folder.glob(".staging-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def register(
        self, source: Path, label: str, base: BaseModel, limits: Limits, principal: str
    ) -> tuple[Adapter, bool]:
        """-> the adapter, and whether it is new here. The same weights, configuration and base are one adapter.

        Raises AdapterRefusedError, ConflictError (no room), UnavailableError (the copy could not be written).
        """
        staging = self.folder / f".staging-{uuid.uuid4()}"
        try:
            staging.mkdir()
            found = take_in(source, staging, base, limits)
            with self._changing:
                held = self._by_digest(found.digest)
                if held and not held.retired_at:
                    return self._checked_since(held, found.manifest), False
                if len(self.adapters()) >= self.at_most:
                    raise ConflictError(
                        f"{self.at_most} adapters are registered, as many as SERVICE_MAX_CPU_LORAS lets the engine hold; "
                        "delete one first"
                    )
                name = held.name if held else self._free_name(f"{label}-{found.digest[:8]}")
                self._place(staging, name)
                write_config(self.folder / name, found.config, base.root)
                if held:
                    return self._revived(held, found.manifest, principal), True
                adapter = Adapter(
                    name=name,
                    label=label,
                    digest=found.digest,
                    created_at=now(),
                    principal=principal,
                    base=base.identity,
                    rank=found.rank,
                    target_modules=found.target_modules,
                    size=found.size,
                    config=found.config,
                    manifest=found.manifest,
                )
                with self.engine.begin() as connection:
                    connection.execute(insert(adapters).values(**adapter.model_dump()))
                return adapter, True
        except OSError as error:
            raise UnavailableError(
                f"the adapter could not be copied to {str(self.folder)!r}: {error.strerror}"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def adapter(self, name: str) -> Adapter:
        """Raises NotFoundError, also for a retired one."""
        with self.engine.connect() as connection:
            row = _row(connection, name)
        if row is None or row["retired_at"]:
            raise NotFoundError(f"there is no adapter {name!r}")
        return Adapter.model_validate(dict(row))

    def adapters(self) -> list[Adapter]:
        """Those not retired, oldest first."""
        query = select(adapters).where(adapters.c.retired_at.is_(None)).order_by(adapters.c.created_at)
        with self.engine.connect() as connection:
            return [Adapter.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def retire(self, name: str) -> None:
        """The name stops at once; the folder stays until `purge`. Raises NotFoundError, ConflictError (in use)."""
        with self._changing:
            self.adapter(name)
            pointed = [collection for collection, to in self.pointers().items() if to == name]
            if pointed:
                where = ", ".join(f"collection {one!r}" if one else "all collections" for one in pointed)
                raise ConflictError(f"adapter {name!r} answers for {where}; activate another or roll back first")
            with self.engine.begin() as connection:
                connection.execute(update(adapters).where(adapters.c.name == name).values(retired_at=now()))

    def purge(self) -> list[str]:
        """Removes the folders of retired adapters, and of checks that were broken off. Only while no engine runs: one that
        was told of a folder needs it.

        -> the names.
        """
        query = select(adapters.c.name).where(adapters.c.retired_at.is_not(None))
        with self._changing, self.engine.connect() as connection:
            gone = [name for name in connection.execute(query).scalars() if (self.folder / name).is_dir()]
            gone += [left.name for left in self.folder.glob(f"{CHECK_LABEL}-*")]
            for name in gone:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        return gone

    def pointers(self) -> dict[str, str | None]:
        """-> by collection (ALL for the live one), the adapter that its pointer names."""
        last = select(func.max(moves.c.seq)).group_by(moves.c.role, moves.c.collection)
        query = select(moves.c.collection, moves.c.to_name).where(moves.c.seq.in_(last))
        with self.engine.connect() as connection:
            return {row.collection: row.to_name for row in connection.execute(query)}

    def chosen(self, collection: str) -> Adapter | None:
        """The adapter that answers for a collection: its own, else the live one; None is the bare base.

        Raises UnavailableError when the pointer names one that was never registered.
        """
        with self.engine.connect() as connection:
            own = _last(connection, collection)
            name = own["to_name"] if own and own["to_name"] else None
            if name is None:
                live = _last(connection, ALL)
                name = live["to_name"] if live else None
            row = _row(connection, name) if name else None
        if name and row is None:
            raise UnavailableError(f"adapter {name!r} is not registered; register it, or activate another")
        return Adapter.model_validate(dict(row)) if row else None

    def activate(self, name: str | None, collection: str, principal: str, why: str | None) -> Move:
        """Moves a pointer; `collection` ALL is the live one, None for `name` the bare base. Raises as `trusted`."""
        with self._changing:
            if name is not None:
                self.trusted(name)
            return self._move("activate", name, collection, principal, why)

    def trusted(self, name: str) -> Adapter:
        """The adapter, if it may be made to answer. Raises NotFoundError, ConflictError: one of ours needs a passed check."""
        adapter = self.adapter(name)
        found = standing(adapter.manifest, adapter.digest)
        if found == "no":
            raise ConflictError(
                f"adapter {name!r} has not been compared with PEFT: run `graft check {name}`, and activate it then"
            )
        if found == "failed":
            raise ConflictError(
                f"adapter {name!r} has failed its check: in the engine it does not answer as it was trained; `graft check "
                f"{name}` says why"
            )
        return adapter

    def record_check(self, name: str, checked: Checked) -> Adapter:
        """Raises NotFoundError; ConflictError where other weights, or another configuration, were checked."""
        with self._changing:
            adapter = self.adapter(name)
            if checked.digest != adapter.digest:
                raise ConflictError(
                    f"the check is of {checked.digest!r}, and adapter {name!r} is {adapter.digest!r}: check it by its name"
                )
            return self._with_manifest(
                adapter, {**(adapter.manifest or {}), "checked": checked.model_dump(mode="json")}
            )

    def untouched(self) -> bool:
        """Whether nobody but the product has ever registered or moved anything here."""
        others = select(adapters.c.name).where((adapters.c.principal != PRODUCT) | adapters.c.retired_at.is_not(None))
        with self.engine.connect() as connection:
            return not any(connection.execute(one.limit(1)).first() for one in (others, select(moves.c.seq)))

    def roll_back(self, collection: str, principal: str, why: str | None) -> Move:
        """Undoes the last activation that was not rolled back. Raises ConflictError when there is none."""
        with self._changing:
            return self._move("rollback", self.before(collection), collection, principal, why)

    def before(self, collection: str) -> str | None:
        """Where a roll-back leads: the adapter before the current one that still exists. Raises ConflictError."""
        living = {adapter.name for adapter in self.adapters()}
        stack: list[str | None] = [None]
        for move in self.moves(collection):
            if move.kind == "rollback":
                while len(stack) > 1 and stack[-1] != move.to_name:
                    stack.pop()
            elif stack[-1] != move.to_name:
                stack.append(move.to_name)
        current = stack.pop()
        while stack and (stack[-1] == current or not (stack[-1] is None or stack[-1] in living)):
            stack.pop()
        if not stack:
            raise ConflictError("no activation is left to roll back")
        return stack[-1]

    def moves(self, collection: str | None = None) -> list[Move]:
        """Of one pointer or of all, oldest first."""
        query = select(moves).order_by(moves.c.seq)
        if collection is not None:
            query = query.where(moves.c.collection == collection)
        with self.engine.connect() as connection:
            return [_as_move(row) for row in connection.execute(query).mappings()]

    def restate_base(self, base: BaseModel) -> None:
        """Writes the engine's present name of the base into every copy made for it; the resolver compares it."""
        for adapter in self.adapters():
            if adapter.base == base.identity and (self.folder / adapter.name).is_dir():
                write_config(self.folder / adapter.name, adapter.config, base.root)

    def _move(self, kind: str, to: str | None, collection: str, principal: str, why: str | None) -> Move:
        while True:
            try:
                with self.engine.begin() as connection:
                    last = _last(connection, collection)
                    row = {
                        "at": now(),
                        "principal": principal,
                        "role": "answer",
                        "collection": collection,
                        "previous": last["seq"] if last else 0,
                        "kind": kind,
                        "from_name": last["to_name"] if last else None,
                        "to_name": to,
                        "why": why,
                    }
                    inserted = connection.execute(insert(moves).values(**row)).inserted_primary_key
                    assert inserted is not None
                    return _as_move({**row, "seq": inserted[0]})
            except IntegrityError:
                continue  # another process moved the same pointer first: this move follows that one

    def _free_name(self, name: str) -> str:
        """Raises InvalidError."""
        with self.engine.connect() as connection:
            if _row(connection, name):
                raise InvalidError(f"the name {name!r} stands for other weights; choose another label")
        return name

    def _place(self, staging: Path, name: str) -> None:
        """The folder of a name holds the weights that the name stands for, or is not there."""
        target = self.folder / name
        if (target / CONFIG).is_file():
            return
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)

    def _revived(self, held: Adapter, manifest: dict[str, Any] | None, principal: str) -> Adapter:
        values = {"retired_at": None, "created_at": now(), "principal": principal, "manifest": manifest}
        with self.engine.begin() as connection:
            connection.execute(update(adapters).where(adapters.c.name == held.name).values(**values))
        return held.model_copy(update=values)

    def _checked_since(self, held: Adapter, manifest: dict[str, Any] | None) -> Adapter:
        """With the check that a folder brings which was registered before it was checked."""
        if standing(manifest, held.digest) in {None, "no"} or standing(held.manifest, held.digest) == "passed":
            return held
        assert manifest is not None
        return self._with_manifest(held, {**(held.manifest or {}), "checked": manifest["checked"]})

    def _with_manifest(self, adapter: Adapter, manifest: dict[str, Any]) -> Adapter:
        with self.engine.begin() as connection:
            connection.execute(update(adapters).where(adapters.c.name == adapter.name).values(manifest=manifest))
        return adapter.model_copy(update={"manifest": manifest})

    def _by_digest(self, digest: str) -> Adapter | None:
        with self.engine.connect() as connection:
            row = connection.execute(select(adapters).where(adapters.c.digest == digest)).mappings().first()
        return Adapter.model_validate(dict(row)) if row else None


def pinned(pointers: dict[str, str | None], name: str) -> Sequence[str]:
    """The collections that have an adapter of their own, this one."""
    return [collection for collection, to in pointers.items() if collection and to == name]


def _row(connection: Connection, name: str) -> RowMapping | None:
    return connection.execute(select(adapters).where(adapters.c.name == name)).mappings().first()


def _last(connection: Connection, collection: str) -> RowMapping | None:
    query = select(moves).where(moves.c.role == "answer", moves.c.collection == collection)
    return connection.execute(query.order_by(moves.c.seq.desc()).limit(1)).mappings().first()


def _as_move(row: Mapping[Any, Any]) -> Move:
    return Move.model_validate({key: row[key] for key in Move.model_fields} | {"collection": row["collection"] or None})
