"""Deployed names: registered and ingested, served, served no more, forgotten; and checkpoints on their way out."""

from __future__ import annotations

import msgspec

from schema.errors import Conflict, Fault, InvalidInput, NotFound
from schema.link import CancelOperation, Ingest, OperationDone, OperationsAcked
from schema.spec import ModelSpec, PathSource, ScaleSpec, check_spec
from schema.states import ModelState, NodeState, Tier, can_become
from sllmctl.cluster.records import Model, Node
from sllmctl.control import disk, drops, instances, operations, prefetch, retrying
from sllmctl.control.effects import ModelChanged, RejectWaiting
from sllmctl.control.events import AddModel, DeployModel, RemoveModel, StopModel
from sllmctl.control.references import missing
from sllmctl.control.turn import Left, Turn
from sllmctl.planner.memory import context_tokens

__all__ = [
    "add",
    "check",
    "deploy",
    "finish_ingest",
    "finish_removal",
    "forget_checkpoint",
    "ingest_node",
    "let_go",
    "operation_done",
    "remove",
    "say",
    "stop",
]

_M = ModelState
_MAKE_ROOM = 3
"""So often room is made on a disk for one ingest, in case others take it."""


def say(turn: Turn, model: Model) -> None:
    """Tell the router how a model stands."""
    checkpoint = turn.view.checkpoints.get(model.digest) if model.digest is not None else None
    context = context_tokens(model.spec, checkpoint) if checkpoint is not None else 0
    turn.do(ModelChanged(model.name, model.spec, model.state, model.digest, context))


def _move(turn: Turn, model: Model, state: ModelState) -> None:
    assert can_become(model.state, state), f"model {model.name}: {model.state} cannot become {state}"
    model.state = state
    turn.put_model(model)


def _known(turn: Turn, name: str) -> Model:
    model = turn.view.models.get(name)
    if model is None:
        raise missing("model", name, turn.view.models)
    return model


# --- registering and ingesting ---


def add(turn: Turn, event: AddModel) -> None:
    """Register a model, or try a failed ingest again. Raises Conflict for a name that is taken, NotFound for its node."""
    spec = check_spec(event.spec)
    model = turn.view.models.get(spec.name)
    if model is not None and model.state is not _M.FAILED:
        raise Conflict(f"model {spec.name!r} exists already ({model.state.value}); {_instead(turn, model)}")
    node = ingest_node(turn, spec)
    op = turn.core.ids("op")
    if model is None:
        model = Model(spec, _M.INGESTING, None, op, node.id, None, turn.now, turn.now, deploy_next=event.deploy)
        turn.view.add_model(model)
        turn.put_model(model)
    else:
        model.spec, model.fault, model.ingested, model.made_room, model.deploy_next = spec, None, None, 0, event.deploy
        turn.view.set_operation(model, op, node.id)
        _move(turn, model, _M.INGESTING)
    turn.wake("model", model.name, turn.now + turn.settings.ingest_timeout_s)
    away = "" if node.state is NodeState.READY else f", once that is ready; it is {node.state.value}"
    turn.event("model", model.name, "Ingesting", f"on node {node.name}{away}")
    say(turn, model)
    turn.send(node.id, Ingest(op=op, source=spec.source))


def _instead(turn: Turn, model: Model) -> str:
    """What to do with a model that is there, where somebody wanted to add it."""
    view, digest = turn.view, model.digest
    if digest is not None and not view.nodes_with(digest, Tier.DISK) and not view.is_published(digest):
        return (
            "no disk has a sound copy of it: remove it and add it again, or add its source by another name, "
            "which makes the same checkpoint if the source is as it was"
        )
    serve = f"serve it by `sllmctl model deploy {model.name}`, " if model.state is _M.STOPPED else ""
    return f"{serve}remove it first or choose another name"


def ingest_node(turn: Turn, spec: ModelSpec) -> Node:
    """The node on which a source lies; for one that is fetched any that is connected, the local one first. Raises NotFound."""
    name = spec.source.node if isinstance(spec.source, PathSource) else None
    nodes = [node for node in turn.view.nodes.values() if node.state is not NodeState.REMOVED]
    local = turn.settings.local_node
    if name is not None:
        wanted = name or local
        found = next((node for node in nodes if node.name == wanted), None)
        if found is None:
            raise NotFound(f"there is no node {wanted!r} to read the source on")
        return found
    nodes.sort(key=lambda node: (node.cordoned, node.state is not NodeState.READY, node.name != local, node.id))
    if not nodes:
        raise NotFound("there is no node to fetch the source to; add one first")
    return nodes[0]


