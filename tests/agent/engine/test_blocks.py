"""Blocks against a brute-force twin that knows what every block holds."""

from __future__ import annotations

import random
from typing import Any

from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.prefix import PrefixChain, prefix_salt
from agent.engine.sequence import Sequence
from tests.agent.engine.models import submit_of


def ignore(_: list[int]) -> None:
    """What erases, where nothing is spoiled."""


class _Twin:
    """What is in each block: the tenant's tokens up to each slot, as whoever wrote them knew them; and who holds what."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.total, self.rows, self.width = rng.randint(4, 24), rng.randint(1, 6), rng.randint(4, 24)
        self.manager = BlockManager(self.total, self.rows, self.width, self.erase)
        self.content: dict[tuple[int, int], Any] = {}
        self.running: list[Sequence] = []
        self.doubtful: set[int] = set()
        """Blocks whose last writing nobody has seen to be sound."""
        self.shared = 0

    def erase(self, blocks: list[int]) -> None:
        for block in blocks:
            assert sum(block in sequence.blocks for sequence in self.running) <= 1, "what others read was erased"
            for slot in range(BLOCK_TOKENS):
                self.content.pop((block, slot), None)
        self.doubtful.difference_update(blocks)

    def submit(self, number: int) -> None:
        base = self.rng.randint(0, 2)  # few beginnings, so that many are shared
        length = self.rng.randint(1, min(self.total, self.width) * BLOCK_TOKENS)
        tokens = [base] * self.rng.randint(1, length)
        tokens += [self.rng.randint(0, 1) for _ in range(length - len(tokens))]
        tenant = self.rng.choice(["", "a"])
        sequence = Sequence(submit_of(number, tokens, 10_000), prefix_salt("m", tenant))
        sequence.account.tenant = tenant
        free = self.manager.free
        reserve = self.rng.randint(0, 2)
        if not self.manager.admit(sequence, reserve):
            assert (self.manager.free, sequence.row, sequence.blocks) == (free, -1, [])
            assert BlockManager.needed(length) + reserve > free, "it would have fitted without any sharing"
            return
        assert sequence.cached % BLOCK_TOKENS == 0
        assert sequence.cached < len(tokens), "the last token is always computed"
        for at in range(sequence.cached):
            block = sequence.blocks[at // BLOCK_TOKENS]
            assert block not in self.doubtful
            assert self.content[block, at % BLOCK_TOKENS] == (tenant, tokens[: at + 1])
        self.shared += sequence.cached
        self.running.append(sequence)

    def compute(self, sequence: Sequence) -> None:
        left = len(sequence.tokens) - sequence.cached
        if left == 0:
            sequence.append(self.rng.randint(0, 1))
            if not self.manager.extend(sequence, len(sequence.tokens)):
                self.release(sequence)
            return
        size = self.rng.randint(1, left)
        for at in range(sequence.cached, sequence.cached + size):
            block = sequence.blocks[at // BLOCK_TOKENS]
            assert [block in other.blocks for other in self.running].count(True) == 1, "it writes where others read"
            self.content[block, at % BLOCK_TOKENS] = (sequence.account.tenant, sequence.tokens[: at + 1])
            self.doubtful.add(block)
        sequence.cached += size
        if self.rng.random() < 0.8:
            self.manager.publish(sequence)
            self.doubtful.difference_update(sequence.blocks)

    def release(self, sequence: Sequence) -> None:
        self.manager.release(sequence, spoiled=self.rng.random() < 0.1)
        self.manager.release(sequence)
        self.running.remove(sequence)
        assert sequence.row == -1
        assert not sequence.blocks

    def check(self) -> None:
        manager = self.manager
        held = {block for sequence in self.running for block in sequence.blocks}
        assert 0 not in held
        assert all(0 < block <= self.total for block in held)
        assert manager.free == self.total - len(held)
        assert manager.used_tokens == len(held) * BLOCK_TOKENS
        assert manager.free_rows == self.rows - len(self.running)
        assert manager.cached_tokens <= manager.free * BLOCK_TOKENS
        assert not self.doubtful - held, "a block was freed whose content nobody had seen to be sound"
        for sequence in self.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            assert manager.tables[sequence.row].tolist() == sequence.blocks + [0] * (self.width - len(sequence.blocks))


def test_blocks_agree_with_a_brute_force_twin() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    shared = 0
    for _ in range(30):
        twin = _Twin(rng)
        for number in range(150):
            choice = rng.random()
            if choice < 0.3 and twin.manager.free_rows:
                twin.submit(number)
            elif twin.running and choice < 0.85:
                twin.compute(rng.choice(twin.running))
            elif twin.running:
                twin.release(rng.choice(twin.running))
            twin.check()
        shared += twin.shared
    assert shared > 1000


def test_the_longest_unused_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    manager = BlockManager(4, 4, 4, ignore)

    def run(number: int, tokens: list[int]) -> int:
        sequence = Sequence(submit_of(number, tokens, 10))
        assert manager.admit(sequence, 0)
        found = sequence.cached
        sequence.cached = len(tokens)
        manager.publish(sequence)
        manager.release(sequence)
        return found

    one, two = [1] * 33, [2] * 17
    assert run(1, one) == 0
    assert manager.cached_tokens == 32
    assert run(2, two) == 0  # takes the two blocks that hold nothing
    assert run(3, one) == 32  # now two's is the longest unused; this one's third block is free again
    assert run(4, [3] * 33) == 0  # three blocks: the free one, two's, and the end of one's
    assert run(5, two) == 0
    assert run(6, one) < 32


def test_a_chain_of_names_tells_models_adapters_tenants_and_histories_apart() -> None:
    tokens = [5, 6, 7, 8] * 12
    salts = [prefix_salt(*of) for of in (("m", ""), ("m", "a"), ("n", ""), ("m", "", "a"), ("ma", ""), ("", "m"))]
    names = [PrefixChain(salt).upto(tokens, 3) for salt in salts]
    assert len({name for each in names for name in each}) == 18, "the same tokens at another place have another name"
    grown = PrefixChain(salts[0])
    assert grown.upto(tokens, 1) == names[0][:1]
    assert grown.upto(tokens, 3) == names[0]
    assert PrefixChain(salts[0]).upto([*tokens[:20], 0, *tokens[21:]], 3)[0] == names[0][0]
    assert not set(PrefixChain(salts[0]).upto([*tokens[:20], 0, *tokens[21:]], 3)[1:]) & set(names[0])


def test_who_needs_what_another_computes_just_now_is_told() -> None:
    manager = BlockManager(16, 4, 8, ignore)
    first, second, other = (Sequence(submit_of(n, tokens, 10)) for n, tokens in enumerate(([1] * 40, [1] * 36, [2] * 40)))
    assert manager.admit(first, 0)
    assert manager.awaits(second)
    assert not manager.awaits(other)
    first.cached = 40
    manager.publish(first)
    assert not manager.awaits(second)
    assert manager.admit(second, 0)
    assert second.cached == 32
    third = Sequence(submit_of(9, [2] * 40, 10))
    assert manager.admit(other, 0)
    assert manager.awaits(third)
    manager.release(other)  # it was cancelled before it came to that
    assert not manager.awaits(third)


def test_nothing_is_shared_where_that_was_not_wanted() -> None:
    manager = BlockManager(16, 4, 8, ignore, share=False)
    first, second = (Sequence(submit_of(n, [1] * 40, 10)) for n in range(2))
    assert manager.admit(first, 0)
    assert not manager.awaits(second)
    first.cached = 40
    manager.publish(first)
    assert manager.admit(second, 0)
    assert (second.cached, manager.cached_tokens) == (0, 0)
