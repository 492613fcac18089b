"""A simulated node by what it says: where weights come from and when, what lies where, and how sequences end."""

from __future__ import annotations

from random import Random

import pytest

from schema.states import EndReason, InstanceState, Tier
from sllmctl.simulate.memory import Device
from sllmctl.simulate.migration import Migration
from tests.sllmctl.simulate.nodes import GB, Bench, group, machine

_I = InstanceState


def _free(device: Device) -> int:
    return device.memory_bytes - device.used_bytes


def test_a_start_takes_the_slowest_channel_and_the_finish() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DISK)
    bench.start("i", "m0")
    bench.run()
    assert bench.states("i") == [(pytest.approx(4.5), _I.READY)]
    truth = bench.last("i")
    assert truth.kv_capacity_tokens == 10_000
    assert truth.max_context_tokens == 2048
    assert truth.phases is not None
    assert (truth.phases.load_s, truth.phases.total_s) == (pytest.approx(4.0), pytest.approx(4.5))
    assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.DISK, 20 * GB)
    assert bench.lies("m0") == {(Tier.DISK, 0): (20 * GB, 0), (Tier.DRAM, 0): (20 * GB, 0), (Tier.DEVICE, 0): (20 * GB, 1)}


def test_building_goes_side_by_side_with_the_load() -> None:
    bench = Bench(group=group(build_s=6.0))
    bench.nodes["a"].store.place("m0", Tier.DISK)
    bench.start("i", "m0")
    bench.run()
    assert bench.states("i") == [(pytest.approx(6.5), _I.READY)]


def test_the_second_start_finds_the_weights_in_dram_the_third_on_the_device() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DISK)
    bench.start("i", "m0")
    bench.run(10.0)
    bench.start("j", "m0", (1,))
    bench.run(20.0)
    bench.stop("j")
    assert bench.states("j")[-1] == (pytest.approx(20.0), _I.STOPPED)
    assert bench.lies("m0")[Tier.DEVICE, 1] == (20 * GB, 0)
    bench.start("k", "m0", (1,))
    bench.run()
    assert bench.states("j")[0] == (pytest.approx(11.5), _I.READY)
    assert bench.states("k")[-1] == (pytest.approx(20.5), _I.READY)
    assert bench.starts == [("i", Tier.DISK, False), ("j", Tier.DRAM, False), ("k", Tier.DEVICE, False)]


def test_two_starts_of_one_checkpoint_share_its_reading() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DISK)
    bench.start("i", "m0", (0,))
    bench.start("j", "m0", (1,))
    bench.run()
    assert bench.states("i") == bench.states("j") == [(pytest.approx(4.5), _I.READY)]


def test_two_checkpoints_wait_for_one_disk() -> None:
    bench = Bench()
    for digest in ("m0", "m1"):
        bench.nodes["a"].store.place(digest, Tier.DISK)
    bench.start("i", "m0", (0,))
    bench.start("j", "m1", (1,))
    bench.run()
    assert bench.states("i") == [(pytest.approx(4.5), _I.READY)]
    assert bench.states("j") == [(pytest.approx(8.5), _I.READY)]


def test_an_instance_over_two_devices_has_half_on_each_and_both_links() -> None:
    bench = Bench(group=group(devices=2))
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0", (0, 1))
    bench.run()
    assert bench.states("i") == [(pytest.approx(1.0), _I.READY)]
    assert bench.lies("m0")[Tier.DEVICE, 1] == (10 * GB, 1)
    assert bench.last("i").kv_capacity_tokens == 20_000


def test_a_checkpoint_is_fetched_from_a_peer_or_from_afar_and_kept() -> None:
    bench = Bench(machine(network_bps=2 * GB))
    bench.nodes["b"].store.place("m0", Tier.DISK)
    bench.wanted["i"] = (Tier.REMOTE, "b")
    bench.start("i", "m0")
    bench.start("j", "m1", (1,))
    bench.run()
    assert bench.starts == [("i", Tier.REMOTE, True), ("j", Tier.REMOTE, False)]
    assert bench.states("i") == [(pytest.approx(10.5), _I.READY)]
    assert bench.states("j") == [(pytest.approx(20.5), _I.READY)]
    assert (Tier.DISK, 0) in bench.lies("m0")
    assert (Tier.DISK, 0) in bench.lies("m1")


def test_the_arena_gives_up_what_was_used_longest_ago() -> None:
    bench = Bench()
    for digest in ("m0", "m1", "m2"):
        bench.nodes["a"].store.place(digest, Tier.DISK)
    for number, digest in enumerate(("m0", "m1", "m2")):
        bench.run(number * 10.0)
        bench.start(f"i{number}", digest)
        bench.run(number * 10.0 + 9)
        bench.stop(f"i{number}")
        bench.drop(digest, Tier.DEVICE)
    assert list(bench.nodes["a"].store.arena.residents) == ["m1", "m2"]
    assert (Tier.DRAM, 0) not in bench.lies("m0")


