"""Random stories: requests come, share prefixes, are preempted, cancelled and resumed, and each says what it would alone."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from agent.engine.api import StepOutput
from agent.engine.build import build_engine
from agent.engine.engine import BatchEngine
from schema.ids import Epoch
from schema.link import Ended, Submit
from schema.states import EndReason
from tests.agent.engine.models import VOCAB, kv_options, make_model, manifest_of, submit_of, tensors_of

REQUESTS = 10


def wishes(dice: random.Random) -> dict[str, Any]:
    """Parameters at the ends of their ranges and between, any of them together."""
    some: dict[str, list[Any]] = {
        "top_k": [1, 5, VOCAB + 9, (1 << 31) - 1],
        "top_p": [1e-300, 0.5, 0.999],
        "min_p": [1e-9, 0.05, 1.0],
        "repetition_penalty": [0.01, 1.3, 100.0],
        "presence_penalty": [-2.0, 2.0],
        "frequency_penalty": [-2.0, 2.0],
        "logit_bias": [tuple((token, dice.choice([-100.0, 100.0])) for token in dice.sample(range(VOCAB), 3))],
        "stop_token_ids": [tuple(dice.sample(range(VOCAB), 20))],
        "min_tokens": [3, 30],
        "logprobs": [0, 20],
    }
    chosen = {name: dice.choice(values) for name, values in some.items() if dice.random() < 0.25}
    return {"temperature": dice.choice([0.0, 1e-30, 0.8, 100.0]), "seed": dice.randrange(1 << 63), **chosen}


def check_blocks(engine: BatchEngine) -> None:
    """Every block is free, cached or held by as many as count it; tables show what their rows hold; padding is zero."""
    blocks, running = engine._blocks, engine._scheduler.running
    held = [0] * (blocks.total + 1)
    for sequence in running:
        row = blocks.tables[sequence.row]
        assert row[: len(sequence.blocks)].tolist() == sequence.blocks
        assert not row[len(sequence.blocks) :].any()
        for block in sequence.blocks:
            held[block] += 1
    assert held == blocks._holders
    assert not any(held[block] for block in blocks._unheld)
    assert len(blocks._free) + len(blocks._unheld) + sum(count > 0 for count in held) == blocks.total
    assert all(sequence in running for sequence in blocks._coming.values())
    assert not engine._pool.layers[0][0].any()


class Story:
    """What one engine was asked and said."""

    def __init__(self, engine: BatchEngine, dice: random.Random) -> None:
        self.engine, self._dice = engine, dice
        self.submits: dict[int, Submit] = {}
        self.tokens: dict[int, list[int]] = {}
        self.records: dict[int, bytes] = {}
        self.ends: dict[int, Ended] = {}
        self._trunks = [[dice.randrange(VOCAB) for _ in range(dice.choice([16, 33, 48]))] for _ in range(2)]

    @property
    def live(self) -> list[int]:
        return [attempt for attempt in self.submits if attempt not in self.ends]

    def tell(self) -> None:
        while len(self.submits) < REQUESTS or self.live:
            for _ in range(self._dice.randint(0, 3) if len(self.submits) < REQUESTS else 0):
                self._submit()
            if self.live and self._dice.random() < 0.1:
                self.engine.cancel(Epoch(self._dice.choice(self.live)))
            self._take(self.engine.step())
            check_blocks(self.engine)
        assert (self.engine.running, self.engine.waiting, self.engine.kv_used_tokens) == (0, 0, 0)

    def _submit(self) -> None:
        """A new request, or one that was cancelled, from where it stood."""
        dice, number = self._dice, len(self.submits) + 1
        cancelled = [attempt for attempt, end in self.ends.items() if end.reason is EndReason.CANCELLED]
        if cancelled and dice.random() < 0.5:
            old = self.submits[dice.choice(cancelled)]
            submit = msgspec.structs.replace(old, attempt=Epoch(number), generated=tuple(self.tokens[old.attempt]))
        else:
            trunk = dice.choice(self._trunks)
            prompt = trunk[: dice.randint(1, len(trunk))] + [dice.randrange(VOCAB) for _ in range(dice.choice([0, 1, 20]))]
            tenant, choice = dice.choice(["", "a"]), dice.choice([0, 7])
            submit = submit_of(number, prompt, dice.randint(1, 40), tenant=tenant, choice=choice, **wishes(dice))
        self.submits[number], self.tokens[number], self.records[number] = submit, list(submit.generated), b""
        self.engine.submit(submit)

    def _take(self, output: StepOutput) -> None:
        for run in output.runs:
            assert run.attempt in self.live
            assert run.start == len(self.tokens[run.attempt])
            self.tokens[run.attempt] += run.ids
            self.records[run.attempt] += run.logprobs
        for end in output.ends:
            assert end.attempt in self.live
            assert end.fault is None
            self.ends[end.attempt] = end


def alone(engine: BatchEngine, submit: Submit) -> tuple[list[int], bytes, EndReason]:
    """The whole of a request by itself, its prompt in one step."""
    engine.submit(msgspec.structs.replace(submit, generated=()))
    tokens: list[int] = []
    records = b""
    while True:
        output = engine.step()
        for run in output.runs:
            tokens += run.ids
            records += run.logprobs
        for end in output.ends:
            return tokens, records, end.reason


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [
        ("mistral-window", False),
        *(
            pytest.param(*story, marks=pytest.mark.slow)
            for story in (("llama", False), ("gpt_oss", False), ("falcon-alibi", False), ("mistral-window", True))
        ),
    ],
)
def test_whatever_happens_around_it_a_request_says_what_it_would_alone(name: str, deterministic: bool) -> None:
    """Deterministic ones in bfloat16, their log-probabilities to the bit."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    model = make_model(name, dtype=torch.bfloat16 if deterministic else torch.float32)
    manifest = manifest_of(model, "BF16" if deterministic else "F32")

    def engine(tokens: int, prefill_tokens: int, share: bool) -> BatchEngine:
        options = msgspec.structs.replace(kv_options(manifest, tokens), deterministic=deterministic)
        return build_engine(manifest, tensors_of(model), options, prefill_tokens=prefill_tokens, share_prefixes=share)

    story = Story(engine(112, dice.choice([5, 16, 40]), share=True), dice)
    story.tell()
    quiet = engine(1024, 512, share=False)
    for attempt, submit in story.submits.items():
        tokens, records, reason = alone(quiet, submit)
        said = story.tokens[attempt]
        assert said == tokens[: len(said)], attempt
        if story.ends[attempt].reason is not EndReason.CANCELLED:
            outgrew = len(submit.prompt) + len(said) > 112
            assert outgrew or (len(said), story.ends[attempt].reason) == (len(tokens), reason), attempt
        if deterministic and records:
            size = len(records) // len(tokens)
            assert story.records[attempt] == records[size * len(submit.generated) : size * len(said)], attempt
