"""The typed client of the admin API: what can be asked, described once, and two thin transports that ask it.

`Call` is one request and how its answer is read; the functions of this module make them. `AdminClient` (for commands) and
`AsyncAdminClient` (for a dashboard) carry any Call over the manager's unix socket::

    with AdminClient(socket, settings) as admin:
        for model in admin.ask(models()): ...
        for frame in admin.follow(): ...

``follow`` is the event stream: a picture of the cluster, then what changes. Both raise the SllmError that the answer's body
names, and Unreachable when no manager answers.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from schema.admin import (
    AppliedView,
    ApplyBody,
    CheckpointBody,
    CheckpointView,
    DeployBody,
    EstimatesView,
    EventView,
    ExplainView,
    InstanceView,
    LogFrame,
    LogLineView,
    ModelView,
    NodeView,
    OperationView,
    RemoteBody,
    RequestExplainView,
    RequestView,
    StatusView,
    StreamFrame,
    StreamKind,
)
from schema.errors import Fault, InvalidInput, LinkError, Overloaded, SllmError, Unauthorised, Unreachable
from schema.spec import ModelSpec, ScaleSpec
from schema.states import Tier
from sllmctl.config import ClientSettings

__all__ = [
    "AdminClient",
    "AsyncAdminClient",
    "Call",
    "LogQuery",
    "Until",
    "Waited",
    "add_model",
    "apply_models",
    "cancel_request",
    "checkpoint",
    "checkpoints",
    "deploy_model",
    "drop_checkpoint",
    "estimates",
    "events",
    "explain_model",
    "explain_request",
    "fetch_checkpoint",
    "forget_checkpoint",
    "instance",
    "instances",
    "logs",
    "model",
    "models",
    "node",
    "nodes",
    "operation",
    "operations",
    "pin_checkpoint",
    "prefetch_checkpoint",
    "publish_checkpoint",
    "remove_model",
    "request",
    "requests",
    "status",
    "stop_instance",
    "stop_model",
    "verify_checkpoint",
    "wait_model",
    "wait_operation",
]

T = TypeVar("T")
V = TypeVar("V")
Until = Literal["ingested", "ready", "stopped", "gone"]
"""What can be waited for: a checkpoint is there; as many instances are ready as the scale's ``min``; none is left; the
model itself is forgotten (its wait then ends with NotFound)."""

_BASE_URL = "http://sllmctl/admin/v1/"
_PENDING = 202
_EVENT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. ``hold_s`` is how long the manager may hold its answer back, on top of the client's own patience."""

    method: str
    path: str
    read: Callable[[int, bytes], T]
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Waited:
    """How a wait stands: ``done`` when what was waited for has come, else the view as it is now."""

    view: ModelView
    done: bool


class _Items(msgspec.Struct, Generic[V], frozen=True):
    items: tuple[V, ...]


class _Problem(msgspec.Struct, frozen=True):
    code: str
    message: str
    param: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Problem


# --- What can be asked ---------------------------------------------------------------------------------------------


def status() -> Call[StatusView]:
    return _get("status", StatusView)


def nodes() -> Call[tuple[NodeView, ...]]:
    return _list("nodes", NodeView)


def node(name: str) -> Call[NodeView]:
    return _get(f"nodes/{_segment(name)}", NodeView)


def models() -> Call[tuple[ModelView, ...]]:
    return _list("models", ModelView)


def model(name: str) -> Call[ModelView]:
    return _get(f"models/{_segment(name)}", ModelView)


def wait_model(name: str, until: Until, hold_s: float) -> Call[Waited]:
    """The model as soon as it is as waited for, or as it is after ``hold_s`` seconds; a model that failed raises its fault."""

    def read(code: int, body: bytes) -> Waited:
        return Waited(_decode(body, ModelView), done=code != _PENDING)

    return Call("GET", f"models/{_segment(name)}", read, {"wait": until, "timeout": f"{hold_s:g}"}, hold_s=hold_s)


