"""How fast the simulator is: requests and events per second, its memory, and where the time goes, on one core.

It runs the shipped scenario ``datacentre``, or a share of it: of its nodes, models, rate and requests.

    python -m bench.simulate [--share 1.0] [--requests 1000000] [--policy sllmctl] [--profile] [--json FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import sys
import time
from pathlib import Path

from msgspec.structs import replace

from bench.report import Report
from sllmctl.simulate.cluster import simulate
from sllmctl.simulate.policies import policy_named
from sllmctl.simulate.record import Record
from sllmctl.simulate.scenario import Scenario, load_scenario
from sllmctl.simulate.workload import arrivals


def scenario(share: float, requests: int) -> Scenario:
    whole = load_scenario("datacentre")
    assert whole.workload.rate is not None
    return replace(
        whole,
        nodes=tuple(replace(group, count=max(1, round(group.count * share))) for group in whole.nodes),
        models=tuple(replace(group, count=max(1, round(group.count * share))) for group in whole.models),
        workload=replace(whole.workload, rate=whole.workload.rate * share, requests=requests),
    )


def _say(report: Report, record: Record) -> None:
    count = len(record.arrived_at)
    report.row("requests", [count], "")
    report.row("wall time", [record.wall_s], "s", "< 480 for a million requests")
    report.row("requests per second", [count / record.wall_s], "1/s")
    report.row("events per request", [record.events / count], "")
    report.row("simulated time", [record.simulated_s], "s")
    report.row("starts", [record.starts], "")
    report.row("failed", [sum(record.failed)], "")
    report.row("migrations", [record.migrations], "")
    report.row("largest memory", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024], "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--policy", default="sllmctl")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked = scenario(args.share, args.requests)
    nodes, models = (sum(group.count for group in groups) for groups in (asked.nodes, asked.models))
    report = Report(f"simulating {nodes} nodes and {models} models under {args.policy}")
    began = time.perf_counter()

    def progress(ended: int) -> None:
        if ended % 50_000 == 0:
            print(f"{ended} requests after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    profiler = cProfile.Profile()
    if args.profile:
        profiler.enable()
    record = simulate(asked, policy_named(args.policy), arrivals(asked, asked.seed), progress=progress)
    profiler.disable()
    _say(report, record)
    if args.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
