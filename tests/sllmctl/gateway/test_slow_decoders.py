"""Decoders that only the library knows, whose regular expressions may take any time: never on the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders

from schema.states import EndReason
from sllmctl.gateway.detokenize import DetokenizerFactory
from tests.sllmctl.gateway.harness import TOKENIZER, ids_of, serving


def decode_with(directory: Path, pattern: str) -> None:
    """Give the tokenizer there a decoder that replaces what a regular expression finds by an asterisk."""
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex(pattern), "*")])
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that decoded something, in order."""
    threads: list[threading.Thread] = []
    decode = DetokenizerFactory._decode

    def watched(self: DetokenizerFactory, ids: list[int]) -> str:
        threads.append(threading.current_thread())
        return decode(self, ids)

    monkeypatch.setattr(DetokenizerFactory, "_decode", watched)
    return threads


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{}, {"stop": "!"}, {"logprobs": 1}], ids=["plain", "stop", "logprobs"])
async def test_the_loop_decodes_nothing(stream: bool, asked: dict[str, Any], decoding: list[threading.Thread]) -> None:
    async with serving() as here:
        decode_with(here.assets.directory, "[aeiou]")
        body = {"model": "tiny", "prompt": "x", "stream": stream, **asked}
        reply = asyncio.create_task(here.client.post("/v1/completions", json=body))
        request = await here.router.taken()
        for text, end in (("one and ", None), ("two! ", None), ("more", EndReason.LENGTH)):
            request.sequence.emit(ids_of(text), end, asked.get("logprobs"))
        text = (await reply).text
        said = (
            "".join(json.loads(line[6:])["choices"][0]["text"] for line in text.split("\n\n") if line.startswith("data: {"))
            if stream
            else json.loads(text)["choices"][0]["text"]
        )
    assert said == ("*n* *nd tw*" if "stop" in asked else "*n* *nd tw*! m*r*")
    assert decoding
    assert threading.main_thread() not in decoding


async def test_a_decoder_that_gives_up_fails_its_request_alone(decoding: list[threading.Thread]) -> None:
    async with serving() as here:
        decode_with(here.assets.directory, "(x?[a-z]+)+[0-9]")
        reply = asyncio.create_task(here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}))
        request = await here.router.taken()
        request.sequence.emit(ids_of("a" * 60), EndReason.LENGTH)
        answer = await reply
    assert answer.status_code == 422
    assert "tokenizer cannot decode what the model said" in answer.json()["error"]["message"]
    assert threading.main_thread() not in decoding
