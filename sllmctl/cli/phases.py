"""A start's phases and a request's timeline as a line each. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllmctl.cli.format import duration, size

if TYPE_CHECKING:
    from schema.admin import ProgressView, RequestTimeline
    from schema.link import EngineTiming, StartPhases

__all__ = ["engine_text", "progress_text", "start_text", "timeline_text"]


def start_text(start: StartPhases) -> str:
    """``load 0.41 s (1.2 GiB from dram), fork 9 ms, build 0.05 s, attach 8 ms, warm 0.02 s; ready after 0.52 s``."""
    came_from = f" ({size(start.loaded_bytes)} from {start.loaded_from})" if start.loaded_from else ""
    waited = f" ({duration(start.zygote_s)} for the zygote)" if start.zygote_s > 0 else ""
    parts = [f"load {duration(start.load_s)}{came_from}", f"fork {duration(start.fork_s)}{waited}"]
    parts += [
        f"{name} {duration(seconds)}"
        for name, seconds in (
            ("build", start.build_s),
            ("attach", start.attach_s),
            ("warm", start.warm_s),
        )
    ]
    return f"{', '.join(parts)}; ready after {duration(start.total_s)}"


def timeline_text(timeline: RequestTimeline) -> str:
    """``routed 0.52 s, first token 0.61 s, ended 1.90 s`` since the request came, as far as it has come."""
    marks = (("routed", timeline.routed_s), ("first token", timeline.first_token_s), ("ended", timeline.ended_s))
    return ", ".join(f"{name} {duration(at)}" for name, at in marks if at is not None) or "waiting"


def engine_text(engine: EngineTiming) -> str:
    """``queued 0 ms, waited for weights 0.21 s, prefill 21 ms, first token 0.23 s, total 1.30 s, 64 steps``: the engine's own
    account of an attempt. Most wait for no weights, and do not say so."""
    parts = [("queued", engine.queued_s)]
    if engine.weights_s > 0:
        parts.append(("waited for weights", engine.weights_s))
    parts += [("prefill", engine.prefill_s), ("first token", engine.first_token_s), ("total", engine.total_s)]
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts)
    return f"{spent}, {engine.steps} steps"


def progress_text(progress: ProgressView) -> str:
    """``load from disk 310.0 MiB of 1.1 GiB, 800.0 MiB/s, now 1.1 GiB/s``."""
    text = progress.doing
    if progress.total_bytes:
        text += f" {size(progress.done_bytes)} of {size(progress.total_bytes)}"
    if progress.rate_bps > 0:
        text += f", {size(progress.rate_bps)}/s"
    return text + (f", now {size(progress.now_bps)}/s" if progress.now_bps > 0 else "")