def test_weights_in_use_are_not_dropped_and_idle_ones_are() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0")
    bench.run()
    done = bench.drop("m0", Tier.DEVICE)
    assert done.fault is not None
    assert done.fault.code == "conflict"
    bench.stop("i")
    assert bench.drop("m0", Tier.DEVICE).fault is None
    assert bench.lies("m0") == {(Tier.DRAM, 0): (20 * GB, 0)}
    done = bench.drop("m0", Tier.DEVICE)
    assert done.fault is not None
    assert done.fault.code == "not_found"


def test_weights_are_dropped_where_they_are_idle_and_stay_where_they_are_used() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0", (0,))
    bench.start("j", "m0", (1,))
    bench.run()
    bench.stop("i")
    assert bench.drop("m0", Tier.DEVICE).fault is None
    assert bench.lies("m0") == {(Tier.DRAM, 0): (20 * GB, 0), (Tier.DEVICE, 1): (20 * GB, 1)}


def test_a_part_that_idles_beside_one_in_use_does_not_stay() -> None:
    bench = Bench(machine(devices=3), group(devices=2))
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0", (0, 1), kv=5 * GB)
    bench.start("j", "m0", (1, 2), kv=5 * GB)
    bench.run()
    assert bench.lies("m0")[Tier.DEVICE, 1] == (20 * GB, 2)
    bench.stop("i")
    assert bench.lies("m0")[Tier.DEVICE, 1] == (10 * GB, 1)
    assert bench.lies("m0")[Tier.DEVICE, 0] == (10 * GB, 0)


def test_weights_that_nobody_waits_for_any_more_do_not_stay_on_the_device() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DISK)
    bench.start("i", "m0")
    bench.run(1.0)
    bench.stop("i")
    assert not bench.nodes["a"].store.devices[0].weights
    bench.run()
    assert bench.lies("m0") == {(Tier.DISK, 0): (20 * GB, 0), (Tier.DRAM, 0): (20 * GB, 0)}


def test_more_than_a_device_has_is_never_promised_to_it() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0")
    with pytest.raises(AssertionError, match="a device of 40000000000 bytes holds"):
        bench.start("j", "m1")


def test_on_a_cpu_the_weights_stay_in_the_arena_and_in_use() -> None:
    bench = Bench(machine(device_kind="cpu"))
    for digest in ("m0", "m1", "m2"):
        bench.nodes["a"].store.place(digest, Tier.DISK)
    for number in range(3):
        bench.start(f"i{number}", f"m{number}", kv=GB)
    bench.run()
    assert bench.states("i0") == [(pytest.approx(4.5), _I.READY)]
    assert bench.states("i1") == [(pytest.approx(8.5), _I.READY)]
    refused = bench.last("i2")
    assert refused.state is _I.STOPPED
    assert refused.fault is not None
    assert refused.fault.code == "out_of_space"
    assert bench.lies("m0") == {(Tier.DISK, 0): (20 * GB, 0), (Tier.DRAM, 0): (20 * GB, 1)}
    bench.stop("i0")
    assert bench.lies("m0")[Tier.DRAM, 0] == (20 * GB, 0)


def test_a_drained_instance_stops_with_its_last_sequence() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0")
    bench.run(2.0)
    bench.submit("i", "r", 100, 11)
    bench.stop("i", grace_s=30.0)
    bench.run()
    assert [(at, end.reason, end.position) for at, end in bench.ends] == [(pytest.approx(3.1), EndReason.STOP, 11)]
    assert bench.states("i")[-1] == (pytest.approx(3.1), _I.STOPPED)


def test_a_stopped_one_says_what_it_has_before_its_sequences_are_lost() -> None:
    bench = Bench()
    bench.nodes["a"].store.place("m0", Tier.DRAM)
    bench.start("i", "m0")
    bench.run(2.0)
    attempt = bench.submit("i", "r", 100, 500)
    bench.stop("i", grace_s=1.0)
    bench.run()
    assert bench.tokens[attempt] == 10
    ((at, end),) = bench.ends
    assert (at, end.reason, end.position) == (pytest.approx(3.0), EndReason.LOST, 10)
    assert bench.losses == ["r"]
    # It is resumed from there: all tokens so far are computed again, and only what follows is made.
    bench.start("j", "m0")
    bench.run(4.0)
    bench.submit("j", "r", 100, 500, generated=10)
    bench.run()
    assert bench.firsts["r"] == pytest.approx(4.11)
    assert bench.ends[-1][1].position == 500
    assert bench.ends[-1][0] == pytest.approx(4.11 + 48.9)


