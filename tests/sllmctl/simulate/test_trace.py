"""Workload files: read as a stream, refused by line."""

from __future__ import annotations

import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from schema.errors import InvalidInput
from sllmctl.simulate.scenario import load_scenario, override
from sllmctl.simulate.trace import is_shipped, read_counts, read_trace, synthetic_counts
from sllmctl.simulate.workload import arrivals

HEADER = "time,model,input_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trace.csv:1: the columns must be time,model,input_tokens,output_tokens, not none"),
        ("time,model\n1,m\n", "not time,model"),
        (HEADER, "trace.csv: no requests"),
        (HEADER + "1,m,5\n", "trace.csv:2: 3 values for 4 columns"),
        (HEADER + "1,m,5,5\n\nx,m,5,5\n", "trace.csv:4: time 'x'"),
        (HEADER + "-1,m,5,5\n", "trace.csv:2: time -1"),
        (HEADER + "nan,m,5,5\n", "trace.csv:2: time nan"),
        (HEADER + "2,m,5,5\n1,m,5,5\n", "trace.csv:3: time 1 is before the line above it"),
        (HEADER + "1,m,0,5\n", "trace.csv:2: input_tokens '0'"),
        (HEADER + "1,m,5,2.5\n", "trace.csv:2: output_tokens '2.5'"),
        (HEADER + "1,other,5,5\n", "trace.csv:2: the scenario has no model 'other'; its models are named m"),
        (HEADER + "1,m,50,51\n", "trace.csv:2: 101 tokens in and out, but m has a context of 100"),
        (HEADER + '1,"m,5,5\n', "trace.csv:2: unexpected end of data"),
        (HEADER + "1,\ufffem,5,5\n", "no model"),
    ],
)
def test_bad_traces_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        list(read_trace(str(path), {"m": 100}))
    assert message in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_bytes(HEADER.encode() + b"1,\xff,5,5\n")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        list(read_trace(str(tmp_path / "trace.csv")))


def test_a_scenario_checks_its_trace_and_finds_it_beside_itself(tmp_path: Path) -> None:
    scenario = override(load_scenario("trace-example"), ["models[0].count=8"])
    assert len(list(arrivals(scenario, 0))) == 120
    with pytest.raises(InvalidInput, match=r"example\.csv:\d+: the scenario has no model 'opt-6.7b-0000\d'"):
        override(scenario, ["models[0].count=1"])
    (tmp_path / "mine.csv").write_text(HEADER + "0.5,opt-6.7b-00000,5,6\n1.5,opt-6.7b-00007,7,8\n")
    mine = override(scenario, [f"workload.trace={tmp_path / 'mine.csv'}"])
    assert [(a.at, a.model, a.prompt_tokens, a.output_tokens) for a in arrivals(mine, 0)] == [
        (0.5, "opt-6.7b-00000", 5, 6),
        (1.5, "opt-6.7b-00007", 7, 8),
    ]
    assert len(list(arrivals(override(mine, ["workload.requests=1"]), 0))) == 1


def test_a_trace_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    with path.open("w") as stream:
        stream.write(HEADER)
        stream.writelines(f"{number},m,5,5\n" for number in range(20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_trace(str(path), {"m": 100})) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HashOwner,HashApp,HashFunction,Trigger\n", "counts.csv:1: the columns must be"),
        ("HashOwner,HashApp,HashFunction,Trigger,2\n", "counts.csv:1: the columns must be"),
        ("HashOwner,HashApp,HashFunction,Trigger,1\na,b,c,d\n", "counts.csv:2: 4 values for 5 columns"),
        ("HashOwner,HashApp,HashFunction,Trigger,1\na,b,c,d,-1\n", "counts.csv:2: '-1' is no number of invocations"),
        ("HashOwner,HashApp,HashFunction,Trigger,1\na,b,c,d,99999999999\n", "counts.csv:2: '99999999999' is no number"),
        ("HashOwner,HashApp,HashFunction,Trigger,1\na,b,c,d,0\n", "counts.csv: no invocations"),
    ],
)
def test_bad_counts_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "counts.csv").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_counts(str(tmp_path / "counts.csv"))
    assert message in str(caught.value)


def test_counts_are_spread_over_their_minutes_and_dealt_to_the_models(tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_text(
        "HashOwner,HashApp,HashFunction,Trigger,1,2,3\na,b,c,http,2,0,1\na,b,d,timer,0,4,0\na,b,e,queue,0,0,3\n"
    )
    scenario = override(
        load_scenario("azure-shape"), [f"workload.counts={tmp_path / 'counts.csv'}", "workload.rate=null", "models[0].count=2"]
    )
    calls = list(arrivals(scenario, 3))
    assert [call.at for call in calls] == sorted(call.at for call in calls)
    assert [(int(call.at // 60), call.model) for call in calls[:6]] == [(0, "opt-6.7b-00000")] * 2 + [(1, "opt-6.7b-00001")] * 4
    # The third function is dealt to the first model again.
    assert [(int(call.at // 60), call.model) for call in calls[6:]] == [(2, "opt-6.7b-00000")] * 4
    faster = list(arrivals(override(scenario, ["workload.rate=1"]), 3))
    assert len(faster) == 10
    assert all(10 / 180 * call.at == pytest.approx(quick.at) for call, quick in zip(calls, faster, strict=True))


def test_the_shipped_counts_are_what_their_scenario_says() -> None:
    assert is_shipped("azure-shape.csv")
    counts = read_counts("azure-shape.csv")
    text = synthetic_counts(functions=48, minutes=120, rate=1.0, zipf=1.5, cv=3.0, seed=1)
    rows = [[int(value) for value in line.split(",")[4:]] for line in text.splitlines()[1:]]
    assert [list(function) for function in counts.by_function] == rows
    totals = sorted(map(sum, rows), reverse=True)
    # Few functions make most calls, and many minutes are empty.
    assert sum(totals[:5]) > 0.6 * sum(totals)
    assert sum(row.count(0) for row in rows) > 0.7 * 48 * 120


def test_the_example_is_the_beginning_of_what_it_says_it_was_drawn_from() -> None:
    drawn = islice(arrivals(load_scenario("demo"), 1), 120)
    for made, read in zip(drawn, arrivals(load_scenario("trace-example"), 0), strict=True):
        assert read.at == pytest.approx(made.at, abs=1e-3)
        assert (read.model, read.prompt_tokens, read.output_tokens) == (made.model, made.prompt_tokens, made.output_tokens)
