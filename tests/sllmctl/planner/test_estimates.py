"""Estimates of starts and migrations: what they begin with, how they are corrected, and what queues ahead."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.link import ArenaInfo, DeviceInfo, Inventory, StartPhases
from schema.states import NodeState, Tier
from sllmctl.cluster.changes import PutEstimate
from sllmctl.cluster.records import Checkpoint, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.planner.coefficients import Line, Window
from sllmctl.planner.estimates import Channel, Estimates
from sllmctl.planner.loads import Loads

GB = 10**9
RULES = ControlSettings(disk_read_bps=1e9, device_copy_bps=10e9, network_bps=0.5e9, start_base_s=0.3)


def node(name: str = "n", *, kind: str = "cuda", devices: int = 2, disk_bps: float = 0.0) -> Node:
    inventory = Inventory(
        hostname=name,
        cpus=4,
        memory_bytes=64 * GB,
        devices=tuple(DeviceInfo(index=i, kind=kind, name=kind, memory_bytes=48 * GB) for i in range(devices)),
        arena=ArenaInfo(id="a", budget_bytes=32 * GB, chunk_bytes=1 << 22),
        disk_read_bps=disk_bps,
    )
    return Node(name, name, "unix:/x", NodeState.READY, False, 0.0, 0.0, inventory)


def checkpoint(digest: str = "d", size_gb: float = 10) -> Checkpoint:
    return Checkpoint(digest, "Tiny", int(size_gb * GB), 1000, 2048, 0.0)


def start(load_s: float, source: Tier | None = Tier.DISK, *, build_s: float = 0.2, finish_s: float = 0.1) -> StartPhases:
    total_s = max(load_s, build_s) + finish_s
    return StartPhases(load_s=load_s, loaded_from=source, loaded_bytes=1, build_s=build_s, attach_s=finish_s, total_s=total_s)


def disk_start(estimates: Estimates, seconds: float, digest: str = "d", here: Node | None = None) -> None:
    """A load from disk that nothing was ahead of."""
    here, what = here or node(), checkpoint(digest)
    estimates.began("one", here, what, (0,), Tier.DISK, "", 0.0)
    estimates.ended("one", seconds)
    estimates.started(here, what, (0,), start(seconds), seconds)


def test_a_start_waits_for_a_zygote_that_still_imports_beside_its_load() -> None:
    estimates, here = Estimates(ControlSettings(disk_read_bps=1e9, start_base_s=0.3, import_s=5.0)), node(kind="cpu")

    def takes_s(now: float, size_gb: float = 1) -> float:
        return estimates.startup(here, checkpoint(size_gb=size_gb), (0,), Tier.DISK, "", now).total_s

    assert takes_s(100.0) == pytest.approx(1.0)
    here.imports_since = 100.0
    assert [takes_s(now) for now in (100.0, 103.0, 104.5)] == pytest.approx([5.3, 2.3, 1.0])
    assert takes_s(100.0, size_gb=8) == pytest.approx(8.0)
    assert takes_s(108.0) == pytest.approx(8.3), "one that is overdue is expected to take as long again"
    later = [
        estimates.startup(here, checkpoint(size_gb=1), (0,), Tier.DISK, "", now, later_s=later_s).total_s
        for now, later_s in ((100.0, 3.0), (100.0, 600.0), (108.0, 6.0))
    ]
    assert later == pytest.approx([2.3, 1.0, 2.3]), "what begins later waits for less of it"
    other = Estimates(estimates._settings)
    for _ in range(3):
        rows = estimates.imported(here, 109.0)
    other.restore(rows)
    estimates = other
    assert takes_s(100.0) == pytest.approx(9.3)
    here = node("new", kind="cpu")
    here.imports_since = 100.0
    assert takes_s(100.0) == pytest.approx(9.3), "as other nodes took"


def test_a_start_takes_its_slowest_channel_or_its_worker_whichever_is_longer() -> None:
    estimates = Estimates(RULES)
    there = (node(), checkpoint(), (0, 1))
    assert estimates.startup(*there, Tier.DISK, "", 0.0).total_s == pytest.approx(10.0)
    assert estimates.startup(*there, Tier.DRAM, "", 0.0).total_s == pytest.approx(0.5)
    assert estimates.startup(*there, Tier.DEVICE, "", 0.0).total_s == pytest.approx(0.3)
    assert estimates.startup(*there, Tier.REMOTE, "peer", 0.0).total_s == pytest.approx(20.0)
    assert estimates.startup(node(kind="cpu"), checkpoint(), (0,), Tier.DRAM, "", 0.0).load_s == 0.0


def test_a_measured_bandwidth_goes_before_an_assumed_one_and_a_new_measurement_before_an_old() -> None:
    estimates, here = Estimates(RULES), node(disk_bps=2e9)
    assert estimates.bandwidth_bps(here, Channel.DISK) == 2e9
    here.inventory = node(disk_bps=4e9).inventory
    assert estimates.bandwidth_bps(here, Channel.DISK) == 4e9
    assert estimates.bandwidth_bps(node(), Channel.NETWORK) == 0.5e9


def test_one_outlier_moves_nothing_and_a_lasting_change_is_followed() -> None:
    estimates, here = Estimates(RULES), node(disk_bps=2e9)
    for _ in range(6):
        disk_start(estimates, 5.0, here=here)
    before = estimates.bandwidth_bps(here, Channel.DISK)
    assert before == 2e9
    disk_start(estimates, 500.0, here=here)
    assert estimates.bandwidth_bps(here, Channel.DISK) == before
    disk_start(estimates, 5.0, here=here)
    for _ in range(3):
        disk_start(estimates, 10.0, here=here)
    assert estimates.bandwidth_bps(here, Channel.DISK) == 1e9


def test_the_first_observation_alone_does_not_outvote_a_measurement() -> None:
    estimates, here = Estimates(RULES), node(disk_bps=2e9)
    disk_start(estimates, 500.0, here=here)
    assert estimates.bandwidth_bps(here, Channel.DISK) == 2e9


def bandwidth_lesson(estimates: Estimates, here: Node, digest: str, device: int, load_s: float) -> float | None:
    """The newest sample of a bandwidth that a reported start left, if it left one."""
    rows = estimates.started(here, checkpoint(digest), (device,), start(load_s), 0.0)
    return next((row.samples[-1] for row in rows if row.key.startswith("bps/")), None)


def test_the_wait_of_a_load_is_no_part_of_its_bandwidth() -> None:
    estimates, here = Estimates(RULES), node(devices=3)
    for place, (name, at) in enumerate((("a", 0.0), ("b", 1.0), ("c", 2.0))):
        estimates.began(name, here, checkpoint(name), (place,), Tier.DISK, "", at)
    assert bandwidth_lesson(estimates, here, "a", 0, 8.0) == pytest.approx(10 * GB / 8)
    estimates.ended("a", 8.0)
    assert bandwidth_lesson(estimates, here, "b", 1, 19.0) == pytest.approx(10 * GB / 12)
    estimates.ended("b", 20.0)
    assert bandwidth_lesson(estimates, here, "c", 2, 28.0) == pytest.approx(10 * GB / 10)


def test_a_load_behind_one_of_unknown_end_teaches_no_bandwidth() -> None:
    estimates, here = Estimates(RULES), node()
    estimates.began("a", here, checkpoint("a"), (0,), Tier.DISK, "", 0.0)
    estimates.began("b", here, checkpoint("b"), (1,), Tier.DISK, "", 0.0)
    estimates.ended("a", 3.0)
    assert bandwidth_lesson(estimates, here, "b", 1, 13.0) is None


def test_a_load_beside_one_that_another_channel_holds_up_teaches_no_bandwidth() -> None:
    estimates, here = Estimates(RULES), node()
    estimates.began("a", here, checkpoint("a"), (0,), Tier.REMOTE, "", 0.0)
    estimates.began("b", here, checkpoint("b"), (0,), Tier.DRAM, "", 0.0)
    estimates.started(here, checkpoint("a"), (0,), start(20.0, Tier.REMOTE), 20.0)
    rows = estimates.started(here, checkpoint("b"), (0,), start(21.0, Tier.DRAM), 21.0)
    assert not [row for row in rows if row.key.startswith("bps/")]


def test_weights_that_come_from_elsewhere_than_planned_teach_no_bandwidth() -> None:
    estimates, here = Estimates(RULES), node()
    for reported in (start(5.0, Tier.DISK), StartPhases(load_s=1.0, loaded_from=Tier.DRAM, total_s=2.0), start(1.0, None)):
        estimates.began("a", here, checkpoint("a"), (0,), Tier.DRAM, "", 0.0)
        estimates.ended("a", 5.0)
        rows = estimates.started(here, checkpoint("a"), (0,), reported, 5.0)
        assert not [row for row in rows if row.key.startswith("bps/")]


def test_a_start_of_what_is_already_coming_waits_for_that_and_reads_nothing_twice() -> None:
    estimates, here = Estimates(RULES), node(kind="cpu")
    estimates.began("a", here, checkpoint("a"), (0,), Tier.DISK, "", 0.0)
    assert estimates.startup(here, checkpoint("a"), (1,), Tier.DISK, "", 4.0).total_s == pytest.approx(6.0)
    estimates.began("b", here, checkpoint("a"), (1,), Tier.DISK, "", 4.0)
    assert estimates.startup(here, checkpoint("c"), (1,), Tier.DISK, "", 4.0).queue_s == pytest.approx(6.0)
    estimates.ended("a", 10.0)
    assert bandwidth_lesson(estimates, here, "a", 1, 6.0) is None
    assert estimates.startup(here, checkpoint("c"), (1,), Tier.DISK, "", 10.0).queue_s == 0.0
    assert estimates.startup(here, checkpoint("a"), (1,), Tier.DISK, "", 10.0).load_s == pytest.approx(10.0)


def test_a_weights_way_onto_the_devices_counts_also_where_they_are_already_coming() -> None:
    estimates, here = Estimates(RULES), node()
    estimates.began("a", here, checkpoint("a"), (0,), Tier.DISK, "", 0.0)
    late = estimates.startup(here, checkpoint("a"), (1,), Tier.DISK, "", 9.9)
    assert late.queue_s == pytest.approx(0.0)
    assert late.load_s == pytest.approx(1.0)


def test_loads_that_fail_for_ever_leave_nothing_behind() -> None:
    estimates, here = Estimates(RULES), node()
    tracemalloc.start()
    try:
        sizes = []
        for number in range(2000):
            estimates.began(f"l{number}", here, checkpoint(f"d{number % 3}"), (0,), Tier.DISK, "", float(number))
            estimates.ended(f"l{number - 1}", number + 0.5)
            if number % 1000 == 999:
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 20_000


def test_the_first_start_of_a_checkpoint_does_not_put_its_estimate_back_to_what_was_assumed() -> None:
    estimates = Estimates(ControlSettings(start_base_s=5.0))
    for number in range(5):
        disk_start(estimates, 0.01, digest=f"d{number}")
    before = estimates.startup(node(), checkpoint("new", 0), (0,), Tier.DEVICE, "", 0.0)
    disk_start(estimates, 0.01, digest="new")
    assert before.total_s == pytest.approx(0.3)
    assert estimates.startup(node(), checkpoint("new", 0), (0,), Tier.DEVICE, "", 0.0) == before


def test_starts_that_waited_for_a_zygote_make_no_later_one_seem_slow() -> None:
    """A node that has just begun is asked for several models while it still imports torch."""
    estimates = Estimates(ControlSettings(start_base_s=0.3))
    for number in range(5):
        waited_s = 4.0 - 0.1 * number
        phases = StartPhases(fork_s=waited_s + 0.01, zygote_s=waited_s, build_s=0.04, attach_s=0.02, total_s=waited_s + 0.07)
        estimates.started(node(kind="cpu"), checkpoint(f"d{number}"), (0,), phases, 0.0)
    assert estimates.startup(node(kind="cpu"), checkpoint("new", 0), (0,), Tier.DRAM, "", 0.0).total_s == pytest.approx(0.07)


@given(
    st.lists(st.tuples(st.floats(0.5, 5), st.floats(0, 4), st.booleans()), min_size=2, max_size=12),
    st.floats(0.2, 5),
)
def test_a_busy_disk_teaches_its_true_bandwidth(loads: list[tuple[float, float, bool]], speed: float) -> None:
    """Whatever stands in line: a lesson is right or is not given, and without failures all of them are given."""
    estimates, here = Estimates(RULES), node(kind="cpu", devices=1)
    now, free_at, reports, events = 0.0, 0.0, 0, []
    for number, (size_gb, pause, fails) in enumerate(loads):
        now += pause
        free_at = max(now, free_at) + size_gb / speed
        events += [(now, 0, number, now), (free_at, 1, number, now)]
        reports += not fails
    lessons = 0
    for at, kind, number, began_at in sorted(events):
        size_gb, _, fails = loads[number]
        what = checkpoint(f"d{number}", size_gb)
        if kind == 0:
            estimates.began(f"l{number}", here, what, (0,), Tier.DISK, "", at)
            continue
        estimates.ended(f"l{number}", at)
        if fails:
            continue
        rows = estimates.started(here, what, (0,), start(at - began_at), at)
        for row in rows:
            if row.key.startswith("bps/"):
                assert row.samples[-1] == pytest.approx(speed * 1e9, rel=1e-6)
                lessons += 1
    assert lessons <= reports
    if reports == len(loads):
        assert lessons == reports


def test_small_loads_teach_no_bandwidth() -> None:
    estimates, here = Estimates(RULES), node()
    tiny = checkpoint("tiny", 0.001)
    estimates.began("a", here, tiny, (0,), Tier.DISK, "", 0.0)
    assert not [row for row in estimates.started(here, tiny, (0,), start(1.0), 1.0) if row.key.startswith("bps/")]


def test_a_new_checkpoint_takes_after_the_others_on_its_kind_of_device() -> None:
    estimates = Estimates(RULES)
    for number in range(5):
        disk_start(estimates, 0.01, digest=f"d{number}")
    found = estimates.startup(node(), checkpoint("new", 0), (0,), Tier.DEVICE, "", 0.0)
    assert found.total_s == pytest.approx(0.3)
    assert estimates.startup(node(kind="cpu"), checkpoint("new", 0), (0,), Tier.DRAM, "", 0.0).total_s == pytest.approx(0.3)


def test_loads_ahead_on_a_channel_are_waited_for_and_others_are_not() -> None:
    estimates, here = Estimates(RULES), node()
    estimates.began("a", here, checkpoint("a"), (0,), Tier.DISK, "", 100.0)
    assert estimates.startup(here, checkpoint("b"), (1,), Tier.DISK, "", 104.0).queue_s == pytest.approx(6.0)
    assert estimates.startup(here, checkpoint("b"), (1,), Tier.DRAM, "", 104.0).queue_s == 0.0
    assert estimates.startup(here, checkpoint("b"), (0,), Tier.DRAM, "", 100.5).queue_s == pytest.approx(0.5)
    assert estimates.startup(node("other"), checkpoint("b"), (1,), Tier.DISK, "", 104.0).queue_s == 0.0
    estimates.ended("a", 105.0)
    assert estimates.startup(here, checkpoint("b"), (1,), Tier.DISK, "", 105.0).queue_s == 0.0
    estimates.ended("never heard of", 105.0)


def test_a_peer_that_gives_is_busy_giving() -> None:
    estimates, giver, taker = Estimates(RULES), node("giver"), node("taker")
    estimates.began("a", taker, checkpoint("a"), (0,), Tier.REMOTE, "giver", 0.0)
    assert estimates.startup(node("third"), checkpoint("b"), (0,), Tier.REMOTE, "giver", 0.0).queue_s == pytest.approx(20.0)
    assert estimates.startup(giver, checkpoint("b"), (0,), Tier.DISK, "", 0.0).queue_s == 0.0


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 5)), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_a_queue_is_what_is_left_of_those_ahead(loads: list[tuple[float, float]], rng: random.Random) -> None:
    queue, now, free_at = Loads(), 0.0, 0.0
    ends: dict[str, float] = {}
    for number, (seconds, pause) in enumerate(loads):
        now += pause
        for name in [name for name, at in ends.items() if at <= now]:
            queue.end(name, ends.pop(name))
        free_at = max(now, free_at) + seconds
        queue.begin(f"l{number}", [(("n", "disk", 0), seconds)], now)
        ends[f"l{number}"] = free_at
        assert queue.wait_s(("n", "disk", 0), now) == pytest.approx(free_at - now)
    for name in rng.sample(sorted(ends), len(ends)):
        queue.end(name, now)
    assert queue.none


def test_a_migration_is_a_line_through_prefills_that_outliers_do_not_bend() -> None:
    estimates = Estimates(RULES)
    assert estimates.migration_s("d", "cuda", 1000) == pytest.approx(1000 * RULES.prefill_token_s + RULES.prefill_base_s)
    for tokens in (100, 400, 900, 1600, 2500, 3600):
        estimates.prefilled("d", "cuda", tokens, 0.0002 * tokens + 0.03, 1.0)
    assert estimates.migration_s("d", "cuda", 5000) == pytest.approx(1.03)
    estimates.prefilled("d", "cuda", 500, 60.0, 2.0)
    assert estimates.migration_s("d", "cuda", 5000) == pytest.approx(1.03, rel=0.1)
    assert estimates.migration_s("unknown", "cuda", 5000) == pytest.approx(1.03, rel=0.1)


def test_prefills_of_one_length_move_the_level_alone() -> None:
    line = Line(0.001, 0.05)
    for _ in range(5):
        line.add(100, 0.5)
    assert line.slope == 0.001
    assert line.base == pytest.approx(0.4)


def test_what_was_learned_is_taken_up_again() -> None:
    estimates = Estimates(RULES)
    rows: dict[str, PutEstimate] = {}
    here = node()
    for seconds in (5.0, 5.5, 6.0):
        estimates.began("one", here, checkpoint(), (0,), Tier.DISK, "", 0.0)
        estimates.ended("one", seconds)
        rows |= {row.key: row for row in estimates.started(here, checkpoint(), (0,), start(seconds), seconds)}
    for tokens in (100, 500, 900):
        rows |= {row.key: row for row in estimates.prefilled("d", "cuda", tokens, tokens / 1e4, 9.0)}
    again = Estimates(RULES)
    again.restore(list(rows.values()))
    assert again.coefficients() == pytest.approx(estimates.coefficients())
    assert again.bandwidth_bps(here, Channel.DISK) == estimates.bandwidth_bps(here, Channel.DISK) != 1e9


def test_a_window_keeps_only_its_latest() -> None:
    window = Window.assumed(1.0)
    for sample in (5.0, 6.0, 7.0, 8.0, 9.0):
        window.add(sample)
    assert (window.value, window.samples) == (7.0, (5.0, 6.0, 7.0, 8.0, 9.0))
