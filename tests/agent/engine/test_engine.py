"""The engine against transformers' own `generate`, token for token, and against bad input."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import msgspec
import pytest
import torch

import agent.engine.engine as engine_module
from agent.engine.api import StepOutput
from agent.engine.build import build_engine
from agent.engine.engine import BatchEngine
from agent.engine.scheduler import Plan
from schema.errors import InvalidCheckpoint, OutOfSpace
from schema.ids import Epoch
from schema.link import Ended, EngineOptions, Submit
from schema.sampling import Logprobs, read_logprobs
from schema.states import EndReason
from tests.agent.engine.models import CONTEXT, UNHEARD, VOCAB, kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.examples import sampled

LENGTHS = (1, 5, 17, 40, 70, 16)


def engine_of(model: Any, tokens: int = 2048, concurrency: int = 16, prefill_tokens: int = 512) -> BatchEngine:
    manifest = manifest_of(model)
    return build_engine(manifest, tensors_of(model), kv_options(manifest, tokens, concurrency), prefill_tokens=prefill_tokens)


def prompts(seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def reference(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@dataclasses.dataclass
class Outcome:
    tokens: dict[int, list[int]]
    ends: dict[int, Ended]
    logprobs: dict[int, list[Logprobs]]


def drive(engine: BatchEngine, submits: list[Submit], each_step: Any = None) -> Outcome:
    """Run to the end, checking that positions have no gap and every attempt ends once."""
    for submit in submits:
        engine.submit(submit)
    outcome = Outcome({s.attempt: list(s.generated) for s in submits}, {}, {s.attempt: [] for s in submits})
    for step in range(5_000):
        if each_step is not None:
            each_step(step)
        output: StepOutput = engine.step()
        for run in output.runs:
            assert run.attempt not in outcome.ends
            assert run.start == len(outcome.tokens[run.attempt])
            outcome.tokens[run.attempt] += run.ids
            outcome.logprobs[run.attempt] += read_logprobs(run.logprobs, len(run.ids)) if run.logprobs else []
        for end in output.ends:
            assert end.attempt not in outcome.ends
            assert end.position == len(outcome.tokens[end.attempt])
            outcome.ends[end.attempt] = end
        if len(outcome.ends) == len(submits):
            assert (engine.running, engine.waiting, engine.kv_used_tokens) == (0, 0, 0)
            return outcome
    raise AssertionError(f"only {len(outcome.ends)} of {len(submits)} attempts ended")


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


@pytest.mark.parametrize("name", sampled(["llama", "gpt2", "mistral-window"], "mistral-window"))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_resuming_from_the_middle_changes_nothing(name: str, temperature: float) -> None:
    model = make_model(name)
    params = {"temperature": temperature, "seed": 77, "top_p": 0.9, "top_k": 30, "choice": 2}
    whole = drive(engine_of(model), [submit_of(i + 1, prompt, 24, **params) for i, prompt in enumerate(prompts())])
    resumed = drive(
        engine_of(model, prefill_tokens=20),
        [submit_of(9 - i, prompt, 24, whole.tokens[i + 1][: 4 * i + 1], **params) for i, prompt in enumerate(prompts())],
    )
    for i in range(len(LENGTHS)):
        assert resumed.tokens[9 - i] == whole.tokens[i + 1]
        assert resumed.ends[9 - i].position == 24


WISHES: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.4, "temperature": 0.0},
    {"presence_penalty": 1.2, "frequency_penalty": 0.6, "min_p": 0.02, "logprobs": 2},
    {"logit_bias": ((5, 6.0), (9, -100.0)), "repetition_penalty": 0.7, "logprobs": 0},
    {"min_tokens": 12, "stop_token_ids": tuple(range(0, VOCAB, 2)), "frequency_penalty": -0.5},
    {"logprobs": 20, "top_k": 9},
    {},
)


def test_wishes_hold_alone_together_and_after_a_resumption(llama: Any) -> None:
    """Penalties count from the journal, and log-probabilities come for every token, whatever happens around a sequence."""

    def submits(first: int, generated: dict[int, list[int]]) -> list[Submit]:
        return [
            submit_of(first + i, prompt, 24, generated.get(i, ()), **{"temperature": 0.9, "seed": i, **wish})
            for i, (prompt, wish) in enumerate(zip(prompts(), WISHES, strict=True))
        ]

    together = drive(engine_of(llama), submits(1, {}))
    for i, submit in enumerate(submits(1, {})):
        alone = drive(engine_of(llama), [submit])
        assert alone.tokens[submit.attempt] == together.tokens[submit.attempt]
        told, again = together.logprobs[submit.attempt], alone.logprobs[submit.attempt]
        assert [each.token for each in told] == ([] if "logprobs" not in WISHES[i] else together.tokens[submit.attempt])
        assert [each.logprob for each in told] == pytest.approx([each.logprob for each in again], abs=1e-4)
    halves = {i: together.tokens[i + 1][: 3 + 2 * i] for i in range(len(WISHES))}
    resumed = drive(engine_of(llama, prefill_tokens=20), submits(11, halves))
    assert [resumed.tokens[11 + i] for i in range(6)] == [together.tokens[1 + i] for i in range(6)]
    assert len(together.tokens[4]) > 12
    assert together.ends[4].reason is EndReason.STOP


def test_sampling_does_not_depend_on_the_batch(llama: Any) -> None:
    submits = [submit_of(i + 1, prompt, 20, temperature=0.9, seed=i) for i, prompt in enumerate(prompts())]
    together = drive(engine_of(llama), submits)
    for submit in submits:
        assert drive(engine_of(llama), [submit]).tokens[submit.attempt] == together.tokens[submit.attempt]


def test_out_of_blocks_preempts_and_still_gives_the_same_tokens(llama: Any) -> None:
    submits = [submit_of(i + 1, prompt, 60) for i, prompt in enumerate(prompts())]
    engine = engine_of(llama, tokens=160)
    most = 0

    def watch(_: int) -> None:
        nonlocal most
        most = max(most, engine.kv_used_tokens)
        assert engine.kv_used_tokens <= engine.capacity.kv_tokens == 160

    outcome = drive(engine, submits, watch)
    assert most > 120
    for submit in submits:
        assert outcome.tokens[submit.attempt] == reference(llama, list(submit.prompt), 60)


def test_a_sequence_that_outgrows_all_memory_ends_by_length(llama: Any) -> None:
    engine = engine_of(llama, tokens=64)
    assert engine.capacity.max_context_tokens == 64
    outcome = drive(engine, [submit_of(1, prompts()[3], 100)])
    assert outcome.ends[1].reason is EndReason.LENGTH
    assert outcome.tokens[1] == reference(llama, prompts()[3], 100)[: 64 - 40 + 1]


def test_max_concurrency_and_order_of_arrival(llama: Any) -> None:
    engine = engine_of(llama, concurrency=2)
    order: list[int] = []
    for i in range(6):
        engine.submit(submit_of(i + 1, [i + 1] * 8, 5))
    while engine.running or engine.waiting or len(order) < 6:
        output = engine.step()
        assert engine.running <= 2
        order += [run.attempt for run in output.runs if run.start == 0]
    assert order == [1, 2, 3, 4, 5, 6]


def test_stop_tokens_end_a_sequence_and_are_in_it(llama: Any) -> None:
    free = reference(llama, prompts()[2], 30)
    stop = free[7]
    outcome = drive(engine_of(llama), [submit_of(1, prompts()[2], 30, stop_token_ids=(stop,))])
    first = free.index(stop)
    assert outcome.tokens[1] == free[: first + 1]
    assert outcome.ends[1].reason is EndReason.STOP


def test_cancel_frees_memory_and_ends_in_the_next_step(llama: Any) -> None:
    engine = engine_of(llama)
    engine.submit(submit_of(1, prompts()[2], 50))
    engine.submit(submit_of(2, prompts()[3], 3))
    engine.step()
    engine.cancel(Epoch(1))
    engine.cancel(Epoch(99))
    assert engine.running == 1
    output = engine.step()
    assert [(end.attempt, end.reason, end.position) for end in output.ends] == [(1, EndReason.CANCELLED, 1)]
    assert all(run.attempt == 2 for run in output.runs)
    engine.submit(submit_of(3, prompts()[0], 5))
    engine.cancel(Epoch(3))
    assert EndReason.CANCELLED in {end.reason for end in engine.step().ends}
    engine.submit(submit_of(4, prompts()[0], 5))
    engine.cancel(Epoch(4), EndReason.STOP)
    assert {end.reason for end in engine.step().ends} == {EndReason.STOP}


def test_a_known_attempt_is_ignored(llama: Any) -> None:
    engine = engine_of(llama)
    engine.submit(submit_of(1, prompts()[0], 5))
    engine.submit(submit_of(1, prompts()[1], 5))
    assert engine.waiting == 1


@pytest.mark.parametrize(
    ("submit", "code"),
    [
        (submit_of(2, [], 4), "invalid_input"),
        (submit_of(2, [1, VOCAB], 4), "invalid_input"),
        (submit_of(2, [1], 4, [VOCAB + 5]), "invalid_input"),
        (submit_of(2, [1], 4, stop_token_ids=(VOCAB,)), "invalid_input"),
        (submit_of(2, [1], 4, logit_bias=((VOCAB, 1.0),)), "invalid_input"),
        (submit_of(2, [1], 4, logit_bias=((1, math.nan),)), "invalid_input"),
        (submit_of(2, [1], 4, frequency_penalty=2.5), "invalid_input"),
        (submit_of(2, [1], 4, repetition_penalty=math.nan), "invalid_input"),
        (submit_of(2, [1], 4, logprobs=21), "invalid_input"),
        (submit_of(2, [1], 4, min_tokens=2, stop_token_ids=tuple(range(VOCAB))), "invalid_input"),
        (submit_of(2, [1] * 10, CONTEXT - 9), "context_overflow"),
        (submit_of(2, [1] * 130, 4), "context_overflow"),
    ],
)
def test_what_cannot_run_fails_alone(llama: Any, submit: Submit, code: str) -> None:
    good = submit_of(1, prompts()[1], 6)
    outcome = drive(engine_of(llama, tokens=128), [submit, good])
    end = outcome.ends[2]
    assert end.reason is EndReason.ERROR
    assert end.fault is not None
    assert end.fault.code == code
    assert outcome.tokens[1] == reference(llama, prompts()[1], 6)


def test_the_last_token_of_the_context_can_be_used(llama: Any) -> None:
    outcome = drive(engine_of(llama), [submit_of(1, [3] * 10, CONTEXT - 10)])
    assert len(outcome.tokens[1]) == CONTEXT - 10


@pytest.mark.parametrize(
    ("generated", "reason"), [((4, 9), EndReason.STOP), ((4, 5, 6), EndReason.LENGTH), ((4, 5, 6, 7), EndReason.LENGTH)]
)
def test_a_journal_that_is_complete_already_ends_at_once(llama: Any, generated: tuple[int, ...], reason: EndReason) -> None:
    outcome = drive(engine_of(llama), [submit_of(1, [1, 2], 3, generated, stop_token_ids=(9,))])
    assert outcome.tokens[1] == list(generated)
    assert outcome.ends[1].reason is reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_in_the_logits_fails_that_sequence_alone_and_leaves_no_trace(temperature: float) -> None:
    model = make_model("llama")
    tensors = tensors_of(model)
    tensors["model.embed_tokens.weight"][UNHEARD] = torch.nan
    manifest = manifest_of(model)
    engine = build_engine(manifest, tensors, kv_options(manifest, 96))
    clean = [[token for token in prompt if token != UNHEARD] or [1] for prompt in prompts()[:3]]
    submits = [submit_of(i + 1, prompt, 9, temperature=temperature, seed=i) for i, prompt in enumerate(clean)]
    alone = drive(engine_of(model, 96), submits)
    assert UNHEARD not in {token for tokens in alone.tokens.values() for token in tokens}
    mixed = drive(engine, [submit_of(8, [UNHEARD, 1, 2], 9, temperature=temperature), *submits])
    assert mixed.ends[8].reason is EndReason.ERROR
    assert mixed.ends[8].fault is not None
    assert {a: mixed.tokens[a] for a in (1, 2, 3)} == alone.tokens
    drive(engine, [submit_of(i, [UNHEARD] * 80, 9, temperature=temperature) for i in range(20, 24)])
    assert drive(engine, submits).tokens == alone.tokens


def test_a_failed_step_ends_its_sequences_and_leaves_the_engine_usable() -> None:
    model = make_model("gpt2")
    manifest = manifest_of(model)
    tensors = tensors_of(model)
    engine = build_engine(manifest, tensors, kv_options(manifest, 256))
    layer = engine._runner._model.transformer.h[1].mlp  # type: ignore[attr-defined]
    failing = True

    def fail(*_: object) -> None:
        if failing:
            raise RuntimeError("no memory")

    handle = layer.register_forward_pre_hook(fail)  # type: ignore[operator]
    outcome = drive(engine, [submit_of(1, prompts()[1], 6), submit_of(2, prompts()[2], 6)])
    assert {end.reason for end in outcome.ends.values()} == {EndReason.ERROR}
    assert all(end.fault is not None and "no memory" in end.fault.message for end in outcome.ends.values())
    failing = False
    assert drive(engine, [submit_of(3, prompts()[1], 6)]).tokens[3] == reference(model, prompts()[1], 6)
    handle.remove()


@pytest.mark.parametrize("where", ["forward", "sample"])
def test_what_fails_together_is_computed_one_by_one_and_only_the_culprit_ends(
    llama: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submits = [submit_of(i + 1, prompt, 9, seed=i, temperature=i % 2 * 0.9) for i, prompt in enumerate(prompts())]
    submits = [msgspec.structs.replace(s, params=msgspec.structs.replace(s.params, logprobs=1)) for s in submits]
    quiet = drive(engine_of(llama), submits)
    engine = engine_of(llama)
    culprit, forward, draw = submits[3].attempt, engine._runner.forward, engine_module.sample

    def short_of_memory(plan: Plan) -> Any:
        if any(each.attempt == culprit and each.position > 2 for each in plan.sequences()):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return forward(plan)

    def broken(logits: torch.Tensor, rows: Any) -> list[int]:
        logits += 1  # whatever it has done by then
        if any(each.attempt == culprit and each.position > 2 for each in rows):
            raise MemoryError("no more of it")
        return draw(logits, rows)

    if where == "forward":
        monkeypatch.setattr(engine._runner, "forward", short_of_memory)
    else:
        monkeypatch.setattr(engine_module, "sample", broken)
    outcome = drive(engine, submits)
    fault = outcome.ends[culprit].fault
    assert fault is not None
    assert (fault.code, outcome.ends[culprit].position) == ("out_of_space", 3)
    assert "not enough memory" in fault.message
    for submit in submits:
        if submit.attempt != culprit:
            assert outcome.tokens[submit.attempt] == quiet.tokens[submit.attempt]
            assert len(outcome.logprobs[submit.attempt]) == 9


def test_every_attempt_has_one_end_whatever_is_asked_and_cancelled(llama: Any) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    engine = engine_of(llama, tokens=160, concurrency=3, prefill_tokens=24)
    ends: dict[int, EndReason] = {}
    position: dict[int, int] = {}
    for number in range(1, 41):
        wishes = rng.choice([{}, {"tenant": "a"}, {"presence_penalty": 9.0}, {"logprobs": 2}, {"stop_token_ids": (3, 9)}])
        prompt = [rng.randrange(VOCAB + (rng.random() < 0.05)) for _ in range(rng.choice([0, 1, 15, 16, 17, 60]))]
        submit = submit_of(number, prompt, rng.randint(1, 40), seed=number, temperature=rng.choice([0.0, 1.5]), **wishes)  # type: ignore[arg-type]
        for _ in range(rng.randint(1, 2)):
            engine.submit(submit)
        if rng.random() < 0.3:
            engine.cancel(Epoch(rng.randint(1, number)))
        for _ in range(rng.randint(0, 4) if number < 40 else 2_000):
            output = engine.step()
            for run in output.runs:
                assert run.attempt not in ends
                assert run.start == position.get(run.attempt, 0)
                position[run.attempt] = run.start + len(run.ids)
            for end in output.ends:
                assert end.attempt not in ends
                assert end.position == position.get(end.attempt, 0)
                ends[end.attempt] = end.reason
    assert sorted(ends) == list(range(1, 41))
    assert (engine.running, engine.waiting, engine.kv_used_tokens) == (0, 0, 0)


def test_timing_is_filled_in(llama: Any) -> None:
    outcome = drive(engine_of(llama, concurrency=1), [submit_of(1, prompts()[1], 8), submit_of(2, prompts()[1], 8)])
    first, second = outcome.ends[1].timing, outcome.ends[2].timing
    assert first is not None
    assert second is not None
    assert first.steps == second.steps == 8
    assert 0 <= first.queued_s < second.queued_s < second.first_token_s < second.total_s
    assert second.first_token_s == pytest.approx(second.queued_s + second.prefill_s)


def test_bfloat16_resumes_and_batches(llama: Any) -> None:
    model = make_model("qwen3", dtype=torch.bfloat16)
    manifest = manifest_of(model, "BF16")
    engine = build_engine(manifest, tensors_of(model), kv_options(manifest, 1024))
    outcome = drive(engine, [submit_of(i + 1, prompt, 10, temperature=0.8, seed=5) for i, prompt in enumerate(prompts())])
    assert all(len(tokens) == 10 for tokens in outcome.tokens.values())


def test_weights_are_used_where_they_lie(llama: Any) -> None:
    manifest = manifest_of(llama)
    tensors = tensors_of(llama)
    engine = build_engine(manifest, tensors, kv_options(manifest, 64))
    before = drive(engine, [submit_of(1, prompts()[1], 6)]).tokens[1]
    tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].flip(0))
    after = drive(engine, [submit_of(1, prompts()[1], 6)]).tokens[1]
    assert after[0] == VOCAB - 1 - before[0]


def _refused(manifest: Any, tensors: Any) -> str:
    with pytest.raises(InvalidCheckpoint) as caught:
        build_engine(manifest, tensors, kv_options(manifest, 64))
    return str(caught.value)


def test_missing_unknown_and_misshapen_tensors_are_named(llama: Any) -> None:
    manifest = manifest_of(llama)
    tensors = tensors_of(llama)
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    assert "'model.layers.1.mlp.up_proj.weight'" in _refused(manifest, lost)
    assert "'model.extra.weight'" in _refused(manifest, {**tensors, "model.extra.weight": torch.zeros(2)})
    assert "'model.norm.weight'" in _refused(manifest, {**tensors, "model.norm.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "no-such"}, "no-such"),
        ({"model_type": None}, "None"),
        ({"model_type": "bert"}, "bert"),
        ({"hidden_size": "wide"}, "config"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_configs_that_cannot_run_are_refused_by_name(llama: Any, change: dict[str, Any], word: str) -> None:
    manifest = manifest_of(llama)
    broken = msgspec.structs.replace(manifest, config={**manifest.config, **change})
    assert word in _refused(broken, tensors_of(llama))


@pytest.mark.parametrize(
    ("architecture", "config", "word"),
    [
        ("MoshiForCausalLM", {"model_type": "moshi", "hidden_size": 32, "num_attention_heads": 4}, "compared"),
        ("JambaForCausalLM", {"model_type": "jamba", "hidden_size": 32, "num_attention_heads": 4}, "JambaForCausalLM"),
        ("Lfm2ForCausalLM", {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
        ("Llama4ForCausalLM", {"model_type": "llama4_text"}, "chunked_attention"),
        ("MambaForCausalLM", {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, "MambaForCausalLM"),
        ("OtherForCausalLM", {"model_type": "llama"}, "OtherForCausalLM"),
    ],
)
def test_architectures_that_cannot_run_are_refused_by_name(
    llama: Any, architecture: str, config: dict[str, Any], word: str
) -> None:
    manifest = msgspec.structs.replace(manifest_of(llama), architecture=architecture, config=config)
    message = _refused(manifest, tensors_of(llama))
    assert architecture in message
    assert word in message


def test_a_manifest_whose_kv_geometry_is_not_the_models_is_refused(llama: Any) -> None:
    manifest = manifest_of(llama)
    fewer = msgspec.structs.replace(manifest, kv=msgspec.structs.replace(manifest.kv, layers=1))
    more = msgspec.structs.replace(manifest, kv=msgspec.structs.replace(manifest.kv, layers=3))
    thick = msgspec.structs.replace(manifest, kv=msgspec.structs.replace(manifest.kv, kv_heads=4))
    for wrong in (fewer, more, thick):
        assert "layer" in _refused(wrong, tensors_of(llama))


def test_kv_memory_that_holds_no_block_is_refused(llama: Any) -> None:
    manifest = manifest_of(llama)
    with pytest.raises(OutOfSpace, match="kv_bytes 100"):
        build_engine(manifest, tensors_of(llama), EngineOptions(kv_bytes=100))
