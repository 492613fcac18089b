"""`sllmctl checkpoint`: what is asked for copies of checkpoints, how it is waited for, and how it ends."""

from __future__ import annotations

import json

import msgspec
import pytest

from schema.admin import PinView, ProgressView, PublicationView
from schema.errors import Fault
from schema.states import Tier, TierState
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import CHECKPOINTS, OPERATIONS, FakeManager

_RUNNING = msgspec.structs.replace(OPERATIONS[0], ended_at=None)


@pytest.mark.parametrize(
    ("arguments", "path", "body"),
    [
        (("prefetch", "qwen"), "prefetch", {"node": None, "tier": "dram"}),
        (("prefetch", "qwen", "--node", "gpu1"), "prefetch", {"node": "gpu1", "tier": "dram"}),
        (("prefetch", "qwen", "--tier", "device"), "prefetch", {"node": None, "tier": "device"}),
        (("verify", "qwen", "--node", "gpu1"), "verify", {"node": "gpu1", "tier": None}),
        (("publish", "qwen", "s3://b/p"), "publish", {"url": "s3://b/p", "node": None, "tier": None}),
        (("publish", "qwen", "--node", "gpu1"), "publish", {"url": None, "node": "gpu1", "tier": None}),
        (("fetch", "qwen"), "fetch", {"url": None, "node": None, "tier": "disk"}),
        (
            ("fetch", "qwen", "--from", "https://h", "--node", "gpu1", "--tier", "dram"),
            "fetch",
            {"url": "https://h", "node": "gpu1", "tier": "dram"},
        ),
        (("rm", "qwen", "-y"), "drop", {"node": None, "tier": None}),
        (("rm", "qwen", "-y", "--tier", "device"), "drop", {"node": None, "tier": "device"}),
        (("rm", "qwen", "-y", "--tier", "disk", "--node", "local"), "drop", {"node": "local", "tier": "disk"}),
    ],
)
def test_what_is_asked(
    sllmctl: Sllmctl, manager: FakeManager, arguments: tuple[str, ...], path: str, body: dict[str, str]
) -> None:
    manager.answer(f"POST checkpoints/qwen/{path}", 200, {"items": [_RUNNING]})
    manager.answer("GET operations/op_1", 202, _RUNNING)
    manager.answer("GET operations/op_1", 200, OPERATIONS[0])
    said = sllmctl("checkpoint", *arguments)
    assert said.code == 0, said.err
    assert manager.asked[0] == ("POST", f"checkpoints/qwen/{path}", body)
    assert [path.partition("?")[0] for _, path, _ in manager.asked[1:]] == ["operations/op_1"] * 2
    assert "done" in said.out


