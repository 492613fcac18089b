"""Whether a terminal's background is light: as the environment says, else as the terminal answers."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty

__all__ = ["is_light"]

_ASK = b"\x1b]11;?\x1b\\\x1b[c"
"""Two questions, of xterm's: which colour is the background, and (what any terminal answers, in turn) which terminal it is."""
_ANSWER = re.compile(rb"\x1b\]11;rgb:([0-9a-fA-F]+)/([0-9a-fA-F]+)/([0-9a-fA-F]+)")
_LAST = re.compile(rb"\x1b\[\?[0-9;]*c")
_PATIENCE_S = 1.0
_LIGHT_INDICES = {7, *range(9, 16)}


def is_light() -> bool:
    """As ``COLORFGBG`` says (``15;0``: the background is the last), else as the terminal on stdin and stdout answers within a
    second. One that says nothing is dark."""
    index = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    if index.isascii() and index.isdigit():
        return int(index) in _LIGHT_INDICES
    try:
        answer = _ask(sys.stdin.fileno(), sys.stdout.fileno())
    except (OSError, ValueError, termios.error):
        return False
    return _brightness(answer) > 0.5


def _ask(source: int, target: int) -> bytes:
    """What a terminal answers; whatever comes too late is thrown away, or it would be taken for keys."""
    before = termios.tcgetattr(source)
    answer = b""
    try:
        tty.setcbreak(source, termios.TCSANOW)
        os.write(target, _ASK)
        deadline = time.monotonic() + _PATIENCE_S
        while _LAST.search(answer) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([source], [], [], left_s)[0]:
                break
            if not (part := os.read(source, 1024)):
                break
            answer += part
    finally:
        termios.tcsetattr(source, termios.TCSAFLUSH, before)
    return answer


def _brightness(answer: bytes) -> float:
    """Of the background in an answer, by ITU-R BT.709's weights: 0 for black or none, 1 for white."""
    found = _ANSWER.search(answer)
    if found is None:
        return 0.0
    parts = zip((0.2126, 0.7152, 0.0722), found.groups(), strict=True)
    return sum(weight * int(part, 16) / float(16 ** len(part) - 1) for weight, part in parts)
