"""What a cell of fixed width shows: short numbers, ages, bars, histories, and the colours of states. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "ACCENT",
    "BAD",
    "DEVICE",
    "FAINT",
    "GOOD",
    "MUTED",
    "PLAIN",
    "WARN",
    "Cell",
    "Span",
    "age",
    "bar",
    "clock",
    "count",
    "history",
    "printable",
    "rate",
    "seconds",
    "short",
    "size",
    "state",
]

PLAIN, MUTED, FAINT, ACCENT, GOOD, WARN, BAD, DEVICE = "plain", "muted", "faint", "accent", "good", "warn", "bad", "device"
"""Styles by what they are for; tui.palette has their colours."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEVELS = "▁▂▃▄▅▆▇█"
_COLOURS = {
    **dict.fromkeys(("ready", "deployed", "running", "resident", "finished", "start", "best"), GOOD),
    **dict.fromkeys(("failed", "unreachable", "quarantined", "error", "critical", "refused"), BAD),
    **dict.fromkeys(
        ("starting", "ingesting", "filling", "waiting", "backoff", "draining", "joining", "planned", "warning", "wait"), WARN
    ),
    **dict.fromkeys(
        ("stopped", "stopping", "deleting", "evicting", "removed", "cancelled", "absent", "debug", "cordoned"), MUTED
    ),
}


class Span(NamedTuple):
    """Text in one style, as tui.palette takes it."""

    text: str
    style: str = PLAIN


Cell = str | Span | Sequence[Span]


def printable(text: str) -> str:
    """The text without what could steer the terminal: it was written by others."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def size(number_bytes: float) -> str:
    """At most five characters: ``512B``, ``1.5G``, ``832M``."""
    value = float(number_bytes)
    for unit in "BKMGTP":
        if value < 999.5 or unit == "P":
            return f"{value:.0f}{unit}" if unit == "B" or value >= 9.95 else f"{value:.1f}{unit}"
        value /= 1024
    raise AssertionError(number_bytes)


def rate(bps: float) -> str:
    return f"{size(bps)}/s" if bps > 0 else ""


def count(number: int) -> str:
    """At most five characters: ``12345``, ``1.2M``."""
    if number < 100_000:
        return str(number)
    for unit, power in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        value = number / power
        if value < 999.5 or unit == "G":
            return f"{value:.0f}{unit}" if value >= 9.95 else f"{value:.1f}{unit}"
    raise AssertionError(number)


def age(elapsed_s: float) -> str:
    """``3m``: whole units of the largest kind of which there are two; a clock that is behind shows ``0s``."""
    whole = max(0, int(elapsed_s))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


def seconds(elapsed_s: float | None) -> str:
    """At most six characters: ``8ms``, ``0.84s``, ``41s``, ``130s``; "" for None."""
    if elapsed_s is None:
        return ""
    if elapsed_s < 0.0995:
        return f"{elapsed_s * 1000:.0f}ms"
    return f"{elapsed_s:.2f}s" if elapsed_s < 9.995 else f"{elapsed_s:.0f}s"


def clock(at: float) -> str:
    """The time of day, here."""
    import time

    return time.strftime("%H:%M:%S", time.localtime(at))


def short(name: str, width: int) -> str:
    """A name that fits: its middle is left out, since both ends tell names apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}" if width > 2 else name[:width]


def state(name: str) -> Span:
    """A state, or a level, in its colour."""
    return Span(name, _COLOURS.get(name, PLAIN))


def bar(ratio: float, width: int) -> list[Span]:
    """A bar in eighths of a character, green to red as it fills."""
    ratio = min(1.0, max(0.0, ratio))
    eighths = round(ratio * width * 8)
    if ratio > 0:
        eighths = max(1, eighths)
    full, part = divmod(eighths, 8)
    colour = GOOD if ratio < 0.75 else WARN if ratio < 0.92 else BAD
    spans = [Span("█" * full, colour)] if full else []
    if part:
        spans.append(Span(_EIGHTHS[part], f"{colour} on track"))
    if (rest := width - full - bool(part)) > 0:
        spans.append(Span(" " * rest, "on track"))
    return spans


def history(samples: Iterable[float], width: int, top: float | None = None) -> Span:
    """The newest samples as a line of small bars, the newest at the right; ``top`` is a full one, else the highest."""
    newest = list(samples)[-width:]
    most = top if top else max(newest, default=0.0)
    if most <= 0:
        return Span("▁" * len(newest), FAINT)
    line = "".join(_LEVELS[min(7, round(7 * max(0.0, sample) / most))] for sample in newest)
    return Span(f"{line:>{width}}", ACCENT)
