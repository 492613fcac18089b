"""The admin API's routes that say why: of a model, of a request, and how good the estimates behind the decisions are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Protocol

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from schema.admin import EstimatesView, ExplainView, OutcomeView, RequestExplainView, RequestView
from schema.errors import NotFound
from sllmctl.cluster.view import ClusterView
from sllmctl.control.explain import DecisionsPort, ExplainerPort, explain, explain_request
from sllmctl.gateway.admin.answers import Routes, json_answer, known, read_count, read_query
from sllmctl.gateway.openapi import Query, operation
from sllmctl.planner.outcomes import summarise

__all__ = ["EstimatesPort", "Explanations", "OutcomesPort", "RequestPort"]

_OUTCOMES_LIMIT = 10_000


class OutcomesPort(Protocol):
    async def outcomes(self, limit: int = 100) -> list[OutcomeView]:
        """The newest outcomes, oldest first."""


class EstimatesPort(Protocol):
    def coefficients(self) -> Mapping[str, float]:
        """What estimates are made of now, by key."""


class RequestPort(Protocol):
    def request(self, id: str) -> RequestView: ...  # noqa: A002 - the name that every view of a request has


class Explanations:
    """``clock`` is the control loop's (Unix seconds)."""

    def __init__(
        self,
        *,
        view: ClusterView,
        router: RequestPort,
        planner: ExplainerPort,
        decisions: DecisionsPort,
        estimates: EstimatesPort,
        database: OutcomesPort,
        clock: Callable[[], float],
    ) -> None:
        self._view, self._router, self._database = view, router, database
        self._planner, self._decisions, self._estimates = planner, decisions, estimates
        self._clock = clock

    def routes(self) -> Routes:
        return {
            ("GET", "models/{name}/explain"): self.explain_model,
            ("GET", "requests/{id}/explain"): self.explain_request,
            ("GET", "estimates"): self.get_estimates,
        }

    @operation("Where one more instance of a model would go now, and why.", ExplainView, errors=(NotFound,))
    async def explain_model(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["name"]
        model = known("model", name, self._view.models.get(name), self._view.models)
        return json_answer(explain(self._view, self._planner, self._decisions, model, self._clock()))

    @operation("What was decided for a request's model while it waited.", RequestExplainView, errors=(NotFound,))
    async def explain_request(self, request: Request) -> Response:
        read_query(request)
        asked = self._router.request(request.path_params["id"])
        return json_answer(explain_request(self._view, self._decisions, asked))

    @operation(
        "How good the planner's estimates are.",
        EstimatesView,
        query=(
            Query(
                "limit", Annotated[int, Meta(ge=0, le=_OUTCOMES_LIMIT)], "Outcomes to show, of the newest; 100 if not given."
            ),
        ),
    )
    async def get_estimates(self, request: Request) -> Response:
        """The errors are those of all outcomes that are kept; the outcomes shown are the newest."""
        limit = read_count(read_query(request), "limit", 100, 0, _OUTCOMES_LIMIT)
        kept = await self._database.outcomes(_OUTCOMES_LIMIT)
        return json_answer(
            EstimatesView(
                errors=summarise(kept),
                outcomes=tuple(kept[max(0, len(kept) - limit) :]),
                coefficients=dict(self._estimates.coefficients()),
            )
        )