def operation_done(turn: Turn, node: str, done: OperationDone) -> None:
    """An operation has ended: take its result in, and let the node forget it once that is durable."""
    model = turn.view.model_of_op(done.op)
    asked = operations.done(turn, done)
    if drops.done(turn, done.op, done) or prefetch.done(turn, done.op) or asked:
        pass
    elif model is not None and model.state is _M.INGESTING:
        if done.fault is None and done.digest not in turn.view.checkpoints:
            model.ingested = done.digest
            return
        if done.fault is not None and done.fault.short_bytes and _ingest_again(turn, model, node, done.fault):
            turn.send(node, OperationsAcked(ops=(done.op,)))
            return
        _ingested(turn, model, done.digest, done.fault)
    elif model is not None or turn.core.left.pop(done.op, None) is not None:
        if model is not None:
            turn.view.set_operation(model, None, None)
            turn.put_model(model)
            finish_removal(turn, model)
        if done.fault is None and not turn.view.placements_at(done.digest, node):
            turn.core.leave(done.op, Left(node, done.digest))
            return
        if done.fault is None:
            forget_checkpoint(turn, done.digest)
    turn.send(node, OperationsAcked(ops=(done.op,)))


def finish_ingest(turn: Turn, node: str, digest: str) -> None:
    """A checkpoint became known; an ingest that ended before it was stated is complete now."""
    ops = [model.op for model in turn.view.operating_on(node) if model.ingested == digest and model.op is not None]
    for op in ops + [op for op, left in turn.core.left.items() if left == Left(node, digest)]:
        operation_done(turn, node, OperationDone(op=op, digest=digest))


def _ingest_again(turn: Turn, model: Model, node: str, fault: Fault) -> bool:
    """An ingest would have passed the disk's budget: try again without what can be had again, if that will do."""
    if model.made_room >= _MAKE_ROOM or turn.view.nodes[node].state is not NodeState.READY:
        return False
    if not disk.make_room(turn, node, fault.short_bytes, f"model {model.name}"):
        return False
    model.made_room += 1
    op = turn.core.ids("op")
    turn.view.set_operation(model, op, node)
    turn.put_model(model)
    turn.send(node, Ingest(op=op, source=model.spec.source))
    return True


def _ingested(turn: Turn, model: Model, digest: str, fault: Fault | None) -> None:
    turn.view.set_operation(model, None, None)
    model.fault, model.ingested = fault, None
    if fault is None:
        turn.view.set_digest(model, digest)
        _move(turn, model, _M.STOPPED)
        turn.event("model", model.name, "Ingested", f"checkpoint {digest[:12]}")
        if model.deploy_next:
            _serve(turn, model, None)
            return
    else:
        _move(turn, model, _M.FAILED)
        turn.event("model", model.name, "IngestFailed", fault.message, level="error")
    say(turn, model)


def check(turn: Turn, model: Model) -> None:
    """A time asked for has come: give up an ingest that takes too long."""
    if model.state is not _M.INGESTING:
        return
    at = model.changed_at + turn.settings.ingest_timeout_s
    if at > turn.now:
        turn.wake("model", model.name, at)
        return
    if model.op is not None and model.node is not None:
        turn.send(model.node, CancelOperation(op=model.op))
        _leave(turn, model)
    limit = turn.settings.ingest_timeout_s
    _ingested(turn, model, "", Fault("timed_out", f"the ingest took longer than ingest_timeout_s, {limit:g} s"))


# --- serving ---


def deploy(turn: Turn, event: DeployModel) -> None:
    """Serve a model or change its scale; what has failed is tried anew. Raises NotFound, Conflict, InvalidInput."""
    model = _known(turn, event.model)
    if model.state is _M.FAILED:
        why = model.fault.message if model.fault is not None else "unknown"
        raise Conflict(f"model {model.name!r} could not be ingested: {why}; add it again")
    if model.state not in (_M.STOPPED, _M.DEPLOYED):
        raise Conflict(f"model {model.name!r} is {model.state.value}; wait until it is stopped")
    if event.scale is not None and event.scale.min > event.scale.max:
        raise InvalidInput(f"scale.min {event.scale.min} is above scale.max {event.scale.max}", "scale.min")
    _serve(turn, model, event.scale)


