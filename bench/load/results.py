"""From the runs of a benchmark of loading to its figures and tables: medians, paired ratios with their intervals, Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["TITLES", "figures", "interval", "markdown", "replace_tables"]

TITLES = {
    "raw": "io_uring in C, direct (the raw limit)",
    "raw_buffered": "4 threads in C, buffered",
    "arena": "**sllmctl**, disk to arena",
    "tensors": "**sllmctl**, to tensors in a worker",
    "in_place": "**sllmctl**, to tensors, safetensors in place",
    "sllm_store": "sllm-store's reader (its loop in C, 4 x 32 MiB), to host memory",
    "run_ai": "Run:ai model streamer",
    "safetensors_mmap": "safetensors `load_file`, every page touched",
    "safetensors_pread": 'safetensors 0.9rc, `backend="pread"`',
    "safetensors_prefetch": "safetensors 0.9rc, `prefetch`",
    "fast_safetensors": "fastsafetensors",
    "instant_tensor": "InstantTensor",
    "tensorizer_file": "tensorizer",
    "torch_load": "torch.load",
    "mmap_clone": "mmap and clone",
    "torch_dcp": "torch DCP",
}
_OURS = ("arena", "tensors", "in_place")
# A mapping of the page cache copies nothing and holds nothing: it is shown, and is no copying peer.
_NO_COPY = ("safetensors_mmap",)

Run = dict[str, Any]
Rates = dict[int, float]


def interval(values: Sequence[float], least: float = 0.9) -> tuple[float, float, float]:
    """The median's interval from order statistics, (low, high, coverage): the narrowest of ``least``, or all there is."""
    ordered = sorted(values)
    count = len(ordered)
    best = (ordered[0], ordered[-1], 1 - 2 * 0.5**count)
    for cut in range(1, count // 2):
        outside = 2 * sum(math.comb(count, below) for below in range(cut + 1)) * 0.5**count
        if 1 - outside < least:
            break
        best = (ordered[cut], ordered[count - 1 - cut], 1 - outside)
    return best


def _rates(runs: Iterable[Run], subject: str, state: str) -> Rates:
    return {run["round"]: run["bytes"] / run["seconds"] for run in runs if (run["subject"], run["state"]) == (subject, state)}


def _ratios(above: Rates, below: Rates) -> list[float]:
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def _ratio_text(values: Sequence[float]) -> str:
    low, high, _ = interval(values)
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def _subject_table(runs: list[Run], state: str, base: str) -> list[str]:
    names = [name for name in TITLES if _rates(runs, name, state)]
    limit = _rates(runs, base, state)
    rows = []
    for name in names:
        rates = _rates(runs, name, state)
        seconds = [run["seconds"] for run in runs if (run["subject"], run["state"]) == (name, state)]
        used = [run["cpu_s"] / run["bytes"] * 1e9 for run in runs if (run["subject"], run["state"]) == (name, state)]
        ratio = "1" if name == base else _ratio_text(_ratios(rates, limit))
        middle = statistics.median(seconds)
        text = f"| {TITLES[name]} | {middle:.2f} | {statistics.median(rates.values()) / 1e9:.2f} | {ratio} "
        rows.append((middle, text + f"| {statistics.median(used):.3f} |"))
    head = ["| loader | seconds | GB/s | of the limit (interval) | CPU s/GB |", "|---|--:|--:|--:|--:|"]
    return head + [text for _, text in sorted(rows)]


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each aim: what was aimed at, what was measured, and whether it is reached. Absent what was not run."""
    runs: list[Run] = result["runs"]
    lines: list[dict[str, Any]] = []

    def line(figure: str, aim: str, measured: str, reached: bool | None) -> None:
        lines.append({"figure": figure, "aim": aim, "measured": measured, "reached": reached})

    def ratio(figure: str, aim: float, above: Rates, below: Rates, unit: str, limit: Rates | None = None) -> None:
        """``limit`` are the rates that nobody can pass: what they are to those below is the most that could be measured."""
        if values := _ratios(above, below):
            room = _ratios(limit or {}, below)
            most = f"; the disk allows {statistics.median(room):.2f}" if room else ""
            line(figure, f"{aim:g} {unit}", f"{_ratio_text(values)} {unit}{most}", statistics.median(values) >= aim)

    cold = {name: _rates(runs, name, "cold") for name in TITLES}
    ratio("cold, disk to arena", 0.95, cold["arena"], cold["raw"], "x io_uring in C")
    used = [run["cpu_s"] / run["bytes"] * 1e9 for run in runs if (run["subject"], run["state"]) == ("arena", "cold")]
    if used:
        median = statistics.median(used)
        line("cold, disk to arena, processor time", "at most 0.02 s/GB", f"{median:.3f} s/GB", median <= 0.02)
    for peer, aim in (
        ("run_ai", 1.15), ("sllm_store", 1.4), ("safetensors_pread", 1.7), ("fast_safetensors", 3.0), ("mmap_clone", 4.0),
    ):  # fmt: skip
        ratio(f"cold, disk to tensors, against {TITLES[peer]}", aim, cold["tensors"], cold[peer], "x faster", cold["raw"])
    ratio("cold, safetensors in place against ingested", 1.0, cold["in_place"], cold["tensors"], "x")
    warm = {name: _rates(runs, name, "warm") for name in TITLES}
    peers = {name: rates for name, rates in warm.items() if rates and name not in (*_OURS, *_NO_COPY)}
    if peers and warm["tensors"]:
        best = max(peers, key=lambda name: statistics.median(peers[name].values()))
        ratio(f"warm page cache, against the best buffered peer ({TITLES[best]})", 0.95, warm["tensors"], peers[best], "x")
    for each in result.get("attach", ()):
        median, count = statistics.median(each["attach_s"]) * 1e3, each["tensors"]
        used = statistics.median(each["attach_cpu_s"]) * 1e3
        aim = 5 + 0.002 * count
        line(
            f"resident to tensors, {count:,} tensors, {each['bytes'] / 1e9:.1f} GB",
            f"at most {aim:.1f} ms",
            f"{median:.1f} ms, {used:.1f} ms of processor (and its manifest, read before: {each['manifest_s'] * 1e3:.0f} ms)",
            median <= aim,
        )
    if touches := [run["first_touch_s"] for run in runs if (run["subject"], run["state"]) == ("tensors", "cold")]:
        line("a worker's first pass over its tensors (page faults)", "-", f"{statistics.median(touches) * 1e3:.0f} ms", None)
    few, many = _rates(runs, "few", "cold"), _rates(runs, "many", "cold")
    if values := _ratios(few, many):
        reached = statistics.median(values) <= 1.1
        line("19,000 tensors against 200, cold", "at most 1.1 x the time", f"{_ratio_text(values)} x", reached)
    ratio("reading while all cores are busy", 0.85, _rates(runs, "arena", "busy"), cold["arena"], "of idle")
    if values := _ratios(_rates(runs, "raw", "busy"), cold["raw"]):
        line("the raw limit itself while all cores are busy", "-", f"{_ratio_text(values)} of idle", None)
    if ingests := result.get("ingest", ()):
        _ingest_lines(ingests, line)
    beyond = [run["beyond_arena_bytes"] for run in runs if "beyond_arena_bytes" in run]
    if beyond:
        line("store memory beyond the arena", "under 200 MiB", f"{max(beyond) / 2**20:.0f} MiB", max(beyond) < 200 << 20)
    return lines


def _ingest_lines(ingests: Sequence[Run], line: Callable[[str, str, str, bool | None], None]) -> None:
    """Against what the machine does one at a time, as the aim has it; against what its disk does of both at once; and of a
    source in memory, which leaves the disk to the writes."""

    def against(rate: str, *limits: str) -> tuple[str, bool]:
        values = [each[rate] / min(each[name] for name in limits) for each in ingests]
        middle = {name: statistics.median(each[name] for each in ingests) / 1e9 for name in (rate, *limits)}
        of = ", ".join(f"{'sha256' if name == 'hash' else name} {middle[name]:.2f}" for name in limits)
        return f"{_ratio_text(values)}: {middle[rate]:.2f} of {of} GB/s", statistics.median(values) >= 0.8

    line("ingest", "0.8 of min(read, write, hash)", *against("rate", "read", "write", "hash"))
    if all("copy" in each for each in ingests):
        text, _ = against("rate", "copy", "hash")
        line("ingest, against the disk reading and writing at once", "-", text, None)
        line("ingest of a source in the page cache", "0.8 of min(write, hash)", *against("warm_rate", "write", "hash"))
    peak = max(each["peak_rss_bytes"] for each in ingests)
    line("ingest, memory at most", "under 1 GiB", f"{peak / 2**20:.0f} MiB", peak < 1 << 30)


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/store.md."""
    runs: list[Run] = result["runs"]
    coverage = interval(list(range(result["rounds"])))[2]
    pages = sorted({run["pages"] for run in runs if run["subject"] in (*_OURS, "raw", "raw_buffered")})
    notes = [
        f"{result['machine']}; commit {result['commit']}; arena pages: {', '.join(pages)}.",
        f"{result['rounds']} rounds, interleaved; medians; intervals of paired ratios at {coverage:.0%}.",
        *(f"Not run: {TITLES[name]} ({reason})." for name, reason in sorted(result["unsupported"].items())),
    ]
    parts = [*notes, "", f"Cold, {result['bytes'] / 1e9:.1f} GB in {result['tensors']} tensors:", ""]
    parts += _subject_table(runs, "cold", "raw")
    if _rates(runs, "raw_buffered", "warm"):
        parts += ["", "From the page cache:", "", *_subject_table(runs, "warm", "raw_buffered")]
    parts += ["", "| figure | aim | measured | reached |", "|---|---|---|---|"]
    for each in figures(result):
        reached = {True: "yes", False: "**no**", None: "-"}[each["reached"]]
        parts.append(f"| {each['figure']} | {each['aim']} | {each['measured']} | {reached} |")
    return "\n".join(parts)


def replace_tables(document: str, tables: str, benchmark: str = "bench.load") -> str:
    """The document with the text between its two marks exchanged. Raises ValueError when it has not both, in order."""
    first, last = f"<!-- {benchmark}: tables -->\n", f"<!-- {benchmark}: end -->\n"
    before, begin, rest = document.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"there are no marks {first.strip()} and {last.strip()} in the document")
    return f"{before}{begin}{tables}\n{end}{after}"
