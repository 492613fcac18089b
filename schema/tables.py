"""What must survive a restart, as SQLAlchemy tables. Only sllmctl.state speaks SQL; Alembic's migrations lie beside this.

Times are seconds of the Unix clock. Epochs are the integers of schema.ids. Structs (specs, faults, phases) are stored as
JSON text, encoded and decoded by sllmctl.state alone. Telemetry and token counts are not here: they stay in memory.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Enum, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from schema.states import InstanceState, ModelState, NodeState, Tier, TierState

__all__ = [
    "Base",
    "CheckpointRow",
    "ClusterRow",
    "EstimateRow",
    "EventRow",
    "InstanceRow",
    "ModelRow",
    "NodeRow",
    "OutcomeRow",
    "PinRow",
    "PlacementRow",
    "PublicationRow",
]


def _enum(kind: type) -> Enum:
    """States are stored by value as text with a CHECK, so that a database can be read with any SQLite shell."""
    return Enum(kind, native_enum=False, create_constraint=True, length=16, values_callable=lambda e: [m.value for m in e])


class Base(DeclarativeBase):
    pass


class ClusterRow(Base):
    """The one row of a cluster: who it is, and the manager generation, incremented at every start before anything else."""

    __tablename__ = "cluster"
    __table_args__ = (CheckConstraint("id = 1", name="one_cluster"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, default=1)
    uuid: Mapped[str] = mapped_column(String(36))
    generation: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Float)


class NodeRow(Base):
    """A machine with an agent, which takes ``id`` as its own when it is first dialled. ``address`` is a socket path
    (``unix:/...``); host keys and SSH settings join it later."""

    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    address: Mapped[str] = mapped_column(Text)
    state: Mapped[NodeState] = mapped_column(_enum(NodeState))
    cordoned: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float, default=0.0)


class CheckpointRow(Base):
    """A checkpoint the cluster knows, by digest; manifest and text assets lie as files in the manager's state directory.

    The row goes only when no node holds the checkpoint any more, it lies on no remote, and no model uses it.
    """

    __tablename__ = "checkpoints"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    architecture: Mapped[str] = mapped_column(String(128))
    image_bytes: Mapped[int] = mapped_column(BigInteger)
    kv_token_bytes: Mapped[int] = mapped_column(BigInteger)
    max_context_tokens: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Float)
    step: Mapped[str | None] = mapped_column(Text, default=None)


class PlacementRow(Base):
    """A checkpoint on one tier of one node; ``device`` is 0 but on the device tier. ``used_at``: when it came, or when an
    instance or a load last began from it."""

    __tablename__ = "placements"

    digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True)
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True)
    tier: Mapped[Tier] = mapped_column(_enum(Tier), primary_key=True)
    device: Mapped[int] = mapped_column(Integer, primary_key=True, default=0)
    state: Mapped[TierState] = mapped_column(_enum(TierState))
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    used_at: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")


class PinRow(Base):
    """An operator keeps a checkpoint on a tier of a node: there it is never put out to make room."""

    __tablename__ = "pins"

    digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True)
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True)
    tier: Mapped[Tier] = mapped_column(_enum(Tier), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)


class PublicationRow(Base):
    """A checkpoint lies on the remote at ``url``, in this layout, unless there is a ``doubt``. Credentials are the nodes' own,
    never here."""

    __tablename__ = "publications"

    digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True)
    url: Mapped[str] = mapped_column(Text, primary_key=True)
    layout: Mapped[str] = mapped_column(String(128))
    published_at: Mapped[float] = mapped_column(Float)
    doubt: Mapped[str] = mapped_column(Text, default="")


class ModelRow(Base):
    """A model under its deployed name: its spec (JSON of schema.spec.ModelSpec), the checkpoint once ingested, its state.

    While it is being ingested, ``op`` and ``node`` say by which operation and where; ``deploy_next``: then it is served.
    """

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    spec: Mapped[str] = mapped_column(Text)
    state: Mapped[ModelState] = mapped_column(_enum(ModelState))
    digest: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.digest"), default=None)
    op: Mapped[str | None] = mapped_column(String(40), default=None)
    node: Mapped[str | None] = mapped_column(ForeignKey("nodes.id"), default=None)
    fault: Mapped[str | None] = mapped_column(Text, default=None)
    created_at: Mapped[float] = mapped_column(Float)
    changed_at: Mapped[float] = mapped_column(Float)
    deploy_next: Mapped[bool] = mapped_column(default=False, server_default="0")


class InstanceRow(Base):
    """A replica. Its row is written, as starting, before its node is told, and is deleted when it has stopped."""

    __tablename__ = "instances"
    __table_args__ = (Index("instances_by_model", "model"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"))
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id"))
    digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest"))
    epoch: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[InstanceState] = mapped_column(_enum(InstanceState))
    devices: Mapped[str] = mapped_column(Text)
    working_bytes: Mapped[int] = mapped_column(BigInteger)
    restarts: Mapped[int] = mapped_column(Integer, default=0)
    retry_at: Mapped[float | None] = mapped_column(Float, default=None)
    fault: Mapped[str | None] = mapped_column(Text, default=None)
    phases: Mapped[str | None] = mapped_column(Text, default=None)
    reason: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[float] = mapped_column(Float)
    changed_at: Mapped[float] = mapped_column(Float)


class EventRow(Base):
    """What happened, for people: one line, about one object. Old ones are cut by count."""

    __tablename__ = "events"
    __table_args__ = (Index("events_by_object", "kind", "object"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    level: Mapped[str] = mapped_column(String(8))
    kind: Mapped[str] = mapped_column(String(16))
    object: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(String(48))
    message: Mapped[str] = mapped_column(Text)


class EstimateRow(Base):
    """A coefficient that the planner has learned: its latest observations (JSON), newest last."""

    __tablename__ = "estimates"

    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    samples: Mapped[str] = mapped_column(Text)
    changed_at: Mapped[float] = mapped_column(Float)


class OutcomeRow(Base):
    """An estimate beside what happened. Old ones are cut by count."""

    __tablename__ = "outcomes"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(String(64))
    node: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(16))
    estimated_s: Mapped[float] = mapped_column(Float)
    actual_s: Mapped[float] = mapped_column(Float)
