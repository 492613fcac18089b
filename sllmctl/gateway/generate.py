"""A request's way through the gateway: submitted, read from its sequence as tokens come, written as text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import Counter

from schema.errors import Cancelled, NotFound, SllmError
from schema.link import SamplingParams
from schema.states import EndReason, ModelState
from sllmctl.gateway.exchange import BodyBudget, Exchange
from sllmctl.gateway.metrics import Metrics
from sllmctl.gateway.ports import AssetsPort, RequestPort, RoutedModelPort, RouterPort, SequencePort
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.sse import DONE, ReplyHead, Shape, Usage
from sllmctl.gateway.stop import StopMatcher
from sllmctl.gateway.text import TextModel, TextService

__all__ = ["Gateway", "Job"]

_REASONS = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Job:
    """One generation as a client asked for it, in tokens. ``shape`` makes the writer of its reply."""

    model: str
    text: TextModel
    prompt: tuple[int, ...]
    params: SamplingParams
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    shape: type[Shape]


class _Reply:
    """One choice: its sequence read as text. ``reason`` is set with its last text; ``position`` counts the tokens read."""

    __slots__ = ("_detokenizer", "_sequence", "_stop", "index", "position", "reason")

    def __init__(self, index: int, sequence: SequencePort, text: TextModel, stops: tuple[str, ...]) -> None:
        self.index = index
        self.position = 0
        self.reason: str | None = None
        self._sequence = sequence
        self._detokenizer = text.detokenizer()
        self._stop = StopMatcher(stops) if stops else None

    async def next(self) -> str:
        """Wait for more tokens, or the end; all that is there, as text. Raises the SllmError of a sequence that failed."""
        sequence = self._sequence
        await sequence.wait(self.position)
        return await self._take()

    async def all(self, max_tokens: int) -> str:
        """The whole text, read once it is complete, so that tokens on the way wake nobody; with stop strings, as they come."""
        if self._stop is None:
            # A sequence never has more than max_tokens: this returns at its end.
            await self._sequence.wait(max_tokens)
            return await self._take()
        parts: list[str] = []
        while self.reason is None:
            parts.append(await self.next())
        return "".join(parts)

    async def _take(self) -> str:
        sequence, position = self._sequence, self.position
        finish = sequence.finish
        tokens = sequence.tokens[position:]
        if finish is not None and finish not in _REASONS and not tokens:
            await sequence.wait(len(sequence.tokens))
            raise _failure(finish)
        if self._stop is None:
            self.position = position + len(tokens)
            text = self._detokenizer.push(tokens)
            if finish in _REASONS:
                self.reason = _REASONS[finish]
                text += self._detokenizer.flush()
            return text
        return self._take_until_stop(self._stop, tokens, finish)

    def _take_until_stop(self, stop: StopMatcher, tokens: list[int], finish: EndReason | None) -> str:
        """Token by token, so that where a reply ends and what it counts do not depend on how tokens arrive."""
        parts: list[str] = []
        for token in tokens:
            self.position += 1
            parts.append(stop.push(self._detokenizer.push((token,))))
            if stop.matched:
                break
        if not stop.matched and finish in _REASONS:
            self.reason = _REASONS[finish]
            parts += (stop.push(self._detokenizer.flush()), stop.flush())
        if stop.matched:
            self.reason = "stop"
        return "".join(parts)


def _failure(finish: EndReason) -> SllmError:
    if finish == EndReason.CANCELLED:
        return Cancelled("the request was cancelled by an operator")
    return SllmError(f"the request ended as {finish.value} without saying why")


class Gateway:
    """What the endpoints share: router, texts, metrics; and the running of a `Job`."""

    def __init__(
        self,
        router: RouterPort,
        assets: AssetsPort,
        text: TextService,
        settings: GatewaySettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.router = router
        self.text = text
        self.settings = settings
        self.metrics = metrics
        self.clock = clock
        self.bodies = BodyBudget(settings.bodies_limit_bytes)
        self._assets = assets
        self._generated: dict[str, Counter] = {}

    async def prepare(self, name: str) -> tuple[RoutedModelPort, TextModel]:
        """A model that is served, and its text side. Raises NotFound, and what waiting for its assets raises."""
        try:
            model = self.router.model(name)
        except NotFound as error:
            raise NotFound(f"the model {name!r} does not exist; see GET /v1/models") from error
        if model.state != ModelState.DEPLOYED or model.digest is None:
            raise NotFound(f"the model {name!r} is not deployed, it is {model.state.value}; deploy it first")
        text = self.text.cached(model.digest)
        if text is None:
            text = await self.text.load(await self._assets.get(model.digest, self.settings.assets_timeout_s))
        return model, text

    async def run(self, job: Job, exchange: Exchange) -> None:
        """Submit a job and write its reply; however this ends, the request has ended with it."""
        request = self.router.submit(job.model, job.prompt, job.params)
        metrics = self.metrics
        metrics.prompt_tokens.labels(job.model).inc(len(job.prompt))
        head = ReplyHead(request.id.rpartition("_")[2], int(self.clock()), job.model, f"fp_{job.text.digest[:12]}")
        shape = job.shape(head, include_usage=job.include_usage)
        replies = [_Reply(index, sequence, job.text, job.stops) for index, sequence in enumerate(request.sequences)]
        name = (b"x-request-id", request.id.encode())
        try:
            if job.stream:
                await self._stream(job, exchange, shape, replies[0], name)
            else:
                await self._whole(job, exchange, shape, replies, name)
        finally:
            _end(request)
            metrics.ended(job.model, request.timeline(), sum(reply.position for reply in replies))

    async def _whole(
        self, job: Job, exchange: Exchange, shape: Shape, replies: list[_Reply], name: tuple[bytes, bytes]
    ) -> None:
        choices = []
        for reply in replies:
            text = await reply.all(job.params.max_tokens)
            choices.append(shape.choice(text, reply.reason or "stop", reply.index))
        tokens = sum(reply.position for reply in replies)
        self._counter(job.model).inc(tokens)
        await exchange.answer(200, shape.whole(choices, _usage(job, tokens)), name)

    async def _stream(self, job: Job, exchange: Exchange, shape: Shape, reply: _Reply, name: tuple[bytes, bytes]) -> None:
        # The status line waits for the first token: a request that cannot be served is answered with its own status.
        text = await reply.next()
        counter = self._counter(job.model)
        self.metrics.streams.inc()
        try:
            await exchange.open_stream(name)
            data = shape.opening(reply.index)
            counted = 0
            while True:
                counter.inc(reply.position - counted)
                counted = reply.position
                if text:
                    data += shape.delta(text, reply.index)
                if reply.reason is not None:
                    break
                if data:
                    await exchange.write(data)
                data = b""
                text = await reply.next()
            data += shape.closing(reply.reason, reply.index)
            if job.include_usage:
                data += shape.usage(_usage(job, reply.position))
            await exchange.write(data + DONE, more=False)
        finally:
            self.metrics.streams.dec()

    def _counter(self, model: str) -> Counter:
        if (counter := self._generated.get(model)) is None:
            counter = self._generated[model] = self.metrics.generated_tokens.labels(model)
        return counter


def _end(request: RequestPort) -> None:
    """Give the request up unless it has run to its end: the client went away, a stop string came, an error."""
    if any(sequence.finish is None for sequence in request.sequences):
        request.cancel()


def _usage(job: Job, tokens: int) -> Usage:
    return Usage(len(job.prompt), tokens, len(job.prompt) + tokens)
