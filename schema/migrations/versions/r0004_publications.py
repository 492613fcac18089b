"""Which checkpoints lie on which remotes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.create_table(
        "publications",
        sa.Column("digest", sa.String(64), sa.ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("url", sa.Text(), primary_key=True),
        sa.Column("layout", sa.String(128), nullable=False),
        sa.Column("published_at", sa.Float(), nullable=False),
    )
