"""A request's way through the gateway: submitted, read from its sequence as tokens come, written as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from schema.errors import Conflict, NotFound, SllmError, Unreachable
from schema.link import RetryKey, SamplingParams
from schema.states import ModelState
from sllmctl.gateway.errors import INTERNAL, STOPPING
from sllmctl.gateway.exchange import BodyBudget, Exchange, Header
from sllmctl.gateway.metrics import Metrics
from sllmctl.gateway.ports import AssetsPort, RequestPort, RoutedModelPort, RouterPort
from sllmctl.gateway.replies import PromptDetails, Usage
from sllmctl.gateway.reply import Reply
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.sse import DONE, ReplyHead, Shape
from sllmctl.gateway.text import TextModel, TextService

__all__ = ["Gateway", "Job"]

R = TypeVar("R")
_UNSERVED: Final = {
    ModelState.INGESTING: "is being ingested; try again later",
    ModelState.FAILED: "could not be ingested; `sllmctl model show {}` says why",
    ModelState.STOPPED: "is not deployed; `sllmctl model deploy {}` serves it",
    ModelState.DEPLOYED: "has no checkpoint; `sllmctl model show {}` says more",
    ModelState.DELETING: "is being removed",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One generation as a client asked for it, in tokens. ``shape`` makes the writer of its reply."""

    model: str
    text: TextModel
    prompt: tuple[int, ...]
    params: SamplingParams
    choices: int
    tenant: str
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    shape: type[Shape]


class _Stream:
    """The events of all choices of a reply on one exchange. ``open_choices`` have not said their last."""

    def __init__(self, exchange: Exchange, headers: list[Header], metrics: Metrics, choices: int) -> None:
        self._exchange = exchange
        self._headers = headers
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._opened = False
        self.open_choices = choices

    async def open(self) -> None:
        """Begin the response, with the first choice that has a token: a request that cannot be served is answered with its
        own status."""
        async with self._turn:
            if not self._opened:
                self._opened = True
                self._metrics.streams.inc()
                await self._exchange.open_stream(*self._headers)

    async def write(self, data: bytes, *, more: bool = True) -> None:
        async with self._turn:
            await self._exchange.write(data, more=more)

    def close(self) -> None:
        if self._opened:
            self._metrics.streams.dec()


