"""`sllmctl simulate`: what it prints, writes and refuses; whole simulations of a small cluster."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sllmctl.cli import diagnostics
from tests.sllmctl.cli.conftest import Sllmctl

SMALL = ("demo", "--requests", "20")


def test_it_lists_what_there_is(sllmctl: Sllmctl) -> None:
    said = sllmctl("simulate", "--list")
    assert said.code == 0
    assert all(name in said.out for name in ("opt-30b-sharegpt", "datacentre", "shepherd-batched", "sllmctl-no-locality"))


def test_policies_stand_side_by_side(sllmctl: Sllmctl) -> None:
    said = sllmctl("simulate", *SMALL, "--policy", "random", "--policy", "sllmctl")
    assert said.code == 0
    header, first, second = said.out.splitlines()
    assert header.split()[:4] == ["POLICY", "REQUESTS", "WITHIN", "FAILED"]
    assert first.split()[:2] == ["random", "20"]
    assert second.split()[:2] == ["sllmctl", "20"]
    assert said.err.startswith("demo: 40 requests in all (2 policies, 2 simulations) for 8 models on 2 nodes; about ")
    assert "\ndone in " in said.err


def figures(text: str) -> list[dict[str, object]]:
    """What does not depend on how fast this machine is."""
    return [{key: value for key, value in one.items() if key not in ("wall_s", "simulated_rps")} for one in json.loads(text)]


@pytest.mark.slow
def test_several_processes_say_the_same(sllmctl: Sllmctl) -> None:
    asked = ("simulate", *SMALL, "--policy", "random", "--policy", "paper", "--rate", "0.5", "--rate", "2", "-o", "json")
    seeds = ("--seed", "1", "--seed", "2")
    alone, together = sllmctl(*asked, *seeds), sllmctl(*asked, *seeds, "--jobs", "2")
    assert alone.code == together.code == 0
    found = figures(alone.out)
    assert found == figures(together.out)
    assert [(one["policy"], one["settings"], one["requests"], one["seeds"]) for one in found] == [
        (policy, {"workload.rate": rate}, 40, [1, 2]) for rate in (0.5, 2.0) for policy in ("random", "paper")
    ]


def test_files_are_written(sllmctl: Sllmctl, tmp_path: Path) -> None:
    table, picture = tmp_path / "t.csv", tmp_path / "p.svg"
    said = sllmctl(
        "simulate", *SMALL, "--sweep", "models[0].count=2,8", "--csv", str(table), "--plot", str(picture), "--plot", "-"
    )
    assert said.code == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["settings.models[0].count"] for row in rows] == ["2", "8"]
    assert "<svg" in picture.read_text()
    assert "demo: P99 startup latency (s)" in said.out
    assert f"wrote {picture}" in said.err


def test_the_scenario_is_changed(sllmctl: Sllmctl) -> None:
    said = sllmctl("simulate", *SMALL, "--set", "nodes[0].count=1", "--set", "models[0].count=3", "-o", "json")
    assert said.code == 0
    assert "for 3 models on 1 node;" in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name a SCENARIO"),
        (("demo", "--policy", "best"), "there is no policy 'best'; those there are: random"),
        (("demo", "--policy", "random", "--policy", "random"), "given twice"),
        (("demo", "--set", "nodes[0].counts=1"), "counts"),
        (("demo", "--rate", "-1"), "rate"),
        (("demo", "--rate", "nan"), "rate"),
        (("demo", "--rate", "1", "--sweep", "workload.cv=1,2"), "one thing at a time"),
        (("demo", "--sweep", "workload.cv"), "write KEY=NUMBER,NUMBER"),
        (("demo", "--sweep", "workload.cv=1,x"), "write KEY=NUMBER,NUMBER"),
        (("demo", "--sweep", "models[7].count=1,2"), "models[7].count"),
        (("demo", "--plot", "p.pdf"), ".png or .svg"),
        (("demo", "--csv", "/nowhere/t.csv"), "there is no directory /nowhere"),
        (("demo", "--jobs", "0"), "--jobs"),
    ],
)
def test_what_cannot_be_simulated_is_refused(sllmctl: Sllmctl, arguments: tuple[str, ...], says: str) -> None:
    said = sllmctl("simulate", *arguments)
    assert said.code == diagnostics.USAGE
    assert says in said.err
    assert "requests in all" not in said.err


def test_a_scenario_that_is_not_there(sllmctl: Sllmctl) -> None:
    said = sllmctl("simulate", "nonesuch")
    assert said.code == 5
    assert "those are azure-shape, datacentre, demo" in said.err


@contextmanager
def simulating(jobs: str) -> Iterator[subprocess.Popen[str]]:
    """Two simulations of a million requests each, which run."""
    asked = [
        sys.executable, "-u", "-m", "sllmctl", "simulate", "demo", "--requests", "1000000", "--policy", "random",
        "--policy", "paper", "--jobs", jobs,
    ]  # fmt: skip
    child = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stderr is not None
    try:
        assert "2,000,000 requests in all" in child.stderr.readline()
        # A line of progress means that simulations run.
        assert "%" in child.stderr.readline()
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interrupt_ends_it(jobs: str) -> None:
    with simulating(jobs) as child:
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == diagnostics.INTERRUPTED
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


@pytest.mark.slow
def test_no_process_of_one_that_was_killed_goes_on() -> None:
    with simulating("2") as child:
        child.kill()
        # Whoever goes on holds the other end of its pipes.
        child.communicate(timeout=60)


def test_help_loads_no_simulator() -> None:
    code = "import sys; from sllmctl.cli.main import run; run(['simulate', '-h']); assert 'sllmctl.simulate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
