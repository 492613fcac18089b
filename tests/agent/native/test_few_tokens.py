from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agent.native import few_tokens
from agent.native.few_tokens import STEP, Way

TYPES = {Way.DOT: torch.bfloat16, Way.BFLOAT16: torch.bfloat16, Way.FLOAT16: torch.float16}
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(params=TYPES, ids=lambda way: way.name)
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    if chosen not in few_tokens.ways():
        pytest.skip("this processor has not the instructions")
    return chosen


def multiply(way: Way, weight: Tensor, x: Tensor, *, residual: Tensor | None = None, threads: int = 1) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=weight.dtype) if residual is None else residual.clone()
    given = x if way is Way.DOT else x.float()
    few_tokens.multiply(
        way, weight.data_ptr(), *weight.shape, given.data_ptr(), x.shape[0], out.data_ptr(), out.shape[1],
        adds=residual is not None, threads=threads,
    )  # fmt: skip
    return out


def made(way: Way, outputs: int, inputs: int, tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(outputs + inputs + tokens)
    return (torch.randn(outputs, inputs) / inputs**0.5).to(TYPES[way]), torch.randn(tokens, inputs).to(TYPES[way])


@pytest.mark.parametrize("tokens", [*range(1, 10), 17, 40])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (13, 96), (70, 4096), (3, 131072 + 32)])
def test_it_multiplies(way: Way, outputs: int, inputs: int, tokens: int) -> None:
    weight, x = made(way, outputs, inputs, tokens)
    exact = x.double() @ weight.double().t()
    tolerance = 2.0**-7 if TYPES[way] == torch.bfloat16 else 2.0**-9
    torch.testing.assert_close(multiply(way, weight, x).double(), exact, rtol=tolerance, atol=tolerance)
    residual = torch.randn(tokens, outputs).to(TYPES[way])
    added = multiply(way, weight, x, residual=residual)
    torch.testing.assert_close(added.double(), exact + residual.double(), rtol=tolerance, atol=tolerance)


def test_sums_are_rounded_once_to_the_nearest_ties_to_even(way: Way) -> None:
    bits = 8 if TYPES[way] == torch.bfloat16 else 11
    ulp = 2.0 ** (1 - bits)
    cases = {1 + ulp / 2: 1.0, 1 + 1.5 * ulp: 1 + 2 * ulp, 1 + 0.75 * ulp: 1 + ulp, 1 + 0.25 * ulp: 1.0}
    weight = torch.zeros(len(cases), STEP, dtype=TYPES[way])
    for row, total in enumerate(cases):
        weight[row, 0], weight[row, 9] = 1.0, total - 1
    out = multiply(way, weight, torch.ones(1, STEP, dtype=TYPES[way]))
    assert out[0].double().tolist() == list(cases.values())

    half = torch.zeros(1, STEP, dtype=TYPES[way])
    half[0, 3], half[0, 5] = ulp / 2, ulp / 256  # rounded before it is added, it would be half an ulp, and lost
    residual = torch.ones(1, 1, dtype=TYPES[way])
    assert multiply(way, half, torch.ones(1, STEP, dtype=TYPES[way]), residual=residual).item() == 1 + ulp


def test_what_is_no_number_stays_none(way: Way) -> None:
    weight, x = made(way, 9, 64, 2)
    x[1, 40] = torch.nan
    weight[4, 7] = torch.inf
    out = multiply(way, weight, x)
    assert out[1].isnan().all()
    assert out[0].isinf().tolist() == [row == 4 for row in range(9)]


def test_a_token_has_the_same_bits_whatever_stands_beside_it(way: Way) -> None:
    weight, x = made(way, 101, 256, 40)
    together = multiply(way, weight, x)
    for size in range(1, 10):
        for start in range(0, 40, size):
            assert torch.equal(multiply(way, weight, x[start : start + size]), together[start : start + size])
    for rows in (1, 2, 50):
        assert torch.equal(multiply(way, weight[rows:], x), together[:, rows:])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_outputs(way: Way, threads: int) -> None:
    for outputs in (1, 2, 5, 200):
        weight, x = made(way, outputs, 128, 3)
        assert torch.equal(multiply(way, weight, x, threads=threads), multiply(way, weight, x))


def test_weights_lie_at_any_address_and_outputs_beside_others(way: Way) -> None:
    weight, x = made(way, 10, 64, 5)
    shifted = torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view(weight.shape).copy_(weight)
    out = torch.zeros(5, 14, dtype=weight.dtype)
    given = x if way is Way.DOT else x.float()
    few_tokens.multiply(way, shifted.data_ptr(), 10, 64, given.data_ptr(), 5, out[:, 2:].data_ptr(), 14, adds=False, threads=2)
    assert torch.equal(out[:, 2:12], multiply(way, weight, x))
    assert not out[:, :2].any()
    assert not out[:, 12:].any()
