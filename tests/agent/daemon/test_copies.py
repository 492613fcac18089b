"""Several copies of one checkpoint, whose images differ: which one is loaded where, and what of them goes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.daemon.catalog import Checkpoints
from agent.daemon.connection import Connection
from agent.daemon.storelink import StoreLink
from agent.store import catalog
from schema.checkpoint import IN_PLACE, AssetEntry, SourceFile, decode_manifest, encode_manifest
from schema.errors import Fault
from schema.link import (
    ArenaInfo,
    DeviceWeights,
    DropDevice,
    DropResident,
    Evicted,
    Extent,
    FetchStored,
    FillArena,
    FillDevice,
    HoldCheckpoint,
    HoldDevice,
    Message,
    NodeEvent,
    OperationDone,
    Resident,
    StoreTruth,
)
from schema.states import Tier, TierState
from tests.agent.daemon.peers import DIGEST, make_checkpoint

OTHER_ID = "9" * 32


class Place:
    """An agent's knowledge of one checkpoint, over a store that does what it is told: it is its kin and its owner too."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkpoints"
        self.root.mkdir(parents=True)
        self.said: list[Message] = []
        kin: Any = self
        self.store = StoreLink(kin, self)
        self.checkpoints = Checkpoints(self.root, self.store)
        self.stale = False
        info = ArenaInfo(id="arena_1", budget_bytes=1 << 30, chunk_bytes=4 << 20)
        self.truth = StoreTruth(arena=info)
        self.hear(self.truth)

    def send(self, message: Message) -> None:
        self.said.append(message)

    def disclaim(self, connection: Connection) -> bool:
        return True

    def hear(self, message: Message) -> None:
        self.store.received(None, message)  # type: ignore[arg-type]

    def placement_changed(self, digest: str) -> None:
        self.stale = self.checkpoints.stale(digest)

    async def look(self) -> None:
        """What the agent does once something seems to be of no use."""
        if self.stale:
            await self.checkpoints.scan()

    def source(self, *devices: int) -> str:
        """The layout that is loaded to these devices, or to memory."""
        return self.checkpoints.source(DIGEST, devices)[0].removeprefix(f"{DIGEST}/")

    def happened(self, event: NodeEvent) -> None: ...

    def loaded(self, digest: str) -> None: ...

    def load_failed(self, digest: str, fault: Fault) -> None: ...

    def checkpoint_came(self, digest: str, then: Callable[[], None]) -> None: ...

    def arena_changed(self) -> None: ...

    def store_ready(self) -> None: ...

    def store_lost(self) -> None: ...

    async def copy(self, layout: str) -> str:
        """Another copy on the disk, and its image's id."""
        directory = make_checkpoint(self.root, layout=layout)
        await self.checkpoints.scan()
        return decode_manifest((directory / "manifest.json").read_bytes()).image_id

    async def spoil(self, layout: str, file: str = "part-0") -> None:
        directory = self.root / DIGEST / layout
        catalog.quarantine(directory, f"{directory}/{file}: bytes are wrong")
        await self.checkpoints.scan()

    async def cut(self, layout: str) -> None:
        manifest = self.root / DIGEST / layout / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-1])
        await self.checkpoints.scan()

    @property
    def disk(self) -> tuple[TierState, str]:
        """What is said of the disk: its state, and why."""
        (placement,) = self.checkpoints.truth(DIGEST).placements
        return placement.state, placement.reason

    def lies_in_memory(self, image_id: str) -> None:
        self.hear(Resident(digest=DIGEST, image_id=image_id, extents=(Extent(0, 4096),), image_bytes=4096))

    def lies_on_device(self, image_id: str, device: int) -> DeviceWeights:
        name = f"weights_{device}"
        weights = DeviceWeights(id=name, digest=DIGEST, device=device, image_id=image_id, size_bytes=4096, image_bytes=4096)
        self.store.devices.keep(weights, os.open("/dev/null", os.O_RDONLY))
        return weights

    def drops(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_what_is_dropped_from_devices_is_not_taken_for_dropped_from_memory(place: Place) -> None:
    await place.copy("l1")
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0)
    place.lies_on_device(OTHER_ID, 0)
    place.lies_in_memory(OTHER_ID)
    place.store.devices.release(DIGEST, (0,), "inst_1")
    await place.look()
    (memory,), (device,) = place.drops(DropResident), place.drops(DropDevice)
    place.hear(OperationDone(op=device.op, digest=DIGEST))
    assert DIGEST in place.store.residents
    place.hear(OperationDone(op=memory.op, digest=DIGEST, fault=Fault("conflict", "it is being verified")))
    assert DIGEST in place.store.residents


