"""Figures of the benchmark of loading: medians, paired by round, with an interval that says how sure it is."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from bench.load.results import figures, interval, markdown, replace_tables


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    hits, covered = 0, 0.0
    for _ in range(4000):
        low, high, covered = interval(list(random.normal(size=7)))
        hits += low <= 0 <= high
    assert covered == pytest.approx(1 - 2 * 0.5**7)
    assert hits / 4000 == pytest.approx(covered, abs=0.01)


def test_a_long_series_gets_a_narrower_interval() -> None:
    low, high, covered = interval(list(range(21)))
    assert (low, high) == (6, 14)
    assert 0.9 <= covered < 0.95


def _result() -> dict[str, object]:
    runs = []
    for number, disk_s in enumerate((1.0, 2.0, 4.0)):  # a disk that changes between rounds, and a loader that keeps its share
        for subject, share in (("raw", 1.0), ("arena", 0.96), ("run_ai", 0.5), ("tensors", 0.9)):
            runs.append(
                {"round": number, "subject": subject, "state": "cold", "seconds": disk_s / share, "cpu_s": 0.01, "bytes": 10**9,
                 "pages": "hugetlb", "first_touch_s": 0.004}
            )  # fmt: skip
    return {
        "runs": runs,
        "rounds": 3,
        "machine": "m",
        "commit": "c",
        "unsupported": {"instant_tensor": "no GPU"},
        "bytes": 10**9,
        "tensors": 201,
        "attach": [
            {"attach_s": [0.004, 0.006, 0.005], "attach_cpu_s": [0.003, 0.003, 0.004], "manifest_s": 0.002, "tensors": 201,
             "bytes": 10**9}
        ],
    }  # fmt: skip


def test_an_ingest_is_set_against_one_way_at_a_time_and_against_both_at_once() -> None:
    ingest = {
        "rate": 0.9e9,
        "warm_rate": 1.8e9,
        "read": 1.5e9,
        "write": 2e9,
        "copy": 1e9,
        "hash": 3e9,
        "peak_rss_bytes": 400 << 20,
    }
    lines = {line["figure"]: line for line in figures(_result() | {"ingest": [ingest]})}
    alone, both = lines["ingest"], lines["ingest, against the disk reading and writing at once"]
    assert (alone["measured"][:4], alone["reached"]) == ("0.60", False)
    assert alone["measured"].endswith("0.90 of read 1.50, write 2.00, sha256 3.00 GB/s")
    assert (both["measured"][:4], both["reached"]) == ("0.90", None)
    warm = lines["ingest of a source in the page cache"]
    assert (warm["measured"][:4], warm["reached"]) == ("0.90", True)
    del ingest["copy"], ingest["warm_rate"]
    assert "ingest" in {
        line["figure"] for line in figures(_result() | {"ingest": [ingest]})
    }  # a result of before they were measured


def test_ratios_are_of_the_same_round() -> None:
    lines = {line["figure"]: line for line in figures(_result())}
    assert lines["cold, disk to arena"]["measured"].startswith("0.96 (0.96 to 0.96)")
    assert lines["cold, disk to arena"]["reached"] is True
    assert lines["cold, disk to tensors, against Run:ai model streamer"]["measured"].startswith("1.80 ")
    assert lines["cold, disk to tensors, against Run:ai model streamer"]["measured"].endswith("; the disk allows 2.00")
    attach = lines["resident to tensors, 201 tensors, 1.0 GB"]
    assert (attach["aim"], attach["measured"][:7], attach["reached"]) == ("at most 5.4 ms", "5.0 ms,", True)
    assert lines["cold, disk to arena, processor time"]["measured"] == f"{statistics.median([0.01]):.3f} s/GB"


def test_the_tables_show_what_ran_and_why_the_rest_did_not() -> None:
    text = markdown(_result())
    assert "Not run: InstantTensor (no GPU)." in text
    assert text.index("io_uring in C") < text.index("to tensors in a worker") < text.index("Run:ai")
    assert "From the page cache" not in text


def test_tables_go_between_the_marks_of_the_document() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text()
    once = replace_tables(document, "| a |")
    assert "\n| a |\n<!--" in once
    assert replace_tables(once, "| b |") == once.replace("| a |", "| b |")
    with pytest.raises(ValueError, match="no marks"):
        replace_tables("text", "| a |")
