"""Log lines: what is on them in both forms, that nothing in a record breaks them, and that a flood is cut."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from schema.logs import LineFormatter, Throttle, about, install, stamp, stamp_of, time_of

AT = 1_800_000_000.25


def record(message: str, *args: object, level: int = logging.INFO, at: float = AT, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("agent.x", level, "x.py", 1, message, args, None)
    made.created = at
    made.__dict__.update(about(**fields))
    return made


def test_a_line_for_people_has_its_time_its_place_and_what_it_is_about() -> None:
    line = LineFormatter("worker", "console", {"instance": "i"}).format(
        record("took %d", 3, request="req_1", why="a b", x=None)
    )
    assert line == '2027-01-15T08:00:00.250Z INFO worker agent.x: took 3 instance=i request=req_1 why="a b"'
    assert time_of(line) == AT


def test_a_json_line_has_the_same_as_fields() -> None:
    made = record("took %d", 3, level=logging.WARNING, request="req_1", after_s=0.1234567891)
    line = LineFormatter("worker", "json").format(made)
    told = json.loads(line)
    assert told == {
        "at": "2027-01-15T08:00:00.250Z",
        "level": "warning",
        "process": "worker",
        "logger": "agent.x",
        "pid": made.process,
        "message": "took 3",
        "request": "req_1",
        "after_s": 0.123457,
    }
    assert time_of(line) == AT


def test_what_a_field_is_called_hides_nothing_of_the_line_itself() -> None:
    told = json.loads(LineFormatter("worker", "json", {"message": "x", "level": "y"}).format(record("m")))
    assert (told["message"], told["level"]) == ("m", "info")


@pytest.mark.parametrize("form", ["console", "json"])
def test_nobody_can_make_one_line_look_like_two(form: str) -> None:
    made = record("user %s", "\n2027-01-15T08:00:00.250Z ERROR forged", request="a\r\nb")
    assert "\n" not in LineFormatter("p", form).format(made)  # type: ignore[arg-type]


def test_nobody_can_steer_a_terminal_that_shows_lines() -> None:
    try:
        raise ValueError("\x1b[2J\x9b31m")
    except ValueError:
        made = record("user %s", "\x1b]0;title\x07", request="\x1b[31m")
        made.exc_info = sys.exc_info()
    line = LineFormatter("p", "console").format(made)
    assert all(c.isprintable() or c == "\n" for c in line)
    assert "\\x1b]0;title\\x07" in line


def test_a_name_that_is_no_unicode_can_be_told_in_json() -> None:
    line = LineFormatter("p", "json").format(record("read %s", "/weights/\udcff"))
    assert json.loads(line.encode())["message"] == "read /weights/\udcff"


def test_numbers_that_are_none_are_told_in_json() -> None:
    line = LineFormatter("p", "json").format(record("x", ratio=float("nan"), huge=1 << 70))
    assert json.loads(line, parse_constant=pytest.fail)["huge"] == 1 << 70


def test_a_record_that_cannot_be_told_is_told_of() -> None:
    assert "arguments do not fit" in LineFormatter("p", "console").format(record("%d", "three"))
    assert len(LineFormatter("p", "console").format(record("x" * 10_000_000))) < 5000


def test_a_trace_follows_its_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    first, *rest = LineFormatter("p", "console").format(made).splitlines()
    assert first.endswith("failed")
    assert rest[-1] == "ValueError: no"
    assert stamp_of(rest[0]) is None
    assert json.loads(LineFormatter("p", "json").format(made))["trace"].endswith("ValueError: no")


def test_a_stamp_is_cut_to_its_millisecond() -> None:
    assert [stamp(at)[-5:] for at in (1_800_000_000.001, 1_800_000_000.9999, 1_800_000_000.0)] == [".001Z", ".999Z", ".000Z"]


def test_stamps_sort_by_time() -> None:
    assert stamp(AT) < stamp(AT + 0.001) < stamp(AT + 86400)
    assert stamp_of("2027-13-45T99:00:00.250Z x") is not None
    assert time_of("2027-13-45T99:00:00.250Z x") is None


def test_a_flood_is_cut_and_says_so() -> None:
    throttle = Throttle(per_s=10, burst=5)
    passed = [made for made in (record("m", at=AT + n / 1000) for n in range(20)) if throttle.filter(made)]
    assert len(passed) == 5
    assert throttle.filter(record("bad", level=logging.ERROR, at=AT))
    later = record("m", at=AT + 1)
    assert throttle.filter(later)
    assert later.__dict__["about"]["lines_left_out"] == 15


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.fixture
def _root_logging() -> Iterator[None]:
    root, handlers, level = logging.getLogger(), list(logging.getLogger().handlers), logging.getLogger().level
    names = ("raiseExceptions", "_srcfile", "logThreads", "logMultiprocessing", "logAsyncioTasks")
    switches = {name: getattr(logging, name) for name in names if hasattr(logging, name)}
    yield
    root.handlers[:] = handlers
    for name, switch in switches.items():
        setattr(logging, name, switch)
    root.setLevel(level)
    logging.getLogger("sllmctl").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_root_logging")
def test_a_handler_that_fails_ends_nothing() -> None:
    install(logging.StreamHandler(_Broken()), LineFormatter("p", "console"), "info")
    logging.getLogger("agent.x").error("nobody will read this")


@pytest.mark.usefixtures("_root_logging")
def test_libraries_say_only_what_is_wrong() -> None:
    stream = io.StringIO()
    install(logging.StreamHandler(stream), LineFormatter("p", "console"), "debug", libraries="WARNING")
    logging.getLogger("sllmctl.x").debug("ours")
    logging.getLogger("asyncio").info("theirs")
    assert "ours" in stream.getvalue()
    assert "theirs" not in stream.getvalue()


@pytest.mark.usefixtures("_root_logging")
def test_a_line_has_no_more_work_done_for_it_than_it_shows() -> None:
    handler = logging.StreamHandler(io.StringIO())
    made: list[logging.LogRecord] = []
    handler.emit = made.append  # type: ignore[method-assign]
    install(handler, LineFormatter("p", "json"), "info")
    logging.getLogger("sllmctl.x").info("told")
    assert made[0].threadName is None
    assert made[0].lineno == 0
