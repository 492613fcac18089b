"""What the commands ask of the manager, how they end, and what they refuse to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from schema.errors import (
    Cancelled,
    Conflict,
    ContextOverflow,
    InvalidCheckpoint,
    InvalidInput,
    LinkError,
    NotFound,
    OutOfSpace,
    Overloaded,
    SllmError,
    TimedOut,
    Unauthorised,
    Unreachable,
    Unschedulable,
)
from schema.version import VERSION
from sllmctl import serve
from sllmctl.cli import diagnostics
from sllmctl.cli.main import root, run
from sllmctl.config import Settings
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import MODELS, FakeManager

_CODES: dict[type[SllmError], int] = {
    SllmError: 1,
    InvalidInput: 2,
    InvalidCheckpoint: 1,
    ContextOverflow: 2,
    Unauthorised: 4,
    NotFound: 5,
    Conflict: 6,
    Overloaded: 1,
    Unschedulable: 1,
    Unreachable: 3,
    TimedOut: 7,
    Cancelled: 1,
    OutOfSpace: 1,
    LinkError: 1,
}


def _raiser(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


@pytest.mark.parametrize("kind", _CODES)
def test_every_class_of_error_has_its_exit_code(kind: type[SllmError], capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnostics.guard(_raiser(kind("what happened"))) == _CODES[kind]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: what happened\n")


def test_no_class_of_error_is_forgotten() -> None:
    ours = {kind for code, kind in SllmError.by_code.items() if kind.__module__ == "schema.errors"}
    assert ours | {SllmError} == set(_CODES)


def test_a_class_made_elsewhere_ends_as_the_one_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(SllmError.by_code)
    try:

        class Elsewhere(NotFound):
            code = "elsewhere"

        assert diagnostics.guard(_raiser(Elsewhere("x"))) == 5
    finally:
        SllmError.by_code.clear()
        SllmError.by_code.update(before)


def test_interrupts_defects_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnostics.guard(_raiser(KeyboardInterrupt())) == 130
    assert diagnostics.guard(_raiser(ZeroDivisionError("x"))) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "defect" in err
    assert diagnostics.guard(lambda: 8) == 8
    assert diagnostics.guard(lambda: None) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("model", "bogus"),
        ("model", "ls", "-o", "xml"),
        ("model", "ls", "extra"),
        ("model", "show"),
        ("model", "scale", "qwen"),
        ("model", "add", "x", "./nowhere"),
        ("model", "add", "x", "/nowhere/at/all"),
        ("model", "add", "x", ""),
        ("model", "add", "x", "~nobody-of-this-name/model"),
        ("model", "add", "x", "/" + "a" * 5000),
        ("model", "add", "x", "\udcff"),
        ("model", "add", "bad name", "org/name"),
        ("model", "add", "x", "org/name", "--min", "3", "--max", "2"),
        ("model", "add", "x", "org/name", "--kv-size", "lots"),
        ("model", "deploy", "qwen", "--min", "5"),
        ("event", "ls", "--limit", "0"),
        ("event", "ls", "--kind", "bogus"),
        ("explain",),
        ("explain", "qwen", "--request", "req_1"),
        ("explain", "qwen", "-o", "name"),
        ("explain", ""),
        ("bench",),
        ("bench", "estimates", "all"),
        ("model", "scale", "qwen", "--keep-alive", "soon"),
        ("model", "scale", "qwen", "--keep-alive", "-1"),
        ("model", "scale", "qwen", "--keep-alive", "nan"),
        ("model", "deploy", "qwen", "--wait", "--timeout", "nan"),
        ("--config", "/nowhere.toml", "model", "ls"),
    ],
)
def test_what_is_wrong_ends_with_2_and_changes_nothing(
    sllmctl: Sllmctl, manager: FakeManager, arguments: tuple[str, ...]
) -> None:
    said = sllmctl(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert "error: " in said.err
    assert all(method == "GET" for method, _, _ in manager.asked)


@pytest.mark.parametrize(
    "arguments", [("model", "rm", "qwen"), ("model", "stop", "qwen"), ("instance", "stop", "inst_1", "inst_2")]
)
def test_what_destroys_asks_and_without_a_terminal_refuses(
    sllmctl: Sllmctl, manager: FakeManager, arguments: tuple[str, ...]
) -> None:
    refused = sllmctl(*arguments)
    assert (refused.code, manager.asked) == (2, [])
    assert "-y" in refused.err
    manager.answer("DELETE models/qwen", 204, None)
    manager.answer("POST models/qwen/stop", 200, MODELS[0])
    for name in ("inst_1", "inst_2"):
        manager.answer(f"POST instances/{name}/stop", 204, None)
    assert sllmctl(*arguments, "-y").code == 0
    assert len(manager.asked) == len(arguments) - 2


@pytest.mark.parametrize(("answer", "code", "asked"), [("y\n", 0, 1), ("n\n", 1, 0)])
def test_on_a_terminal_it_asks(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, asked: int
) -> None:
    manager.answer("DELETE models/qwen", 204, None)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: "qwen" in question and err and answer == "y\n")
    assert sllmctl("model", "rm", "qwen").code == code
    assert len(manager.asked) == asked


def test_adding_asks_for_the_deployment_at_once_and_waits(sllmctl: Sllmctl, manager: FakeManager, tmp_path: Path) -> None:
    manager.answer("POST models", 201, MODELS[2])
    manager.answer("GET models/new", 202, MODELS[2])
    manager.answer("GET models/new", 200, MODELS[0])
    said = sllmctl(
        "model",
        "add",
        "new",
        str(tmp_path),
        "--deploy",
        "--wait",
        "--min",
        "1",
        "--kv-size",
        "64MiB",
        "--threads",
        "2",
        "--deterministic",
    )
    assert (said.code, said.out, said.err) == (0, "", "model new is deployed\n")
    assert [(method, path.split("&")[0]) for method, path, _ in manager.asked] == [
        ("POST", "models?deploy=1"),
        ("GET", "models/new?wait=ready"),
        ("GET", "models/new?wait=ready"),
    ]
    spec: dict[str, Any] = manager.asked[0][2]
    assert spec["source"] == {"kind": "path", "path": str(tmp_path.resolve()), "node": "", "in_place": False}
    engine = {"kv_bytes": 64 << 20, "max_context_tokens": None, "threads": 2, "deterministic": True}
    assert (spec["scale"]["min"], spec["engine"]) == (1, engine)


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("org/name", {"kind": "hub", "repo": "org/name", "revision": "main"}),
        ("org/name@v1", {"kind": "hub", "repo": "org/name", "revision": "v1"}),
        ("gpu1:/models/m", {"kind": "path", "path": "/models/m", "node": "gpu1", "in_place": False}),
        ("here/model", {"kind": "path", "path": "{cwd}/here/model", "node": "", "in_place": False}),
        ("./here/model", {"kind": "path", "path": "{cwd}/here/model", "node": "", "in_place": False}),
    ],
)
def test_what_a_source_means(
    sllmctl: Sllmctl,
    manager: FakeManager,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    word: str,
    source: dict[str, Any],
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    manager.answer("POST models", 201, MODELS[2])
    assert sllmctl("model", "add", "new", word).code == 0
    expected = {key: value.format(cwd=tmp_path.resolve()) if isinstance(value, str) else value for key, value in source.items()}
    assert manager.asked[0][2]["source"] == expected


def test_a_file_is_no_source_and_is_not_said_to_be_missing(sllmctl: Sllmctl, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    said = sllmctl("model", "add", "new", str(tmp_path / "model.safetensors"))
    assert (said.code, "is a file; give the model's directory" in said.err) == (2, True)


def test_a_model_that_is_added_is_named_with_where_to_look(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST models", 201, MODELS[2])
    said = sllmctl("model", "add", "new", "org/name")
    assert said.err == "model new is being ingested; see `sllmctl model show new`\n"


def test_scaling_keeps_what_is_not_given(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST models/qwen/deploy", 200, MODELS[0])
    assert sllmctl("model", "scale", "qwen", "--min", "1", "--keep-alive", "9").code == 0
    scale = manager.asked[1][2]["scale"]
    assert scale == {"min": 1, "max": 2, "keep_alive_s": 9.0, "max_concurrency": 64, "queue_limit": 256}
    assert sllmctl("model", "scale", "qwen", "--keep-alive", "auto").code == 0
    assert manager.asked[-1][2]["scale"] == {
        "min": 0,
        "max": 2,
        "keep_alive_s": None,
        "max_concurrency": 64,
        "queue_limit": 256,
    }
    assert sllmctl("model", "scale", "broken", "--min", "1").code == 6, "only what is deployed is scaled"
    assert sllmctl("model", "deploy", "qwen").code == 0
    assert manager.asked[-1] == ("POST", "models/qwen/deploy", {"scale": None})


def test_removing_waits_until_it_is_gone(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("DELETE models/old", 204, None)
    manager.answer("GET models/old", 202, MODELS[0])
    manager.refuse("GET models/old", 404, "not_found", "there is no model 'old'")
    said = sllmctl("model", "rm", "old", "-y", "--wait")
    assert (said.code, said.err) == (0, "model old is removed\n")


def test_a_wait_ends_with_its_time_or_with_the_models_fault(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST models/qwen/deploy", 200, MODELS[0])
    manager.answer("GET models/qwen", 202, MODELS[0])
    late = sllmctl("model", "deploy", "qwen", "--wait", "--timeout", "0.01")
    assert (late.code, "sllmctl model show qwen" in late.err) == (7, True)
    manager.forget()
    manager.answer("POST models/qwen/deploy", 200, MODELS[0])
    manager.refuse("GET models/qwen", 422, "invalid_checkpoint", "model.safetensors is cut short")
    failed = sllmctl("model", "deploy", "qwen", "--wait")
    assert (failed.code, failed.err) == (1, "error: model qwen: model.safetensors is cut short\n")


def test_what_is_refused_of_one_keeps_no_other_from_its_turn(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.refuse("DELETE models/old", 404, "not_found", "there is no model 'old'")
    manager.refuse("DELETE models/busy", 409, "conflict", "model busy is in use")
    manager.answer("DELETE models/qwen", 204, None)
    said = sllmctl("model", "rm", "old", "busy", "qwen", "qwen", "-y")
    assert (said.code, said.out) == (5, "")
    assert said.err.splitlines() == [
        "error: there is no model 'old'",
        "error: model busy is in use",
        "model qwen is being removed",
    ]
    manager.refuse("POST instances/inst_1/stop", 404, "not_found", "gone")
    manager.answer("POST instances/inst_2/stop", 204, None)
    said = sllmctl("instance", "stop", "inst_1", "inst_2", "-y")
    assert (said.code, said.err) == (5, "error: gone\ninstance inst_2 is stopping\n")


def test_more_at_least_than_at_most_is_told_by_the_options(sllmctl: Sllmctl, manager: FakeManager, tmp_path: Path) -> None:
    for words, most in ((("add", "new", str(tmp_path)), 1), (("scale", "qwen"), MODELS[0].spec.scale.max)):
        said = sllmctl("model", *words, "--min", "7")
        assert (said.code, f"--min 7 is above --max {most}" in said.err) == (2, True), said.err
    assert not [method for method, _, _ in manager.asked if method == "POST"]


def test_all_are_stopped_before_any_is_waited_for(sllmctl: Sllmctl, manager: FakeManager) -> None:
    for name in ("qwen", "coming"):
        manager.answer(f"POST models/{name}/stop", 200, MODELS[0])
    manager.answer("GET models/qwen", 202, MODELS[0])
    manager.answer("GET models/coming", 200, MODELS[2])
    said = sllmctl("model", "stop", "qwen", "coming", "-y", "--wait", "--timeout", "0.01")
    assert said.code == 7
    assert said.err.splitlines() == [
        "model qwen is stopping",
        "model coming is stopping",
        "error: model qwen is not stopped after 0.01 s; it goes on, `sllmctl model show qwen` says how far it is",
        "model coming is stopped",
    ]


def test_requests_are_cancelled(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("POST requests/req_2/cancel", 204, None)
    asked = sllmctl("request", "cancel", "req_2")
    assert (asked.code, "say so with -y" in asked.err, manager.asked) == (2, True, [])
    assert sllmctl("request", "cancel", "req_2", "-y").code == 0
    assert sllmctl("request", "show", "req_9").code == 5


def test_what_is_not_there_cannot_be_explained(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.refuse("GET models/x/explain", 404, "not_found", "there is no model 'x'")
    manager.refuse("GET requests/y/explain", 404, "not_found", "there is no request 'y'")
    for words in (("x",), ("--request", "y")):
        said = sllmctl("explain", *words)
        assert (said.code, said.out) == (5, "")
        assert said.err == f"error: there is no {'model' if words == ('x',) else 'request'} {words[-1]!r}\n"


def test_without_a_manager(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--socket", "/tmp/nowhere/admin.sock", "model", "ls"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "sllmctl serve" in err


def test_what_the_manager_says_cannot_steer_the_terminal(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.refuse("GET models/x", 404, "not_found", "no \x1b[2Jmodel")
    said = sllmctl("model", "show", "x")
    assert (said.code, "\x1b" in said.err) == (5, False)


def _python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLLM_")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environ, capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["version"],
        ["model", "--help"],
        ["chat", "--help"],
        ["serve", "--help"],
        ["explain", "--help"],
        ["bench", "--help"],
    ],
)
def test_help_imports_only_what_it_needs(arguments: list[str]) -> None:
    program = (
        "import sys; from sllmctl.cli.main import run\n"
        "code = run(sys.argv[1:])\n"
        "heavy = {'httpx', 'msgspec', 'sqlalchemy', 'starlette', 'uvicorn', 'yaml', 'asyncio', 'torch', 'agent'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = _python(program, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_imports_neither_the_manager_nor_the_node() -> None:
    program = (
        "import sys; from sllmctl.cli.main import run\n"
        "assert run(['--socket', '/tmp/nowhere.sock', 'model', 'ls']) == 3\n"
        "heavy = {'sqlalchemy', 'starlette', 'uvicorn', 'torch', 'transformers', 'agent', 'sllmctl.serve'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = _python(program)
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_help_is_there(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    alone_says = capsys.readouterr().out
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert alone_says == said
    for line in said.partition("Running:")[2].partition("Examples:")[0].splitlines():
        if line.startswith("  ") and line.strip():
            assert run([line.split()[0], "--help"]) == 0, line
    assert " zygote " not in said


def test_the_version_is_an_option_and_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"sllmctl {VERSION}\n"
    assert run(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"sllmctl {VERSION} (Python ")


def test_the_nodes_verbs_replace_the_process(tmp_path: Path) -> None:
    package = tmp_path / "agent"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import os, sys; print(os.getpid(), *sys.argv[1:]); sys.exit(7)")
    program = "import os, sys; print(os.getpid(), flush=True); from sllmctl.cli.main import main; main()"
    environ = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", program, "agent", "--config-json", "{}", "--", "-x"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    before, after = done.stdout.splitlines()
    assert done.returncode == 7
    assert after == f"{before} agent --config-json {{}} -- -x"


def test_a_reader_that_goes_away_is_no_traceback(manager: FakeManager) -> None:
    command = f"{sys.executable} -m sllmctl --socket {manager.socket} model show qwen -o json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("words", "redirect", "code", "said"),
    [
        ("model show qwen", ">/dev/full", 1, "error: cannot write to standard output: No space left on device\n"),
        ("model show qwen", ">&-", 1, "error: cannot write to standard output: Bad file descriptor\n"),
        ("chat -m qwen", "<&-", 2, "error: the prompt is empty\n"),
        ("chat -m qwen", r"< <(printf '\xff\xfe')", 2, "error: the prompt on stdin is not UTF-8 text"),
        (r"chat -m qwen $'\xff'", "", 2, "is not UTF-8 text\n"),
        ("model foo", "2>&-", 2, ""),
        ("model foo", "2>/dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_full_or_no_text(manager: FakeManager, words: str, redirect: str, code: int, said: str) -> None:
    command = f"{sys.executable} -m sllmctl --socket {manager.socket} {words} {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="cannot make the state directory"):
        serve.run(Settings.load({"state_dir": str(tmp_path / place)}, {"HOME": str(tmp_path)}))


@pytest.mark.slow
def test_a_manager_that_cannot_begin_says_why(alone: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "sllmctl", "--state-dir", str(tmp_path / "file"), "serve"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot make the state directory ")


def _leaves(group: click.Group) -> Iterator[click.Command]:
    for name in group.list_commands(click.Context(group)):
        found = group.get_command(click.Context(group), name)
        assert found is not None
        if isinstance(found, click.Group):
            yield from _leaves(found)
        elif not found.hidden:
            yield found


def test_every_command_has_examples_that_its_options_bear_out() -> None:
    for command in _leaves(root):
        _, _, examples = (command.help or "").partition("Examples:")
        assert examples.strip(), command.name
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        lines = [line for line in examples.splitlines() if f"sllmctl {command.name}" in line]
        used = {word for line in lines for word in line.split(" | ")[0].split() if word.startswith("--")}
        assert used <= known | {"--config"}, command.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("modle", "ls"), "did you mean 'model'?"), (("xyzzy",), "`sllmctl -h` shows what there is"), (("stroe",), "shows what")],
)
def test_a_mistyped_command_is_answered_by_the_nearest(sllmctl: Sllmctl, arguments: tuple[str, ...], said: str) -> None:
    refused = sllmctl(*arguments)
    assert (refused.code, said in refused.err) == (2, True), refused.err
