"""The only owner of stderr and of exit codes: notes, progress, questions, and what an error makes of the command.

::

    0 ok                       4 not authorised      8 doctor found a fault
    1 failed                   5 not found         130 interrupted
    2 usage or configuration   6 conflict
    3 manager unreachable      7 wait timed out
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from schema.admin import ProgressView
    from schema.logs import LogFormat

__all__ = [
    "DOCTOR_FAULT",
    "FAILED",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "ProgressLine",
    "Refusals",
    "confirm",
    "guard",
    "log_to_stderr",
    "note",
    "told_beside",
    "waiting_line",
    "writing_stdout",
]

OK, FAILED, USAGE, DOCTOR_FAULT, INTERRUPTED = 0, 1, 2, 8, 130

_BY_CODE = {
    "invalid_input": USAGE,
    "context_overflow": USAGE,
    "unreachable": 3,
    "unauthorised": 4,
    "not_found": 5,
    "conflict": 6,
    "timed_out": 7,
    "invalid_checkpoint": FAILED,
    "overloaded": FAILED,
    "unschedulable": FAILED,
    "cancelled": FAILED,
    "out_of_space": FAILED,
    "link_error": FAILED,
    "internal": FAILED,
}
"""Every class of the error tree, by its code."""

_SHOW_AFTER_S = 1.0
_LINE_EVERY_S = 5.0
_TICK_S = 0.2
_USUAL_COLUMNS = 80


def note(message: str) -> None:
    """A line for the person at the terminal, never part of the output; what it quotes of others cannot steer the terminal."""
    from sllmctl.cli.format import printable

    _tell(printable(message, keep="\n\t") + "\n")


def _tell(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # Where stderr takes nothing there is nobody to tell; the work goes on, and the exit code still says how it went.
        _give_up(sys.stderr)


def guard(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; whatever it raises ends here, said once."""
    _stand_in_for_closed_streams()
    try:
        return _run(command)
    except BrokenPipeError:
        # The reader of our output is gone, which is its own affair.
        _give_up(sys.stdout)
        return FAILED


def _stand_in_for_closed_streams() -> None:
    """Python has None for a standard stream that was closed. Reading then meets the end, and writing to stdout an error.

    The descriptors are also taken before a socket or a database gets one of these numbers.
    """
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))


class StdoutError(Exception):
    """What a command said could not be written."""


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """A block that writes to stdout: its failure is a full disk or a closed stream of the user's, not a defect."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(f"cannot write to standard output: {error.strerror}") from error


def _give_up(stream: TextIO) -> None:
    """What is still buffered must not raise again when Python flushes on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def log_to_stderr(level: str, form: LogFormat) -> None:
    """The log of a command that serves: a line each, from ``level`` ("debug" to "error") up; of libraries, what is wrong."""
    import logging

    from schema.logs import LineFormatter, install

    install(logging.StreamHandler(sys.stderr), LineFormatter("manager", form), level, libraries="WARNING")


def confirm(question: str, yes: bool) -> None:
    """Ask before something is destroyed; ``yes`` has answered already. What the question quotes cannot steer the terminal.

    Raises UsageError where nobody can be asked.
    """
    from sllmctl.cli.format import printable

    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"{question} There is no terminal to ask on: say so with -y.")
    if not click.confirm(printable(question), err=True):
        raise click.exceptions.Exit(FAILED)


class Refusals:
    """What is asked of several things: that one is refused keeps no other from its turn.

    Each refusal is told as it comes; leaving the block then ends the command as the first of them would have.
    """

    def __init__(self) -> None:
        self._codes: list[int] = []

    def __enter__(self) -> Refusals:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._codes:
            raise click.exceptions.Exit(self._codes[0])

    def each(self, names: Iterable[str], act: Callable[[str], object]) -> list[str]:
        """Do it to each, once, and return those that it was not refused for. Raises Unreachable and NoAnswer: nobody else will
        answer, or in time."""
        from schema.errors import SllmError, Unreachable
        from sllmctl.client import NoAnswer

        done = []
        for name in dict.fromkeys(names):
            try:
                act(name)
            except (Unreachable, NoAnswer):
                raise
            except SllmError as error:
                self._codes.append(_failed(error))
            else:
                done.append(name)
        return done


