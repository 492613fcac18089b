"""Rows for the tests: one of each kind, and events by number."""

from __future__ import annotations

from schema.admin import EventKind, EventView
from schema.errors import Fault
from schema.ids import epoch_of
from schema.link import InstanceTruth, StartPhases
from schema.memory import StepCosts
from schema.spec import ModelSpec, PathSource
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.cluster.changes import PutCheckpoint, PutInstance, PutModel, PutNode, PutPlacement, RowChange

DIGEST = "ab" * 32
STEP = StepCosts(token_bytes=9, layer_kv_bytes=8, item_bytes=2, vocab_size=7, unfused_heads=6, head_bytes=5)
EPOCH = epoch_of(3, 7)


def event(number: int, *, kind: EventKind = "model", name: str = "m") -> EventView:
    return EventView(
        id=f"ev_{number:08d}", at=float(number), level="info", kind=kind, object=name, reason="Said", message=str(number)
    )


def node(*, seen_at: float = 2.0) -> PutNode:
    return PutNode("n1", "local", "unix:/run/a.sock", NodeState.READY, False, 1.0, seen_at)


def whole() -> list[RowChange]:
    """Node, checkpoint, placement, model and instance, each with every optional field set."""
    spec = ModelSpec(name="m", source=PathSource("/models/m"))
    truth = InstanceTruth(
        instance="inst_1",
        epoch=EPOCH,
        digest=DIGEST,
        state=InstanceState.BACKOFF,
        devices=(0, 2),
        phases=StartPhases(load_s=1.5, loaded_from=Tier.DISK, loaded_bytes=9, total_s=2.5),
        fault=Fault("internal", "it broke"),
    )
    return [
        node(),
        PutCheckpoint(DIGEST, "LlamaForCausalLM", 1 << 40, 4096, 8192, 5.0, STEP),
        PutModel(spec, ModelState.DEPLOYED, DIGEST, "op_1", "n1", Fault("timed_out", "slow"), 6.0, 7.0),
        PutPlacement(DIGEST, "n1", Tier.DISK, 0, TierState.RESIDENT, 1 << 40),
        PutInstance(truth, "m", "n1", 1 << 33, 2, 99.5, "why", 8.0, 9.0),
    ]
