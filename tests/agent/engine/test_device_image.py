"""The engine over weights that went by way of a driver: the same tokens as over the model's own."""

from __future__ import annotations

import gc

import pytest

from agent.engine.build import build_engine
from tests.agent.engine.device_image import laid_out, tensors_on
from tests.agent.engine.models import kv_options, make_model, submit_of, tensors_of
from tests.agent.engine.test_engine import drive, prompts
from tests.agent.native.fake_driver import FakeDriver


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_tokens_as_from_the_models_own_weights(name: str) -> None:
    driver, model = FakeDriver(), make_model(name)
    manifest, image = laid_out(model)
    options = kv_options(manifest, 2048)
    tensors = tensors_on(driver, manifest, image)
    submits = [submit_of(i + 1, prompt, 9 + i) for i, prompt in enumerate(prompts())]
    engine = build_engine(manifest, tensors, options, driver.torch_device(0))
    found = drive(engine, submits).tokens
    assert found == drive(build_engine(manifest, tensors_of(model), options), submits).tokens
    assert driver.leaked == {"allocations": 1}
    del engine, tensors
    gc.collect()
    assert not driver.leaked
