"""Adapters and the moves of their pointers; a collection's own adapter becomes a pointer."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.String(length=128), nullable=False),
        sa.Column("base", sa.String(length=512), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("target_modules", sa.JSON(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=True),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("digest"),
    )
    moves = op.create_table(
        "adapter_moves",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.String(length=128), nullable=False),
        sa.Column("role", sa.String(length=32), nullable=False),
        sa.Column("collection", sa.String(length=64), nullable=False),
        sa.Column("previous", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("from_name", sa.String(length=128), nullable=True),
        sa.Column("to_name", sa.String(length=128), nullable=True),
        sa.Column("why", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("role", "collection", "previous", name="uq_adapter_moves_previous"),
    )
    pinned = sa.text("SELECT name, adapter FROM collections WHERE adapter IS NOT NULL")
    for row in op.get_bind().execute(pinned).all():
        move = {
            "at": datetime.now(UTC),
            "principal": "migration",
            "role": "answer",
            "collection": row.name,
            "previous": 0,
            "kind": "activate",
            "from_name": None,
            "to_name": row.adapter,
            "why": "named by the collection's settings",
        }
        op.execute(sa.insert(moves).values(**move))
    op.drop_column("collections", "adapter")
