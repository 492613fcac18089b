"""Whether a model is served as soon as it has been ingested."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.add_column("models", sa.Column("deploy_next", sa.Boolean(), nullable=False, server_default="0"))
