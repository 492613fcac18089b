"""What a shell completes: commands, and the names of what lives; and that a manager that is away is no error."""

from __future__ import annotations

from typing import get_args

import pytest
from click.shell_completion import ShellComplete

from schema.admin import EventKind
from sllmctl.cli.main import root
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import CHECKPOINTS


def _completed(words: str, begin: str = "") -> list[str]:
    shell = ShellComplete(root, {}, "sllmctl", "_SLLMCTL_COMPLETE")
    return [item.value for item in shell.get_completions(words.split(), begin)]


@pytest.mark.parametrize(
    ("words", "begin", "completed"),
    [
        ("", "ver", ["version"]),
        ("model", "st", ["stop"]),
        ("model show", "", ["qwen", "broken", "coming"]),
        ("model stop qwen", "", ["broken", "coming"]),
        ("model add", "", []),
        ("node show", "g", ["gpu1"]),
        ("instance stop", "inst_", ["inst_1", "inst_2"]),
        ("request cancel", "req_2", ["req_2"]),
        ("checkpoint verify", "", ["qwen", CHECKPOINTS[0].digest[:12]]),
        ("explain", "q", ["qwen"]),
        ("operation show", "op_2", ["op_2"]),
        ("wait", "node/", ["node/local", "node/gpu1"]),
        ("wait node/local", "nod", ["node/gpu1"]),
        ("wait", "nothing/", []),
        ("wait node/local --for", "re", ["ready", "removed"]),
        ("wait instance/inst_1 --for", "", ["ready", "stopped"]),
        ("wait model/qwen node/local --for", "", ["ready", "removed"]),
        ("wait operation/op_1 request/req_1 --timeout 5 --for", "", ["ended"]),
        ("wait --for", "re", ["ready", "removed"]),
        ("wait checkpoint/qwen --for", "on=g", ["on=gpu1:disk", "on=gpu1:dram", "on=gpu1:device"]),
        ("chat -m", "b", ["broken"]),
        ("checkpoint prefetch qwen --node", "", ["local", "gpu1"]),
        ("checkpoint rm qwen --node", "g", ["gpu1"]),
        ("event ls --kind", "", list(get_args(EventKind))),
        ("explain --request", "", ["req_1", "req_2", "req_3"]),
    ],
)
def test_names_are_those_that_live(sllmctl: Sllmctl, words: str, begin: str, completed: list[str]) -> None:
    assert _completed(words, begin) == completed


def test_without_a_manager_nothing_is_completed(sllmctl: Sllmctl, tmp_path: object) -> None:
    assert _completed(f"--socket {tmp_path}/none.sock model show") == []


def test_each_shell_has_its_script(sllmctl: Sllmctl) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_SLLMCTL_COMPLETE" in sllmctl("completion", shell).out
