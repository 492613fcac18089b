"""The DRAM tier under any order of fills, holds, drops, pins and verifications, beside a model of its budget."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.native.arena import Arena
from agent.native.reader import Priority
from agent.store import catalog
from schema.errors import Conflict, NotFound
from tests.agent.store.images import CHUNK, Bench, Borrower, commit, read_image
from tests.examples import examples


class Budget(RuleBasedStateMachine):
    """Any order of fills, holds, drops, pins and verifications against a set of digests and their users."""

    CHUNKS = 5

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="sl"))
        self.made = [commit(self.root, number, size * CHUNK - 100) for number, size in enumerate((1, 1, 2, 3, 6))]
        self.bench = Bench(Arena.create(self.CHUNKS * CHUNK, CHUNK))
        self.users: dict[str, int] = {}
        self.order: list[str] = []
        self.kept: set[str] = set()
        self.count = 0

    @rule(number=st.integers(0, 4), users=st.integers(0, 2))
    def fill(self, number: int, users: int) -> None:
        digest, directory, image = self.made[number]
        before, self.bench.told.gone = dict(self.users), []
        self.count += 1
        op = f"op{self.count}"
        self.bench.store.fill(op, digest, directory, users)
        self.bench.wait(op)
        size = -(-len(image) // CHUNK)
        others = {each: users for each, users in before.items() if each != digest}
        pinned = sum(self._size(each) for each, users in others.items() if users or each in self.kept)
        gone = self.bench.told.gone
        if digest not in before and size + pinned > self.CHUNKS:
            assert self.bench.told.faults[op].code == "out_of_space"
            assert not gone
            return
        expected = []
        if digest not in before:
            idle = [each for each in self.order if not before.get(each) and each not in self.kept]
            while sum(self._size(each) for each in before if each not in expected) + size > self.CHUNKS:
                expected.append(idle.pop(0))
        assert gone == expected
        for each in expected:
            del self.users[each]
            self.order.remove(each)
        self._touch(digest, users)

    @rule(number=st.integers(0, 4), users=st.integers(0, 2))
    def hold(self, number: int, users: int) -> None:
        digest = self.made[number][0]
        self.bench.store.hold(digest, users)
        if digest in self.users:
            self._touch(digest, users)

    @rule(number=st.integers(0, 4))
    def drop(self, number: int) -> None:
        digest = self.made[number][0]
        if digest not in self.users:
            with pytest.raises(NotFound):
                self.bench.store.drop(digest)
        elif self.users[digest] or digest in self.kept:
            with pytest.raises(Conflict):
                self.bench.store.drop(digest)
        else:
            self.bench.store.drop(digest)
            del self.users[digest]
            self.order.remove(digest)

    @rule(number=st.integers(0, 4), lent=st.booleans())
    def let_go(self, number: int, lent: bool) -> None:
        """An image that is named goes, whoever is counted or pinned it; one that is lent goes after that."""
        digest, directory, _ = self.made[number]
        image_id = catalog.read_entry(directory).manifest.image_id
        self.bench.told.gone = []
        if digest not in self.users:
            with pytest.raises(NotFound):
                self.bench.store.drop(digest, image_id)
            return
        if lent:
            self.bench.store.bring(Borrower(), digest, directory, Priority.REQUEST, image_id)
            with pytest.raises(Conflict):
                self.bench.store.drop(digest, image_id)
            self.agrees()
            self.bench.store.give_back(digest)
        else:
            self.bench.store.drop(digest, image_id)
        assert self.bench.told.gone == [digest]
        del self.users[digest]
        self.order.remove(digest)

    @rule(numbers=st.sets(st.integers(0, 4)))
    def pin(self, numbers: set[int]) -> None:
        self.kept = {self.made[number][0] for number in numbers}
        self.bench.store.pin(self.kept)

    @rule(number=st.integers(0, 4), wrong=st.booleans())
    def verify(self, number: int, wrong: bool) -> None:
        """A wrong image goes unless somebody uses it, pinned or not; the twin then forgets it."""
        digest, directory, _ = self.made[number]
        self.count += 1
        op = f"op{self.count}"
        occupant = self.bench.store._residency.get(digest)
        wrong = wrong and occupant is not None and not self.users[digest]
        if wrong:
            assert occupant is not None
            (view,) = self.bench.arena.views(occupant.chunks, 7, 1)
            view[0] ^= 1
        self.bench.told.gone = []
        self.bench.store.verify(op, digest, directory)
        self.bench.wait(op)
        assert (self.bench.told.verdicts[op] is not None) == wrong
        assert self.bench.told.gone == ([digest] if wrong else [])
        if wrong:
            del self.users[digest]
            self.order.remove(digest)

    @rule(number=st.integers(0, 4))
    def fail(self, number: int) -> None:
        digest, directory, _ = self.made[number]
        if digest not in self.users:
            self.count += 1
            self.bench.store.fill(f"op{self.count}", digest, directory.parent / "none")
            assert self.bench.told.faults[f"op{self.count}"].code == "invalid_checkpoint"

    @precondition(lambda self: self.users)
    @rule()
    def restart(self) -> None:
        descriptor = os.dup(self.bench.arena.descriptor)
        self.bench.close()
        self.bench = Bench(Arena.adopt(descriptor, self.CHUNKS * CHUNK, CHUNK))
        self.bench.store.pin(self.kept)  # as the agent says after every truth

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "users"):
            return
        residents = {resident.digest: resident for resident in self.bench.store.residents()}
        assert {digest: resident.users for digest, resident in residents.items()} == self.users
        assert self.bench.store.arena.used_bytes == sum(map(self._size, self.users)) * CHUNK <= self.CHUNKS * CHUNK
        for digest, _, image in self.made:
            if digest in residents:
                assert read_image(self.bench.arena.descriptor, residents[digest]) == image

    def teardown(self) -> None:
        self.bench.close()
        shutil.rmtree(self.root)

    def _size(self, digest: str) -> int:
        return -(-len(self.made[int(digest, 16)][2]) // CHUNK)

    def _touch(self, digest: str, users: int) -> None:
        self.users[digest] = users
        self.order = [*(each for each in self.order if each != digest), digest]


TestBudget = Budget.TestCase
TestBudget.settings = settings(max_examples=examples(15), stateful_step_count=20, suppress_health_check=list(HealthCheck))