async def test_what_is_fetched_again_is_not_stated_on_a_device_before_it_is_on_the_disk(place: Place) -> None:
    image_id = await place.copy("l1")
    place.lies_in_memory(image_id)
    await place.checkpoints.remove(DIGEST)  # while its image is on its way out
    place.hear(Evicted(digest=DIGEST))
    assert place.checkpoints.truth(DIGEST).placements == ()
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0)
    place.lies_on_device(image_id, 0)
    assert place.checkpoints.truth(DIGEST).placements == (), "nobody else could be started over it"
    await place.copy("l1")
    assert [each.tier for each in place.checkpoints.truth(DIGEST).placements] == [Tier.DISK, Tier.DEVICE]


async def test_what_has_left_every_tier_is_forgotten(place: Place) -> None:
    await place.copy("l1")
    assert place.checkpoints.truth(DIGEST).architecture
    await place.checkpoints.remove(DIGEST)
    assert not place.checkpoints.truth(DIGEST).architecture


async def test_a_copy_in_quarantine_is_started_from_only_where_it_lies(place: Place) -> None:
    first, second = await place.copy("l1"), await place.copy("l2")
    place.lies_on_device(first, 0)
    await place.spoil("l1")
    assert (place.source(0), place.source(1), place.source()) == ("l1", "l2", "l2")
    place.lies_on_device(second, 1)
    place.lies_in_memory(first)
    assert (place.source(0), place.source(1), place.source(2), place.source()) == ("l1", "l2", "l1", "l1")
    await place.spoil("l1", "manifest.json")
    assert (place.source(0), place.source(1), place.source(2), place.source()) == ("l2", "l2", "l2", "l2")


async def test_a_copy_that_comes_to_a_device_is_started_from_there(place: Place) -> None:
    await place.copy("l1")
    second = await place.copy("l2")
    assert place.source(0) == "l1"
    place.store.devices.fill(DIGEST, f"{DIGEST}/l2", (0,), lambda _: None, lambda _: None, user="inst_1", image_id=second)
    assert (place.source(0), place.source(1), place.source()) == ("l2", "l1", "l1")


async def test_of_copies_with_one_image_the_sound_one_is_started_from(place: Place) -> None:
    await place.copy("l1")
    image_id = await place.copy("l2")
    assert await place.copy("l3") == image_id
    await place.spoil("l3", "manifest.json")
    place.lies_in_memory(image_id)
    assert place.source() == "l2"
    assert place.drops(DropResident) == []
    assert list(place.checkpoints.copies(DIGEST)) == [f"{DIGEST}/{layout}" for layout in ("l1", "l2", "l3")]


async def test_bad_copies_beside_a_sound_one_are_named_and_removed_with_it(place: Place) -> None:
    await place.copy("l1")
    assert place.disk == (TierState.RESIDENT, "")
    for layout in ("l2", "l3", "l4"):
        await place.copy(layout)
    await place.spoil("l2")
    await place.cut("l3")
    await place.cut("l4")
    state, reason = place.disk
    assert state is TierState.RESIDENT
    assert [told.partition(" is in quarantine: ")[0] for told in reason.split("; ")] == ["copy l2", "copy l3", "copy l4"]
    assert [path in reason for path in ("l2/part-0: bytes", "l3/manifest.json", "l4/manifest.json")] == [True] * 3
    assert [bool(why) for why in place.checkpoints.copies(DIGEST).values()] == [False, True, True, True]
    assert place.source() == "l1"
    await place.checkpoints.remove(DIGEST)
    assert list(place.root.iterdir()) == []


