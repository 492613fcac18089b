"""The engine on a CUDA device: the same tokens as transformers there, and the same noise as on a CPU. Skips without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agent.engine.build import build_engine
from agent.engine.philox import philox4x32
from agent.engine.sampler import gumbel
from tests.agent.engine.models import VOCAB, kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_engine import drive, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral-window", "opt", "gpt2", "gpt_neox", "gemma")


def engine_on_device(model: Any, prefill_tokens: int = 24) -> Any:
    manifest = manifest_of(model)
    tensors = {name: tensor.cuda() for name, tensor in tensors_of(model).items()}
    return build_engine(manifest, tensors, kv_options(manifest, 2048), "cuda", prefill_tokens)


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt], device="cuda")
    mask = torch.ones_like(tokens)
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate_on_the_device(name: str) -> None:
    model = make_model(name)
    submits = [submit_of(i + 1, prompt, 12 + 3 * i) for i, prompt in enumerate(prompts())]
    outcome = drive(engine_on_device(model), submits)
    model = model.cuda()
    for i, prompt in enumerate(prompts()):
        assert outcome.tokens[i + 1] == generated(model, prompt, 12 + 3 * i)


def test_a_sampled_sequence_goes_on_from_its_journal() -> None:
    model = make_model("llama")
    prompt = prompts()[3]
    whole = drive(engine_on_device(model), [submit_of(1, prompt, 40, temperature=0.9, seed=5)]).tokens[1]
    resumed = drive(engine_on_device(model), [submit_of(2, prompt, 40, whole[:17], temperature=0.9, seed=5)]).tokens[2]
    assert resumed == whole


def test_noise_is_the_same_bits_on_device_and_cpu() -> None:
    def noise(device: str) -> torch.Tensor:
        position = torch.arange(64, device=device).unsqueeze(1)
        token = torch.arange(VOCAB, device=device).unsqueeze(0)
        zero = torch.zeros_like(position * token)
        keys = torch.tensor(12345, device=device), torch.tensor(678, device=device)
        words = philox4x32(position + zero, token + zero, zero, zero, *keys)
        return torch.stack([word.cpu() for word in words])

    assert torch.equal(noise("cuda"), noise("cpu"))
    words = torch.arange(1 << 16)
    assert torch.allclose(gumbel(words), gumbel(words.cuda()).cpu(), rtol=1e-14, atol=0)
