"""The gateway's ASGI application: which path is answered by what, errors into answers, and what lives as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import msgspec
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from schema.admin import StatusView
from schema.errors import InvalidInput, NotFound, SllmError, Unreachable
from schema.ids import system_ids
from schema.logs import about
from schema.states import ModelState
from sllmctl.gateway import story
from sllmctl.gateway.chat import chat_job
from sllmctl.gateway.completions import completion_job
from sllmctl.gateway.errors import INTERNAL, STOPPING, ErrorBody, NoSuchPath, WrongHost, answer_of
from sllmctl.gateway.exchange import ClientGone, Exchange
from sllmctl.gateway.generate import Gateway, Job
from sllmctl.gateway.hosts import KnownHosts
from sllmctl.gateway.keys import KEY_HEADER, retry_key
from sllmctl.gateway.metrics import CONTENT_TYPE, Metrics
from sllmctl.gateway.openapi import document, operation
from sllmctl.gateway.ports import AssetsPort, RoutedModelPort, RouterPort
from sllmctl.gateway.replies import Health, ModelCard, ModelList, Readiness
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.text import TextService

__all__ = ["api_app"]

_log = logging.getLogger(__name__)
_CLIENT_GONE = "499"
_TITLE = "sllmctl: inference API"
_ABOUT = "OpenAI's API, as far as this server has it; what it cannot honour is refused by name."
_encode = msgspec.json.Encoder().encode
_TEXT = (b"content-type", CONTENT_TYPE.encode())

Answerer = Callable[[Scope, Exchange], Awaitable[None]]


def api_app(
    *,
    router: RouterPort,
    assets: AssetsPort,
    text: TextService,
    settings: GatewaySettings,
    status: Callable[[], StatusView],
    metrics: Metrics | None = None,
    hosts: Iterable[str] | None = None,
) -> ASGIApp:
    """The OpenAI API, ``/healthz``, ``/readyz`` and ``/metrics``. Its lifespan starts and closes ``text``.

    ``hosts``: names that requests may be for, as `KnownHosts` has it; None is any.
    """
    metrics = metrics or Metrics()
    gateway = Gateway(router, assets, text, settings, metrics)
    created = int(time.time())

    @operation("The models that are served.", ModelList)
    async def list_models(_: Scope, exchange: Exchange) -> None:
        data = [_card(model, created) for model in router.models() if model.state == ModelState.DEPLOYED]
        await exchange.answer(200, _encode(ModelList(data=data)))

    @operation("A model that is served.", ModelCard, errors=(NotFound,))
    async def one_model(scope: Scope, exchange: Exchange) -> None:
        name = scope["path_params"]["model"]
        model = router.model(name)
        if model.state != ModelState.DEPLOYED:
            raise NotFound(f"the model {name!r} is not deployed, it is {model.state.value}")
        await exchange.answer(200, _encode(_card(model, created)))

    @operation("Whether the manager answers.", Health)
    async def health(_: Scope, exchange: Exchange) -> None:
        await exchange.answer(200, _encode(Health()))

    @operation("Whether requests can be served.", {200: Readiness, 503: Readiness})
    async def ready(_: Scope, exchange: Exchange) -> None:
        now = status()
        await exchange.answer(200 if now.ready else 503, _encode(Readiness(now.ready, now.nodes_ready, now.nodes)))

    @operation("Metrics in Prometheus' text format.", str, content="text/plain")
    async def scrape(_: Scope, exchange: Exchange) -> None:
        metrics.forget_models({model.spec.name for model in router.models()})
        await exchange.answer(200, metrics.render(), content_type=_TEXT)

    async def describe(_: Scope, exchange: Exchange) -> None:
        await exchange.answer(200, said)

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await text.start()
        try:
            yield
        finally:
            await text.close()

    endpoints: list[tuple[str, Answerer]] = [
        ("/v1/models", list_models),
        ("/v1/models/{model:path}", one_model),
        ("/healthz", health),
        ("/readyz", ready),
        ("/metrics", scrape),
    ]
    generations = [("/v1/chat/completions", chat_job), ("/v1/completions", completion_job)]
    table = [
        *(("POST", path, make_job) for path, make_job in generations),
        *(("GET", path, answerer) for path, answerer in endpoints),
    ]
    said = document(_TITLE, _ABOUT, table, error=ErrorBody, always=(InvalidInput, WrongHost, SllmError))
    app = Router(
        [
            *(Route(path, _Generation(gateway, make_job)) for path, make_job in generations),
            *(Route(path, _Endpoint(answerer)) for path, answerer in (*endpoints, ("/openapi.json", describe))),
        ],
        redirect_slashes=False,
        default=_Endpoint(_no_such_path, any_method=True),
        lifespan=lifespan,
    )
    return app if hosts is None else KnownHosts(app, hosts)


def _card(model: RoutedModelPort, created: int) -> ModelCard:
    return ModelCard(id=model.spec.name, created=created)


async def _no_such_path(scope: Scope, exchange: Exchange) -> None:
    raise NoSuchPath(f"nothing is at {scope['path']}; the OpenAI API is under /v1")


class _Endpoint:
    """A small answer to GET as a plain ASGI application: whatever it raises becomes an error's body."""

    def __init__(self, answerer: Answerer, *, any_method: bool = False) -> None:
        self._answerer, self._any_method = answerer, any_method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        exchange = Exchange(scope, receive, send)
        try:
            if not self._any_method:
                exchange.require_method("GET")
            await self._answerer(scope, exchange)
        except SllmError as error:
            await exchange.fail(error)
        except Exception:
            await exchange.fail(_internal(scope))


