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


def test_a_newer_builds_handshake_is_readable() -> None:
    newer = msgspec.msgpack.encode({"t": "hello", "role": "manager", "software": "9", "pid": 1, "protocol": 9, "colour": "red"})
    (hello,) = FrameDecoder[Hello](Hello).feed(struct.pack(">I", len(newer)) + newer)
    assert hello.protocol == 9
    welcome = msgspec.msgpack.encode({"t": "welcome", "protocol": 1, "software": "9", "node": "", "pid": 1, "colour": "red"})
    assert FrameDecoder[Welcome](Welcome).feed(struct.pack(">I", len(welcome)) + welcome)[0].protocol == 1
