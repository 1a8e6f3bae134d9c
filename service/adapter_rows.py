"""What is kept of adapters: versions, the moves of their pointers, and whether a version is known to answer as it was trained."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import JSON, BigInteger, Column, Integer, String, Table, Text, UniqueConstraint

from ingest.db import Utc, metadata
from ingest.schemas import Frozen
from service.schemas_adapters import Checked, Standing

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("label", String(64), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("created_at", Utc, nullable=False),
    Column("principal", String(128), nullable=False),
    Column("base", String(512), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("target_modules", JSON, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("config", JSON, nullable=False),
    Column("manifest", JSON),
    Column("retired_at", Utc),
)

moves = Table(
    "adapter_moves",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("at", Utc, nullable=False),
    Column("principal", String(128), nullable=False),
    Column("role", String(32), nullable=False),
    Column("collection", String(64), nullable=False),
    Column("previous", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("from_name", String(128)),
    Column("to_name", String(128)),
    Column("why", Text),
    UniqueConstraint("role", "collection", "previous", name="uq_adapter_moves_previous"),
)


class Adapter(Frozen):
    """A registered LoRA. `base`: the identity of the model that it was checked against; `size` in bytes."""

    name: str
    label: str
    digest: str
    created_at: datetime
    principal: str
    base: str
    rank: int
    target_modules: tuple[str, ...]
    size: int
    config: dict[str, Any]
    manifest: dict[str, Any] | None = None
    retired_at: datetime | None = None

    # A manifest is whatever lay in the folder: what does not fit is not there.

    @property
    def parent(self) -> str | None:
        return _text((self.manifest or {}).get("parent"))

    @property
    def prompt_version(self) -> str | None:
        """That it was trained with."""
        return _text((self.manifest or {}).get("prompt_version"))

    @property
    def languages(self) -> tuple[str, ...]:
        """That it was trained in."""
        held = (self.manifest or {}).get("languages")
        return tuple(held) if isinstance(held, list) and all(isinstance(one, str) for one in held) else ()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def standing(manifest: Mapping[str, Any] | None, digest: str) -> Standing | None:
    """Of the adapter `digest`: what a check of just these weights, configuration and base found; None for one that another
    tool made and nobody checked, which goes by its preflight alone.
    """
    manifest = manifest or {}
    try:
        checked = Checked.model_validate(manifest.get("checked"))
    except ValidationError:
        checked = None
    if checked and checked.digest == digest:
        return "passed" if checked.passed else "failed"
    return "no" if manifest.get("made_by") == "graft" else None