async def test_every_copy_is_stated_with_its_layout_the_best_first(place: Place) -> None:
    await place.copy("l1")
    await place.copy("l2")
    await place.copy("l3")
    catalog.mark_verified(place.root / DIGEST / "l2")
    await place.spoil("l1")
    await place.cut("l3")
    (placement,) = place.checkpoints.truth(DIGEST).placements
    assert [(copy.layout, copy.state, copy.verified) for copy in placement.copies] == [
        ("l2", TierState.RESIDENT, True), ("l1", TierState.QUARANTINED, False), ("l3", TierState.QUARANTINED, False)
    ]  # fmt: skip
    assert placement.copies[0].size_bytes == 4096
    assert placement.copies[2].size_bytes > 4096, "what it takes of the disk"


async def test_what_a_checkpoint_takes_of_the_disk_is_that_of_its_copies_but_not_of_the_users_own_files(place: Place) -> None:
    def taken() -> int:
        (placement,) = place.checkpoints.truth(DIGEST).placements
        return placement.size_bytes

    file = place.root.parent / "model.safetensors"
    file.write_bytes(b"\1" * 4096)
    status = file.stat()
    directory = make_checkpoint(place.root)
    (directory / "part-0").unlink()
    manifest = decode_manifest((directory / "manifest.json").read_bytes())
    source = SourceFile(str(file), status.st_mtime_ns, status.st_ino)
    partitions = tuple(msgspec.structs.replace(each, source=source) for each in manifest.partitions)
    manifest = msgspec.structs.replace(manifest, layout=IN_PLACE, partitions=partitions)
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))
    directory.rename(directory.with_name(IN_PLACE))
    await place.checkpoints.scan()
    assert taken() == 0
    assert place.checkpoints.truth(DIGEST).image_bytes == 4096
    for number, layout in enumerate(("l1", "l2"), 1):
        await place.copy(layout)
        assert taken() == number * 4096
    await place.cut("l2")
    assert taken() > 4096, "a damaged one takes its room, too"


async def test_where_all_copies_are_bad_each_is_named(place: Place) -> None:
    await place.copy("l1")
    await place.copy("l2")
    await place.spoil("l1")
    await place.cut("l2")
    state, reason = place.disk
    assert state is TierState.QUARANTINED
    assert reason.startswith(f"{place.root / DIGEST}/l1/part-0: bytes are wrong; copy l2 is in quarantine: ")
    await place.cut("l1")
    assert place.disk[0] is TierState.QUARANTINED
    assert list(place.checkpoints.copies(DIGEST)) == [f"{DIGEST}/l1", f"{DIGEST}/l2"]


def put_text(directory: Path, text: bytes, found: bytes) -> None:
    """A small file of the copy there, which was ingested as ``text``."""
    manifest = decode_manifest((directory / "manifest.json").read_bytes())
    assets = (AssetEntry("tokenizer.json", len(text), hashlib.sha256(text).hexdigest()),)
    (directory / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, assets=assets)))
    (directory / "tokenizer.json").write_bytes(found)


async def test_small_files_are_compared_with_the_manifest_that_lies_there_now(place: Place) -> None:
    await place.copy("l1")
    put_text(place.root / DIGEST / "l1", b"[]", b"[]")
    await place.checkpoints.scan()
    put_text(place.root / DIGEST / "l1", b"{}", b"{}")
    await place.checkpoints.check_assets(DIGEST)
    assert place.disk == (TierState.RESIDENT, "")


