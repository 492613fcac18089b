"""sllmctl's engine as a subject: `python -m bench.engine.ours LAYOUT_DIRECTORY THREADS`, over the code that workers run.

Weights come through the store's own reader into an arena and are attached without a copy.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agent.engine.build import build_engine
from agent.engine.image import image_tensors
from agent.engine.threads import threads_for
from agent.native.mapping import ImageMapping
from agent.store.catalog import read_entry
from agent.store.index import read_index
from agent.store.trial import TrialStore
from bench.engine.work import Workload, serve
from schema.ids import Epoch
from schema.link import EngineOptions, SamplingParams, Submit

_BLOCK_TOKENS = 16


class Ours:
    """One image, and an engine for each number of sequences that run at once."""

    def __init__(self, directory: Path, cores: int) -> None:
        entry = read_entry(directory)
        self._manifest = entry.manifest
        torch.set_num_threads(threads_for(entry.manifest.image_bytes, cores))
        self._store = TrialStore(entry.manifest.image_bytes, chunk_bytes=4 << 20, reader_threads=2)
        resident, _ = self._store.fill(entry)
        mapping = ImageMapping(self._store.arena.descriptor, resident.extents, resident.image_bytes)
        self._tensors = image_tensors(read_index(directory, entry.manifest), mapping.buffer)
        self._engines: dict[int, Any] = {}
        self._prefix_engines: dict[bool, Any] = {}
        self._ids = itertools.count(1)

    def engine(self, running: int) -> Any:
        if running not in self._engines:
            tokens = running * 256 + _BLOCK_TOKENS
            options = EngineOptions(kv_bytes=self._manifest.kv.token_bytes * tokens, max_concurrency=running)
            self._engines[running] = build_engine(self._manifest, self._tensors, options)
        return self._engines[running]

    def generate(self, workload: Workload) -> list[list[int]]:
        engine = self.engine(workload.running)
        tokens: dict[Epoch, list[int]] = {}
        for prompt, length in zip(workload.prompts(self._manifest.vocab_size), workload.lengths, strict=True):
            tokens[self._submit(engine, prompt, length)] = []
        self._run(engine, tokens)
        return list(tokens.values())

    def more(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked:
            case {"what": "schedule"}:
                return self._schedule(**asked)
            case {"what": "prefix"}:
                return self._prefix(**asked)
            case {"what": "diverged"}:
                return self._diverged(**asked)
        raise ValueError(f"nobody knows how to {asked}")

    def _submit(
        self,
        engine: Any,
        prompt: list[int],
        length: int,
        generated: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Epoch:
        attempt = Epoch(next(self._ids))
        engine.submit(
            Submit(
                attempt=attempt,
                instance="i",
                instance_epoch=Epoch(1),
                request=f"r{attempt}",
                model="m",
                prompt=tuple(prompt),
                generated=tuple(generated),
                params=SamplingParams(max_tokens=length, temperature=temperature, seed=seed),
            )
        )
        return attempt

    def _run(self, engine: Any, tokens: dict[Epoch, list[int]], *, first_only: bool = False) -> None:
        """Steps until all have ended, or until there is a token."""
        left = len(tokens)
        while left:
            output = engine.step()
            for run in output.runs:
                tokens[run.attempt] += run.ids
            if first_only and output.runs:
                return
            left -= len(output.ends)
            if fault := next((end.fault for end in output.ends if end.fault is not None), None):
                raise RuntimeError(f"the engine failed: {fault.message}")

    def _schedule(self, *, what: str, sequences: int, steps: int) -> dict[str, Any]:
        """Seconds of each step in which all sequences decode that neither the model nor the sampler has."""
        engine = self.engine(sequences)
        spent = 0.0

        def timed(call: Any) -> Any:
            def around(*args: Any, **named: Any) -> Any:
                nonlocal spent
                began = time.perf_counter()
                try:
                    return call(*args, **named)
                finally:
                    spent += time.perf_counter() - began

            return around

        import agent.engine.engine as module

        runner, sample = engine._runner, module.sample
        runner.forward = timed(runner.forward)  # type: ignore[method-assign]
        module.sample = timed(sample)  # type: ignore[assignment]
        try:
            tokens = {self._submit(engine, [5] * 32, steps + 16): [] for _ in range(sequences)}
            found = []
            while engine.running + engine.waiting:
                spent = 0.0
                began = time.perf_counter()
                output = engine.step()
                if len(output.runs) == sequences:
                    found.append(time.perf_counter() - began - spent)
        finally:
            del runner.forward
            module.sample = sample
        assert len(found) >= steps
        return {"sequences": sequences, "seconds": statistics.median(found), "steps": len(tokens)}

    def _prefix(self, *, what: str, tokens: int) -> dict[str, Any]:
        """Seconds to the first token of a prompt whose prefix another request had, with and without the cache of prefixes."""
        ids = random.Random(next(self._ids))
        prefix = [ids.randrange(10, self._manifest.vocab_size) for _ in range(tokens)]
        taken = {}
        for shares in (True, False):
            if shares not in self._prefix_engines:
                options = EngineOptions(kv_bytes=self._manifest.kv.token_bytes * 8 * tokens, max_concurrency=4)
                self._prefix_engines[shares] = build_engine(self._manifest, self._tensors, options, share_prefixes=shares)
            engine = self._prefix_engines[shares]
            self._run(engine, {self._submit(engine, [*prefix[: tokens if shares else 16], 7], 1): []})
            began = time.perf_counter()
            given = {self._submit(engine, [*prefix, 8, 9], 1): []}
            self._run(engine, given, first_only=True)
            taken[shares] = time.perf_counter() - began
            engine.step()
        return {"with_s": taken[True], "without_s": taken[False]}

    def _diverged(self, *, what: str, requests: int, deterministic: bool, temperature: float) -> dict[str, Any]:
        """How many requests, stopped at a random token and resumed in another batch, go on otherwise than undisturbed."""
        if deterministic and "deterministic" not in EngineOptions.__struct_fields__:
            return {"diverged": None}
        length, running = 32, 16
        more = {"deterministic": True} if deterministic else {}
        options = EngineOptions(kv_bytes=self._manifest.kv.token_bytes * running * 256, max_concurrency=running, **more)
        engine = build_engine(self._manifest, self._tensors, options)
        ids = random.Random(3)
        prompts = [[ids.randrange(10, self._manifest.vocab_size) for _ in range(ids.randrange(4, 60))] for _ in range(requests)]
        whole: dict[Epoch, list[int]] = {}
        for seed, prompt in enumerate(prompts):
            whole[self._submit(engine, prompt, length, (), temperature, seed)] = []
        self._run(engine, whole)
        undisturbed = list(whole.values())
        order = list(range(requests))
        ids.shuffle(order)
        resumed: dict[Epoch, list[int]] = {}
        for index in order:
            kept = undisturbed[index][: ids.randrange(1, length)]
            resumed[self._submit(engine, prompts[index], length, kept, temperature, index)] = list(kept)
        self._run(engine, resumed)
        pairs = zip(order, resumed.values(), strict=True)
        return {"diverged": sum(tokens != undisturbed[index] for index, tokens in pairs)}


def main() -> None:
    ours = Ours(Path(sys.argv[1]), int(sys.argv[2]))
    serve(ours.generate, ours.more)


if __name__ == "__main__":
    main()