def add_model(spec: ModelSpec) -> Call[ModelView]:
    """Register a model and begin to ingest it; its state tells how that goes."""
    return Call("POST", "models", _reader(ModelView), body=msgspec.json.encode(spec))


def apply_models(
    specs: Sequence[ModelSpec], remove: Sequence[str] = (), *, deploy: bool = True, dry_run: bool = False
) -> Call[tuple[AppliedView, ...]]:
    """Make models as specs say and forget those to ``remove``, all or nothing; ``dry_run``: only tell what would change."""
    body = ApplyBody(models=tuple(specs), remove=tuple(remove), deploy=deploy, dry_run=dry_run)
    return Call("POST", "apply", _items(AppliedView), body=msgspec.json.encode(body))


def deploy_model(name: str, scale: ScaleSpec | None = None) -> Call[ModelView]:
    """Serve a model that has been ingested, or change how it is scaled."""
    body = msgspec.json.encode(DeployBody(scale=scale))
    return Call("POST", f"models/{_segment(name)}/deploy", _reader(ModelView), body=body)


def stop_model(name: str) -> Call[ModelView]:
    return Call("POST", f"models/{_segment(name)}/stop", _reader(ModelView))


def remove_model(name: str) -> Call[None]:
    return Call("DELETE", f"models/{_segment(name)}", _nothing)


def explain_model(name: str) -> Call[ExplainView]:
    """Where one more instance of a model would go now, and why."""
    return _get(f"models/{_segment(name)}/explain", ExplainView)


def instances() -> Call[tuple[InstanceView, ...]]:
    return _list("instances", InstanceView)


def instance(instance_id: str) -> Call[InstanceView]:
    return _get(f"instances/{_segment(instance_id)}", InstanceView)


def stop_instance(instance_id: str) -> Call[None]:
    return Call("POST", f"instances/{_segment(instance_id)}/stop", _nothing)


def checkpoints() -> Call[tuple[CheckpointView, ...]]:
    return _list("checkpoints", CheckpointView)


def checkpoint(digest: str) -> Call[CheckpointView]:
    """A checkpoint by a model's name, by its digest, or by a beginning of it that no other has."""
    return _get(f"checkpoints/{_segment(digest)}", CheckpointView)


def prefetch_checkpoint(reference: str, node: str | None = None, tier: Tier | None = None) -> Call[tuple[OperationView, ...]]:
    """Bring a checkpoint, named by a beginning of its digest or by a model, into a node's memory."""
    return _operate(reference, "prefetch", node, tier)


def verify_checkpoint(reference: str, node: str | None = None) -> Call[tuple[OperationView, ...]]:
    """Compare every copy on disk, or a node's, with its checksums."""
    return _operate(reference, "verify", node, None)


def drop_checkpoint(reference: str, node: str | None = None, tier: Tier | None = None) -> Call[tuple[OperationView, ...]]:
    """Take a checkpoint from a tier of a node, or of all."""
    return _operate(reference, "drop", node, tier)


def publish_checkpoint(reference: str, url: str | None = None, node: str | None = None) -> Call[tuple[OperationView, ...]]:
    """Put a checkpoint on a remote, from a node that has it."""
    return _to_remote(reference, "publish", RemoteBody(url=url, node=node), _items(OperationView))


def fetch_checkpoint(
    reference: str, url: str | None = None, node: str | None = None, tier: Tier | None = None
) -> Call[tuple[OperationView, ...]]:
    """Bring a checkpoint from a remote to a node's disk, or memory."""
    return _to_remote(reference, "fetch", RemoteBody(url=url, node=node, tier=tier), _items(OperationView))


def forget_checkpoint(reference: str, url: str | None = None) -> Call[CheckpointView]:
    """A checkpoint lies on a remote, or on any, no more; what is there is left."""
    return _to_remote(reference, "forget", RemoteBody(url=url), _reader(CheckpointView))


def _to_remote(reference: str, verb: str, body: RemoteBody, reader: Callable[[int, bytes], T]) -> Call[T]:
    return Call("POST", f"checkpoints/{_segment(reference)}/{verb}", reader, body=msgspec.json.encode(body))