def test_what_comes_for_no_life_is_lost_at_once() -> None:
    bench = Bench()
    bench.submit("gone", "r", 100, 5)
    assert not bench.ends
    bench.run()
    assert [end.reason for _, end in bench.ends] == [EndReason.LOST]


def test_a_migration_computes_all_but_the_last_gap_before_the_source_lets_go() -> None:
    bench = Bench()
    for node in "ab":
        bench.nodes[node].store.place("m0", Tier.DRAM)
    bench.start("i", "m0")
    bench.start("j", "m0", node="b")
    bench.run(2.0)
    first = bench.submit("i", "r", 1000, 700)
    bench.run(33.0)
    moved: list[float] = []
    source, target = bench.nodes["a"].lives["i"], bench.nodes["b"].lives["j"]
    Migration(source, target, lambda: moved.append(bench.kernel.now)).begin()
    bench.stop("i", grace_s=30.0)
    bench.run(36.0)
    # 301 tokens are made when it begins, 1301 take 1.301 s; 13 more came meanwhile, which is little.
    assert moved == [pytest.approx(34.301)]
    ((at, end),) = bench.ends
    assert (at, end.reason, end.position) == (pytest.approx(34.301), EndReason.LOST, 314)
    assert bench.tokens[first] == 314
    assert bench.states("i")[-1] == (pytest.approx(34.301), _I.STOPPED)
    bench.submit("j", "r", 1000, 700, generated=314, node="b")
    bench.run()
    assert bench.firsts["r"] == pytest.approx(36.013)
    assert bench.ends[-1][1].position == 700
    assert bench.ends[-1][1].timing is None


def test_a_source_that_stops_in_the_middle_of_a_migration_loses_nothing() -> None:
    bench = Bench()
    for node in "ab":
        bench.nodes[node].store.place("m0", Tier.DRAM)
    bench.start("i", "m0")
    bench.start("j", "m0", node="b")
    bench.run(2.0)
    bench.submit("i", "r", 1000, 700)
    bench.run(33.0)
    Migration(bench.nodes["a"].lives["i"], bench.nodes["b"].lives["j"], lambda: None).begin()
    bench.run(33.5)
    bench.stop("i")
    assert bench.ends[-1][1].position == 306
    bench.submit("j", "r", 1000, 700, generated=306, node="b")
    bench.run()
    assert bench.firsts["r"] == pytest.approx(34.301 + 0.005)
    assert bench.ends[-1][1].position == 700
    engine = bench.nodes["b"].lives["j"].engine
    assert engine is not None
    assert engine.tokens == engine.kept == 0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_memory_is_kept_within_its_bounds(seed: int) -> None:
    """Starts where there is room, stops, drops and sequences at random: the assertions within must hold, and in the end
    everything is free again."""
    random = Random(seed)
    bench = Bench(machine(dram_bytes=random.choice([20, 45, 100]) * GB), group(devices=random.choice([1, 2])))
    node = bench.nodes["a"]
    for number in range(4):
        node.store.place(f"m{number}", Tier.DISK)
    devices = bench.group.devices
    share = 20 * GB // devices
    count = 0
    for _ in range(200):
        bench.run(bench.kernel.now + random.uniform(0, 3))
        for device in node.store.devices:
            used = sum(weights.size for weights in device.weights.values())
            used += sum(life.start.options.kv_bytes for life in node.lives.values() if device in life.devices)
            assert used <= device.memory_bytes
            lives = sum(device in life.devices for life in node.lives.values())
            assert lives <= sum(weights.users for weights in device.weights.values())
        match random.randrange(4):
            case 0:
                chosen = tuple(sorted(random.sample(range(2), devices)))
                digest = f"m{random.randrange(4)}"
                if all(_free(node.store.devices[index]) >= share + 5 * GB for index in chosen):
                    count += 1
                    bench.start(f"i{count}", digest, chosen, kv=5 * GB)
            case 1 if node.lives:
                bench.stop(random.choice(list(node.lives)), random.choice([0.0, 5.0]))
            case 2:
                bench.drop(f"m{random.randrange(4)}", Tier.DEVICE)
            case _ if node.lives:
                bench.submit(random.choice(list(node.lives)), f"r{bench.epochs}", random.randint(1, 500), 50)
    for instance in list(node.lives):
        bench.stop(instance)
    bench.run()
    for digest in bench.models:
        bench.drop(digest, Tier.DEVICE)
    assert all(not device.weights and _free(device) == device.memory_bytes for device in node.store.devices)
    assert all(not resident.users for resident in node.store.arena.residents.values())
    assert len(bench.ends) == len(bench.outputs)