class Gateway:
    """What the endpoints share: router, texts, metrics; and the running of a `Job`."""

    def __init__(
        self,
        router: RouterPort,
        assets: AssetsPort,
        text: TextService,
        settings: GatewaySettings,
        metrics: Metrics,
    ) -> None:
        self.router = router
        self.text = text
        self.settings = settings
        self.metrics = metrics
        self.bodies = BodyBudget(settings.bodies_limit_bytes)
        self._assets = assets

    async def prepare(self, name: str) -> tuple[RoutedModelPort, TextModel]:
        """A model that is served, and its text side. Raises NotFound, and what waiting for its assets raises."""
        try:
            model = self.router.model(name)
        except NotFound as error:
            raise NotFound(f"the model {name!r} does not exist; see GET /v1/models") from error
        if model.state is not ModelState.DEPLOYED or model.digest is None:
            raise NotFound(f"the model {name!r} {_UNSERVED[model.state].format(name)}")
        text = self.text.cached(model.digest)
        if text is None:
            text = await self.text.load(await self._assets.get(model.digest, self.settings.assets_timeout_s))
        return model, text

    async def run(self, job: Job, exchange: Exchange, retry: RetryKey | None = None) -> None:
        """Submit a job, or join the request that it is a retry of, and write its reply; with this the request has been left."""
        request = None if retry is None else self.router.join(retry)
        joined = request is not None
        metrics = self.metrics
        if request is None:
            if self.router.model(job.model).digest != job.text.digest:
                raise Conflict(f"model {job.model!r} was replaced while this request was read; send it again")
            asked = exchange.request_id
            request = self.router.submit(job.model, job.prompt, job.params, job.choices, job.tenant, retry, asked)
            metrics.prompt_tokens.labels(job.model).inc(len(job.prompt))
        exchange.request_id = request.id
        replies: list[Reply] = []
        error: SllmError | None = None
        try:
            head = ReplyHead(request.id.removeprefix("req_"), int(request.received_at), job.model, f"fp_{job.text.digest[:12]}")
            shape = job.shape(head, job.text.detokenizer.spell, include_usage=job.include_usage)
            for index, sequence in enumerate(request.sequences):
                replies.append(Reply(index, sequence, job.text, job.stops, request.params))
            headers = [(b"idempotent-replayed", b"true")] if joined else []
            if job.stream:
                await self._stream(job, exchange, shape, request, replies, headers)
            else:
                await self._whole(job, exchange, shape, request, replies, headers)
        except SllmError as why:
            error = why
            raise
        except asyncio.CancelledError:
            error = exchange.broken_off if exchange.gone else Unreachable(STOPPING)
            raise
        except Exception:
            error = SllmError(INTERNAL)
            raise
        finally:
            request.leave(error)
            if not joined:
                metrics.ended(job.model, request.timeline(), sum(reply.position for reply in replies))

    async def _whole(
        self, job: Job, exchange: Exchange, shape: Shape, request: RequestPort, replies: list[Reply], headers: list[Header]
    ) -> None:
        pieces = await _together([reply.all(request.params.max_tokens) for reply in replies])
        choices = []
        for reply, piece in zip(replies, pieces, strict=True):
            assert reply.reason is not None, "a whole reply has ended"
            scores = None if job.params.logprobs is None else piece.scores
            choices.append(shape.choice(piece.text, reply.reason, reply.index, scores))
        usage = _usage(job, request, replies)
        self.metrics.generated(job.model).inc(usage.completion_tokens)
        await exchange.answer(200, shape.whole(choices, usage), *headers)

    async def _stream(
        self, job: Job, exchange: Exchange, shape: Shape, request: RequestPort, replies: list[Reply], headers: list[Header]
    ) -> None:
        stream = _Stream(exchange, headers, self.metrics, len(replies))
        try:
            data = b"".join(await _together([self._stream_choice(job, shape, reply, stream) for reply in replies]))
            if job.include_usage:
                data += shape.usage(_usage(job, request, replies))
            await stream.write(data + DONE, more=False)
        finally:
            stream.close()

    async def _stream_choice(self, job: Job, shape: Shape, reply: Reply, stream: _Stream) -> bytes:
        """Write one choice as it comes; what the last one has to say in the end is left to go out with the stream's end."""
        piece = await reply.next()
        await stream.open()
        data = shape.opening(reply.index)
        counted = 0
        said_at, longest_s = time.perf_counter(), 0.0
        while True:
            self.metrics.generated(job.model).inc(reply.position - counted)
            counted = reply.position
            if piece.text or piece.scores:
                data += shape.delta(piece.text, reply.index, piece.scores)
            if reply.reason is not None:
                break
            if data:
                await stream.write(data)
            data = b""
            piece = await reply.next()
            now = time.perf_counter()
            said_at, longest_s = now, max(longest_s, now - said_at)
        if longest_s:
            self.metrics.longest_gap.labels(job.model).observe(longest_s)
        data += shape.closing(reply.reason, reply.index)
        stream.open_choices -= 1
        if stream.open_choices:
            await stream.write(data)
            data = b""
        return data


async def _together(choices: list[Coroutine[Any, Any, R]]) -> list[R]:
    """The results of all; the first error of any, once the others are over too."""
    if len(choices) == 1:
        return [await choices[0]]
    tasks = [asyncio.create_task(choice) for choice in choices]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _usage(job: Job, request: RequestPort, replies: list[Reply]) -> Usage:
    """What was cached before the request came is what its first choice found there: the others find that one's blocks.

    Of a choice that a stop string ended the engine's account comes later than the reply; so nothing is told then, and a retry
    gets the same.
    """
    tokens = sum(reply.position for reply in replies)
    found = [None if reply.cut else sequence.cached_tokens for reply, sequence in zip(replies, request.sequences, strict=True)]
    told = [each for each in found if each is not None]
    details = PromptDetails(min(*told, len(job.prompt))) if len(told) == len(found) else None
    return Usage(len(job.prompt), tokens, len(job.prompt) + tokens, details)
