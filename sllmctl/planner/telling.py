"""A place as it is told: who leaves by name, and the working memory that it gets."""

from __future__ import annotations

from sllmctl.cluster.plans import Candidate
from sllmctl.planner.inquiry import CHEAP, Inquiry
from sllmctl.planner.memory import WorkingNeed, given_bytes
from sllmctl.planner.spot import Option
from sllmctl.planner.victims import Exit

__all__ = ["candidate"]


def candidate(inquiry: Inquiry, option: Option, *, roomy: bool = False) -> Candidate:
    """``roomy``: weights that cost next to nothing to drop go too, until it gets all that it wants."""
    asked = inquiry.asked
    exits = option.exits
    free, delay_s = option.free, option.delay_s
    if roomy and free < asked.wanted and not option.ground.cpu and inquiry.options.sharing:
        exits, free, delay_s = _widened(inquiry, option)
    halved = option.ground.cpu and inquiry.options.sharing
    working_bytes = given_bytes(WorkingNeed(asked.least, asked.wanted), free, cpu=halved)
    return Candidate(
        node=option.node.id,
        name=option.node.name,
        devices=option.devices,
        working_bytes=working_bytes,
        source=option.source,
        peer=option.peer,
        queue_s=option.startup.queue_s,
        load_s=option.startup.load_s,
        room_s=option.room_s,
        startup_s=option.room_s + option.startup.total_s,
        delay_s=delay_s,
        risk_s=option.risk_s,
        free_bytes=free,
        drops=tuple(dict.fromkeys(digest for one in exits for digest in one.drops)),
        stops=tuple(name for one in exits for name in one.stops),
        drains=tuple(name for one in exits for name in one.drains),
        moves=option.moves,
    )


def _widened(inquiry: Inquiry, option: Option) -> tuple[list[Exit], int, float]:
    asked, view, node = inquiry.asked, inquiry.view, option.node
    gone = {digest for one in option.exits for digest in one.drops}
    exits, delay_s = list(option.exits), option.delay_s
    rooms = {index: option.ground.rooms[index] + sum(one.frees.get(index, 0) for one in exits) for index in option.devices}
    limit_s = CHEAP * option.startup.total_s
    lying = {digest for index in option.devices for digest in view.memory.idle_weights.get((node.id, index), ())}
    items = sorted(
        (inquiry.prices.weights_s(node, digest, view.checkpoints[digest].image_bytes), digest)
        for digest in lying - gone - {asked.digest}
        if digest in view.checkpoints and not view.memory.holds_arena(node.id, digest)
    )
    for weights_s, digest in items:
        if min(rooms.values()) >= asked.wanted or weights_s > limit_s:
            break
        frees = {
            device.index: view.memory.idle_weights.get((node.id, device.index), {}).get(digest, 0)
            for device in option.ground.inventory.devices
        }
        one = Exit(frees, weights_s)
        one.drops = (digest,)
        exits.append(one)
        delay_s += weights_s
        for index in rooms:
            rooms[index] += frees[index]
    return exits, min(rooms.values()), delay_s
