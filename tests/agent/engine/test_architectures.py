"""Every architecture against transformers' own `generate`, token for token, in a batch that is mixed, chunked and preempted."""

from __future__ import annotations

import pytest

from agent.engine.architectures import COMPARED
from agent.engine.native_runner import NATIVE
from tests.agent.engine.coming import ComingWeights
from tests.agent.engine.models import CONFIGS, kv_options, make_model, submit_of
from tests.agent.engine.test_engine import drive, engine_of, prompts, reference
from tests.examples import sampled

FEW = ("llama", "mistral-window", "gpt2", "gemma3", "falcon-alibi", "mixtral")
"""One of each way to attend, to know positions, and to mix experts."""


@pytest.mark.usefixtures("attends")
@pytest.mark.parametrize("name", sampled(CONFIGS, *FEW))
def test_greedy_equals_generate_in_mixed_batches_that_are_preempted(name: str) -> None:
    """Prompts on both sides of the sliding windows of 24 tokens, in chunks, while others decode, in too little memory."""
    model = make_model(name)
    engine = engine_of(model, tokens=160, prefill_tokens=24)
    submits = [submit_of(i + 1, prompts()[4][:length], 22) for i, length in enumerate((5, 16, 31, 45))]
    all_ran = preempted = False

    def watch(_: int) -> None:
        nonlocal all_ran, preempted
        preempted |= all_ran and engine.waiting > 0
        all_ran |= engine.running == len(submits)

    outcome = drive(engine, submits, watch)
    for submit in submits:
        assert outcome.tokens[submit.attempt] == reference(model, list(submit.prompt), submit.params.max_tokens)
    assert len({token for tokens in outcome.tokens.values() for token in tokens}) > 8
    assert preempted


@pytest.mark.parametrize("name", sampled(CONFIGS, *FEW))
def test_a_first_step_reads_no_weight_before_it_has_come(name: str) -> None:
    follows(name, bare=False)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_a_first_step_follows_weights_named_without_the_models_prefix(name: str) -> None:
    follows(name, bare=True)


def follows(name: str, bare: bool) -> None:
    model = make_model(name)
    coming = ComingWeights(model, bare=bare)
    engine = coming.engine(kv_options(coming.manifest, 256))
    submit = submit_of(1, prompts()[4][:31], 3)
    engine.submit(submit)
    tokens = [token for run in engine.step().runs for token in run.ids]
    assert list(dict.fromkeys(coming.asked)) == list(range(coming.manifest.kv.layers + 1)), "in their order, and all"
    asked = len(coming.asked)
    for _ in range(2):
        tokens += [token for run in engine.step().runs for token in run.ids]
    assert tokens == reference(model, list(submit.prompt), 3)
    assert len(coming.asked) == asked, "what has come is not asked for again"


def test_what_runs_natively_was_compared() -> None:
    assert NATIVE <= COMPARED
