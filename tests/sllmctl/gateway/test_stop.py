"""Stop strings against a brute-force twin, whatever the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllmctl.gateway.stop import StopMatcher


def _brute(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return text[: end - max(sizes)], True
    return text, False


def _may_begin(text: str, stops: tuple[str, ...]) -> int:
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


_letters = st.text("ab\n", min_size=1, max_size=4)


@given(st.lists(st.text("ab\n", max_size=5), max_size=12), st.lists(_letters, min_size=1, max_size=4))
def test_pieces_are_cut_as_the_whole_is(pieces: list[str], stop_list: list[str]) -> None:
    stops = tuple(stop_list)
    matcher = StopMatcher(stops)
    sent, seen = "", ""
    for piece in pieces:
        sent += matcher.push(piece)
        seen += piece
        if not matcher.matched:
            assert len(seen) - len(sent) == _may_begin(seen, stops), "exactly what may begin a stop string is held back"
    matched = matcher.matched
    sent += matcher.flush()
    assert (sent, matched) == _brute("".join(pieces), stops)


def test_a_stop_string_over_three_pieces_never_leaks() -> None:
    matcher = StopMatcher(("<end>",))
    assert [matcher.push(piece) for piece in ("ab<", "en", "d>cd")] == ["ab", "", ""]
    assert matcher.matched
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_a_false_start_is_sent_after_all() -> None:
    matcher = StopMatcher(("<end>",))
    assert matcher.push("a<en") == "a"
    assert matcher.push("try") == "<entry"
    assert not matcher.matched


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("a", ""))
