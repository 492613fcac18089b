"""What an instance is promised beside its weights is more than its KV cache."""

from __future__ import annotations

from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.execute("ALTER TABLE instances RENAME COLUMN kv_bytes TO working_bytes")
