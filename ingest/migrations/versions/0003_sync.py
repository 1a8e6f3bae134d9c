"""Documents: labels by where they come from, and a stamp of any source; the indexes that a collection has had."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.alter_column("documents", "mtime_ns", new_column_name="stamp")
    op.add_column("documents", sa.Column("given_acl", sa.JSON(), nullable=True))
    op.add_column("documents", sa.Column("own_acl", sa.JSON(), nullable=True))
    op.add_column("documents", sa.Column("sidecar", sa.JSON(), nullable=True))
    op.execute("UPDATE documents SET given_acl = acl")
    op.create_table(
        "generations",
        sa.Column("collection", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("embedder", sa.String(length=512), nullable=False),
        sa.Column("chunking", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("comparison", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("collection", "fingerprint"),
    )
