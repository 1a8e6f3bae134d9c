"""What training jobs say of themselves, and the worker processes that do them."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    for name in ("tuning", "curve", "waiting", "result"):
        op.add_column("jobs", sa.Column(name, sa.JSON(none_as_null=True), nullable=True))
    op.create_table(
        "workers",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("queue", sa.String(32), nullable=False),
        sa.Column("host", sa.String(200), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("started", sa.Float, nullable=False),
        sa.Column("beat", sa.DateTime(timezone=True), nullable=False),
    )