async def test_the_small_files_of_every_copy_are_looked_at(place: Place) -> None:
    for layout, found in (("l1", b"{}"), ("l2", b"{]")):
        await place.copy(layout)
        put_text(place.root / DIGEST / layout, b"{}", found)
    await place.checkpoints.scan()
    await place.checkpoints.check_assets(DIGEST)
    good, bad = place.checkpoints.copies(DIGEST).values()
    assert good is None
    assert bad is not None
    assert "l2/tokenizer.json" in bad


async def test_stale_weights_go_from_a_device_whatever_lies_in_memory(place: Place) -> None:
    first = await place.copy("l1")
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0)
    place.lies_on_device(first, 0)
    shutil.rmtree(place.root / DIGEST)
    second = await place.copy("l2")
    place.lies_in_memory(second)
    place.lies_on_device(second, 1)
    assert place.drops(DropDevice) == []
    place.store.devices.release(DIGEST, (0,), "inst_1")
    await place.look()
    assert [drop.image_id for drop in place.drops(DropDevice)] == [first]
    assert place.drops(DropResident) == []


async def test_a_pin_keeps_no_image_that_no_copy_has(place: Place) -> None:
    place.store.pin((DIGEST,))
    place.lies_in_memory(await place.copy("l1"))
    await place.look()
    assert place.drops(DropResident) == []
    place.lies_in_memory(OTHER_ID)
    await place.look()
    assert [drop.image_id for drop in place.drops(DropResident)] == [OTHER_ID]


async def test_an_image_without_usable_text_makes_way_for_what_was_fetched(place: Place) -> None:
    image_id = await place.copy("l1")
    place.lies_in_memory(image_id)
    place.lies_on_device(image_id, 0)
    place.lies_on_device(image_id, 1)
    await place.spoil("l1", "manifest.json")
    place.store.holds.add(DIGEST, "op_1", waits=True)
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0, waits=True)
    place.store.devices.hold(DIGEST, (1,), "inst_2", 0)
    fetch = FetchStored(op="op_1", digest=DIGEST, url="s3://b/c", in_memory=True, users=1)
    place.store.fetch(fetch, lambda _: None, lambda _: None)
    await place.checkpoints.scan()
    assert place.said[-1] == fetch, "it may be put right, and nobody knows whether another comes"
    await place.copy("l2")
    assert place.said[-1] == fetch, "it is not known what becomes of that copy"
    place.hear(OperationDone(op="op_1", digest=DIGEST, layout="l2"))
    await place.checkpoints.scan()
    (memory,), (device,) = place.drops(DropResident), place.drops(DropDevice)
    assert (memory.image_id, device.image_id, device.device) == (image_id, image_id, 0), "on device 1 it is used"


async def test_what_somebody_has_asked_for_stays(place: Place) -> None:
    image_id = await place.copy("l1")
    place.lies_in_memory(image_id)
    place.lies_on_device(image_id, 0)
    place.store.holds.add(DIGEST, "inst_1", waits=True)
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0, waits=True)
    ask(place, image_id)
    shutil.rmtree(place.root / DIGEST)
    other = await place.copy("l2")
    assert place.drops(DropResident) == place.drops(DropDevice) == []
    ask(place, other)
    assert place.drops(DropResident) == place.drops(DropDevice) == []


async def test_what_nobody_uses_gives_way_to_another_image_at_once(place: Place) -> None:
    image_id = await place.copy("l1")
    place.lies_in_memory(OTHER_ID)
    place.lies_on_device(OTHER_ID, 0)
    place.lies_on_device(OTHER_ID, 1)
    place.store.holds.add(DIGEST, "inst_1", waits=True)
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0, waits=True)
    place.said.clear()
    ask(place, image_id)
    kinds = [type(message) for message in place.said if not isinstance(message, HoldCheckpoint | HoldDevice)]
    assert kinds == [DropResident, FillArena, DropDevice, FillDevice]
    assert [drop.device for drop in place.drops(DropDevice)] == [0]