def pin_checkpoint(
    reference: str, node: str | None = None, tier: Tier | None = None, *, pinned: bool = True
) -> Call[CheckpointView]:
    """Keep a checkpoint on a tier of a node, or where it lies; ``pinned`` False lets it go."""
    body = msgspec.json.encode(CheckpointBody(node=node, tier=tier))
    path = f"checkpoints/{_segment(reference)}/{'pin' if pinned else 'unpin'}"
    return Call("POST", path, _reader(CheckpointView), body=body)


def operations() -> Call[tuple[OperationView, ...]]:
    """What operators asked for lately, oldest first."""
    return _list("operations", OperationView)


def operation(operation_id: str) -> Call[OperationView]:
    return _get(f"operations/{_segment(operation_id)}", OperationView)


def wait_operation(operation_id: str, hold_s: float) -> Call[OperationView]:
    """The operation as soon as it has ended, or as it is after ``hold_s`` seconds."""
    query = {"wait": "ended", "timeout": f"{hold_s:g}"}
    return Call("GET", f"operations/{_segment(operation_id)}", _reader(OperationView), query, hold_s=hold_s)


def requests() -> Call[tuple[RequestView, ...]]:
    return _list("requests", RequestView)


def request(request_id: str) -> Call[RequestView]:
    return _get(f"requests/{_segment(request_id)}", RequestView)


def cancel_request(request_id: str) -> Call[None]:
    return Call("POST", f"requests/{_segment(request_id)}/cancel", _nothing)


def explain_request(request_id: str) -> Call[RequestExplainView]:
    """What was decided for a request's model while it waited."""
    return _get(f"requests/{_segment(request_id)}/explain", RequestExplainView)


def estimates() -> Call[EstimatesView]:
    """How good the planner's estimates are."""
    return _get("estimates", EstimatesView)


