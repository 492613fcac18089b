"""How the end-to-end tests talk to the API: with the official client, as a user would."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import openai

from tests.cluster import Cluster

SEED = 7
LONG = 3500
"""Tokens that no machine has made before the test has read one and done something."""


@dataclass
class Answer:
    text: str
    request_id: str
    finish_reason: str | None


def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=240)


def ask(cluster: Cluster, question: str, *, max_tokens: int = 40) -> Answer:
    """A chat reply, the same each time."""
    with client(cluster) as api:
        raw = api.chat.completions.with_raw_response.create(
            model="docs", messages=[{"role": "user", "content": question}], max_tokens=max_tokens, temperature=1, seed=SEED
        )
        choice = raw.parse().choices[0]
        return Answer(choice.message.content or "", raw.headers["x-request-id"], choice.finish_reason)


def completion(cluster: Cluster, prompt: str, *, max_tokens: int = 16) -> str:
    with client(cluster) as api:
        return api.completions.create(model="docs", prompt=prompt, max_tokens=max_tokens, temperature=0).choices[0].text


class Endless:
    """A stream of a long completion, the same each time, read token by token; closing it early disconnects."""

    def __init__(self, api: openai.OpenAI, *, model: str = "docs", prompt: str = "sllmctl is", max_tokens: int = 600) -> None:
        self._stream = api.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=1, seed=SEED, stream=True
        )
        self._events = iter(self._stream)
        self.request_id = self._stream.response.headers["x-request-id"]
        self.text = ""
        self.finish_reason: str | None = None

    def __enter__(self) -> Endless:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def token(self) -> str:
        """The next piece of text; "" at the end."""
        for event in self._events:
            if event.choices:
                self.finish_reason = event.choices[0].finish_reason
                if event.choices[0].text:
                    self.text += event.choices[0].text
                    return event.choices[0].text
        return ""

    def rest(self) -> str:
        """All of the text, once it has ended."""
        while self.token():
            pass
        return self.text
