"""The prefix cache inside the engine: the same tokens with it and without, and who shares what with whom."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from agent.engine.build import build_engine
from agent.engine.engine import BatchEngine
from schema.ids import Epoch
from schema.states import EndReason
from tests.agent.engine.models import UNHEARD, VOCAB, kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_engine import Outcome, drive
from tests.examples import sampled


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


def engine_of(model: Any, tokens: int = 2048, share: bool = True, prefill_tokens: int = 48) -> BatchEngine:
    manifest = manifest_of(model)
    options = kv_options(manifest, tokens)
    return build_engine(manifest, tensors_of(model), options, prefill_tokens=prefill_tokens, share_prefixes=share)


def prompts() -> list[list[int]]:
    """A common beginning of 70 tokens with endings of several lengths, of which one is as long as whole blocks."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (200,), generator=generator).tolist()
    return [tokens[:70] + tokens[100 + 3 * at : 100 + 5 * at] for at in range(4)] + [tokens[:96]]


def found(outcome: Outcome, attempt: int) -> int:
    timing = outcome.ends[attempt].timing
    assert timing is not None
    return timing.cached_tokens


@pytest.mark.parametrize("name", sampled(["llama", "gpt2", "mistral-window"], "mistral-window"))
def test_tokens_are_the_same_from_cached_prefixes(name: str) -> None:
    model = make_model(name)
    submits = [submit_of(at + 1, prompt, 20, temperature=at % 2 * 0.8, seed=at) for at, prompt in enumerate(prompts())]
    expected = drive(engine_of(model, share=False), submits)
    engine = engine_of(model)
    for submit in submits:
        assert drive(engine, [submit]).tokens[submit.attempt] == expected.tokens[submit.attempt]
    again = [submit_of(at + 11, submit.prompt, 20, temperature=at % 2 * 0.8, seed=at) for at, submit in enumerate(submits)]
    together = drive(engine, again)
    for submit in submits:
        attempt = submit.attempt
        assert together.tokens[attempt + 10] == expected.tokens[attempt]
        assert found(expected, attempt) == 0
        assert found(together, attempt + 10) == (len(submit.prompt) - 1) // 16 * 16


def test_choices_share_their_prompt_and_differ_after_it(llama: Any) -> None:
    submits = [submit_of(n + 1, prompts()[3], 12, choice=n, temperature=1.0, seed=3) for n in range(4)]
    engine = engine_of(llama)
    outcome = drive(engine, submits)
    assert [found(outcome, n + 1) for n in range(4)] == [0, 64, 64, 64]
    assert len({tuple(tokens) for tokens in outcome.tokens.values()}) == 4
    for submit in submits:
        assert drive(engine_of(llama, share=False), [submit]).tokens[submit.attempt] == outcome.tokens[submit.attempt]


def test_tenants_find_nothing_of_each_other(llama: Any) -> None:
    engine = engine_of(llama)
    outcomes = [
        drive(engine, [submit_of(at, prompts()[0], 4, tenant=tenant)]) for at, tenant in enumerate(("", "a", "b", "a"), 1)
    ]
    assert [found(outcome, at) for at, outcome in enumerate(outcomes, 1)] == [0, 0, 0, 64]
    assert len({tuple(*outcome.tokens.values()) for outcome in outcomes}) == 1


def test_a_reply_is_a_prefix_too_so_a_conversation_goes_on_from_it(llama: Any) -> None:
    engine = engine_of(llama)
    first = drive(engine, [submit_of(1, prompts()[0], 30)])
    more = [*prompts()[0], *first.tokens[1], 5, 6]
    second = drive(engine, [submit_of(2, more, 8)])
    assert found(second, 2) == 96  # of 70 + 30, of which the last was never computed
    assert second.tokens[2] == drive(engine_of(llama, share=False), [submit_of(2, more, 8)]).tokens[2]


def test_what_was_cancelled_before_it_was_seen_to_be_sound_leaves_no_trace() -> None:
    model = make_model("llama")
    tensors = tensors_of(model)
    tensors["model.embed_tokens.weight"][UNHEARD] = torch.nan
    manifest = manifest_of(model)
    engine = build_engine(manifest, tensors, kv_options(manifest, 128), prefill_tokens=24)
    clean = [submit_of(at + 1, [token for token in prompt if token != UNHEARD], 9) for at, prompt in enumerate(prompts()[:2])]
    alone = drive(engine_of(model, 128), clean)
    for attempt in range(20, 24):
        engine.submit(submit_of(attempt, [UNHEARD] * 100, 9))
        engine.step()
        engine.cancel(Epoch(attempt))
        assert [end.reason for end in engine.step().ends] == [EndReason.CANCELLED]
    assert drive(engine, clean).tokens == alone.tokens


