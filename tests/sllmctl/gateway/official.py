"""The official client of the OpenAI API on a gateway, replies for it to read, and the events of a stream."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from schema.states import EndReason
from tests.sllmctl.gateway.harness import END, FakeRequest, Serving, ids_of

__all__ = ["client_of", "events_of", "says"]


def client_of(here: Serving) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=30)


def says(text: str, finish: EndReason = EndReason.STOP, *, batch: int = 3) -> Any:
    """A reply that comes in batches of tokens, its end token last."""

    def reply(request: FakeRequest) -> None:
        ids = ids_of(text) + ([END] if finish == EndReason.STOP else [])

        async def emit() -> None:
            for start in range(0, len(ids), batch):
                last = start + batch >= len(ids)
                request.sequence.emit(ids[start : start + batch], finish if last else None)
                await asyncio.sleep(0)

        request.emitting = asyncio.create_task(emit())  # type: ignore[attr-defined]

    return reply


async def events_of(here: Serving, path: str, body: dict[str, object]) -> list[str]:
    response = await here.client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]
