"""Numbers as people read them, and when progress is shown."""

from __future__ import annotations

import io
import os

import pytest

from schema.admin import ProgressView
from sllmctl.cli.diagnostics import ProgressLine
from sllmctl.cli.format import age, bandwidth, duration, printable, short_digest, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1_288_490_189, "1.2 GiB"),
        (1 << 40, "1.0 TiB"),
        (5 << 60, "5120.0 PiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0.9, "0s"),
        (59, "59s"),
        (119, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (172_799, "47h"),
        (172_800, "2d"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.0995, "0.10 s"),
        (0.099, "99 ms"),
        (1.234, "1.23 s"),
        (9.999, "10 s"),
        (119.4, "119 s"),
        (119.6, "2m"),
        (130, "2m10s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_digests_and_what_must_not_steer_a_terminal() -> None:
    assert (bandwidth(0), bandwidth(1 << 30)) == ("-", "1.0 GiB/s")
    assert (short_digest(None), short_digest("0123456789abcdef")) == ("-", "0123456789ab")
    assert printable("a\x1b[2Jb\r\nc") == "a\ufffd[2Jb\ufffd\ufffdc"
    assert printable("a\nb\t", keep="\n\t") == "a\nb\t"


class _Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


_HALF = ProgressView(stage="reading", done_bytes=1 << 30, total_bytes=2 << 30, rate_bps=float(1 << 29))


def test_progress_is_shown_from_the_second_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = _Screen(terminal=False), [0.0]
    monkeypatch.setattr("sys.stderr", screen)
    with ProgressLine(lambda: clock[0]) as line:
        for moment in (0.5, 0.9, 1.1, 2.0, 3.0, 6.2):
            clock[0] = moment
            line.show("ingesting tiny", _HALF if moment < 6 else None)
    expected = "ingesting tiny: reading 1.0 GiB of 2.0 GiB (50 %), 512.0 MiB/s\ningesting tiny ...\n"
    assert screen.getvalue() == expected, "in a log, a line every five seconds"


@pytest.mark.parametrize(
    ("columns", "what", "shown"),
    [
        (12, "ingesting tiny", "ingesting t"),
        (12, "ingesting 通义", "ingesting "),
        (0, "ingesting tiny", "ingesting tiny ..."),
    ],
)
def test_on_a_terminal_one_line_is_rewritten_and_removed(
    monkeypatch: pytest.MonkeyPatch, columns: int, what: str, shown: str
) -> None:
    screen, clock = _Screen(terminal=True), [0.0]
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(screen, "fileno", lambda: 2)
    monkeypatch.setattr("os.get_terminal_size", lambda _: type("Size", (), {"columns": columns})())
    with ProgressLine(lambda: clock[0]) as line:
        clock[0] = 1.5
        line.show(what, None)
        line.show(what, None)
    assert screen.getvalue() == f"\r\x1b[K{shown}\r\x1b[K{shown}\r\x1b[K"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stderr_that_nobody_reads_ends_no_work(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(nobody, "isatty", lambda: terminal)
        monkeypatch.setattr("sys.stderr", nobody)
        clock = [0.0]
        with ProgressLine(lambda: clock[0]) as line:
            for moment in (1.5, 9.0):
                clock[0] = moment
                line.show("ingesting tiny", None)
