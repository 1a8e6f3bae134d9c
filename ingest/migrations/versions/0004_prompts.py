"""Prompt versions that users add, and the moves of each collection's prompt; what a model had said, and how it was judged."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "prompts",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("name", "number"),
        sa.UniqueConstraint("name", "digest", name="uq_prompts_digest"),
    )
    op.create_table(
        "prompt_moves",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.String(length=128), nullable=False),
        sa.Column("collection", sa.String(length=64), nullable=False),
        sa.Column("previous", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("from_version", sa.String(length=64), nullable=False),
        sa.Column("to_version", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("collection", "previous", name="uq_prompt_moves_previous"),
    )
    op.execute("UPDATE collections SET prompt = prompt || '-1' WHERE prompt IN ('brief', 'cited')")
    op.add_column("interactions", sa.Column("said", sa.Text(), nullable=True))
    op.add_column("interactions", sa.Column("sentences", sa.JSON(), nullable=True))
