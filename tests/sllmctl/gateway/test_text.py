"""Tokenizers loaded once, texts off the loop, and what the gateway's process must not import."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schema.checkpoint import TextDefaults
from schema.errors import ContextOverflow, Overloaded
from sllmctl.gateway import text
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.text import TextModel, TextService
from tests.sllmctl.gateway.harness import TOKENIZER, assets_directory, make_manifest


async def test_many_askers_load_a_tokenizer_once() -> None:
    with assets_directory() as assets:
        service = TextService(GatewaySettings())
        assert service.cached(assets.manifest.digest) is None
        models = await asyncio.gather(*(service.load(assets) for _ in range(5)))
        assert len({id(model) for model in models}) == 1
        assert service.cached(assets.manifest.digest) is models[0]
        await service.close()


async def test_an_asker_that_goes_away_does_not_stop_the_load() -> None:
    with assets_directory() as assets:
        service = TextService(GatewaySettings())
        first, second = (asyncio.create_task(service.load(assets)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).digest == assets.manifest.digest
        await service.close()


async def test_a_tokenizer_that_never_loads_holds_up_neither_its_askers_nor_other_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stuck, threads = threading.Event(), []

    def read(path: Path) -> Any:
        if path.is_relative_to(assets.directory):
            threads.append(threading.current_thread())
            stuck.wait(60)
        return real(path)

    real = text._read_tokenizer
    monkeypatch.setattr(text, "_read_tokenizer", read)
    with assets_directory() as assets, assets_directory() as others:
        service = TextService(GatewaySettings(assets_timeout_s=0.05))
        for _ in range(5):
            with pytest.raises(Overloaded, match=r"not loaded after 0\.05 s"):
                await service.load(assets)
        assert [thread.daemon for thread in threads] == [True], "one thread for all its askers, which the end does not wait for"
        service._settings = GatewaySettings()
        other = replace(others, manifest=make_manifest(TextDefaults(), "b" * 64))
        assert (await asyncio.wait_for(service.load(other), 60)).digest == "b" * 64
        late = asyncio.create_task(service.load(assets))
        await asyncio.sleep(0)
        stuck.set()
        assert (await late).digest == assets.manifest.digest
        stuck.clear()
        third = replace(assets, manifest=make_manifest(TextDefaults(), "c" * 64))
        last = asyncio.create_task(service.load(third))
        await asyncio.sleep(0)
        await asyncio.wait_for(service.close(), 60)
        with pytest.raises(asyncio.CancelledError):
            await last
        stuck.set()


async def test_the_last_used_tokenizers_are_kept() -> None:
    with assets_directory() as assets:
        service = TextService(GatewaySettings(tokenizers_kept=2))
        digests = [letter * 64 for letter in "abc"]
        for digest in digests[:2]:
            await service.load(replace(assets, manifest=make_manifest(TextDefaults(), digest)))
        service.cached(digests[0])
        await service.load(replace(assets, manifest=make_manifest(TextDefaults(), digests[2])))
        assert [service.cached(digest) is not None for digest in digests] == [True, False, True]
        await service.close()


async def test_a_slow_tokenizer_keeps_up_neither_the_loop_nor_other_models() -> None:
    step = {"type": "Replace", "pattern": {"Regex": "(?!x)[aeiou]"}, "content": "a"}
    slow = json.loads(TOKENIZER.to_str()) | {"normalizer": {"type": "Sequence", "normalizers": [step] * 1000}}
    text = "Tokens carry positions. " * 50
    with assets_directory() as assets, assets_directory() as others:
        (assets.directory / "tokenizer.json").write_text(json.dumps(slow))
        service = TextService(GatewaySettings(encode_threads=1, encode_timeout_s=0.05))
        model = await service.load(assets)
        other = await TextService(GatewaySettings()).load(replace(others, manifest=make_manifest(TextDefaults(), "b" * 64)))
        kept_up = asyncio.create_task(service.encode(model, "a" * 2000, 4096))
        assert await service.encode(other, text, 4096) == TOKENIZER.encode(text).ids
        assert not kept_up.done(), "the loop was held up"
        with pytest.raises(Overloaded, match=r"over 0\.05 s for this text or for those before it"):
            await service.encode(model, "short", 4096)
        with pytest.raises(Overloaded):
            await kept_up
        await service.close()


async def test_texts_that_wait_for_a_stuck_tokenizer_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Text(str):
        __slots__ = ("__weakref__",)

    async def given_up() -> weakref.ref[Text]:
        text = Text("a" * 2000)
        with contextlib.suppress(Overloaded):
            await service.encode(model, text, 4096)
        return weakref.ref(text)

    stuck = threading.Event()
    with assets_directory() as assets:
        service = TextService(GatewaySettings(encode_threads=1, encode_timeout_s=0.05))
        model = await service.load(assets)
        monkeypatch.setattr(model, "_encode", lambda text, special: stuck.wait(60) and [])
        texts = [await given_up() for _ in range(3)]
        await asyncio.sleep(0)
        gc.collect()
        assert [text() is not None for text in texts] == [True, False, False], "only the one that is being encoded"
        stuck.set()
        await service.close()


async def test_a_tokenizer_found_slow_is_kept_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def busy(text: str, special: bool) -> list[int]:
        threads.append(threading.current_thread().name)
        began = time.thread_time()
        while time.thread_time() - began < 0.01:
            pass
        return [1]

    with assets_directory() as assets:
        service = TextService(GatewaySettings())
        model = await service.load(assets)
        monkeypatch.setattr(model, "_encode", busy)
        for _ in range(4):
            assert await service.encode(model, "short", 4096) == [1]
        assert threads == ["MainThread", "MainThread", "tokenizer", "tokenizer"]
        await service.close()


async def test_a_panic_of_the_library_takes_no_thread_for_good() -> None:
    """A panic is no Exception: who waits is told at once, and who comes next has the thread."""

    class Panic(BaseException):
        pass

    def panics() -> None:
        raise Panic

    with assets_directory() as assets:
        service = TextService(GatewaySettings(encode_threads=1))
        model = await service.load(assets)
        for _ in range(3):
            with pytest.raises(Panic):
                await model.aside(panics)
        assert await model.aside(lambda: 5) == 5
        await service.close()


async def test_a_text_that_no_context_holds_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> list[int]:
        raise AssertionError("it was tokenised")

    with assets_directory() as assets:
        service = TextService(GatewaySettings(chars_per_token_limit=10))
        model = await service.load(assets)
        assert await service.encode(model, "x" * 80, 8)
        monkeypatch.setattr(TextModel, "encode", never)
        with pytest.raises(ContextOverflow, match=r"81 characters.*8 tokens.*at most 80") as caught:
            await service.encode(model, "x" * 81, 8)
        assert caught.value.param == "prompt"
        with pytest.raises(ContextOverflow) as caught:
            await service.encode_chat(model, [{"role": "user", "content": "x" * 41}] * 2, 8)
        assert caught.value.param == "messages"
        await service.close()


def test_the_gateway_is_light() -> None:
    code = (
        "import sys, sllmctl.gateway.app, sllmctl.gateway.server\n"
        "print(sorted({'torch', 'transformers', 'agent', 'numpy', 'jinja2.sandbox'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "['jinja2.sandbox']"
