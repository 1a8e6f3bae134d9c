"""What was searched for in place of a follow-up question."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("interactions", sa.Column("search", sa.Text(), nullable=True))
