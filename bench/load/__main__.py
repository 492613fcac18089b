"""Loading against peers, on this machine: every subject in a fresh process, cold and out of the page cache, interleaved.

    python -m bench.load --prepare                     make checkpoints and the peers' environment (once; 14 GB of disk)
    python -m bench.load --rounds 5 --hugepages        measure; as root, with huge pages for the time of the run
    python -m bench.load --table RESULT.json           the Markdown tables of docs/store.md

A subject says "ready" when it has imported what it needs, has warmed up and has touched its memory; only then are its files
thrown out of the page cache (which mincore confirms) or read into it, and it is told to go. It times itself. Afterwards it
shows that all bytes arrived: the sum of all 8-byte words of its tensors, which is known from the files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.native.cold import forget, remember
from bench.load.prepare import HERE, PEERS, Checkpoint, Prepared, data_sum, prepare
from bench.load.results import figures, markdown, replace_tables
from bench.report import commit, machine

ROOT = HERE.parents[1]
BLOCK = str(4 << 20)
WARM_PEERS = ("run_ai", "safetensors_mmap", "safetensors_pread", "fast_safetensors", "mmap_clone")
HUGE = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGES = 1400  # 2.8 GB: one arena of the largest checkpoint at a time
HUGE_PAGES_LEAST = 1100
KEPT = 0.001  # the share of a cold file's pages that may still be cached
LIMIT_S = 120.0
INGESTS = 3


class Bench:
    """Runs subjects and keeps what they say. A subject that cannot run here is asked once."""

    def __init__(self, prepared: Prepared, *, huge: bool) -> None:
        self.prepared = prepared
        self.huge = huge
        self.runs: list[dict[str, Any]] = []
        self.unsupported: dict[str, str] = {}
        self.sums = {
            checkpoint.source: data_sum(checkpoint.shards) for checkpoint in (prepared.main, prepared.few, prepared.many)
        }

    def round(self, number: int, *, peers: Sequence[str], warm: bool) -> None:
        main = self.prepared.main
        self._raw(number, "raw", "cold", "uring", "32", BLOCK, main.shards)
        self._ours(number, "arena", "cold", "arena", main)
        self._ours(number, "tensors", "cold", "tensors", main)
        self._ours(number, "in_place", "cold", "tensors", self.prepared.in_place)
        self._raw(number, "sllm_store", "cold", "threads", "4", str(32 << 20), main.shards)
        for peer in peers:
            self._peer(number, peer, "cold")
        with _busy_cores():
            self._raw(number, "raw", "busy", "uring", "32", BLOCK, main.shards)
            self._ours(number, "arena", "busy", "arena", main)
        self._ours(number, "few", "cold", "tensors", self.prepared.few)
        self._ours(number, "many", "cold", "tensors", self.prepared.many)
        if warm:
            self._raw(number, "raw_buffered", "warm", "buffered", "4", BLOCK, main.shards)
            self._ours(number, "arena", "warm", "arena", main)
            self._ours(number, "tensors", "warm", "tensors", main)
            for peer in peers:
                if peer in WARM_PEERS:
                    self._peer(number, peer, "warm")

    def attach(self) -> list[dict[str, Any]]:
        checkpoints = (self.prepared.main, self.prepared.few, self.prepared.many)
        return [self._ask(_our_command("attach", each.layout), {}, [], "warm") for each in checkpoints]

    def ingest(self, rounds: int) -> list[dict[str, Any]]:
        """Ingests of the small twin (1.1 GB), from the disk and out of the page cache, beside what the machine's parts do."""
        few, found = self.prepared.few, []
        command = _our_command("ingest", few.source)
        for _ in range(rounds):
            answer = self._ask(command, {}, few.shards, "cold")
            _show("ingest", "cold", answer)
            warm = self._ask(command, {}, few.shards, "warm")
            _show("ingest", "warm", warm)
            limits = {
                "read": self._ask(self._raw_command("uring", "32", BLOCK, few.shards), {}, few.shards, "cold"),
                "write": self._written([]),
                "copy": self._written(few.shards),
            }
            rates = {
                name: each["bytes"] / each["seconds"] for name, each in (limits | {"rate": answer, "warm_rate": warm}).items()
            }
            found.append(answer | rates | {"hash": _hash_bps()})
        return found

    def _written(self, source: list[Path]) -> dict[str, Any]:
        """A file as large as the small twin, written, or copied from the one source."""
        scratch = self.prepared.work / "written"
        with scratch.open("wb") as file:
            file.truncate(sum(path.stat().st_size for path in self.prepared.few.shards))
        try:
            return self._ask(self._raw_command("write", "8", BLOCK, [scratch, *source]), {}, source, "cold")
        finally:
            scratch.unlink()

    def _raw(self, number: int, subject: str, state: str, mode: str, depth: str, block: str, files: list[Path]) -> None:
        self._note(number, subject, state, self._ask(self._raw_command(mode, depth, block, files), {}, files, state))

    def _raw_command(self, mode: str, depth: str, block: str, files: list[Path]) -> list[str]:
        return [str(self.prepared.raw), mode, depth, block, *map(str, files)]

    def _ours(self, number: int, subject: str, state: str, role: str, checkpoint: Checkpoint) -> None:
        answer = self._ask(_our_command(role, checkpoint.layout), {}, checkpoint.partitions, state)
        self._prove(subject, answer, checkpoint)
        self._note(number, subject, state, answer)

    def _peer(self, number: int, peer: str, state: str) -> None:
        if peer in self.unsupported:
            return
        files = self.prepared.files[peer]
        small = ",".join(map(str, self.prepared.small[peer]))
        command = [str(self.prepared.python), str(HERE / "worker.py"), peer, "load", small, *map(str, files)]
        answer = self._ask(command, self.prepared.environment.get(peer, {}), files, state)
        if "error" in answer:
            self.unsupported[peer] = answer["error"]
            print(f"# {peer} cannot run here: {answer['error']}", flush=True)
            return
        self._prove(peer, answer, self.prepared.main)
        self._note(number, peer, state, answer)

    def _ask(self, command: list[str], environment: Mapping[str, str], files: list[Path], state: str) -> dict[str, Any]:
        """Start a subject, set the page cache up once it is ready, let it go, and return its answer."""
        if self.huge:
            _await_huge_pages()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **environment},
        )  # fmt: skip
        timer = threading.Timer(LIMIT_S, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            first = process.stdout.readline()
            if first != "ready\n":
                if first.startswith("{"):
                    return dict(json.loads(first))
                raise SystemExit(f"{command} did not become ready: {first}{process.communicate()[1][-2000:]}")
            for path in files:
                if state == "warm":
                    if (share := remember(path)) < 1 - KEPT:
                        raise SystemExit(f"{path}: only {share:.1%} could be brought into the page cache")
                elif (share := forget(path)) > KEPT:
                    raise SystemExit(f"{path}: {share:.1%} would not leave the page cache")
            out, errors = process.communicate("go\n")
            if process.returncode or not out.strip():
                raise SystemExit(f"{command} failed with {process.returncode}: {errors[-2000:]}")
            return dict(json.loads(out.splitlines()[-1]))
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
            process.communicate()

    def _prove(self, subject: str, answer: dict[str, Any], checkpoint: Checkpoint) -> None:
        if answer["check"] != self.sums[checkpoint.source]:
            raise SystemExit(f"{subject}: the sum of what it loaded is {answer['check']}, not {self.sums[checkpoint.source]}")

    def _note(self, number: int, subject: str, state: str, answer: dict[str, Any]) -> None:
        self.runs.append({"round": number, "subject": subject, "state": state, **answer})
        _show(subject, state, answer)


def _our_command(role: str, directory: Path) -> list[str]:
    return [sys.executable, "-m", "bench.load.ours", role, str(directory)]


def _show(subject: str, state: str, answer: dict[str, Any]) -> None:
    rate = answer["bytes"] / answer["seconds"] / 1e9
    print(f"  {state:<5} {subject:<22} {answer['seconds']:7.3f} s {rate:7.2f} GB/s {answer['cpu_s']:6.2f} CPU s", flush=True)


def _hash_bps() -> float:
    """Bytes per second of sha256 on all cores: what the content's digest costs at least."""
    block, each = bytes(64 << 20), 3
    threads = [
        threading.Thread(target=lambda: [hashlib.sha256(block) for _ in range(each)]) for _ in range(os.cpu_count() or 1)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(threads) * each * len(block) / (time.perf_counter() - began)


@contextlib.contextmanager
def _busy_cores() -> Iterator[None]:
    """Every core has a process that computes and never waits, as workers do."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


@contextlib.contextmanager
def _huge_pages(wanted: bool) -> Iterator[None]:
    if not wanted:
        print("# without huge pages (--hugepages, as root, reserves them for the run): arenas have 4 KiB pages", flush=True)
        yield
        return
    before = HUGE.read_text()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the value is restored then, too
    try:
        HUGE.write_text(str(int(before) + HUGE_PAGES))
        print(f"# {int(HUGE.read_text()) - int(before)} of {HUGE_PAGES} huge pages reserved", flush=True)
        yield
    finally:
        HUGE.write_text(before)


def _await_huge_pages() -> None:
    """The one before may still be giving its pages back. Says so when others on the machine have them."""
    for _ in range(100):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["HugePages_Free"]) - int(fields["HugePages_Rsvd"])
        if free >= HUGE_PAGES_LEAST:
            return
        time.sleep(0.1)
    print(f"# only {free} huge pages are free: others on this machine have taken some", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/sllmctl-bench-load"), help="kept between runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hugepages", action="store_true", help="reserve huge pages for the run (root)")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of them; an empty text for none")
    parser.add_argument("--cold-only", action="store_true", help="leave out the page cache")
    parser.add_argument("--prepare", action="store_true", help="make what a run needs, and end")
    parser.add_argument("--out", type=Path, help="where the JSON goes; bench/results/DATE-load.json for the record")
    parser.add_argument("--table", type=Path, metavar="RESULT.json", help="print the tables of a result, and end")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="with --table: put them there, between their marks")
    given = parser.parse_args()
    if given.table is not None:
        tables = markdown(json.loads(given.table.read_text()))
        if given.into is None:
            print(tables)
        else:
            given.into.write_text(replace_tables(given.into.read_text(), tables))
        return 0
    peers = [peer for peer in given.peers.split(",") if peer]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    prepared = prepare(given.work, with_peers=bool(peers))
    if given.prepare:
        return 0
    began = time.monotonic()
    bench = Bench(prepared, huge=given.hugepages)
    with _huge_pages(given.hugepages):
        for number in range(given.rounds):
            print(f"# round {number + 1} of {given.rounds}, {time.monotonic() - began:.0f} s", flush=True)
            bench.round(number, peers=peers, warm=not given.cold_only)
        attach = bench.attach()
        ingest = bench.ingest(min(given.rounds, INGESTS))
    tensors = next(run["tensors"] for run in bench.runs if run["subject"] == "tensors")
    result = {
        "title": "loading against peers", "machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit(),
        "rounds": given.rounds, "bytes": sum(path.stat().st_size for path in prepared.main.shards), "tensors": tensors,
        "peers": (HERE / "peers.txt").read_text().splitlines()[1:], "unsupported": bench.unsupported, "runs": bench.runs,
        "attach": attach, "ingest": ingest,
    }  # fmt: skip
    result["figures"] = figures(result)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    print(f"# {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
