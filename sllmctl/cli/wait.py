"""`sllmctl wait`: until things are as they are to be, for scripts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from sllmctl.cli.completion import Noun, living
from sllmctl.cli.context import Invocation, pass_invocation, timeout_option

if TYPE_CHECKING:
    from schema.admin import CheckpointView, InstanceView, NodeView, ProgressView, RequestView
    from sllmctl.cli.diagnostics import ProgressLine
    from sllmctl.cli.waiting import Asked, Patience
    from sllmctl.client import Call, Until

__all__ = ["command"]

_LOOK_S: Final = 0.2
_TIERS: Final = ("disk", "dram", "device")
_ON: Final = f"on=NODE:{'|'.join(_TIERS)}"
_CONDITIONS: Final[dict[Noun, tuple[str, ...]]] = {
    "model": ("ingested", "ready", "stopped", "removed"),
    "node": ("ready", "drained", "unreachable", "removed"),
    "instance": ("ready", "stopped"),
    "checkpoint": (_ON, "published", "removed"),
    "operation": ("ended",),
    "request": ("running", "ended"),
}
_GONE: Final = ("removed", "stopped")
"""What has come true of a thing that is not there any more."""


@dataclass(frozen=True, slots=True)
class _Target:
    noun: Noun
    name: str

    def __str__(self) -> str:
        return f"{self.noun}/{self.name}"


def _complete_targets(ctx: click.Context, _: click.Parameter, begin: str) -> list[CompletionItem]:
    noun, slash, name = begin.partition("/")
    if not slash:
        # The shells would set a space after a whole word; so a noun comes with the names of what lives.
        nouns = [each for each in _CONDITIONS if each.startswith(begin)]
        return [item for each in nouns for item in living(ctx, each, "", f"{each}/")]
    return living(ctx, noun, name, f"{noun}/") if noun in _CONDITIONS else []


def _complete_conditions(ctx: click.Context, _: click.Parameter, begin: str) -> list[CompletionItem]:
    """What all that stands before may become; what anything may, if nothing does."""
    words = ctx.params.get("targets") or ctx.args  # arguments are not taken yet while an option lacks its value
    given = [each for noun, each in _CONDITIONS.items() if any(word.startswith(f"{noun}/") for word in words)]
    known = dict.fromkeys(each for conditions in given or _CONDITIONS.values() for each in conditions)
    found = [each for each in known if all(each in conditions for conditions in given)]
    items = [CompletionItem(each) for each in found if each != _ON]
    if _ON in found:
        nodes = living(ctx, "node", "", "on=")
        items += [CompletionItem(f"{node.value}:{tier}") for node in nodes for tier in _TIERS]
    return [item for item in items if item.value.startswith(begin)]


@click.command("wait")
@click.argument("targets", metavar="NOUN/NAME...", nargs=-1, required=True, shell_complete=_complete_targets)
@click.option(
    "--for", "condition", required=True, metavar="CONDITION", shell_complete=_complete_conditions, help="What to wait for."
)
@timeout_option
@pass_invocation
def command(invocation: Invocation, targets: tuple[str, ...], condition: str, timeout: float | None) -> None:
    """Wait until things are as they are to be. Exits with 7 when the time runs out, with 5 for what does not exist.

    A manager that does not answer yet, or that restarts meanwhile, is waited for too; one of another user is not (exit code 4).

    \b
    Conditions:
      model       ingested, ready (as many instances as its scale keeps at least), stopped, removed
      node        ready, drained (without instances), unreachable, removed
      instance    ready, stopped
      checkpoint  on=NODE:disk, on=NODE:dram, on=NODE:device (whole on that tier), published, removed
      operation   ended
      request     running, ended
    What can never come any more ends its wait with its fault, and so does a model one of whose instances was given up, though
    that is tried again; the others are waited for all the same.

    \b
    Examples:
      sllmctl wait model/qwen --for ready --timeout 60
      sllmctl wait node/gpu1 node/gpu2 --for ready
      sllmctl wait checkpoint/qwen --for on=gpu1:dram
    """
    from sllmctl.cli.diagnostics import ProgressLine, Refusals, note
    from sllmctl.cli.waiting import PatientClient, told_of

    wanted = {word: _target(word, condition) for word in targets}
    patience = invocation.patience(timeout)

    def wait(word: str) -> None:
        target = wanted[word]
        with told_of(target.noun, target.name), ProgressLine() as line:
            _wait(asked, target, condition, patience, line)
        note(f"{target}: {condition}")

    with invocation.admin(patience) as admin, Refusals() as refusals:
        asked = PatientClient(admin, patience)
        refusals.each(wanted, wait)


def _target(word: str, condition: str) -> _Target:
    from schema.names import did_you_mean

    noun, slash, name = word.partition("/")
    for known, conditions in _CONDITIONS.items():
        if known == noun:
            if not slash or not name:
                raise click.BadParameter(f"{word!r} is no {noun}; write {noun}/NAME", param_hint="NOUN/NAME")
            placed = noun == "checkpoint" and _place(condition) is not None
            if not placed and (condition == _ON or condition not in conditions):
                what = f"a {noun} is never {condition!r}; wait for {', '.join(conditions)}"
                raise click.BadParameter(what + did_you_mean(condition, conditions), param_hint="--for")
            return _Target(known, name)
    what = f"{noun!r} is none of {', '.join(_CONDITIONS)}{did_you_mean(noun, _CONDITIONS)}"
    if not slash:
        what = f"{word!r} does not say of what it is the name; write model/{word}, or another of {', '.join(_CONDITIONS)}"
    raise click.BadParameter(what, param_hint="NOUN/NAME")


def _place(condition: str) -> tuple[str, str] | None:
    """Node and tier of ``on=NODE:TIER``."""
    kind, _, where = condition.partition("=")
    node, _, tier = where.rpartition(":")
    return (node, tier) if kind == "on" and node and tier in _TIERS else None


def _wait(admin: Asked, target: _Target, condition: str, patience: Patience, line: ProgressLine) -> None:
    from schema.errors import NotFound, TimedOut
    from sllmctl import client

    asks: dict[Noun, Callable[[str], Call[Any]]] = {
        "node": client.node,
        "instance": client.instance,
        "checkpoint": client.checkpoint,
        "operation": client.operation,
        "request": client.request,
    }
    if target.noun == "model":
        _wait_model(admin, target.name, condition, patience)
        return
    while True:
        try:
            view = admin.ask(asks[target.noun](target.name))
        except NotFound:
            if condition in _GONE:
                return
            raise
        if _reached(target.noun, view, condition):
            return
        if not (left_s := patience.left_s):
            raise TimedOut(f"{target.noun} {target.name} is not {condition} after {patience}")
        progress: ProgressView | None = getattr(view, "progress", None)
        line.show(f"waiting for {target} to be {condition}", progress)
        time.sleep(min(_LOOK_S, left_s))


def _wait_model(admin: Asked, name: str, condition: str, patience: Patience) -> None:
    from sllmctl.cli.waiting import wait_for

    until: dict[str, Until] = {"ingested": "ingested", "ready": "ready", "stopped": "stopped", "removed": "gone"}
    wait_for(admin, name, until[condition], patience)


def _reached(noun: Noun, view: Any, condition: str) -> bool:
    """Whether it is so. Raises the fault of what will never be."""
    match noun:
        case "node":
            return _node(view, condition)
        case "instance":
            return _instance(view, condition)
        case "checkpoint":
            return _checkpoint(view, condition)
        case "request":
            return _request(view, condition)
        case _:
            if view.ended_at is not None and view.fault is not None:
                raise view.fault.to_error()
            return view.ended_at is not None


def _node(node: NodeView, condition: str) -> bool:
    return not node.instances if condition == "drained" else node.state == condition


def _instance(instance: InstanceView, condition: str) -> bool:
    if condition == "ready" and instance.state == "failed" and instance.fault is not None:
        raise instance.fault.to_error()
    return instance.state == condition


def _checkpoint(checkpoint: CheckpointView, condition: str) -> bool:
    place = _place(condition)
    if place is None:
        return condition == "published" and bool(checkpoint.publications)
    return any((each.node, each.tier) == place and each.state == "resident" for each in checkpoint.placements)


def _request(request: RequestView, condition: str) -> bool:
    ended = request.state in ("finished", "cancelled", "failed")
    return ended or (condition == "running" and request.state == "running")
