"""Compare architectures with transformers' own `generate`, token for token, on tiny seeded models in float32.

`python -m bench.engine.architectures [MODEL_TYPE ...]`: all that the engine says it runs, or those named, COMPARED or not.
Each attends over gathered blocks and, where that is compiled, in place; deterministic, also in bfloat16, its logits must be the
same bits whatever the batch (`tests.agent.engine.test_determinism`). One line each: equal, how many prompts differ, or why
it does not run; and the layers in the order in which a first step that follows its weights waits for them, the last being all.
Each is also saved by transformers and ingested, which must make the model's own bytes. Each runs in a process of its own: new
ones fail in new ways.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from agent.engine import architectures, attention_paged
from agent.engine.build import build_engine
from tests.agent.engine.coming import ComingWeights
from tests.agent.engine.models import CONTEXT, VOCAB, kv_options, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_determinism import diverged
from tests.agent.engine.test_engine import drive, prompts, reference
from tests.agent.store.test_ingest_naming import strange

LIMIT_S = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "head_dim": 16, "rotary_dim": 4,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "max_seq_len": CONTEXT, "seq_length": CONTEXT,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64, "sliding_window": 24, "window_size": 24,
    "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip


def tiny(model_type: str) -> Any:
    """A small model of this type: every size that its config knows is cut down, everything else is as published."""
    config_class = CONFIG_MAPPING[model_type]
    published = config_class()
    values = {name: value for name, value in SIZES.items() if hasattr(published, name)}
    values = {name: value for name, value in values.items() if not isinstance(getattr(config_class, name, None), property)}
    aliases = getattr(config_class, "attribute_map", {})
    values = {name: value for name, value in values.items() if aliases.get(name) not in values}
    kinds = getattr(published, "layer_types", None)
    if kinds:
        kinds = sorted(set(kinds))
        values["layer_types"] = [kinds[0], kinds[-1]]
    config = config_class(**values)
    torch.manual_seed(7)
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def compare(model_type: str) -> str:
    with mock.patch.object(architectures, "COMPARED", architectures.COMPARED | {model_type}):
        return _compare(tiny(model_type))


def _compare(model: Any) -> str:
    manifest = manifest_of(model)
    options = kv_options(manifest, 512)
    submits = [submit_of(i + 1, prompt, 12 + 3 * i) for i, prompt in enumerate(prompts())]
    wanted = {s.attempt: reference(model, list(s.prompt), s.params.max_tokens) for s in submits}
    ways: dict[str, None] = {}
    for width_for in (lambda pool: None, attention_paged._width_for):
        with mock.patch.object(attention_paged, "_width_for", width_for):
            engine = build_engine(manifest, tensors_of(model), options, prefill_tokens=24)
            for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
                if diverged(copy.deepcopy(model).to(dtype), name, random.Random(5)):
                    return f"DIVERGES in {name}, though deterministic"
        runner: Any = engine._runner
        way = "gathered" if runner._attention.gathers else "in place"
        ways[way] = None
        outcome = drive(engine, submits)
        for end in outcome.ends.values():
            if end.fault is not None:
                return f"fails, {way}: {end.fault.message}"
        other = [attempt for attempt, tokens in wanted.items() if outcome.tokens[attempt] != tokens]
        if other:
            return f"DIFFERS, {way}, in {len(other)} of {len(submits)}"
    coming = ComingWeights(model)
    if drive(coming.engine(options, prefill_tokens=24), submits).tokens != wanted:
        return "READS WEIGHTS before they have come"
    with TemporaryDirectory() as directory:
        if other_bytes := strange(model, Path(directory)):
            return f"INGESTED OTHERWISE: {', '.join(other_bytes)}"
    distinct = len({token for tokens in wanted.values() for token in tokens})
    asked = " ".join(map(str, dict.fromkeys(coming.asked)))
    return f"equal, {' and '.join(ways)}, {distinct} different tokens; weights asked for: {asked}"


def main() -> None:
    for model_type in sys.argv[1:] or sorted(architectures.COMPARED):
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)
            torch.set_num_threads(1)
            try:
                said = compare(model_type)
            except Exception as error:
                said = f"cannot run: {type(error).__name__}: {str(error)[:160]}"
            print(f"{model_type}\t{said}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