def test_no_wait_returns_at_once(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST checkpoints/qwen/verify", 200, {"items": [_RUNNING]})
    said = sllmctl("checkpoint", "verify", "qwen", "--no-wait", "-o", "name")
    assert (said.code, said.out) == (0, "op_1\n")
    assert len(manager.asked) == 1


def test_the_first_failure_is_the_commands_and_all_are_shown(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST checkpoints/qwen/verify", 200, {"items": OPERATIONS})
    said = sllmctl("checkpoint", "verify", "qwen")
    assert said.code == 1
    assert "bytes at offset 0" in said.err
    assert said.err.startswith("error: gpu1: ")
    lines = said.out.splitlines()
    assert len(lines) == 3
    assert "512.0 MiB/s" in lines[1]
    assert "failed (invalid_checkpoint)" in lines[2]
    said = sllmctl("checkpoint", "verify", "qwen", "-o", "json")
    assert said.code == 1
    assert [one["id"] for one in json.loads(said.out)] == ["op_1", "op_2"]


def test_each_failure_is_told_with_its_node(sllmctl: Sllmctl, manager: FakeManager) -> None:
    bad = OPERATIONS[1]
    other = msgspec.structs.replace(bad, id="op_3", node="gpu2", fault=Fault("internal", "Input/output error"))
    manager.answer("POST checkpoints/qwen/verify", 200, {"items": [bad, other]})
    said = sllmctl("checkpoint", "verify", "qwen")
    assert said.code == 1
    further, first = said.err.splitlines()
    assert further == "gpu2: Input/output error"
    assert first.startswith("error: gpu1: partition_0.bin: the 4194304 bytes at offset 0 ")
    manager.forget()
    manager.answer("POST checkpoints/qwen/verify", 200, {"items": [bad]})
    assert sllmctl("checkpoint", "verify", "qwen").err.startswith("error: partition_0.bin: ")


def test_a_wait_that_runs_out_says_that_it_goes_on(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST checkpoints/qwen/verify", 200, {"items": [_RUNNING]})
    manager.answer("GET operations/op_1", 202, _RUNNING)
    said = sllmctl("checkpoint", "verify", "qwen", "--timeout", "0.05")
    assert said.code == 7
    assert "goes on, `sllmctl operation show op_1` says how" in said.err


def test_an_interrupted_wait_says_what_goes_on_and_how_to_end_it(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    manager.answer("POST checkpoints/qwen/verify", 200, {"items": [_RUNNING]})
    monkeypatch.setattr("sllmctl.cli.operations._wait", interrupt)
    said = sllmctl("checkpoint", "verify", "qwen")
    assert said.code == 130
    assert "goes on; `sllmctl operation cancel op_1` ends it" in said.err


def test_what_is_not_known_of_a_damaged_checkpoint_is_no_number(sllmctl: Sllmctl, manager: FakeManager) -> None:
    damaged = msgspec.structs.replace(
        CHECKPOINTS[0], architecture="", image_bytes=0, kv_token_bytes=0, max_context_tokens=0, models=()
    )
    manager.answer("GET checkpoints", 200, {"items": [damaged]})
    assert sllmctl("checkpoint", "ls").out.splitlines()[1].split()[1:5] == ["-", "-", "-", "-"]
    manager.answer("GET checkpoints/01234", 200, damaged)
    shown = sllmctl("checkpoint", "show", "01234").out
    assert "not known: no manifest of it can be read" in shown
    assert "0 tokens" not in shown


def test_operations_are_listed_with_how_far_they_are_and_how_they_ended(sllmctl: Sllmctl, manager: FakeManager) -> None:
    progress = ProgressView(stage="fetch", done_bytes=300 << 20, total_bytes=1 << 30, rate_bps=2 << 20, source=Tier.REMOTE)
    moving = msgspec.structs.replace(_RUNNING, progress=progress)
    cancelled = msgspec.structs.replace(OPERATIONS[1], fault=Fault("cancelled", "the operation was cancelled"))
    manager.answer("GET operations", 200, {"items": [_RUNNING, moving, OPERATIONS[0], cancelled]})
    listed = sllmctl("operation", "ls").out.splitlines()[1:]
    states = ("running   ", "running 29%", "done", "cancelled")
    assert [state in line for state, line in zip(states, listed, strict=True)] == [True] * 4, listed
    assert "2.0 MiB/s" in listed[1]


def test_an_operation_is_cancelled(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST operations/op_1/cancel", 200, _RUNNING)
    manager.answer("GET operations/op_1", 202, _RUNNING)
    assert sllmctl("operation", "cancel", "op_1").code == 7
    manager.forget()
    manager.answer("POST operations/op_1/cancel", 200, _RUNNING)
    ended = msgspec.structs.replace(OPERATIONS[0], fault=Fault("cancelled", "it was cancelled"))
    manager.answer("GET operations/op_1", 200, ended)
    said = sllmctl("operation", "cancel", "op_1")
    assert (said.code, "has ended: it was cancelled" in said.err) == (0, True)
    manager.forget()
    manager.refuse("POST operations/op_1/cancel", 409, "conflict", "operation op_1 has ended")
    assert sllmctl("operation", "cancel", "op_1").code == 6


def test_removal_refuses_without_a_terminal_and_asks_for_nothing(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET checkpoints/qwen", 200, CHECKPOINTS[0])
    said = sllmctl("checkpoint", "rm", "qwen")
    assert said.code == 2
    assert "-y" in said.err
    assert not [one for one in manager.asked if one[0] == "POST"]


def test_a_removal_tells_what_becomes_of_the_last_sound_copy(sllmctl: Sllmctl, manager: FakeManager) -> None:
    alone = CHECKPOINTS[0]
    published = msgspec.structs.replace(alone, publications=(PublicationView(url="s3://b/p", layout="exec1", published_at=0),))
    far = msgspec.structs.replace(alone.placements[0], node="far")
    for found, arguments, told in (
        (alone, (), "the last sound copy that is known"),
        (published, ("--node", "local"), f"checkpoint publish {alone.digest[:16]} s3://b/p` compares what lies there"),
        (published, ("--node", "far"), ""),
        (published, ("--tier", "dram"), ""),
        (msgspec.structs.replace(published, placements=(*alone.placements, far)), ("--node", "local"), ""),
        (msgspec.structs.replace(published, placements=(*alone.placements, far)), (), "forget"),
    ):
        manager.forget()
        manager.answer("GET checkpoints/qwen", 200, found)
        said = sllmctl("checkpoint", "rm", "qwen", *arguments)
        assert said.code == 2
        assert told in said.err
        assert ("last sound copy" in said.err) == bool(told)


def test_the_last_known_place_is_not_forgotten_unasked(sllmctl: Sllmctl, manager: FakeManager) -> None:
    remotes = tuple(PublicationView(url=f"s3://b/{name}", layout="exec1", published_at=0) for name in "pq")
    on_disk = msgspec.structs.replace(CHECKPOINTS[0], publications=remotes)
    bad = msgspec.structs.replace(on_disk.placements[0], state=TierState.QUARANTINED)
    alone = msgspec.structs.replace(on_disk, placements=(bad, *on_disk.placements[1:]))
    last = msgspec.structs.replace(alone, publications=remotes[:1])
    for found, arguments, asks in (
        (alone, (), True),
        (last, ("s3://b/p/",), True),
        (last, ("s3://b/p", "-y"), False),
        (alone, ("s3://b/p",), False),
        (last, ("s3://b/q",), False),
        (on_disk, (), False),
    ):
        manager.forget()
        manager.answer("GET checkpoints/qwen", 200, found)
        manager.answer("POST checkpoints/qwen/forget", 200, found)
        said = sllmctl("checkpoint", "forget", "qwen", *arguments)
        assert said.code == (2 if asks else 0), said.err
        assert (f"fetch {found.digest} --from s3://b/p` brings it back" in said.err) is asks
        assert any(one[0] == "POST" for one in manager.asked) is not asks


def test_what_a_publish_has_mended_is_told(sllmctl: Sllmctl, manager: FakeManager) -> None:
    mended = msgspec.structs.replace(OPERATIONS[0], kind="publish", url="s3://b/p", note="partition_0.bin was written anew")
    manager.answer("POST checkpoints/qwen/publish", 200, {"items": [mended]})
    said = sllmctl("checkpoint", "publish", "qwen", "s3://b/p")
    assert said.code == 0
    assert "s3://b/p: partition_0.bin was written anew" in said.err


@pytest.mark.parametrize(
    ("status", "code", "exit_code"), [(404, "not_found", 5), (409, "conflict", 6), (400, "invalid_input", 2)]
)
def test_refusals_have_their_exit_codes(sllmctl: Sllmctl, manager: FakeManager, status: int, code: str, exit_code: int) -> None:
    manager.refuse("POST checkpoints/abcd/verify", status, code, "abcd is ambiguous: it may mean this or that")
    said = sllmctl("checkpoint", "verify", "abcd")
    assert (said.code, said.out) == (exit_code, "")
    assert "ambiguous" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("prefetch",),
        ("prefetch", "qwen", "--tier", "disk"),
        ("rm", "qwen", "--tier", "remote"),
        ("verify", "qwen", "--tier", "x"),
    ],
)
def test_usage_is_checked(sllmctl: Sllmctl, manager: FakeManager, arguments: tuple[str, ...]) -> None:
    assert sllmctl("checkpoint", *arguments).code == 2
    assert manager.asked == []


@pytest.mark.parametrize("verb", ["pin", "unpin"])
def test_pins_are_asked_for_and_told(sllmctl: Sllmctl, manager: FakeManager, verb: str) -> None:
    pins = (PinView(node="local", tier=Tier.DRAM),) if verb == "pin" else ()
    manager.answer(f"POST checkpoints/qwen/{verb}", 200, msgspec.structs.replace(CHECKPOINTS[0], pins=pins))
    said = sllmctl("checkpoint", verb, "qwen", "--tier", "dram", "--node", "local")
    assert said.code == 0
    assert manager.asked == [("POST", f"checkpoints/qwen/{verb}", {"node": "local", "tier": "dram"})]
    assert ("local:dram" if pins else "nowhere") in said.err
    said = sllmctl("checkpoint", verb, "qwen", "-o", "json")
    assert len(json.loads(said.out)["pins"]) == len(pins)


def test_a_remotes_name_cannot_steer_the_terminal_of_who_is_asked_about_it(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://b/\x1b]0;mine\x07"
    publications = (PublicationView(url=url, layout="exec1", published_at=0),)
    manager.answer(
        "GET checkpoints/qwen", 200, msgspec.structs.replace(CHECKPOINTS[0], placements=(), publications=publications)
    )
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: asked.append(question))
    assert sllmctl("checkpoint", "forget", "qwen").code == 1
    (question,) = asked
    assert "s3://b/\N{REPLACEMENT CHARACTER}]0;mine\N{REPLACEMENT CHARACTER}" in question
    assert question.isprintable()
