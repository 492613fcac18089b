"""Finding out how a disk is read best: on a real file, told to stop, and where it cannot be found out."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from agent.native import calibration
from agent.native.calibration import LEAST_FILE_BYTES, Tuning, calibrate
from agent.native.uring import NoRing, Ring

USUAL = Tuning(4 << 20, 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        Ring(4).close()
    except NoRing as error:
        pytest.skip(str(error))
    file = tmp_path_factory.mktemp("disk") / "weights"
    part = os.urandom(1 << 20)
    with file.open("wb") as out:
        for _ in range(LEAST_FILE_BYTES >> 20):
            out.write(part)
    return file


def test_one_of_the_candidates_is_found(weights: Path) -> None:
    found = calibrate(weights, huge=True, limit_s=0.3, stop=threading.Event())
    assert found in calibration._CANDIDATES


@pytest.mark.parametrize(("other", "expected"), [(1.04, USUAL), (1.2, Tuning(2 << 20, 32))])
def test_the_usual_way_stays_unless_another_is_clearly_faster(
    weights: Path, monkeypatch: pytest.MonkeyPatch, other: float, expected: Tuning
) -> None:
    def run(self: calibration._Race, tuning: Tuning, limit_s: float, stop: threading.Event) -> float:
        return other if tuning == Tuning(2 << 20, 32) else 1.0

    monkeypatch.setattr(calibration._Race, "run", run)
    assert calibrate(weights, huge=True, limit_s=0.1, stop=threading.Event()) == expected


def test_it_ends_when_told(weights: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert calibrate(weights, huge=True, limit_s=60.0, stop=stop) is None


def test_a_short_file_and_a_missing_ring_say_nothing(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(4096))
    assert calibrate(short, huge=True, limit_s=0.1, stop=threading.Event()) is None

    def none(entries: int) -> Ring:
        raise NoRing("the system gives no io_uring: Operation not permitted")

    monkeypatch.setattr(calibration, "Ring", none)
    assert calibrate(weights, huge=True, limit_s=0.1, stop=threading.Event()) is None
