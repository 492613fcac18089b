from __future__ import annotations

import random

from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.sequence import Sequence
from tests.agent.engine.models import submit_of


def test_blocks_agree_with_a_brute_force_twin() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(30):
        total, rows, width = rng.randint(1, 24), rng.randint(1, 6), rng.randint(1, 24)
        manager = BlockManager(total, rows, width)
        held: dict[Sequence, int] = {}
        for number in range(200):
            if rng.random() < 0.3 and manager.free_rows:
                sequence = Sequence(submit_of(number, [1]))
                manager.admit(sequence)
                held[sequence] = 0
            elif held and rng.random() < 0.7:
                sequence = rng.choice(list(held))
                tokens = rng.randint(0, total * BLOCK_TOKENS + 20)
                blocks = max(held[sequence], -(-tokens // BLOCK_TOKENS))
                fits = blocks <= width and blocks - held[sequence] <= total - sum(held.values())
                assert manager.extend(sequence, tokens) is fits
                if fits:
                    held[sequence] = blocks
            elif held:
                sequence = rng.choice(list(held))
                manager.release(sequence)
                manager.release(sequence)
                del held[sequence]
            owned = [block for sequence in held for block in sequence.blocks]
            assert len(owned) == len(set(owned)) == sum(held.values())
            assert 0 not in owned
            assert all(0 < block <= total for block in owned)
            assert manager.free == total - len(owned)
            assert manager.used_tokens == len(owned) * BLOCK_TOKENS
            assert manager.free_rows == rows - len(held)
            for sequence in held:
                table = manager.tables[sequence.row].tolist()
                assert table == sequence.blocks + [0] * (width - len(sequence.blocks))