def ask(place: Place, image_id: str) -> None:
    """Ask for an image in memory and on a device."""
    place.store.fill(DIGEST, f"{DIGEST}/l1", lambda _: None, lambda _: None, user="inst_1", image_id=image_id)
    place.store.devices.fill(DIGEST, f"{DIGEST}/l1", (0,), lambda _: None, lambda _: None, user="inst_1", image_id=image_id)


async def test_what_an_earlier_agent_with_the_same_number_has_asked_for_is_not_taken_for_what_this_one_asks(
    tmp_path: Path,
) -> None:
    earlier, place = Place(tmp_path / "earlier"), Place(tmp_path / "later")
    filling = []
    for each in (earlier, place):
        ask(each, await each.copy("l1"))
        filling.append({message.op for message in each.said if isinstance(message, FillArena | FillDevice)})
    place.said.clear()
    place.hear(msgspec.structs.replace(place.truth, filling=tuple(filling[0])))
    assert {message.op for message in place.said if isinstance(message, FillArena | FillDevice)} == filling[1]
    assert len(filling[1]) == 2


async def test_what_comes_during_a_look_is_left_to_the_next(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalog.look

    def comes(root: Path) -> catalog.Found:
        found = real(root)
        place.lies_in_memory(OTHER_ID)
        return found

    monkeypatch.setattr(catalog, "look", comes)
    await place.checkpoints.scan()
    assert place.drops(DropResident) == []
    monkeypatch.undo()
    await place.look()
    assert len(place.drops(DropResident)) == 1


async def test_a_new_store_hears_what_is_to_go_before_what_is_to_come(place: Place) -> None:
    image_id = await place.copy("l1")
    place.lies_in_memory(OTHER_ID)
    place.lies_on_device(OTHER_ID, 0)
    await place.checkpoints.scan()
    before = (*place.drops(DropResident), *place.drops(DropDevice))
    place.store.devices.hold(DIGEST, (0,), "inst_1", 0, waits=True)
    ask(place, image_id)
    place.said.clear()
    weights = (DeviceWeights(id="weights_0", digest=DIGEST, device=0, image_id=OTHER_ID, size_bytes=4096, image_bytes=4096),)
    place.hear(msgspec.structs.replace(place.truth, residents=tuple(place.store.residents.values()), weights=weights))
    asked = [message for message in place.said if isinstance(message, DropResident | DropDevice | FillArena | FillDevice)]
    assert [type(message) for message in asked] == [DropResident, FillArena, DropDevice, FillDevice]
    assert (asked[0], asked[2]) == before


@pytest.mark.parametrize("wrong", [False, True])
async def test_what_could_not_go_at_once_goes_from_the_next_store_before_what_comes(place: Place, wrong: bool) -> None:
    image_id = await place.copy("l1")
    place.lies_in_memory(image_id if wrong else OTHER_ID)
    (lying,) = place.store.residents.values()
    if wrong:
        lying = msgspec.structs.replace(lying, condemned="a byte is wrong")
        place.hear(lying)
    place.store.holds.add(DIGEST, "inst_1", waits=True)
    ask(place, image_id)
    (before,) = place.drops(DropResident)
    place.hear(OperationDone(op=before.op, digest=DIGEST, fault=Fault("conflict", "it is being verified")))
    fill = next(message for message in place.said if isinstance(message, FillArena))

    def asked(*filling: str) -> list[Message]:
        connection: Any = None
        place.store.lost(connection, "it died")
        place.said.clear()
        place.hear(msgspec.structs.replace(place.truth, residents=(lying,), filling=filling))
        return [message for message in place.said if isinstance(message, DropResident | FillArena)]

    assert asked(fill.op) == [], "who was only not to be reached knows of both"
    assert asked() == [before, fill]
