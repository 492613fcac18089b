import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.errors import LinkError
from schema.ids import Epoch
from schema.link import (
    MAX_FRAME_BYTES,
    AgentMessage,
    Ended,
    EngineTiming,
    FrameDecoder,
    Hello,
    ManagerMessage,
    Ping,
    Role,
    SamplingParams,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
    encode_frame,
)
from schema.states import EndReason

SUBMIT = Submit(
    attempt=Epoch(7),
    instance="inst_1",
    instance_epoch=Epoch(3),
    request="req_1",
    model="docs",
    prompt=(1, 2, 3),
    generated=(4,),
    params=SamplingParams(max_tokens=5, seed=(1 << 63) - 1),
)


@given(st.data())
def test_frames_survive_any_cutting(data: st.DataObject) -> None:
    messages = [SUBMIT, Ping(nonce=1), SUBMIT, Ping(nonce=2)]
    stream = b"".join(encode_frame(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder: FrameDecoder[ManagerMessage] = FrameDecoder(ManagerMessage)
    received = [m for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) for m in decoder.feed(stream[a:b])]
    assert received == messages


def test_tokens_and_ends_keep_their_values() -> None:
    tokens = Tokens(
        frame=9,
        runs=(TokenRun(Epoch(7), 4, (10, 11)),),
        ends=(Ended(attempt=Epoch(7), position=6, reason=EndReason.LENGTH),),
    )
    assert FrameDecoder[AgentMessage](AgentMessage).feed(encode_frame(tokens)) == [tokens]


def test_an_oversized_frame_is_refused_by_its_header_alone() -> None:
    with pytest.raises(LinkError, match="limit"):
        FrameDecoder[AgentMessage](AgentMessage).feed(struct.pack(">I", MAX_FRAME_BYTES + 1))


def test_an_oversized_message_is_not_sent() -> None:
    with pytest.raises(LinkError, match="exceeds"):
        encode_frame(Hello(role=Role.MANAGER, software="x" * (MAX_FRAME_BYTES + 1), pid=1))


@given(st.binary(min_size=0, max_size=200))
def test_garbage_is_a_link_error_or_nothing_yet(body: bytes) -> None:
    decoder: FrameDecoder[ManagerMessage] = FrameDecoder(ManagerMessage)
    try:
        messages = decoder.feed(struct.pack(">I", len(body)) + body)
    except LinkError:
        return
    assert all(isinstance(message, msgspec.Struct) for message in messages)


@pytest.mark.parametrize(
    "body",
    [
        {"t": "nosuch"},
        {"t": "ping"},
        {"t": "ping", "nonce": "one"},
        {"t": "ping", "nonce": 1, "more": 2},
        {"t": "acked", "frame": -1},
        [1, 2],
    ],
)
def test_a_message_that_is_not_of_the_link_is_refused(body: object) -> None:
    encoded = msgspec.msgpack.encode(body)
    with pytest.raises(LinkError, match="not a message"):
        FrameDecoder[ManagerMessage](ManagerMessage).feed(struct.pack(">I", len(encoded)) + encoded)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_time_is_refused(value: float) -> None:
    ended = Ended(attempt=Epoch(7), position=6, reason=EndReason.LENGTH, timing=EngineTiming(total_s=value))
    with pytest.raises(LinkError, match="not a message"):
        FrameDecoder[AgentMessage](AgentMessage).feed(encode_frame(Tokens(frame=9, runs=(), ends=(ended,))))


@pytest.mark.parametrize("value", [-1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("field", ["epoch", "kv_capacity_tokens", "pid"])
def test_what_no_database_takes_is_refused(field: str, value: int) -> None:
    truth = {"instance": "i", "epoch": 1, "digest": "d", "state": "ready", field: value}
    body = msgspec.msgpack.encode({"t": "instance", "truth": truth})
    with pytest.raises(LinkError, match=f"truth.{field}"):
        FrameDecoder[AgentMessage](AgentMessage).feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize("state", ["planned", "backoff", "failed"])
def test_a_state_that_is_the_managers_to_give_is_refused_from_a_node(state: str) -> None:
    truth = {"instance": "i", "epoch": 1, "digest": "d", "state": state}
    arena = {"id": "a", "budget_bytes": 1, "chunk_bytes": 1}
    means = {"hostname": "h", "cpus": 1, "memory_bytes": 1, "devices": (), "arena": arena}
    for said in ({"t": "instance", "truth": truth}, {"t": "truth", "node": "n", "inventory": means, "instances": [truth]}):
        body = msgspec.msgpack.encode(said)
        with pytest.raises(LinkError, match=f"{state}, which is not a node's to say"):
            FrameDecoder[AgentMessage](AgentMessage).feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize("kind", [Hello, AgentMessage, ManagerMessage])
def test_a_body_that_nests_deeper_than_a_stack_is_refused(kind: object) -> None:
    body = b"\x82\xa1t\xa5hello\xa4more" + b"\x91" * 200_000 + b"\xc0"
    with pytest.raises(LinkError, match="not a message"):
        FrameDecoder[object](kind).feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf"])
def test_a_list_that_announces_billions_takes_no_memory(header: bytes) -> None:
    body = b"\x82\xa1t\xa5acked\xa4ends" + header + b"\xff\xff\xff\xff"
    with pytest.raises(LinkError, match="not a message"):
        FrameDecoder[ManagerMessage](ManagerMessage).feed(struct.pack(">I", len(body)) + body)


def test_a_newer_builds_handshake_is_readable() -> None:
    newer = msgspec.msgpack.encode({"t": "hello", "role": "manager", "software": "9", "pid": 1, "protocol": 9, "colour": "red"})
    (hello,) = FrameDecoder[Hello](Hello).feed(struct.pack(">I", len(newer)) + newer)
    assert hello.protocol == 9
    welcome = msgspec.msgpack.encode({"t": "welcome", "protocol": 1, "software": "9", "node": "", "pid": 1, "colour": "red"})
    assert FrameDecoder[Welcome](Welcome).feed(struct.pack(">I", len(welcome)) + welcome)[0].protocol == 1
