"""In which order tensors lie in the image: that in which a forward pass touches them, what is used together side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from agent.store.ingest.headers import SourceTensor
from agent.store.layers import LAYER
from schema.errors import InvalidCheckpoint

__all__ = ["execution_key", "find_ties", "fused_group"]

_RANKS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"input_layernorm|ln_1\b|norm1|pre_attention",
        r"(q_proj|k_proj|v_proj|qkv|c_attn|query_key_value|W_pack)\b",
        r"[qk]_(layer)?norm",
        r"attn|attention(?!_layernorm|_norm)",
        r"post_attention|ln_2\b|norm2|pre_feedforward|pre_mlp",
        r"router|mlp\.gate\b|block_sparse_moe\.gate\b",
        r"(gate_proj|up_proj|gate_up_proj|w1|w3|c_fc|fc1|fc_in)\b",
        r"mlp|feed_forward|experts|fc2|fc_out",
    )
)
_WITHIN: Final = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
_FUSED = re.compile(r"^(.*)\.(q_proj|k_proj|v_proj|gate_proj|up_proj|w1|w3)\.(weight|bias)$")

Key = tuple[int, int, int, tuple[int, ...], int, int, str]


def execution_key(name: str) -> Key:
    """Sorts names: embeddings, layers by number, final norm, head; in a layer by use; weights before biases."""
    match = LAYER.search(name)
    if match is None:
        if re.search(r"embed_out|lm_head|output\.(weight|bias)$", name):
            return 3, 0, 0, (), 0, 0, name
        return 0 if re.search(r"embed|wte|wpe", name) else 2, 0, 0, (), 0, 0, name
    rest = name[match.end() :]
    rank = next((number for number, pattern in enumerate(_RANKS) if pattern.search(rest)), len(_RANKS))
    numbers = tuple(int(number) for number in re.findall(r"\.(\d{1,6})\.", rest))
    within = next((place for part, place in _WITHIN.items() if part in rest), 0)
    return 1, int(match.group(1)), rank, numbers, int(not rest.endswith("weight")), within, name


def fused_group(name: str) -> tuple[str, str, str] | None:
    """What a tensor is multiplied together with: those with the same answer lie behind one another without a gap, so that an
    engine has the fused matrix as a view. None for a tensor that stands alone."""
    match = _FUSED.search(name)
    if match is None:
        return None
    kind = "qkv" if match.group(2) in ("q_proj", "k_proj", "v_proj") else "gate_up"
    return match.group(1), kind, match.group(3)


def find_ties(
    tensors: Mapping[str, SourceTensor], tied: Mapping[str, str], same: Callable[[SourceTensor, SourceTensor], bool]
) -> dict[str, str]:
    """Which names need not be stored: alias -> stored name, of the pairs that the model ties.

    A pair of which the source has one is stored under that one's name; a pair that is there twice is stored once if
    ``same`` finds the bytes alike, and else as it is. Raises InvalidCheckpoint when neither is there.
    """
    ties: dict[str, str] = {}
    for alias, name in tied.items():
        stored = ties.get(name, name)
        if alias in tensors and stored in tensors:
            if same(tensors[alias], tensors[stored]):
                ties[alias] = stored
        elif stored in tensors:
            ties[alias] = stored
        elif alias in tensors:
            ties[name] = alias
        else:
            raise InvalidCheckpoint(f"the model needs {name!r} or {alias!r}; neither is in the checkpoint")
    return ties
