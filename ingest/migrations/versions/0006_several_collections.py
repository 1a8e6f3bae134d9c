"""All collections that a question was asked of."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("interactions", sa.Column("collections", sa.JSON(none_as_null=True), nullable=True))
