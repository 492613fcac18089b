"""The admin API over a real view, with a control loop, a router and a database that the tests play."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from schema.admin import EventView, OutcomeView, ProgressView, RequestTimeline, RequestView, StatusView
from schema.errors import Fault, NotFound
from schema.ids import Epoch
from schema.link import InstanceLoad
from schema.spec import ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, RequestState, Tier, TierState
from sllmctl.cluster.plans import Candidate, Decision, Refusal, Rejection, Wait
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, PlacementRecord
from sllmctl.cluster.view import ClusterView
from sllmctl.config import AdminSettings, LogSettings
from sllmctl.control.events import Event
from sllmctl.gateway.admin.app import admin_app
from sllmctl.gateway.admin.explanations import Explanations
from sllmctl.gateway.admin.logs import Logs, LogsPort

A, B = "ab" * 32, "abcd" + "0" * 60


def made_model(name: str, state: ModelState, digest: str | None = None, fault: Fault | None = None, least: int = 0) -> Model:
    spec = ModelSpec(name=name, source=PathSource("/m"), scale=ScaleSpec(min=least, max=max(1, least)))
    return Model(spec, state, digest, "op_1" if state is ModelState.INGESTING else None, None, fault, 10.0, 11.0)


def made_instance(id_: str, model: str, state: InstanceState, fault: Fault | None = None) -> Instance:
    return Instance(id_, model, "node_1", A, Epoch(5), state, (0,), 1024, 0, None, fault, None, "room", 20.0, 21.0)


def made_view() -> ClusterView:
    view = ClusterView()
    view.add_node(Node("node_1", "local", "unix:/a", NodeState.READY, False, 1.0, 2.0))
    for digest in (A, B):
        view.add_checkpoint(Checkpoint(digest, "LlamaForCausalLM", 4096, 64, 512, 5.0))
    view.put_placement(PlacementRecord(A, "node_1", Tier.DISK, 0, TierState.RESIDENT, 4096))
    view.add_model(made_model("tiny", ModelState.DEPLOYED, A, least=1))
    view.add_model(made_model("coming", ModelState.INGESTING))
    view.add_instance(made_instance("inst_1", "tiny", InstanceState.STARTING))
    return view


class Runner:
    """Takes events as the control loop would: ``then`` says what each does to the view, or raises its refusal."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.then: Callable[[Any], Any] = lambda _: ()

    async def ask(self, make: Callable[[int], Event]) -> Any:
        self.events.append(make(7))
        return self.then(self.events[-1])


class Database:
    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def events(
        self,
        kind: str | None = None,
        object: str | None = None,  # noqa: A002
        limit: int = 100,
        after: str | None = None,
    ) -> list[EventView]:
        self.asked.append((kind, object, limit, after))
        return [EventView(id="ev_1", at=1.0, level="info", kind="model", object="tiny", reason="added", message="added")]

    async def outcomes(self, limit: int = 100) -> list[OutcomeView]:
        self.asked.append(("outcomes", limit))
        return [
            OutcomeView(
                at=float(at), kind="start", model="tiny", node="local", source="disk", estimated_s=1.0, actual_s=1.0 + at / 10
            )
            for at in range(5)
        ]


_BEST = Candidate(node="node_1", name="local", devices=(0,), working_bytes=1, source=Tier.DISK, startup_s=2.0)


@dataclass(frozen=True)
class Made:
    at: float
    model: str
    instance: str | None
    waiting: int
    decision: Decision


class Planner:
    def explain(self, model: Model, now: float) -> tuple[Decision, list[tuple[str, Candidate | Rejection]]]:
        return Wait(0.5, _BEST, {}, f"at {now:g} {model.name} is better served by waiting"), [("node_1", _BEST)]


class Estimates:
    def coefficients(self) -> dict[str, float]:
        return {"disk": 2e9}


class Router:
    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def model_counts(self, model: str) -> tuple[int, int]:
        return (2, 1) if model == "tiny" else (0, 0)

    def instance_load(self, instance: str) -> InstanceLoad | None:
        return InstanceLoad(instance=instance, epoch=Epoch(5), running=1, waiting=0, kv_used_tokens=9)

    def loads(self, node: str) -> list[tuple[str, ProgressView]]:
        return []

    def progress(self, op_or_instance: str) -> ProgressView | None:
        return ProgressView(stage="reading", done_bytes=1, total_bytes=4) if op_or_instance == "op_1" else None

    def requests(self) -> list[RequestView]:
        return [self.request("req_1")]

    def request(self, id: str) -> RequestView:  # noqa: A002
        if id != "req_1":
            raise NotFound(f"there is no request {id!r}")
        return RequestView(
            id=id,
            model="tiny",
            state=RequestState.WAITING,
            instance=None,
            attempts=0,
            prompt_tokens=3,
            generated_tokens=0,
            orphaned=False,
            received_at=1.0,
            timeline=RequestTimeline(cold=True),
        )

    def cancel(self, id: str) -> None:  # noqa: A002
        self.request(id)
        self.cancelled.append(id)


class Manager:
    def __init__(self, settings: AdminSettings | None = None, links: LogsPort | None = None) -> None:
        self.view, self.runner, self.database, self.router = made_view(), Runner(), Database(), Router()
        self.broken = False
        self.decisions = deque([Made(3.0, "tiny", None, 2, Refusal({Rejection.CORDONED: 1}, False, "no room"))], maxlen=9)
        self.app = admin_app(
            runner=self.runner,
            view=self.view,
            database=self.database,
            router=self.router,
            explanations=Explanations(
                view=self.view,
                router=self.router,
                planner=Planner(),
                decisions=self.decisions,
                estimates=Estimates(),
                database=self.database,
                clock=lambda: 77.0,
            ),
            status=self.status,
            settings=settings or AdminSettings(wait_limit_s=60.0, wait_look_s=0.001, body_bytes=2000),
            logs=None if links is None else Logs(self.view, links, LogSettings()),
        )

    def status(self) -> StatusView:
        if self.broken:
            raise ZeroDivisionError("secret")
        return StatusView(
            cluster="c", generation=1, version="0", pid=1, started_at=0.0, api_url="", ready=True, nodes_ready=1, nodes=1
        )

    def http(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://sllmctl/admin/v1/")


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "param"}
    return answer.status_code, error["code"], error["param"]