class ProgressLine:
    """How far something long has come, once it takes over a second: a line that is rewritten, or one now and then in a log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._said = clock()
        self._terminal = sys.stderr.isatty()
        self._open = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, what: str, progress: ProgressView | None) -> None:
        """Say that ``what`` goes on, with its stage, bytes and rate where they are known."""
        self.line(lambda: f"{what}{_amounts(progress)}")

    def line(self, text: Callable[[], str]) -> None:
        """Say this, if it is time to; ``text`` is only asked for then."""
        moment = self._clock()
        if moment - self._began < _SHOW_AFTER_S or (not self._terminal and moment - self._said < _LINE_EVERY_S and self._open):
            return
        from sllmctl.cli.format import printable

        self._said = moment
        if self._terminal:
            _tell(f"\r\x1b[K{_fitting(printable(text()))}")
        else:
            note(text())
        self._open = True

    def clear(self) -> None:
        if self._open and self._terminal:
            _tell("\r\x1b[K")
        self._open = False


def waiting_line(what: str) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """A block that waits for something it cannot look at: `told_beside` tells ``what``, and since when."""
    began = time.monotonic()
    return told_beside(lambda line: line.line(lambda: f"{what} ... {time.monotonic() - began:.0f} s"))


@contextlib.contextmanager
def told_beside(show: Callable[[ProgressLine], None]) -> Iterator[Callable[[], None]]:
    """A block beside which a thread shows a progress line again and again, until the function that it gives is called."""
    import threading

    over = threading.Event()

    def tell() -> None:
        with ProgressLine() as line:
            while not over.wait(_TICK_S):
                show(line)

    def end() -> None:
        over.set()
        teller.join()

    teller = threading.Thread(target=tell, name="waiting line", daemon=True)
    teller.start()
    try:
        yield end
    finally:
        end()


def _fitting(text: str) -> str:
    """As much of it as leaves a line of the terminal unwrapped; one that does not know its width says 0."""
    from sllmctl.cli.format import cells

    columns = 0
    with contextlib.suppress(OSError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    room = max((columns or _USUAL_COLUMNS) - 1, 1)
    while cells(text) > room:
        text = text[:-1]
    return text


def _amounts(progress: ProgressView | None) -> str:
    from sllmctl.cli.format import bandwidth, size

    if progress is None:
        return " ..."
    text = f": {progress.doing}"
    if progress.total_bytes:
        share = 100 * progress.done_bytes / progress.total_bytes
        text += f" {size(progress.done_bytes)} of {size(progress.total_bytes)} ({share:.0f} %)"
    return text + (f", {bandwidth(progress.rate_bps)}" if progress.rate_bps > 0 else "")


def _run(command: Callable[[], object]) -> int:
    try:
        result = command()
        with writing_stdout():
            sys.stdout.flush()
        return result if isinstance(result, int) else OK
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        note("interrupted")
        return INTERRUPTED
    except click.UsageError as error:
        if error.ctx is not None:
            note(error.ctx.get_usage())
        note(f"error: {error.format_message()}")
        return USAGE
    except click.ClickException as error:
        note(f"error: {error.format_message()}")
        return USAGE
    except BrokenPipeError:
        raise
    except StdoutError as error:
        _give_up(sys.stdout)
        note(f"error: {error}")
        return FAILED
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    from schema.errors import SllmError

    if isinstance(error, SllmError):
        note(f"error: {error.message}")
        codes = (getattr(kind, "code", "internal") for kind in type(error).__mro__)
        return next(_BY_CODE[code] for code in codes if code in _BY_CODE)
    import traceback

    traceback.print_exc(file=sys.stderr)
    note("error: this is a defect of sllmctl; please report it with the lines above")
    return FAILED
