"""Numbers as people read them: sizes, rates, ages, durations. Pure."""

from __future__ import annotations

__all__ = ["age", "bandwidth", "cells", "duration", "padded", "printable", "short_digest", "size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(number_bytes: float) -> str:
    """``1.2 GiB``."""
    value = float(number_bytes)
    for unit in _UNITS[:-1]:
        if abs(value) < 1023.95:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def bandwidth(rate_bps: float) -> str:
    """``830.0 MiB/s``, or ``-`` for what was not measured."""
    return f"{size(rate_bps)}/s" if rate_bps > 0 else "-"


def age(seconds: float) -> str:
    """``3m``: whole units of the largest kind of which there are two, down to seconds; a clock that is behind shows ``0s``."""
    whole = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


def duration(seconds: float) -> str:
    """``8 ms``, ``0.84 s``, ``41 s``, ``2m10s``, ``5m``."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if rest else f"{minutes}m"


def short_digest(digest: str | None) -> str:
    """The first 12 digits, enough to name it by."""
    return digest[:12] if digest else "-"


def printable(text: str, keep: str = "") -> str:
    """The text without control characters but those in ``keep``: what others wrote must not steer the terminal."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def cells(text: str) -> int:
    """How many columns of a terminal it takes: Chinese, Japanese and Korean letters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def padded(text: str, width: int, *, right: bool = False) -> str:
    """The text with spaces to ``width`` columns, set to the left or right."""
    space = " " * (width - cells(text))
    return space + text if right else text + space
