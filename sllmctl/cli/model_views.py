"""How a model is shown: the columns of the list, and the fields of one. Pure but for the clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllmctl.cli.format import age, duration, short_digest, size
from sllmctl.cli.output import Column, now
from sllmctl.cli.phases import progress_text

if TYPE_CHECKING:
    from schema.admin import FailingView, ModelView
    from schema.spec import ScaleSpec, Source

__all__ = ["columns", "failing_fields", "fields"]


def columns() -> list[Column[ModelView]]:
    moment = now()
    return [
        Column("NAME", lambda m: m.name),
        Column("STATE", _state),
        Column("INSTANCES", _instances),
        Column("SCALE", lambda m: f"{m.spec.scale.min}-{m.spec.scale.max}", right=True),
        Column("RUNNING", lambda m: str(m.running), right=True),
        Column("WAITING", lambda m: str(m.waiting), right=True),
        Column("CHECKPOINT", lambda m: short_digest(m.digest)),
        Column("AGE", lambda m: age(moment - m.created_at), right=True),
        Column("KEEP-ALIVE", lambda m: _keep_alive(m.spec.scale), wide=True, right=True),
        Column("CONCURRENCY", lambda m: str(m.spec.scale.max_concurrency), wide=True, right=True),
        Column("SOURCE", lambda m: _source(m.spec.source), wide=True),
    ]


def fields(model: ModelView) -> list[tuple[str, str]]:
    scale, engine = model.spec.scale, model.spec.engine
    pairs = [
        ("Name", model.name),
        ("State", str(model.state)),
        ("Source", _source(model.spec.source)),
        ("Checkpoint", model.digest or "-"),
        ("Instances", _instances(model)),
        ("Requests", f"{model.running} running, {model.waiting} waiting"),
        ("Scale", f"{scale.min} to {scale.max} instances, {scale.max_concurrency} sequences each"),
        ("Queue", f"{scale.queue_limit} requests may wait"),
        ("Keep-alive", _keep_alive(scale)),
        ("Cold start", f"a request waits up to {duration(model.spec.cold_start_timeout_s)}"),
        ("Devices", f"{model.spec.devices} an instance"),
    ]
    if engine.kv_bytes is not None:
        pairs.append(("KV cache", size(engine.kv_bytes)))
    if engine.max_context_tokens is not None:
        pairs.append(("Context", f"{engine.max_context_tokens} tokens"))
    if engine.threads is not None:
        pairs.append(("Threads", str(engine.threads)))
    if engine.deterministic:
        pairs.append(("Deterministic", "yes"))
    pairs.append(("Age", age(now() - model.created_at)))
    if model.progress is not None:
        pairs.append(("Progress", progress_text(model.progress)))
    if model.no_place:
        pairs.append(("No place", model.no_place))
    if model.failing is not None:
        pairs += failing_fields(model.name, model.failing)
    if model.fault is not None:
        pairs.append(("Fault", f"{model.fault.message} ({model.fault.code})"))
    return pairs


def failing_fields(model: str, failing: FailingView) -> list[tuple[str, str]]:
    """What is wrong with a model's instance, and when that is tried again."""
    again = "once another node joins or comes back, or a sound copy of its checkpoint appears"
    if failing.retry_at is not None:
        again = f"in {duration(max(0.0, failing.retry_at - now()))}"
    if failing.state == "failed":
        again += f"; `sllmctl model deploy {model}` tries it at once"
    fault = failing.fault
    return [("Failing", f"{failing.instance} on {failing.node}: {fault.message} ({fault.code})"), ("Tried again", again)]


def _state(model: ModelView) -> str:
    if model.fault is not None:
        return f"{model.state} ({model.fault.code})"
    if model.progress is not None and model.progress.total_bytes:
        return f"{model.state} {100 * model.progress.done_bytes / model.progress.total_bytes:.0f}%"
    return str(model.state)


def _instances(model: ModelView) -> str:
    return ", ".join(f"{count} {state}" for state, count in model.instances.items() if count) or "0"


def _source(source: Source) -> str:
    from schema.spec import PathSource, UrlSource

    if isinstance(source, PathSource):
        where = f"{source.node}:{source.path}" if source.node else source.path
        return f"{where} (in place)" if source.in_place else where
    if isinstance(source, UrlSource):
        return source.url
    return f"{source.repo}@{source.revision}"


def _keep_alive(scale: ScaleSpec) -> str:
    return "auto" if scale.keep_alive_s is None else duration(scale.keep_alive_s)
