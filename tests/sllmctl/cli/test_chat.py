"""`sllmctl chat`: what is asked of the model, what is streamed, and how a reply or a conversation ends."""

from __future__ import annotations

import io
import os
import select
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest

from sllmctl.cli import chat, diagnostics
from sllmctl.config import ClientSettings
from sllmctl.inference import ChatOptions, ChatStream
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import MODELS, FakeManager


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _chats(manager: FakeManager) -> list[dict[str, object]]:
    return [body for _, path, body in manager.asked if path == "/v1/chat/completions"]


def _typed(monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> None:
    """A person at a terminal who types these lines, presses Ctrl-C for a KeyboardInterrupt, and then Ctrl-D."""
    monkeypatch.setattr("sys.stdin", _Terminal())
    waiting = iter((*lines, EOFError()))

    def read_line(_: str) -> str:
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(chat, "read_line", read_line)


def test_one_answer(sllmctl: Sllmctl, manager: FakeManager) -> None:
    said = sllmctl("chat", "Hi", "-s", "Be brief.", "--max-tokens", "9", "--temperature", "0", "--seed", "3")
    assert (said.code, said.out, said.err) == (0, "Hello\n", "")
    assert _chats(manager) == [
        {
            "model": "qwen",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 9,
            "temperature": 0.0,
            "seed": 3,
        }
    ]


def test_what_a_models_template_says_cannot_steer_the_terminal(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"error": {"message": "the model's chat template failed: \x1b]0;mine\x07", "code": "invalid_value"}}
    manager.chat_error = (400, msgspec.json.encode(said))
    _typed(monkeypatch, "Hi")
    conversation = sllmctl("chat").err
    for shown in (conversation, sllmctl("chat", "Hi").err):
        assert "error: the model's chat template failed: \N{REPLACEMENT CHARACTER}]0;mine\N{REPLACEMENT CHARACTER}\n" in shown


def test_certificates_are_read_for_https_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Read(Exception):
        pass

    def read(*_: object, **__: object) -> None:
        raise Read

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", read)
    ask = partial(ChatStream, model="qwen", turns=(), options=ChatOptions(), settings=ClientSettings())
    with ask("http://127.0.0.1:8343"):
        pass
    with pytest.raises(Read):
        ask("https://models.example")


def test_the_prompt_may_come_from_a_pipe(sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert sllmctl("chat", "-m", "tiny").out == "Hello\n"
    assert _chats(manager)[0]["messages"] == [{"role": "user", "content": "from a pipe\n"}]
    assert sllmctl("chat", "-m", "tiny").code == 2, "nothing more is in the pipe"


def test_where_the_time_went_is_said_on_stderr(sllmctl: Sllmctl) -> None:
    said = sllmctl("chat", "Hi", "--stats")
    assert said.out == "Hello\n"
    first, timeline, start, engine = said.err.splitlines()
    assert "16 prompt tokens, 2 generated" in first
    assert timeline == "cold start: routed 0.53 s, first token 0.61 s, ended 1.90 s"
    assert start.startswith("instance: load 0.41 s (1.2 GiB from disk), fork 9 ms")
    assert engine.startswith("engine: queued 1 ms, prefill 21 ms")


def test_without_a_name_there_must_be_one_model(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET models", 200, {"items": MODELS[1:]})
    none = sllmctl("chat", "Hi")
    assert (none.code, "no model is deployed" in none.err) == (2, True)
    manager.forget()
    manager.answer("GET models", 200, {"items": [MODELS[0], msgspec.structs.replace(MODELS[0], name="other")]})
    several = sllmctl("chat", "Hi")
    assert (several.code, "qwen, other" in several.err) == (2, True)


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [(400, 2, "x"), (404, 5, "x"), (429, 1, "try again in 3 s"), (503, 1, "x"), (504, 7, "x"), (401, 4, "x"), (500, 1, "x")],
)
def test_a_refusal_has_its_exit_code(sllmctl: Sllmctl, manager: FakeManager, status: int, code: int, text: str) -> None:
    manager.chat_error = (status, b'{"error": {"message": "x", "type": "t", "code": "c", "param": null}}')
    said = sllmctl("chat", "Hi", "-m", "qwen")
    assert (said.code, said.out) == (code, "")
    assert text in said.err


@pytest.mark.parametrize(("status", "name", "code"), [(409, "conflict", 6), (503, "unreachable", 3), (504, "timed_out", 7)])
def test_a_refusal_is_known_by_its_code_before_and_in_the_stream(
    sllmctl: Sllmctl, manager: FakeManager, status: int, name: str, code: int
) -> None:
    body = msgspec.json.encode({"error": {"message": "x", "code": name}})
    for answer in ((status, body), (200, b"data: %b\n\n" % body)):
        manager.chat_error = answer
        said = sllmctl("chat", "Hi", "-m", "qwen")
        assert (said.code, "x" in said.err) == (code, True), said.err


def test_an_answer_of_something_else_is_an_error(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.chat_error = (502, b"<html>")
    said = sllmctl("chat", "Hi", "-m", "qwen")
    assert (said.code, "is it sllmctl's?" in said.err) == (1, True)
    manager.chat_error = (200, b'data: {"error": {"message": "the node is on fire"}}\n\n')
    assert "the node is on fire" in sllmctl("chat", "Hi", "-m", "qwen").err
    manager.chat_error = (200, b"data: {nonsense\n\n")
    assert "cannot be read" in sllmctl("chat", "Hi", "-m", "qwen").err
    manager.chat_error = (200, b": nothing more\n\n")
    assert (sllmctl("chat", "Hi", "-m", "qwen").code, sllmctl("chat", "Hi", "-m", "qwen").out) == (3, "")


def test_a_conversation_remembers_and_forgets(sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    _typed(monkeypatch, "one", "", KeyboardInterrupt(), "/help", "two", "/reset", "three")
    said = sllmctl("chat", "-s", "Be brief.")
    assert (said.code, said.out) == (0, "Hello\nHello\nHello\n\n")
    assert [[turn["content"] for turn in body["messages"]] for body in _chats(manager)] == [  # type: ignore[attr-defined]
        ["Be brief.", "one"],
        ["Be brief.", "one", "Hello", "two"],
        ["Be brief.", "three"],
    ]


def test_a_failed_reply_ends_no_conversation(sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    _typed(monkeypatch, "one", "/quit")
    manager.chat_error = (503, b'{"error": {"message": "no room"}}')
    said = sllmctl("chat")
    assert (said.code, said.out) == (0, "")
    assert "no room" in said.err


def test_a_conversation_that_has_grown_too_long_is_told_how_to_begin_anew(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    _typed(monkeypatch, "one", "/quit")
    manager.chat_error = (400, b'{"error": {"message": "shorten it", "code": "context_length_exceeded"}}')
    assert "error: shorten it; /reset forgets what was said before\n" in sllmctl("chat").err
    assert sllmctl("chat", "one").err == "error: shorten it\n"


def test_a_reply_that_is_waited_for_is_told_of(sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    monkeypatch.setattr(diagnostics, "_SHOW_AFTER_S", 0.0)
    monkeypatch.setattr(diagnostics, "_tell", lambda text: told.set() if "waiting for qwen ... 0 s" in text else None)

    def pieces() -> Iterator[str]:
        assert told.wait(30)
        yield "Hello"

    manager.pieces = pieces()  # type: ignore[assignment]
    assert sllmctl("chat", "Hi").out == "Hello\n"
    assert told.is_set()


def test_ctrl_c_cancels_the_reply_and_returns_to_the_prompt(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.hold = True
    written: list[str] = []

    def press(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            manager.hold = False
            raise KeyboardInterrupt

    _typed(monkeypatch, "one", "two")
    monkeypatch.setattr(chat, "stream", press)
    said = sllmctl("chat")
    assert said.code == 0
    assert "cancelled" in said.err
    assert manager.gone.wait(60), "the manager must see that the client is gone"
    assert written == ["Hel", "lo", "Hel", "lo"]
    assert [len(body["messages"]) for body in _chats(manager)] == [1, 1], "what was cancelled is not remembered"  # type: ignore[arg-type]


def test_ctrl_c_ends_a_single_answer_with_130(manager: FakeManager, ended: Callable[[subprocess.Popen[str]], None]) -> None:
    manager.hold = True
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLLM_")}
    command = [sys.executable, "-m", "sllmctl", "--socket", str(manager.socket), "chat", "-m", "qwen", "Hi"]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended(process)
    assert process.stdout is not None
    assert process.stdout.read(5) == "Hello"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "interrupted")
    assert manager.gone.wait(60)


def test_a_conversation_on_a_real_terminal(manager: FakeManager, ended: Callable[[subprocess.Popen[str]], None]) -> None:
    manager.hold = True
    ours, theirs = os.openpty()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLLM_")}
    command = [sys.executable, "-m", "sllmctl", "--socket", str(manager.socket), "chat"]
    # Ctrl-C reaches the foreground process group of a controlling terminal, which the session's first open makes this one.
    become = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", become, *command], env=environ, stdin=theirs, stdout=theirs, stderr=theirs, text=True
    )
    ended(process)
    os.close(theirs)

    def read_until(text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096)
        return seen

    try:
        read_until(b">>> ")
        os.write(ours, b"one\n")
        read_until(b"Hello")
        os.write(ours, b"\x03")
        assert b"cancelled" in read_until(b">>> ")
        assert manager.gone.wait(60)
        manager.hold = False
        os.write(ours, b"two\n")
        assert b"Hello" in read_until(b">>> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        os.close(ours)
