from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agent.engine import invariant, products
from agent.engine.invariant import TILE_ROWS, RowInvariant
from agent.engine.products import ROWS, Product, Ways, ways_of, widened
from agent.native import few_tokens
from agent.native.few_tokens import Way
from schema.errors import InvalidCheckpoint

CPU = torch.device("cpu")
WAYS = [ROWS, Ways(columns=range(1, 65)), Ways(columns=range(1, 2), widened=9)]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def without_16_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that computes with no 16-bit floats, with and without what is compiled."""
    if not request.param:
        monkeypatch.setattr(few_tokens, "ways", lambda: Way(0))
    for module in (products, invariant):
        monkeypatch.setattr(module, "is_widened", lambda dtype, device: dtype in (torch.bfloat16, torch.float16))
    ways_of.cache_clear()
    yield
    ways_of.cache_clear()


def exact(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    out = x.double() @ torch.cat(weights).double().t()
    return out if bias is None else out + bias.double()


def close(left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(left.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ways", WAYS, ids=["rows", "columns", "widened"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 33, 65])
def test_every_way_gives_the_same_product(ways: Ways, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_TILE_BYTES", 7 * 40 * 4)  # tiles of seven rows, the last of a weight with fewer
    monkeypatch.setattr(products, "_scratch", products._Scratch())
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 40).to(dtype)
    weights = [(torch.randn(rows, 40) / 6).to(dtype) for rows in (16, 9)]
    bias = torch.randn(25).to(dtype)
    product = Product(tuple(weights), bias, ways)
    close(product(x), exact(x, weights, bias), dtype)
    close(product.columns(x.t()), exact(x, weights, bias).t(), dtype)
    assert product(x).is_contiguous()

    one = Product((weights[0],), bias[:16], ways)
    start = torch.randn(tokens, 16).to(dtype)
    for rows in (x, x.t().contiguous().t()):  # as columns leave them
        residual = start.clone()
        one.add_to(residual, rows)
        close(residual, exact(x, weights[:1], bias[:16]) + start.double(), dtype)


@pytest.mark.skipif(not few_tokens.ways(), reason="not compiled, or not for this processor")
@pytest.mark.parametrize("way", Way)
def test_few_tokens_go_the_compiled_way(way: Way) -> None:
    if way not in few_tokens.ways():
        pytest.skip("this processor has not the instructions")
    dtype = torch.float16 if way is Way.FLOAT16 else torch.bfloat16
    torch.manual_seed(way)
    weights = [(torch.randn(rows, 64) / 8).to(dtype) for rows in (16, 9)]
    bias = torch.randn(25).to(dtype)
    ways = Ways(columns=range(1, 65), few=range(1, 9), way=way)
    product, one = Product(tuple(weights), bias, ways), Product((weights[0],), bias[:16], ways)
    for tokens in (0, 1, 8, 9):
        x = torch.randn(tokens, 64).to(dtype)
        assert product.as_columns(tokens) == (tokens > 8)
        close(product(x), exact(x, weights, bias), dtype)
        start = torch.randn(tokens, 16).to(dtype)
        for rows in (x, x.t().contiguous().t()):
            residual = start.clone()
            one.add_to(residual, rows)
            close(residual, exact(x, weights[:1], bias[:16]) + start.double(), dtype)


def test_weights_that_do_not_fit_go_another_way() -> None:
    ways = Ways(few=range(1, 9), way=Way.BFLOAT16)
    zeros = torch.zeros(4, 128, dtype=torch.bfloat16)
    for weight in (zeros[:, :40].contiguous(), zeros.t(), zeros[:, ::2], zeros[:, :0].contiguous()):
        product = Product((weight,), None, ways)
        assert not product.few
        assert product(zeros[:2, : weight.shape[1]]).shape == (2, weight.shape[0])


def test_tokens_that_do_not_fit_are_refused_not_read_beyond() -> None:
    """As by torch: an address knows no length."""
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    product = Product((weight,), None, Ways(few=range(1, 9), way=Way.BFLOAT16))
    for x in (torch.zeros(2, 32, dtype=torch.bfloat16), torch.zeros(2, 96, dtype=torch.bfloat16), torch.zeros(2, 64)):
        with pytest.raises(InvalidCheckpoint, match=f"{x.shape[1]} numbers of {x.dtype}.*64 of torch.bfloat16"):
            product(x)


def test_a_row_longer_than_a_tile_is_multiplied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_TILE_BYTES", 64)
    monkeypatch.setattr(products, "_scratch", products._Scratch())
    x, weight = torch.randn(100, 3).bfloat16(), torch.randn(5, 100).bfloat16()
    close(widened([weight], x), exact(x.t(), [weight], None).t(), torch.bfloat16)


def test_small_weights_are_multiplied_as_rows() -> None:
    ways = Ways(columns=range(1, 9), least=50)
    assert Product((torch.zeros(10, 5),), None, ways).as_columns(8)
    assert not Product((torch.zeros(9, 5),), None, ways).as_columns(8)
    assert Product((torch.zeros(5, 5), torch.zeros(5, 5)), None, ways).as_columns(8)
    assert not Product((torch.zeros(10, 5),), None, ways).as_columns(9)


@pytest.mark.parametrize("amx", [False, True])
def test_few_tokens_go_as_columns_where_there_are_tiles(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_widened", lambda dtype, device: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    ways_of.cache_clear()
    try:
        columns = ways_of(torch.bfloat16, CPU).columns
        assert [tokens in columns for tokens in (1, 15, 16, 64, 65)] == [amx, amx, True, True, False]
    finally:
        ways_of.cache_clear()


def test_few_tokens_go_the_compiled_way_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "ways", lambda: Way.DOT | Way.BFLOAT16 | Way.FLOAT16)
    for widens, amx, way in ((False, False, Way.DOT), (True, False, Way.BFLOAT16), (False, True, None)):
        monkeypatch.setattr(products, "is_widened", lambda dtype, device, widens=widens: widens)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        ways_of.cache_clear()
        ways = ways_of(torch.bfloat16, CPU)
        assert (ways.way, 2 in ways.few) == (way, way is not None)
    ways_of.cache_clear()


def test_avx_512_without_its_bfloat16_goes_the_way_of_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """As servers from Skylake to Ice Lake: torch takes them for computing with bfloat16, and is three times as slow."""
    monkeypatch.setattr(few_tokens, "ways", lambda: Way.BFLOAT16 | Way.FLOAT16)
    monkeypatch.setattr(products, "is_widened", lambda dtype, device: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    ways_of.cache_clear()
    ways = ways_of(torch.bfloat16, CPU)
    assert (ways.way, ways.few, 64 in ways.columns) == (Way.BFLOAT16, range(2, 33), True)
    assert ways_of(torch.float16, CPU).way is None
    ways_of.cache_clear()


def test_ways_follow_the_processor(without_16_bits: None) -> None:
    assert ways_of(torch.bfloat16, CPU).widened < 32
    assert ways_of(torch.bfloat16, torch.device("meta")) == ROWS
    assert ways_of(torch.float64, CPU) == ROWS


def test_widened_products_of_a_deterministic_model_treat_each_row_alike(without_16_bits: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(3 * TILE_ROWS + 5, 256).bfloat16()
    layer = nn.Linear(256, 300).bfloat16()
    parts = [slice(0, 1), slice(7, 40), slice(40, 101), slice(0, 0)]
    with torch.inference_mode(), RowInvariant():
        whole = layer(x)
        found = [layer(x[rows]) for rows in parts]
        batched = layer(x.view(1, *x.shape))
    assert all(torch.equal(out, whole[rows]) for rows, out in zip(parts, found, strict=True))
    assert torch.equal(batched[0], whole)
    close(whole, exact(x, [layer.weight.detach()], layer.bias.detach()), torch.bfloat16)
