"""Rows to and from what the control loop means: statements for its changes, and the view from the tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Executable, bindparam, delete, insert, select
from sqlalchemy.dialects.sqlite import insert as upsert_into

from schema.admin import EventView, OutcomeView
from schema.errors import Fault, InvalidInput
from schema.ids import Epoch
from schema.link import StartPhases
from schema.memory import StepCosts
from schema.spec import ModelSpec
from schema.tables import (
    Base,
    CheckpointRow,
    EstimateRow,
    EventRow,
    InstanceRow,
    ModelRow,
    NodeRow,
    OutcomeRow,
    PinRow,
    PlacementRow,
    PublicationRow,
)
from sllmctl.cluster.changes import (
    PutCheckpoint,
    PutEstimate,
    PutInstance,
    PutModel,
    PutNode,
    PutPin,
    PutPlacement,
    PutPublication,
    RemoveCheckpointRow,
    RemoveInstance,
    RemoveModelRow,
    RemovePin,
    RemovePlacement,
    RemovePublication,
    RowChange,
)
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, PlacementRecord, Publication
from sllmctl.cluster.view import ClusterView

__all__ = ["apply", "read_estimates", "read_view"]


def _upsert(row: type[Base]) -> Executable:
    """Insert, or update all but the key: a REPLACE would delete first and cascade."""
    table = row.__table__
    statement = upsert_into(row).values({column.name: bindparam(column.name) for column in table.columns})
    keys = [column.name for column in table.primary_key]
    rest = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=rest)


_STATEMENTS: dict[type, Executable] = {
    PutNode: _upsert(NodeRow),
    PutCheckpoint: _upsert(CheckpointRow),
    PutPlacement: _upsert(PlacementRow),
    PutModel: _upsert(ModelRow),
    PutInstance: _upsert(InstanceRow),
    PutPin: _upsert(PinRow),
    PutPublication: _upsert(PublicationRow),
    PutEstimate: _upsert(EstimateRow),
    EventView: insert(EventRow),
    OutcomeView: insert(OutcomeRow),
    RemoveInstance: delete(InstanceRow).where(InstanceRow.id == bindparam("id_")),
    RemoveModelRow: delete(ModelRow).where(ModelRow.name == bindparam("name_")),
    RemoveCheckpointRow: delete(CheckpointRow).where(CheckpointRow.digest == bindparam("digest_")),
    RemovePin: delete(PinRow).where(
        PinRow.digest == bindparam("digest_"), PinRow.node == bindparam("node_"), PinRow.tier == bindparam("tier_")
    ),
    RemovePublication: delete(PublicationRow).where(
        PublicationRow.digest == bindparam("digest_"), PublicationRow.url == bindparam("url_")
    ),
    RemovePlacement: delete(PlacementRow).where(
        PlacementRow.digest == bindparam("digest_"),
        PlacementRow.node == bindparam("node_"),
        PlacementRow.tier == bindparam("tier_"),
        PlacementRow.device == bindparam("device_"),
    ),
}


def apply(connection: Connection, changes: Sequence[RowChange]) -> None:
    """Write the changes in order; neighbours of one kind share a statement."""
    for kind, group in groupby(changes, type):
        connection.execute(_STATEMENTS[kind], [_values(change) for change in group])


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _values(change: RowChange) -> dict[str, Any]:
    match change:
        case PutModel():
            return {
                "name": change.spec.name,
                "spec": _json(change.spec),
                "state": change.state,
                "digest": change.digest,
                "op": change.op,
                "node": change.node,
                "fault": _json(change.fault),
                "created_at": change.created_at,
                "changed_at": change.changed_at,
                "deploy_next": change.deploy_next,
            }
        case PutInstance():
            truth = change.truth
            return {
                "id": truth.instance,
                "model": change.model,
                "node": change.node,
                "digest": truth.digest,
                "epoch": truth.epoch,
                "state": truth.state,
                "devices": _json(truth.devices),
                "working_bytes": change.working_bytes,
                "restarts": change.restarts,
                "retry_at": change.retry_at,
                "fault": _json(truth.fault),
                "phases": _json(truth.phases),
                "reason": change.reason,
                "created_at": change.created_at,
                "changed_at": change.changed_at,
            }
        case PutCheckpoint():
            return {name: getattr(change, name) for name in change.__slots__} | {"step": _json(change.step)}
        case RemoveInstance():
            return {"id_": change.id}
        case RemoveModelRow():
            return {"name_": change.name}
        case RemoveCheckpointRow():
            return {"digest_": change.digest}
        case RemovePublication():
            return {"digest_": change.digest, "url_": change.url}
        case RemovePin():
            return {"digest_": change.digest, "node_": change.node, "tier_": change.tier}
        case RemovePlacement():
            return {"digest_": change.digest, "node_": change.node, "tier_": change.tier, "device_": change.device}
        case PutEstimate():
            return {"key": change.key, "samples": _json(change.samples), "changed_at": change.changed_at}
        case EventView() | OutcomeView():
            return msgspec.structs.asdict(change)
        case _:
            return {name: getattr(change, name) for name in change.__slots__}


_T = TypeVar("_T")

_samples = msgspec.json.Decoder(tuple[float, ...])
_devices = msgspec.json.Decoder(tuple[int, ...])
_faults = msgspec.json.Decoder(Fault)
_phases = msgspec.json.Decoder(StartPhases)
_steps = msgspec.json.Decoder(StepCosts)
_specs = msgspec.json.Decoder(ModelSpec)


def _decoded(decoder: msgspec.json.Decoder[_T], text: str, whose: str) -> _T:
    """What was written as JSON; ``whose`` says by which row. A build that knows more may have written it."""
    try:
        return decoder.decode(text)
    except msgspec.DecodeError as error:
        raise InvalidInput(
            f"this build cannot read what the database holds of {whose}: {error}; "
            "run the sllmctl that wrote it, or restore a backup",
            "database_url",
        ) from error


def read_view(connection: Connection) -> ClusterView:
    """The whole cluster as it was last committed. Raises InvalidInput for rows that this build cannot read."""
    view = ClusterView()
    for row in connection.execute(select(*NodeRow.__table__.columns)).mappings():
        view.add_node(Node(**row))
    for row in connection.execute(select(*CheckpointRow.__table__.columns)).mappings():
        step = None if row["step"] is None else _decoded(_steps, row["step"], f"checkpoint {row['digest'][:12]}")
        view.add_checkpoint(Checkpoint(**{**row, "step": step}))
    for row in connection.execute(select(*PinRow.__table__.columns)).mappings():
        view.add_pin((row["digest"], row["node"], row["tier"]), row["created_at"])
    for row in connection.execute(select(*PublicationRow.__table__.columns)).mappings():
        view.put_publication(Publication(**row))
    for row in connection.execute(select(*PlacementRow.__table__.columns)).mappings():
        view.put_placement(PlacementRecord(**row))
    for row in connection.execute(select(*ModelRow.__table__.columns).order_by(ModelRow.name)).mappings():
        whose = f"model {row['name']}"
        fault = None if row["fault"] is None else _decoded(_faults, row["fault"], whose)
        rest = {key: row[key] for key in ("state", "digest", "op", "node", "created_at", "changed_at", "deploy_next")}
        view.add_model(Model(spec=_decoded(_specs, row["spec"], whose), fault=fault, **rest))
    for row in connection.execute(select(*InstanceRow.__table__.columns).order_by(InstanceRow.id)).mappings():
        values, whose = dict(row), f"instance {row['id']}"
        values["epoch"] = Epoch(values["epoch"])
        values["devices"] = _decoded(_devices, values["devices"], whose)
        values["fault"] = None if values["fault"] is None else _decoded(_faults, values["fault"], whose)
        values["phases"] = None if values["phases"] is None else _decoded(_phases, values["phases"], whose)
        view.add_instance(Instance(**values))
    return view


def read_estimates(connection: Connection) -> list[PutEstimate]:
    """The coefficients as they were last committed. Raises InvalidInput as `read_view`."""
    query = select(*EstimateRow.__table__.columns).order_by(EstimateRow.key)
    return [
        PutEstimate(row["key"], _decoded(_samples, row["samples"], f"estimate {row['key']}"), row["changed_at"])
        for row in connection.execute(query).mappings()
    ]