def events(kind: str | None = None, name: str | None = None, limit: int = 100) -> Call[tuple[EventView, ...]]:
    """The newest events, oldest first, of one kind of thing (model, instance, node, checkpoint) or one object by name."""
    query = {"kind": kind, "object": name, "limit": str(limit)}
    return _list("events", EventView, {key: value for key, value in query.items() if value is not None})


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Whose logs are wanted, and from where on: the last ``tail`` lines of each source, at most ``since_s`` old (0: any age).
    ``part`` is an instance of a model, or a process of a node."""

    noun: Literal["model", "instance", "node"]
    name: str
    part: str | None = None
    tail: int = 100
    since_s: float = 0.0

    @property
    def path(self) -> str:
        return f"{self.noun}s/{_segment(self.name)}/logs"

    @property
    def query(self) -> dict[str, str]:
        part = {"process" if self.noun == "node" else "instance": self.part} if self.part is not None else {}
        return {"tail": str(self.tail), "since": f"{self.since_s:g}", **part}


def logs(wanted: LogQuery) -> Call[tuple[LogLineView, ...]]:
    """What was written, in order of time."""
    return _list(wanted.path, LogLineView, wanted.query)


# --- Transports ------------------------------------------------------------------------------------------------------


class AdminClient:
    """Asks the manager at a unix socket and waits for the answer."""

    def __init__(self, path: Path, settings: ClientSettings) -> None:
        self._socket, self._settings, self._knocked = path, settings, False
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url=_BASE_URL, trust_env=False, follow_redirects=False
        )

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, call: Call[T]) -> T:
        """The answer. Raises Unreachable, Unauthorised (the socket is another user's), or what the answer's body says."""
        if not self._knocked:
            _knock(self._socket)
            self._knocked = True
        try:
            answer = self._http.request(**_arguments(call, self._settings))
        except httpx.TransportError as error:
            raise _unanswered(self._socket, error) from error
        return _result(call, answer, self._socket)

    def follow(self, cursor: str | None = None, kinds: Sequence[StreamKind] = ()) -> Iterator[StreamFrame]:
        """The event stream from ``cursor`` on (a frame's), or with a whole picture first; of these ``kinds``, else of all.

        Never ends by itself. Raises Unreachable when the manager goes away or says nothing for long: follow again, from the
        last frame's cursor.
        """
        return self._frames(_following(cursor, kinds, self._settings), StreamFrame)

    def follow_logs(self, wanted: LogQuery) -> Iterator[LogFrame]:
        """The lines that are there, then those that are written. Ends and raises as `follow` does."""
        return self._frames(_log_following(wanted, self._settings), LogFrame)

    def _frames(self, arguments: dict[str, Any], kind: type[V]) -> Iterator[V]:
        _knock(self._socket)
        lines = _Lines(kind)
        try:
            with self._http.stream(**arguments) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise _problem(answer, self._socket)
                for chunk in answer.iter_raw():
                    yield from lines.take(chunk)
        except httpx.TransportError as error:
            raise _unanswered(self._socket, error) from error
        raise Unreachable(f"the manager at {self._socket} ended the event stream; it is stopping")

    def close(self) -> None:
        self._http.close()


class AsyncAdminClient:
    """The same for code that runs on an event loop; any number of calls may be under way at once."""

    def __init__(self, path: Path, settings: ClientSettings) -> None:
        self._socket, self._settings, self._knocked = path, settings, False
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url=_BASE_URL, trust_env=False, follow_redirects=False
        )

    async def __aenter__(self) -> AsyncAdminClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def ask(self, call: Call[T]) -> T:
        """The answer; raises as `AdminClient.ask` does."""
        if not self._knocked:
            _knock(self._socket)
            self._knocked = True
        try:
            answer = await self._http.request(**_arguments(call, self._settings))
        except httpx.TransportError as error:
            raise _unanswered(self._socket, error) from error
        return _result(call, answer, self._socket)

    async def follow(self, cursor: str | None = None, kinds: Sequence[StreamKind] = ()) -> AsyncGenerator[StreamFrame, None]:
        """As `AdminClient.follow`."""
        async with aclosing(self._frames(_following(cursor, kinds, self._settings), StreamFrame)) as frames:
            async for frame in frames:
                yield frame

    async def follow_logs(self, wanted: LogQuery) -> AsyncGenerator[LogFrame, None]:
        """As `AdminClient.follow_logs`."""
        async with aclosing(self._frames(_log_following(wanted, self._settings), LogFrame)) as frames:
            async for frame in frames:
                yield frame

    async def _frames(self, arguments: dict[str, Any], kind: type[V]) -> AsyncGenerator[V, None]:
        _knock(self._socket)
        lines = _Lines(kind)
        try:
            async with self._http.stream(**arguments) as answer:
                if answer.status_code >= 400:
                    await answer.aread()
                    raise _problem(answer, self._socket)
                async for chunk in answer.aiter_raw():
                    for frame in lines.take(chunk):
                        yield frame
        except httpx.TransportError as error:
            raise _unanswered(self._socket, error) from error
        raise Unreachable(f"the manager at {self._socket} ended the event stream; it is stopping")

    async def close(self) -> None:
        await self._http.aclose()


class _Lines(Generic[V]):
    """Server-sent events out of bytes as they come. Raises LinkError for what is no frame, or is longer than any."""

    def __init__(self, kind: type[V]) -> None:
        self._kind = kind
        self._rest = bytearray()

    def take(self, chunk: bytes) -> Iterator[V]:
        seen = max(0, len(self._rest) - 1)
        self._rest += chunk
        while (end := self._rest.find(b"\n\n", seen)) >= 0:
            event = bytes(self._rest[:end])
            del self._rest[: end + 2]
            seen = 0
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    frame: V = _decode(line[6:], self._kind)
                    yield frame
        if len(self._rest) > _EVENT_BYTES:
            raise LinkError(f"an event of the manager's stream is longer than {_EVENT_BYTES} bytes")


def _following(cursor: str | None, kinds: Sequence[StreamKind], settings: ClientSettings) -> dict[str, Any]:
    return {
        "method": "GET",
        "url": "stream",
        "params": {"kinds": ",".join(kinds)} if kinds else {},
        "headers": {"last-event-id": cursor} if cursor else {},
        "timeout": httpx.Timeout(settings.silence_s, connect=settings.connect_s),
    }


def _log_following(wanted: LogQuery, settings: ClientSettings) -> dict[str, Any]:
    return {
        "method": "GET",
        "url": wanted.path,
        "params": {**wanted.query, "follow": "1"},
        "timeout": httpx.Timeout(max(settings.silence_s, settings.answer_s), connect=settings.connect_s),
    }


def _arguments(call: Call[Any], settings: ClientSettings) -> dict[str, Any]:
    timeout = httpx.Timeout(settings.answer_s + call.hold_s, connect=settings.connect_s)
    headers = {"content-type": "application/json"} if call.body is not None else {}
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.query),
        "content": call.body,
        "headers": headers,
        "timeout": timeout,
    }


def _result(call: Call[T], answer: httpx.Response, path: Path) -> T:
    if answer.status_code >= 400:
        raise _problem(answer, path)
    return call.read(answer.status_code, answer.content)


def _problem(answer: httpx.Response, path: Path) -> SllmError:
    try:
        problem = msgspec.json.decode(answer.content, type=_ErrorBody).error
    except msgspec.DecodeError:
        return LinkError(f"{path} answered {answer.status_code} without an error body; is it a manager's admin socket?")
    error = Fault(problem.code, problem.message).to_error()
    if isinstance(error, InvalidInput):
        error.param = problem.param
    elif isinstance(error, Overloaded) and "retry-after" in answer.headers:
        error.retry_after_s = float(answer.headers["retry-after"])
    return error


def _knock(path: Path) -> None:
    """See who is behind the socket. The system's own error tells a dead manager from another user's; httpx's does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.setblocking(False)
        try:
            door.connect(str(path))
        except BlockingIOError:
            return
        except PermissionError as error:
            raise Unauthorised(
                f"the manager's socket {path} is another user's; run this as the user that runs the manager"
            ) from error
        except OSError as error:
            raise Unreachable(_nobody(path)) from error


def _nobody(path: Path) -> str:
    return f"no manager answers at {path}; start it with `sllmctl serve`"


def _unanswered(path: Path, error: httpx.TransportError) -> Unreachable:
    if isinstance(error, httpx.ConnectError):
        return Unreachable(_nobody(path))
    if isinstance(error, httpx.TimeoutException):
        return Unreachable(f"the manager at {path} did not answer in time; see its log, and `sllmctl doctor`")
    return Unreachable(f"the manager at {path} broke off before it answered ({error or type(error).__name__}); ask again")


def _segment(name: str) -> str:
    if name in ("", ".", ".."):
        raise InvalidInput(f"{name!r} is not a name")
    return quote(name, safe="")


def _decode(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise LinkError(f"the manager's answer cannot be read ({error}); are manager and command of one version?") from error


def _reader(kind: type[T]) -> Callable[[int, bytes], T]:
    def read(_: int, body: bytes) -> T:
        result: T = _decode(body, kind)
        return result

    return read


def _get(path: str, kind: type[T]) -> Call[T]:
    return Call("GET", path, _reader(kind))


def _operate(reference: str, verb: str, node: str | None, tier: Tier | None) -> Call[tuple[OperationView, ...]]:
    body = msgspec.json.encode(CheckpointBody(node=node, tier=tier))
    return Call("POST", f"checkpoints/{_segment(reference)}/{verb}", _items(OperationView), body=body)


def _items(kind: type[T]) -> Callable[[int, bytes], tuple[T, ...]]:
    def read(_: int, body: bytes) -> tuple[T, ...]:
        items: tuple[T, ...] = _decode(body, _Items[kind]).items  # type: ignore[valid-type]
        return items

    return read


def _list(path: str, kind: type[T], query: Mapping[str, str] | None = None) -> Call[tuple[T, ...]]:
    return Call("GET", path, _items(kind), query or {})


def _nothing(_: int, __: bytes) -> None:
    return None
