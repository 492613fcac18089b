"""Known answers of Random123 (kat_vectors, philox 4x32 10)."""

from __future__ import annotations

import pytest
import torch

from agent.engine.philox import philox4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = philox4x32(*(torch.tensor([c]) for c in counter), *(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == answer


def test_broadcast_equals_single_calls() -> None:
    rows = torch.tensor([[3], [ONES]])
    columns = torch.arange(37).unsqueeze(0)
    zero = torch.zeros_like(rows)
    together = philox4x32(rows, columns, zero, zero, rows + 0, zero)
    for r in range(2):
        for c in (0, 7, 36):
            at = (rows[r], columns[0, c : c + 1], zero[r], zero[r])
            alone = philox4x32(*at, rows[r], zero[r])
            assert [int(word[r, c]) for word in together] == [int(word) for word in alone]
