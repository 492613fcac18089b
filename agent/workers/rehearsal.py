"""Building one tiny model without weights, so that what Python and torch prepare at a first build is ready before any fork."""

from __future__ import annotations

import pickle
from typing import Final

from agent.engine.skeleton import build_skeleton
from schema.checkpoint import FORMAT_VERSION, KvGeometry, Manifest, TextDefaults

__all__ = ["rehearse"]

_SIZES: Final = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def rehearse() -> None:
    """Build skeletons on the meta device, which computes nothing and starts no thread."""
    for kind, architecture in (("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")):
        model = build_skeleton(
            Manifest(
                format_version=FORMAT_VERSION,
                digest="0" * 64,
                layout="rehearsal",
                architecture=architecture,
                parameters=0,
                vocab_size=32,
                max_context_tokens=16,
                chunk_bytes=4096,
                partitions=(),
                tensors=(),
                ties={},
                kv=KvGeometry(1, 1, 8, "F32"),
                config={**_SIZES, "model_type": kind},
                text=TextDefaults(),
                assets=(),
            )
        )
        pickle.loads(pickle.dumps(model))  # noqa: S301  its own, for what a kept skeleton needs imported