@pytest.mark.parametrize("broken", [False, True])
def test_a_shared_beginning_is_had_before_the_whole_prompt_of_who_computes_it(broken: bool) -> None:
    model = make_model("llama")
    tensors = tensors_of(model)
    tensors["model.embed_tokens.weight"][UNHEARD] = torch.nan
    manifest = manifest_of(model)
    engine = build_engine(manifest, tensors, kv_options(manifest, 1024), prefill_tokens=32)
    begin = [token if token != UNHEARD else 1 for token in prompts()[4][:64]]
    leader, follower = submit_of(1, [*begin, *([UNHEARD] if broken else []), *[7] * 130], 4), submit_of(2, [*begin, 3, 4], 4)
    firsts: list[int] = []
    engine.submit(leader)
    engine.submit(follower)
    while engine.running or engine.waiting:
        output = engine.step()
        firsts += [run.attempt for run in output.runs if run.start == 0]
        firsts += [end.attempt for end in output.ends if end.reason is EndReason.ERROR]
    assert firsts == [2, 1]
    again = drive(engine, [submit_of(3, follower.prompt, 4)])
    assert again.tokens[3] == drive(engine_of(model, share=False), [submit_of(2, follower.prompt, 4)]).tokens[2]


def test_a_beginning_that_is_not_sound_is_never_shared() -> None:
    model = make_model("llama")
    tensors = tensors_of(model)
    tensors["model.embed_tokens.weight"][UNHEARD] = torch.nan
    manifest = manifest_of(model)
    engine = build_engine(manifest, tensors, kv_options(manifest, 1024), prefill_tokens=32)
    outcome = drive(engine, [submit_of(1, [3, UNHEARD, *[4] * 100], 4), submit_of(2, [3, UNHEARD, *[4] * 70], 4)])
    assert [outcome.ends[attempt].reason for attempt in (1, 2)] == [EndReason.ERROR] * 2
    assert found(outcome, 2) == 0


@pytest.mark.usefixtures("attends")
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_not_a_number_behind_a_sliding_window_harms_nobody(deterministic: bool) -> None:
    """A deterministic query reads what it attends to and nothing else, so that a prompt outlives its broken token: its blocks
    are shared with those that begin alike, and after them belong to others. Elsewhere a chunk is broken as a whole."""
    model = make_model("mistral-window")
    manifest = manifest_of(model)
    tensors = tensors_of(model)
    tensors["model.embed_tokens.weight"][UNHEARD] = torch.nan
    options = msgspec.structs.replace(kv_options(manifest, 192), deterministic=deterministic)

    def engine(share: bool = True) -> BatchEngine:
        return build_engine(manifest, tensors, options, prefill_tokens=24, share_prefixes=share)

    healthy = [[token for token in prompt if token != UNHEARD] for prompt in prompts()]
    broken = [1, UNHEARD, *healthy[4]]
    asked = [submit_of(1, broken, 20), submit_of(2, [*broken[:-1], 3], 20)]
    asked += [submit_of(at, prompt, 20) for at, prompt in enumerate(healthy, 3)]
    shared, here = Outcome({}, {}, {}), engine()
    for submit in asked:
        outcome = drive(here, [submit])
        shared.tokens |= outcome.tokens
        shared.ends |= outcome.ends
        if submit.attempt == 2:
            assert (not here._pool.layers[1].isfinite().all()) == deterministic
    assert shared.tokens == {submit.attempt: drive(engine(False), [submit]).tokens[submit.attempt] for submit in asked}
    ends = {attempt: end.reason for attempt, end in shared.ends.items()}
    assert ends == {at: EndReason.LENGTH if deterministic or at > 2 else EndReason.ERROR for at in ends}
    assert (found(shared, 2) > 0) == deterministic
    assert found(drive(here, [submit_of(99, broken, 1)]), 99) == 0, "its blocks have become others'"
