"""The engine against its peers, on this machine, in one run: generation, cold start, prefix cache, scheduling.

    python -m bench.engine                                     measure, and print the table
    python -m bench.engine --out RESULT.json --into FILE.md    keep it, and put the table into a document, between its marks
    python -m bench.engine --only tiny-16,uneven --rounds 5    some of it
    python -m bench.engine --table RESULT.json                 the table of an earlier run

Every subject is a process of its own; all have the same number of threads, the same weights and the same prompts, and are
warmed up. sllmctl's runs as its workers do, transformers under the OpenMP wait policy that is the faster for it here. They
are halted while another is measured, and take turns, so that each ratio is of two runs side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from agent.workers.zygote import ENVIRONMENT
from bench.engine import cold
from bench.engine.prepare import VLLM, VLLM_PEER, Model, prepare_model, prepare_vllm, vllm_environment
from bench.engine.results import markdown
from bench.engine.subject import Subject, SubjectFailed
from bench.engine.work import WORKLOADS, Workload
from bench.load.results import replace_tables
from bench.report import commit, machine

MORE = ("cold", "from_disk", "prefix", "schedule", "diverged", "vllm")
SCHEDULED = 64
PREFIX_TOKENS = 1024
RESUMED = 200
DTYPES = {"fp32": "tiny-llama", "bf16": "tiny-qwen3"}


class Bench:
    """One run: subjects by name and model, what they answered, and why some did not."""

    def __init__(self, work: Path, threads: int, vllm: Path | None) -> None:
        self._work = work
        self._threads = str(threads)
        self._vllm = vllm
        self.peer_policy = "passive"
        self._models: dict[str, Model] = {}
        self._subjects: dict[tuple[str, str], Subject] = {}
        self.runs: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}

    def model(self, name: str) -> Model:
        if name not in self._models:
            self._models[name] = prepare_model(self._work, name)
        return self._models[name]

    def subject(self, name: str, model_name: str) -> Subject:
        """Started when it is asked for first."""
        key = name, model_name
        if key not in self._subjects:
            model = self.model(model_name)
            python = [sys.executable, "-m"]
            if name == "ours":
                subject = Subject([*python, "bench.engine.ours", str(model.layout), self._threads], ENVIRONMENT)
            elif name == "transformers":
                subject = self._transformers(model, self.peer_policy)
            else:
                subject = Subject([str(self._vllm), str(VLLM_PEER), str(model.source)], vllm_environment(self._threads))
            self._subjects[key] = subject
        return self._subjects[key]

    def _transformers(self, model: Model, policy: str) -> Subject:
        command = [sys.executable, "-m", "bench.engine.peer", str(model.source), self._threads]
        return Subject(command, {"OMP_WAIT_POLICY": policy})

    def choose_policy(self) -> None:
        """Spinning threads are faster on a quiet machine, and many times slower on a shared one: let the peer have its best."""
        workload, taken = WORKLOADS["tiny-16"], {}
        for policy in ("passive", "active"):
            subject = self._transformers(self.model(workload.model), policy)
            try:
                subject.ask(workload.short().text())
                taken[policy] = min(subject.ask(workload.text())["seconds"] for _ in range(3))
            finally:
                subject.close()
        self.peer_policy = min(taken, key=lambda policy: taken[policy])
        print(f"# transformers, {workload.name}: {', '.join(f'{name} {s:.2f} s' for name, s in taken.items())}", flush=True)

    def compare(self, workloads: Sequence[Workload], peers: Sequence[str], rounds: int) -> None:
        """Every workload in every round, by every subject; who begins changes from round to round."""
        for number in range(-1, rounds):
            for workload in workloads:
                names = ["ours", *(peer for peer in peers if peer not in self.missing)]
                for name in names if number % 2 else reversed(names):
                    self._once(number, name, workload)

    def _once(self, number: int, name: str, workload: Workload) -> None:
        try:
            answer = self.subject(name, workload.model).ask((workload.short() if number < 0 else workload).text())
        except SubjectFailed as error:
            if name == "ours":
                raise SystemExit(f"sllmctl's engine failed: {error}") from error
            self.missing[name] = str(error)
            print(f"# {name} cannot run here: {error}", flush=True)
            return
        if number >= 0:
            self.runs.append({"round": number, "subject": name, "workload": workload.name, **answer})
            rate = answer["tokens"] / answer["seconds"]
            print(f"  {workload.name:<14} {name:<14} {answer['seconds']:8.3f} s {rate:9.1f} tokens/s", flush=True)

    def ask(self, model: str, what: str, rounds: int, **more: Any) -> dict[str, Any]:
        """Our own figures: each key of the answers as a list, with what was asked."""
        subject = self.subject("ours", model)
        answers = [subject.ask(json.dumps({"do": "more", "what": what, **more})) for _ in range(rounds)]
        return {**{name: [answer[name] for answer in answers] for name in answers[0]}, **more}

    def diverged(self) -> list[dict[str, Any]]:
        """Requests stopped and resumed, in every numeric type, greedy and sampled, with and without ``deterministic``."""
        found = []
        for dtype, model in DTYPES.items():
            for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                for deterministic in (True, False):
                    asked = {"requests": RESUMED, "deterministic": deterministic, "temperature": temperature}
                    answer = self.subject("ours", model).ask(json.dumps({"do": "more", "what": "diverged", **asked}))
                    found.append({"dtype": dtype, "how": how, **asked, **answer})
        return found

    def close(self) -> None:
        for subject in self._subjects.values():
            subject.close()
        self._subjects.clear()


def main() -> int:
    names = [*WORKLOADS, *MORE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/sllmctl-bench-engine"), help="kept between runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(names), help=f"which of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prepare", action="store_true", help="make models and vLLM's environment, and end")
    parser.add_argument("--out", type=Path, help="where the JSON goes; bench/results/DATE-engine.json for the record")
    parser.add_argument("--table", type=Path, metavar="RESULT.json", help="print the table of a result, and end")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="put the table there, between its marks")
    given = parser.parse_args()
    if given.table is not None:
        _show(json.loads(given.table.read_text()), given.into)
        return 0
    only = [name for name in given.only.split(",") if name]
    if unknown := set(only) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    given.work.mkdir(parents=True, exist_ok=True)
    models = {name: prepare_model(given.work, name) for name in ("tiny-llama", "tiny-qwen3", "qwen3-0.6b")}
    vllm, why = None, f"{VLLM} was not asked for"
    if "vllm" in only:
        vllm, why = prepare_vllm(given.work, models["qwen3-0.6b"], str(given.threads))
    if given.prepare:
        return 0
    result = _measure(given.work, given.threads, given.rounds, only, vllm, why)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    _show(result, given.into)
    return 0


def _measure(work: Path, threads: int, rounds: int, only: Sequence[str], vllm: Path | None, why: str) -> dict[str, Any]:
    began = time.monotonic()
    result: dict[str, Any] = {
        "title": "the engine against its peers", "machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit(),
        "rounds": rounds, "threads": threads, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    bench = Bench(work, threads, vllm)

    def part(name: str, run: Callable[[], Any]) -> None:
        if name in only:
            print(f"# {name}, {time.monotonic() - began:.0f} s", flush=True)
            result[name] = run()

    try:
        if set(only) & set(WORKLOADS):
            bench.choose_policy()
        for model in ("tiny-llama", "qwen3-0.6b"):
            peers = ["transformers", *(["vllm"] if vllm is not None and model == "qwen3-0.6b" else [])]
            workloads = [each for name, each in WORKLOADS.items() if name in only and each.model == model]
            if workloads:
                print(f"# {model} against {', '.join(peers)}, {time.monotonic() - began:.0f} s", flush=True)
            bench.compare(workloads, peers, rounds)
            if model == "tiny-llama":
                part("schedule", lambda: bench.ask("tiny-llama", "schedule", rounds, sequences=SCHEDULED, steps=200))
                part("diverged", bench.diverged)
            else:
                part("prefix", lambda: bench.ask("qwen3-0.6b", "prefix", rounds, tokens=PREFIX_TOKENS))
            bench.close()
        part("cold", lambda: cold.measure(bench.model("qwen3-0.6b").source, rounds))
        part("from_disk", lambda: cold.from_disk(bench.model("qwen3-0.6b").source, rounds))
    finally:
        bench.close()
    missing = bench.missing if vllm is not None else {**bench.missing, "vllm": why}
    result |= {"peer_policy": bench.peer_policy}
    result |= {"runs": bench.runs, "missing": missing, "seconds": time.monotonic() - began}
    return result


def _show(result: dict[str, Any], into: Path | None) -> None:
    table = markdown(result)
    print(table)
    if into is not None:
        into.write_text(replace_tables(into.read_text(), table, "bench.engine"))


if __name__ == "__main__":
    sys.exit(main())
