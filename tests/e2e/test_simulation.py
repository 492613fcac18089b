"""The simulator against reality: the same requests, played to a local node and to a simulation of it.

The differences are printed (``pytest -s``), and must stay within what the docstring of each check says. A small machine that
other things run on is no fine measure: what is held here is that the simulation tells the same story.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.reality import MODELS, Observed, Reality, arrivals

pytestmark = [pytest.mark.slow, pytest.mark.alone]

REQUESTS = 40
RATE = 1.0


@pytest.mark.timeout(900)
def test_a_simulation_tells_what_a_real_node_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reality(tmp_path) as real:
        scenario = real.measure()
        calls = arrivals(REQUESTS, RATE, seed=1)
        seen = real.play(calls)
        record = real.simulate(scenario, calls)
    said = Observed(
        startup_s=list(record.startup_s),
        first_token_s=list(record.first_token_s),
        ended_s=list(record.ended_s),
        cold=[bool(cold) for cold in record.cold],
        loads=dict(record.loads),
    )
    with capsys.disabled():
        print(
            f"\n  {REQUESTS} requests over {MODELS} models; DRAM holds two of them, the third is read from disk\n"
            + table(seen, said)
        )
    assert not sum(record.failed)
    starts = sum(seen.loads.values()), sum(said.loads.values())
    assert starts[0] >= MODELS + 2, "weights were evicted and read again"
    assert 0.5 <= starts[1] / starts[0] <= 2.0
    assert abs(sum(said.cold) - sum(seen.cold)) <= 0.3 * len(calls)
    # The first call of each model meets an idle node: what a start and a request take. The others queue for two places in DRAM.
    assert 0.4 <= fmean(said.ended_s[:MODELS]) / fmean(seen.ended_s[:MODELS]) <= 2.5
    assert 0.4 <= fmean(said.ended_s) / fmean(seen.ended_s) <= 2.5


def table(seen: Observed, said: Observed) -> str:
    """Measured, simulated, and how far they are apart, without the calls that set the scene."""
    rows = [f"  {'':24}{'measured':>12}{'simulated':>12}{'ratio':>8}"]
    for name in ("startup_s", "first_token_s", "ended_s"):
        measured, simulated = (fmean(getattr(one, name)[MODELS:]) for one in (seen, said))
        rows.append(f"  {'mean ' + name:24}{measured:>12.3f}{simulated:>12.3f}{simulated / measured:>8.2f}")
    rows += [
        f"  {'starts from ' + source:24}{seen.loads.get(source, 0):>12}{said.loads.get(source, 0):>12}"
        for source in sorted({*seen.loads, *said.loads})
    ]
    cold = sum(seen.cold), sum(said.cold)
    rows.append(f"  {'requests that were cold':24}{cold[0]:>12}{cold[1]:>12}")
    return "\n".join(rows)