class _Generation:
    """An endpoint that generates; ``make_job`` reads its body."""

    def __init__(self, gateway: Gateway, make_job: Callable[[Gateway, bytes], Awaitable[Job]]) -> None:
        self._gateway = gateway
        self._make_job = make_job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        metrics = self._gateway.metrics
        bodies = self._gateway.bodies
        metrics.live.inc()
        model = ""
        try:
            exchange.require_method("POST")
            data = await exchange.body(self._gateway.settings, bodies)
            key = exchange.header(KEY_HEADER)
            async with exchange.while_connected():
                job = await self._make_job(self._gateway, data)
                retry = None if key is None else retry_key(key, scope["path"], data, job)
                del data
                exchange.release(bodies)
                model = job.model
                await self._gateway.run(job, exchange, retry)
        except ClientGone:
            exchange.gone = True
        except asyncio.CancelledError:
            # The server has waited long enough for what still runs and ends: the client is told, and the task is over.
            metrics.errors.labels(Unreachable.code).inc()
            await exchange.fail(Unreachable(STOPPING))
        except SllmError as error:
            code = answer_of(error).code or error.code
            metrics.errors.labels(code).inc()
            exchange.request_id = exchange.request_id or system_ids("req")
            story.refused(exchange.request_id, model, code)
            await exchange.fail(error)
        except Exception:
            metrics.errors.labels("internal").inc()
            exchange.request_id = exchange.request_id or system_ids("req")
            await exchange.fail(_internal(scope, exchange.request_id))
        finally:
            exchange.release(bodies)
            metrics.live.dec()
            if exchange.gone and exchange.broken_off is not None:
                metrics.errors.labels(exchange.broken_off.code).inc()
            # Only names of models that are served become labels: others are as many as there are slips.
            metrics.requests.labels(model, _CLIENT_GONE if exchange.gone else str(exchange.status)).inc()


def _internal(scope: Scope, request: str | None = None) -> SllmError:
    """The answer to an error of ours, whose details are for the log."""
    _log.exception("%s %s failed", scope["method"], scope["path"], extra=about(request=request))
    return SllmError(INTERNAL)
