"""The README's examples, taken by those that they are written for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from sllmctl.cli.main import root
from sllmctl.config import Settings
from tests.cluster import ROOT

_README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", _README, re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("text", _blocks("toml"))
def test_settings_are_taken_as_they_stand(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    assert Settings.load({"state_dir": "/tmp/s"}, {"HOME": "/h"}, file).node.arena_bytes == 64 << 30


@pytest.mark.parametrize("text", _blocks("ini"))
def test_a_unit_of_systemd_has_its_comments_on_lines_of_their_own(text: str) -> None:
    """Behind a value they would be part of it, and the value be ignored."""
    lines = [line for line in text.splitlines() if not line.startswith(("#", "["))]
    assert "KillMode=process" in lines
    assert all(re.fullmatch(r"\w+=[^#]+", line) for line in lines)


def test_every_command_that_is_named_exists() -> None:
    named = re.findall(r"`(sllmctl [^`]+)`", _README) + re.findall(r"^(sllmctl .*)$", _README, re.MULTILINE)
    assert len(named) > 20
    for line in named:
        command: click.Command = root
        context = root.make_context("sllmctl", [], resilient_parsing=True)
        for word in shlex.split(line, comments=True)[1:]:
            if word.startswith("-") or not isinstance(command, click.Group):
                break
            found = command.get_command(context, word)
            assert found is not None, f"{line}: there is no {word}"
            command = found
