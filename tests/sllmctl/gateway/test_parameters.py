"""The OpenAI API's parameters: what reaches the engine, what is refused, by its name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from schema.checkpoint import TextDefaults
from schema.link import SamplingParams
from schema.states import EndReason, ModelState
from tests.sllmctl.gateway.harness import CONTEXT_TOKENS, END, FakeRequest, chat_body, ids_of, model_named, serving
from tests.sllmctl.gateway.official import says


async def test_parameters_reach_the_engine() -> None:
    async with serving() as here:
        here.router.reply = says("x")
        body = chat_body(temperature=0.5, top_p=0.25, top_k=7, seed=-1, max_completion_tokens=9, user="me")
        assert (await here.client.post("/v1/chat/completions", json=body)).status_code == 200
        params = here.router.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.25, 7, 9)
    assert params.seed == (1 << 63) - 1
    assert params.stop_token_ids == (END,)
    assert params == SamplingParams(max_tokens=9, temperature=0.5, top_p=0.25, top_k=7, seed=params.seed, stop_token_ids=(END,))


async def test_wishes_of_later_servers_reach_the_engine_too() -> None:
    wishes = {
        "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2, "min_tokens": 3,
        "logit_bias": {"5": -100, "7": 2.5}, "stop_token_ids": [9, END], "ignore_eos": True, "metadata": {"a": "b"},
        "logprobs": True, "top_logprobs": 20, "user": "me", "n": 2, "max_tokens": 7, "seed": 4,
    }  # fmt: skip

    def reply(request: FakeRequest) -> None:
        for sequence in request.sequences:
            sequence.emit(ids_of("x"), EndReason.LENGTH, 20)

    async with serving() as here:
        here.router.reply = reply
        response = await here.client.post("/v1/chat/completions", json=chat_body(**wishes))
        assert response.status_code == 200, response.text
        request = here.router.requests[0]
    assert request.params == SamplingParams(
        max_tokens=7, seed=4, min_p=0.1, repetition_penalty=1.5, presence_penalty=-2.0, frequency_penalty=2.0, min_tokens=3,
        logit_bias=((5, -100.0), (7, 2.5)), stop_token_ids=(9, END), logprobs=20,
    )  # fmt: skip
    assert (request.tenant, len(request.sequences)) == ("me", 2)


@pytest.mark.parametrize(("top", "longest"), [(None, 131_000), (0, 131_000), (20, 49_932)])
async def test_a_reply_of_no_given_length_is_as_long_as_its_log_probabilities_can_be_told(
    top: int | None, longest: int
) -> None:
    async with serving() as here:
        here.router.routed["tiny"].max_context_tokens = 131_000
        here.router.reply = lambda request: request.sequence.emit(ids_of("x"), EndReason.LENGTH, top)
        asked = {} if top is None else {"logprobs": True, "top_logprobs": top}
        response = await here.client.post("/v1/chat/completions", json=chat_body(**asked))
        assert response.status_code == 200, response.text
        request = here.router.requests[0]
        assert request.params.max_tokens == min(longest, 131_000 - len(request.sequence.prompt))
        response = await here.client.post("/v1/chat/completions", json=chat_body(**asked, max_tokens=100_000))
        assert response.is_success == (top != 20), "who asks for more than can be told is refused"


async def test_defaults_are_the_models_own_then_openais() -> None:
    own = TextDefaults(
        has_template=True, temperature=0.3, top_p=0.0, top_k=11, min_p=0.25, repetition_penalty=1.5,
        special_tokens={"bos_token": "", "eos_token": ""},
    )  # fmt: skip
    for defaults, expected in ((None, (1.0, 1.0, 0, 0.0, 1.0)), (own, (0.3, 0.0, 11, 0.25, 1.5))):
        async with serving(text=defaults) as here:
            here.router.reply = says("x", EndReason.LENGTH)
            for _ in range(2):
                await here.client.post("/v1/chat/completions", json=chat_body())
            first, second = here.router.requests
        params = first.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == expected
        assert params.max_tokens == CONTEXT_TOKENS - len(first.sequence.prompt)
        assert params.seed != second.params.seed, "an unseeded request has noise of its own"


_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "top_logprobs": None,
    "tools": None,
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "store": False,
    "service_tier": "auto",
    "stop": None,
    "max_tokens": None,
    "stream_options": None,
    "metadata": None,
}


async def test_neutral_values_are_accepted() -> None:
    async with serving() as here:
        here.router.reply = says("x")
        response = await here.client.post("/v1/chat/completions", json=chat_body(**_NEUTRAL))
        assert response.status_code == 200, response.text


_REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_value"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"min_p": -0.1}, "min_p", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": "x"}}, "logit_bias[...]", "invalid_value"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
    ({"min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"metadata": {"a": 1}}, "metadata[...]", "invalid_value"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"tempurature": 1}, "tempurature", "unknown_parameter"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"seed": 1 << 64}, "seed", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": ["a" * 257]}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop[0]", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {}}]}]},
        "messages[0].content[0].image_url",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    ({"model": 5}, "model", "invalid_value"),
    ({"model": "nothing"}, None, "model_not_found"),  # type: ignore[list-item]
    ({"model": "asleep"}, None, "model_not_found"),  # type: ignore[list-item]
]


async def test_what_is_refused_is_refused_by_name() -> None:
    async with serving() as here:
        for change, param, code in _REFUSED:
            response = await here.client.post("/v1/chat/completions", json={**chat_body(), **change})
            error = response.json()["error"]
            assert (error["param"], error["code"]) == (param, code), (change, error)
            assert response.status_code == (404 if code == "model_not_found" else 400)
            assert error["type"] == "invalid_request_error"
            assert error["message"]
        response = await here.client.post("/v1/chat/completions", json={"model": "tiny"})
        assert response.json()["error"]["param"] == "messages"
        assert not here.router.requests


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (ModelState.FAILED, "could not be ingested; `sllmctl model show asleep` says why"),
        (ModelState.STOPPED, "is not deployed; `sllmctl model deploy asleep` serves it"),
        (ModelState.INGESTING, "is being ingested"),
        (ModelState.DELETING, "is being removed"),
    ],
)
async def test_a_model_that_is_not_served_is_refused_with_what_to_do(state: ModelState, said: str) -> None:
    async with serving() as here:
        here.router.routed["asleep"] = model_named("asleep", state=state)
        response = await here.client.post("/v1/chat/completions", json={**chat_body(), "model": "asleep"})
        assert (response.status_code, said in response.json()["error"]["message"]) == (404, True), response.text


async def test_completions_refuse_by_name_too() -> None:
    refused: list[tuple[dict[str, object], str, str]] = [
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"prompt": ["a", "b"]}, "prompt", "unsupported_parameter"),
        ({"prompt": [[1], [2]]}, "prompt", "unsupported_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [1 << 20]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"prompt": [1.5]}, "prompt[0]", "invalid_value"),
        ({"prompt": "x " * CONTEXT_TOKENS * 2}, "prompt", "context_length_exceeded"),
        ({"max_tokens": CONTEXT_TOKENS}, "max_tokens", "context_length_exceeded"),
    ]
    async with serving() as here:
        for change, param, code in refused:
            response = await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **change})
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, param, code), (change, error)
        here.router.reply = says("x")
        neutral = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "n": 1}
        assert (await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **neutral})).status_code == 200


async def test_messages_of_every_accepted_form() -> None:
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "developer", "content": ""},
    ]
    async with serving(template="{{ messages | tojson }}") as here:
        here.router.reply = says("x")
        response = await here.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert response.status_code == 200, response.text
        prompt = msgspec.json.decode(here.router.requests[0].prompt_text)
    assert prompt == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a\nb", "name": "me"},
        {"role": "assistant", "content": "c"},
        {"role": "developer", "content": ""},
    ]
