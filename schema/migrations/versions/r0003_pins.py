"""What operators keep on a tier, and when each placement was last used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    tiers = sa.Enum("remote", "disk", "dram", "device", name="tier", native_enum=False, create_constraint=True, length=16)
    op.create_table(
        "pins",
        sa.Column("digest", sa.String(64), sa.ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("node", sa.String(64), sa.ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("tier", tiers, primary_key=True),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.add_column("placements", sa.Column("used_at", sa.Float(), nullable=False, server_default="0"))
