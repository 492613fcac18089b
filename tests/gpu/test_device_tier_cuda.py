"""Weights that the copier put on a CUDA device, attached by descriptor: the same tokens as transformers. Skips without one."""

from __future__ import annotations

import pytest
import torch

from agent.engine.build import build_engine
from agent.native.device import open_driver
from tests.agent.engine.device_image import laid_out, tensors_on
from tests.agent.engine.models import kv_options, make_model, submit_of
from tests.agent.engine.test_engine import drive, prompts
from tests.gpu.test_engine_cuda import generated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_equals_generate_over_attached_weights(name: str) -> None:
    pytest.importorskip("cuda.bindings.driver")
    driver, model = open_driver(), make_model(name)
    manifest, image = laid_out(model)
    tensors = tensors_on(driver, manifest, image)
    assert all(tensor.is_cuda for tensor in tensors.values())
    submits = [submit_of(i + 1, prompt, 12) for i, prompt in enumerate(prompts())]
    outcome = drive(build_engine(manifest, tensors, kv_options(manifest, 2048), driver.torch_device(0)), submits)
    model = model.cuda()
    for i, prompt in enumerate(prompts()):
        assert outcome.tokens[i + 1] == generated(model, prompt, 12)
