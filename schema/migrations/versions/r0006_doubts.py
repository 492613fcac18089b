"""Why a remote is not believed to have a checkpoint any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.add_column("publications", sa.Column("doubt", sa.Text(), nullable=False, server_default=""))
