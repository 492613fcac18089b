"""The comparison of docs/evaluation.md: the paper's workloads under every policy, and the number of models.

    python -m bench.evaluation [--jobs 2] [--seeds 0 1 2 3 4] [--scenarios NAME ...] [--policies NAME ...] [--counts 64 128 256]
        [--set KEY=VALUE ...] [--json FILE] [--markdown FILE]

What is in the JSON file already, from an earlier run that was ended, is not simulated again: give it another file, or none,
after a change of the code.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import msgspec

from sllmctl.simulate.compare import COUNT, MANY, RATE, RATES, SCENARIOS, Comparison
from sllmctl.simulate.policies import POLICIES
from sllmctl.simulate.scenario import load_scenario, override
from sllmctl.simulate.summary import Summary
from sllmctl.simulate.sweep import Run, check_policies, expected_requests, outcomes, runs


class Results(msgspec.Struct):
    """``changed``: what was set differently from the scenarios that are shipped."""

    machine: str
    changed: list[str]
    seeds: list[int]
    summaries: list[Summary]


def _key(scenario: str, policy: str, settings: dict[str, float | int | str]) -> tuple[object, ...]:
    return (scenario, policy, *sorted(settings.items()))


def _asked(args: argparse.Namespace) -> list[Run]:
    made: list[Run] = []
    for name in args.scenarios:
        scenario = override(load_scenario(name), args.set)
        key, values = (COUNT, args.counts) if name == MANY else (RATE, args.rates)
        made += runs(scenario, args.policies, key, values, args.seeds)
    return made


def _machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--scenarios", nargs="+", default=[*SCENARIOS, MANY])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, default=Path(f"bench/results/{time.strftime('%Y-%m-%d')}-evaluation.json"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    check_policies(args.policies)
    results = Results(_machine(), args.set, args.seeds, [])
    if args.json.is_file():
        results = msgspec.json.decode(args.json.read_bytes(), type=Results)
        if (results.changed, results.seeds) != (args.set, args.seeds):
            parser.error(f"{args.json} holds results of other settings or seeds; name another file")
    have = {_key(one.scenario, one.policy, one.settings) for one in results.summaries}
    left = [run for run in _asked(args) if _key(run.scenario.name, run.policy, dict(run.settings)) not in have]
    total = sum(expected_requests(run.scenario) for run in left)
    print(f"{len(left)} simulations of {total:,} requests, {len(have)} results there already", file=sys.stderr, flush=True)
    began = time.monotonic()
    ended = 0

    def progress(count: int) -> None:
        nonlocal ended
        ended = count

    args.json.parent.mkdir(parents=True, exist_ok=True)
    for outcome in outcomes(left, args.jobs, progress):
        one = outcome.summary
        results.summaries.append(one)
        # After each, so that nothing is lost when it is ended.
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
        print(
            f"{time.monotonic() - began:6.0f} s {100 * ended / max(total, 1):3.0f} % {one.scenario} {outcome.distribution[0]}: "
            f"mean {one.startup.mean_s:.3f} s, P99 {one.startup.p99_s:.3f} s, within {100 * one.within_share:.1f} %",
            file=sys.stderr,
            flush=True,
        )
    text = Comparison(results.summaries).markdown()
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
