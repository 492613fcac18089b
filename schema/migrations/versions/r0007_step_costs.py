"""What a step of each checkpoint's engine costs beside its KV cache."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("step", sa.Text(), nullable=True))
