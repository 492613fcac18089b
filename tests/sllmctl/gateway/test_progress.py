"""How far things have come, by operation and by node."""

from __future__ import annotations

from schema.link import Progress
from schema.states import Tier
from sllmctl.gateway.progress import ProgressBoard


def step(op: str, done: int, *, stage: str = "load", source: Tier | None = Tier.DISK) -> Progress:
    return Progress(op=op, stage=stage, done_bytes=done, total_bytes=1000, source=source)


def rates(board: ProgressBoard, op: str) -> tuple[float, float]:
    shown = board.view(op)
    assert shown is not None
    return shown.rate_bps, shown.now_bps


def test_a_rate_is_of_the_stage_and_of_its_last_seconds() -> None:
    board = ProgressBoard(8)
    board.take(step("a", 0), 10.0, "n")
    assert rates(board, "a") == (0.0, 0.0)
    board.take(step("a", 100), 11.0, "n")
    board.take(step("a", 200), 12.0, "n")
    assert rates(board, "a") == (100.0, 100.0)
    board.take(step("a", 900), 15.0, "n")
    assert rates(board, "a") == (180.0, 700 / 3)
    board.take(step("a", 10, stage="verify", source=Tier.DRAM), 19.0, "n")
    shown = board.view("a")
    assert shown is not None
    assert (shown.rate_bps, shown.now_bps, shown.source, shown.stage) == (0.0, 0.0, Tier.DRAM, "verify")


def test_a_burst_of_steps_counts_from_the_step_before_it() -> None:
    """Eight connections that are held down to the same pace end their chunks together, every four seconds."""
    board = ProgressBoard(8)
    done = 0
    board.take(step("a", done), 0.0, "n")
    for burst in range(1, 6):
        for part in range(8):
            done += 4
            board.take(step("a", done), 4.0 * burst + 0.1 * part, "n")
            assert rates(board, "a")[1] < 9.0, "four bytes in a tenth of a second are no forty a second"


def test_what_brings_no_bytes_slows_the_rate() -> None:
    board = ProgressBoard(8)
    for second in range(4):
        board.take(step("a", 100 * second), float(second), "n")
    assert rates(board, "a") == (100.0, 100.0)
    for second in range(4, 8):
        board.take(step("a", 300), float(second), "n")
    assert rates(board, "a")[1] == 0.0


def test_what_goes_on_where_it_broke_off_is_named_with_the_tier_that_it_comes_from() -> None:
    board = ProgressBoard(8)
    board.take(step("a", 0, stage="fetch, resumed", source=Tier.REMOTE), 0.0, "n")
    board.take(step("b", 0, stage="warm", source=None), 0.0, "n")
    named = [shown.doing for op in ("a", "b") if (shown := board.view(op)) is not None]
    assert named == ["fetch from remote, resumed", "warm"]


def test_a_node_shows_what_moves_there_and_neither_what_is_done_nor_what_is_silent() -> None:
    board = ProgressBoard(8)
    for op, node, done in (("a", "n", 10), ("b", "m", 10), ("c", "n", 1000), ("d", "n", 20)):
        board.take(step(op, done), 10.0, node)
    assert [op for op, _ in board.on("n", 20.0)] == ["a", "d"]
    board.take(step("a", 11), 35.0, "n")
    assert [op for op, _ in board.on("n", 45.0)] == ["a"]
    board.drop("a")
    assert board.on("n", 45.0) == []