def _serve(turn: Turn, model: Model, scale: ScaleSpec | None) -> None:
    """Serve a model that is ingested, with another scale or (None) its own."""
    routed = scale is not None
    scale = scale or model.spec.scale
    model.spec, model.deploy_next = msgspec.structs.replace(model.spec, scale=scale), False
    if model.state is _M.STOPPED:
        _move(turn, model, _M.DEPLOYED)
    turn.put_model(model)
    keep = "by reload cost" if scale.keep_alive_s is None else f"{scale.keep_alive_s:g} s"
    turn.event("model", model.name, "Deployed", f"{scale.min} to {scale.max} instances, keep-alive {keep}")
    say(turn, model)
    retrying.deployed(turn, model.name)
    for instance in turn.view.instances_of(model.name).values() if routed else ():
        instances.route(turn, instance)
    turn.rescale[model.name] = None


def stop(turn: Turn, event: StopModel) -> None:
    """Serve a model no more, or not as soon as it has been ingested. Raises NotFound, Conflict."""
    model = _known(turn, event.model)
    if model.state is _M.STOPPED:
        return
    if model.state is _M.INGESTING and model.deploy_next:
        model.deploy_next = False
        turn.put_model(model)
        turn.event("model", model.name, "Stopped", "it is not served once it has been ingested")
        return
    if model.state is not _M.DEPLOYED:
        raise Conflict(f"model {model.name!r} is {model.state.value}, not deployed")
    _move(turn, model, _M.STOPPED)
    turn.event("model", model.name, "Stopped", "it is served no more")
    _undeploy(turn, model, "was stopped")


def _undeploy(turn: Turn, model: Model, what: str) -> None:
    say(turn, model)
    turn.do(RejectWaiting(model.name, Fault("unschedulable", f"model {model.name!r} {what}")))
    model.waiting = 0
    turn.view.set_waiting_since(model, None)
    turn.rescale[model.name] = None


# --- forgetting ---


def remove(turn: Turn, event: RemoveModel) -> None:
    """Begin to forget a model: its ingest is cancelled, its instances drain. Raises NotFound."""
    model = _known(turn, event.model)
    if model.state is _M.DELETING:
        return
    _move(turn, model, _M.DELETING)
    turn.event("model", model.name, "Deleting", "its instances stop, then it is forgotten")
    if model.op is not None and model.node is not None:
        if turn.view.nodes[model.node].state is NodeState.READY and model.ingested is None:
            turn.send(model.node, CancelOperation(op=model.op))
        else:
            _leave(turn, model)
    _undeploy(turn, model, "is being removed")


def let_go(turn: Turn, model: Model) -> None:
    """The node that does something for a model is away, or does it no more: a removal does not wait for it. Should it still
    go on there, its next truth says so, and it is ended; what it has brought is forgotten."""
    if model.state is _M.DELETING and model.op is not None:
        _leave(turn, model)
        turn.put_model(model)
        turn.rescale[model.name] = None


def _leave(turn: Turn, model: Model) -> None:
    assert model.op is not None
    assert model.node is not None
    turn.core.leave(model.op, Left(model.node, model.ingested or ""))
    turn.view.set_operation(model, None, None)


def finish_removal(turn: Turn, model: Model) -> None:
    """Forget a model that is being removed, if nothing of it runs any more."""
    if model.state is not _M.DELETING or model.op is not None or turn.view.instances_of(model.name):
        return
    digest = model.digest
    turn.remove_model(model)
    turn.core.decisions.forget(model.name)
    turn.core.look_at.pop(model.name, None)
    turn.event("model", model.name, "Deleted", "it is forgotten")
    turn.do(ModelChanged(model.name, None, model.state, None, 0))
    if digest is not None:
        forget_checkpoint(turn, digest)


def forget_checkpoint(turn: Turn, digest: str) -> None:
    """Take a checkpoint that no model uses from every tier of the connected nodes; its row goes with its last placement."""
    if digest not in turn.view.checkpoints or any(turn.view.models_of(digest)):
        return
    places = {(record.node, record.tier) for record in turn.view.placements_of(digest).values()}
    for tier in (Tier.DEVICE, Tier.DRAM, Tier.DISK):
        for node in sorted(node for node, where in places if where is tier):
            if (digest, node, tier) in turn.view.pins:
                message = f"it stays pinned on {tier.value} of node {turn.view.nodes[node].name}"
                turn.event("checkpoint", digest, "Kept", message)
            elif turn.view.nodes[node].state is NodeState.READY:
                drops.begin(turn, node, digest, tier)
    if not places and not turn.view.publications_of(digest):
        turn.remove_checkpoint(digest)
