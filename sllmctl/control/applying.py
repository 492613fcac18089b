"""Models as files want them: what would change is told field by field; all of it is done, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from schema.admin import AppliedView, ChangeView
from schema.errors import Conflict, Fault, InvalidInput, SllmError
from schema.spec import ModelSpec, PathSource, check_spec
from schema.states import ModelState
from sllmctl.cluster.records import Instance, Model
from sllmctl.control import instances, models
from sllmctl.control.events import AddModel, ApplyModels, DeployModel, RemoveModel
from sllmctl.control.turn import Turn

__all__ = ["apply"]

_M = ModelState
_Leaf = str | int | float | bool | None


class _FixedKey(Conflict):
    """What stands under a key, ``param``, cannot be changed."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def apply(turn: Turn, event: ApplyModels) -> tuple[AppliedView, ...]:
    """Make the models as the specs say, or only tell what that would change; the others are left as they are.

    Raises the first refusal, all of them in its message, before anything is changed; a dry run tells them in its answer.
    """
    names = Counter([*(spec.name for spec in event.specs), *event.remove])
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise InvalidInput(f"{', '.join(twice)}: named twice", "models")
    told = [_judged(turn, spec, event.deploy) for spec in event.specs]
    told += [_leaving(turn, name) for name in event.remove]
    if event.dry_run:
        return tuple(told)
    faults = [each.fault for each in told if each.fault is not None]
    if faults:
        raise Fault(faults[0].code, "\n".join(fault.message for fault in faults)).to_error()
    for spec, each in zip(event.specs, told, strict=False):
        if each.action in ("created", "configured"):
            _carry_out(turn, event, spec, each)
    for each in told:
        if each.action == "removed":
            models.remove(turn, RemoveModel(event.ticket, each.name))
    return tuple(told)


def _judged(turn: Turn, spec: ModelSpec, deploy: bool) -> AppliedView:
    model = turn.view.models.get(spec.name)
    try:
        check_spec(spec)
        if model is None or model.state is _M.FAILED:
            models.ingest_node(turn, spec)
        if model is None:
            return AppliedView(name=spec.name, action="created", changes=_added(spec))
        changes = _changes(turn, model, spec, deploy)
    except SllmError as error:
        fault = Fault(error.code, f"model {spec.name}: {error.message}")
        return AppliedView(name=spec.name, action="refused", fault=fault, key=getattr(error, "param", None) or "")
    restarts = len(_replaced(turn, model, spec))
    return AppliedView(
        name=spec.name, action="configured" if changes else "unchanged", changes=tuple(changes), restarts=restarts
    )


def _leaving(turn: Turn, name: str) -> AppliedView:
    model = turn.view.models.get(name)
    if model is None or model.state is _M.DELETING:
        return AppliedView(name=name, action="unchanged")
    return AppliedView(name=name, action="removed", restarts=len(turn.view.instances_of(name)))


def _changes(turn: Turn, model: Model, spec: ModelSpec, deploy: bool) -> list[ChangeView]:
    """What is other than it is. Raises Conflict for what cannot be changed."""
    if model.state is _M.DELETING:
        raise Conflict("it is being removed; wait until it is gone")
    changes = _differing(_leaves(_stated(turn, model.spec)), _leaves(_stated(turn, spec)))
    source = next((change for change in changes if change.key.startswith("source.")), None)
    if source is not None and model.state is not _M.FAILED:
        raise _FixedKey(
            source.key,
            f"{source.key}: {source.old!r} cannot become {source.new!r}, since its checkpoint is another then; "
            f"give that a name of its own, or remove this one first (`sllmctl model rm {model.name}`)",
        )
    if model.state is _M.FAILED:
        changes.append(ChangeView(key="state", old=str(_M.FAILED), new=str(_M.INGESTING)))
    elif deploy and model.state is not _M.DEPLOYED and not model.deploy_next:
        changes.append(ChangeView(key="state", old=str(model.state), new=str(_M.DEPLOYED)))
    return changes


def _stated(turn: Turn, spec: ModelSpec) -> ModelSpec:
    """The spec with its node by name: none is the manager's own machine."""
    source = spec.source
    if isinstance(source, PathSource) and not source.node:
        source = msgspec.structs.replace(source, node=turn.settings.local_node)
    return msgspec.structs.replace(spec, source=source)


def _leaves(spec: ModelSpec) -> dict[str, _Leaf]:
    def leaves(value: Any, key: str) -> Iterable[tuple[str, _Leaf]]:
        if not isinstance(value, dict):
            yield key, value
            return
        for name, below in value.items():
            yield from leaves(below, f"{key}.{name}" if key else name)

    return dict(leaves(msgspec.to_builtins(spec), ""))


def _differing(old: dict[str, _Leaf], new: dict[str, _Leaf]) -> list[ChangeView]:
    keys = dict.fromkeys([*old, *new])
    return [ChangeView(key=key, old=old.get(key), new=new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _added(spec: ModelSpec) -> tuple[ChangeView, ...]:
    """What a new model has that is no default; its name is told already."""
    usual = _leaves(ModelSpec(name=spec.name, source=msgspec.structs.replace(spec.source, **_defaults(spec.source))))
    return tuple(
        ChangeView(key=key, old=None, new=value)
        for key, value in _leaves(spec).items()
        if key in ("source.kind", "source.path", "source.repo", "source.url") or usual[key] != value
    )


def _defaults(struct: msgspec.Struct) -> dict[str, Any]:
    return {each.name: each.default for each in msgspec.structs.fields(struct) if each.default is not msgspec.NODEFAULT}


def _replaced(turn: Turn, model: Model, spec: ModelSpec) -> list[Instance]:
    """The instances that cannot become what the spec says, and so make room for others."""
    if (model.spec.engine, model.spec.devices) == (spec.engine, spec.devices):
        return []
    return [one for one in turn.view.instances_of(model.name).values() if one.state in instances.ACTIVE]


def _carry_out(turn: Turn, event: ApplyModels, spec: ModelSpec, told: AppliedView) -> None:
    model = turn.view.models.get(spec.name)
    if model is None or model.state is _M.FAILED:
        models.add(turn, AddModel(event.ticket, spec, event.deploy))
        return
    leaving = _replaced(turn, model, spec)
    model.spec = msgspec.structs.replace(spec, source=model.spec.source)
    turn.put_model(model)
    turn.event("model", model.name, "Configured", ", ".join(f"{each.key}: {each.new}" for each in told.changes))
    for instance in leaving:
        instances.stop(turn, instance, "Replaced", f"model {model.name} has another engine configuration")
    if model.state is _M.DEPLOYED or (event.deploy and model.state is _M.STOPPED):
        models.deploy(turn, DeployModel(event.ticket, model.name, model.spec.scale))
    else:
        model.deploy_next = model.deploy_next or (event.deploy and model.state is _M.INGESTING)
        models.say(turn, model)
