"""The first tables: cluster, nodes, checkpoints, placements, models, instances, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: None = None
depends_on: None = None


def _state(name: str, *values: str) -> sa.Enum:
    return sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=16)


def _tier() -> sa.Enum:
    return _state("tier", "remote", "disk", "dram", "device")


def upgrade() -> None:
    op.create_table(
        "cluster",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("uuid", sa.String(36), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("id = 1", name="one_cluster"),
    )
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("state", _state("nodestate", "joining", "ready", "unreachable", "removed"), nullable=False),
        sa.Column("cordoned", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("architecture", sa.String(128), nullable=False),
        sa.Column("image_bytes", sa.BigInteger(), nullable=False),
        sa.Column("kv_token_bytes", sa.BigInteger(), nullable=False),
        sa.Column("max_context_tokens", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "placements",
        sa.Column("digest", sa.String(64), sa.ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("node", sa.String(64), sa.ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("tier", _tier(), primary_key=True),
        sa.Column("device", sa.Integer(), primary_key=True),
        sa.Column("state", _state("tierstate", "absent", "filling", "resident", "evicting", "quarantined"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("state", _state("modelstate", "ingesting", "failed", "stopped", "deployed", "deleting"), nullable=False),
        sa.Column("digest", sa.String(64), sa.ForeignKey("checkpoints.digest")),
        sa.Column("op", sa.String(40)),
        sa.Column("node", sa.String(64), sa.ForeignKey("nodes.id")),
        sa.Column("fault", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("changed_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "instances",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("model", sa.String(64), sa.ForeignKey("models.name"), nullable=False),
        sa.Column("node", sa.String(64), sa.ForeignKey("nodes.id"), nullable=False),
        sa.Column("digest", sa.String(64), sa.ForeignKey("checkpoints.digest"), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column(
            "state",
            _state("instancestate", "planned", "starting", "ready", "draining", "stopping", "backoff", "failed", "stopped"),
            nullable=False,
        ),
        sa.Column("devices", sa.Text(), nullable=False),
        sa.Column("kv_bytes", sa.BigInteger(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("retry_at", sa.Float()),
        sa.Column("fault", sa.Text()),
        sa.Column("phases", sa.Text()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("changed_at", sa.Float(), nullable=False),
    )
    op.create_index("instances_by_model", "instances", ["model"])
    op.create_table(
        "events",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("object", sa.String(128), nullable=False),
        sa.Column("reason", sa.String(48), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
    )
    op.create_index("events_by_object", "events", ["kind", "object"])


def downgrade() -> None:
    for table in ("events", "instances", "models", "placements", "checkpoints", "nodes", "cluster"):
        op.drop_table(table)
