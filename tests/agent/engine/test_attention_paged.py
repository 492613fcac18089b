"""Which attention serves which KV memory; what it answers is compared in test_attended and test_architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agent.engine.attention import AttentionBatch, KvPool, LayerAttention
from agent.engine.attention_alone import AloneAttention
from agent.engine.attention_paged import PagedAttention, attention_for
from agent.engine.attention_sdpa import SdpaAttention
from agent.engine.blocks import BLOCK_TOKENS
from agent.native import paged_attention
from agent.native.paged_attention import Width
from schema.errors import InvalidCheckpoint


def pool_of(head_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> KvPool:
    return KvPool(1, 2, 1, head_dim, dtype, device)


def test_compiled_code_and_memory_mean_the_same_by_a_block() -> None:
    assert paged_attention.BLOCK_TOKENS == BLOCK_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 80, 512])
def test_heads_that_compiled_code_takes_attend_in_place(head_dim: int, dtype: torch.dtype) -> None:
    if not paged_attention.widths():
        pytest.skip("not compiled, or not for this processor")
    for deterministic in (False, True):
        assert isinstance(attention_for(pool_of(head_dim, dtype), deterministic), PagedAttention)


@pytest.mark.parametrize(
    "pool", [pool_of(8), pool_of(24), pool_of(528), pool_of(16, torch.float64), pool_of(16, device="meta")], ids=range(5)
)
def test_all_others_attend_over_gathered_blocks(pool: KvPool) -> None:
    assert isinstance(attention_for(pool, deterministic=False), SdpaAttention)
    assert isinstance(attention_for(pool, deterministic=True), AloneAttention)


def test_without_compiled_code_all_attend_over_gathered_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "widths", lambda: Width(0))
    assert isinstance(attention_for(pool_of(16), deterministic=False), SdpaAttention)
    assert isinstance(attention_for(pool_of(16), deterministic=True), AloneAttention)


def one_of(head_dim: int = 16, heads: int = 3, kv_heads: int = 1) -> tuple[PagedAttention, AttentionBatch, Tensor, Tensor]:
    """Two sequences' tokens at 0 and 1, their queries, and keys and values."""
    pool = KvPool(1, 2, kv_heads, 16, torch.float32, "cpu")
    attention = attention_for(pool, deterministic=False)
    if not isinstance(attention, PagedAttention):
        pytest.skip("not compiled, or not for this processor")
    blocks = np.array([[1], [2]])
    batch = AttentionBatch(pool, torch.tensor([16, 33]), blocks, np.array([0, 1]), np.array([0, 1]), decodes=[], prefills=[])
    return attention, batch, torch.randn(2, heads, head_dim), torch.randn(2, 2 * kv_heads, 16)


def test_queries_may_lie_as_a_model_made_them() -> None:
    """Head by head, or beside keys and values."""
    attention, batch, query, fresh = one_of()
    wanted = attention(batch, query, fresh, LayerAttention(0, 0.25))
    for lies in (query.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((query, fresh), dim=1)[:, :3]):
        assert not lies.is_contiguous()
        assert torch.equal(attention(batch, lies, fresh, LayerAttention(0, 0.25)), wanted)


@pytest.mark.parametrize(("head_dim", "heads", "dtype"), [(32, 3, "float32"), (16, 3, "bfloat16"), (16, 2, "float32")])
def test_queries_that_are_not_made_for_its_memory_are_refused(head_dim: int, heads: int, dtype: str) -> None:
    attention, batch, query, fresh = one_of(head_dim, heads, kv_heads=3 if heads == 2 else 1)
    with pytest.raises(InvalidCheckpoint, match="layer 0 attends with"):
        attention(batch, query.to(getattr(torch, dtype)), fresh, LayerAttention(0, 0.25))
