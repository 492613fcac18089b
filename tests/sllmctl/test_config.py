"""Settings: which layer wins, what is refused and how it is named, and what follows the state directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import parse_config
from schema.errors import InvalidInput
from sllmctl.config import Settings, parse_bytes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment whose default configuration file is ``tmp_path/sllmctl/config.toml``, and a short state directory."""
    monkeypatch.chdir(tmp_path)
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "SLLM_STATE_DIR": "/tmp/s"}


def _write(tmp_path: Path, text: str, name: str = "sllmctl/config.toml") -> Path:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_each_layer_wins_over_the_ones_below_it(tmp_path: Path, home: dict[str, str]) -> None:
    assert Settings.load({}, home).api.port == 8080
    _write(tmp_path, "[api]\nport = 8001\nhost = '0.0.0.0'\n[client]\nwait_s = 5\n")
    assert Settings.load({}, home).api.port == 8001
    home["SLLM_API_PORT"] = "8002"
    assert Settings.load({}, home).api.port == 8002
    settings = Settings.load({"api.port": 8003, "api.host": None}, home)
    assert (settings.api.port, settings.api.host, settings.client.wait_s) == (8003, "0.0.0.0", 5.0)


def test_the_file_is_the_flags_then_the_environments_then_the_default_one(tmp_path: Path, home: dict[str, str]) -> None:
    _write(tmp_path, "log_level = 'error'")
    other, third = _write(tmp_path, "log_level = 'debug'", "a.toml"), _write(tmp_path, "log_level = 'warning'", "b.toml")
    assert Settings.load({}, home).log_level == "error"
    home["SLLM_CONFIG"] = str(other)
    assert Settings.load({}, home).log_level == "debug"
    assert Settings.load({}, home, third).log_level == "warning"


def test_a_file_that_was_asked_for_must_be_there(home: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match=r"no configuration file /nowhere/x\.toml"):
        Settings.load({}, home, Path("/nowhere/x.toml"))
    home["SLLM_CONFIG"] = "/nowhere/y.toml"
    with pytest.raises(InvalidInput, match=r"/nowhere/y\.toml"):
        Settings.load({}, home)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("[api]\nprot = 1", "api.prot", "unknown key api.prot; did you mean api.port?"),
        ("prot = 1", "prot", "unknown key prot"),
        ("[gpu]\nx = 1", "gpu", "unknown key gpu"),
        ("api = 3", "api", "a table of settings"),
        ("[api]\nport = '8080'", "api.port", "Expected `int`, got `str`"),
        ("[api]\nport = 70000", "api.port", "<= 65535"),
        ("[api]\nport = true", "api.port", "Expected `int`"),
        ("[api]\nhosts = ['llm.example:443']", "api.hosts", "matching regex"),
        ("[node]\narena_bytes = '1 gig'", "node.arena_bytes", "no number of bytes"),
        ("[node]\nmanager_grace_s = -1", "node.manager_grace_s", ">= 0"),
        ("[gateway]\nbody_limit_bytes = 0", "gateway.body_limit_bytes", ">= 1"),
        ("log_level = 'loud'", "log_level", "Invalid enum value"),
        ("state_dir = 3", "state_dir", "Expected `str`"),
        ("state_dir = ''", "state_dir", "must not be empty"),
        ('state_dir = "a\\u0000b"', "state_dir", "NUL character"),
        ("[api\n", None, "not valid TOML"),
        ("deep = " + "[" * 20_000, None, "not valid TOML"),
        ("[api]\nport = 1\nport = 2", None, "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_naming_file_and_key(
    tmp_path: Path, home: dict[str, str], text: str, key: str | None, message: str
) -> None:
    file = _write(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        Settings.load({}, home)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.param == key


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, home: dict[str, str]) -> None:
    _write(tmp_path, "").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="not valid TOML"):
        Settings.load({}, home)
    with pytest.raises(InvalidInput, match="cannot read"):
        Settings.load({}, home, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("SLLM_API_PROT", "1", "unknown environment variable SLLM_API_PROT; did you mean SLLM_API_PORT?"),
        ("SLLM_API_PORT", "http", "environment variable SLLM_API_PORT: Expected `int`"),
        ("SLLM_NODE_ARENA_BYTES", "much", "environment variable SLLM_NODE_ARENA_BYTES"),
        ("SLLM_SERVE_STOP_AGENT", "perhaps", "environment variable SLLM_SERVE_STOP_AGENT"),
    ],
)
def test_a_bad_variable_is_refused_by_name(home: dict[str, str], name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Settings.load({}, {**home, name: text})
    assert message in str(caught.value)


def test_variables_are_read_as_their_settings_types(home: dict[str, str]) -> None:
    more = {
        "SLLM_NODE_ARENA_BYTES": "2GiB",
        "SLLM_NODE_ADOPT_S": "1.5",
        "SLLM_SERVE_STOP_AGENT": "false",
        "SLLM_API_HOST": "",
        "SLLM_PYTHON": "x",
        "SLLM_VENV": "/x",
    }
    settings = Settings.load({}, {**home, **more})
    assert settings.node.arena_bytes == 2 << 30
    assert settings.node.adopt_s == 1.5
    assert settings.serve.stop_agent is False
    assert settings.api.host == "127.0.0.1", "an empty variable is one that is not set"


def test_what_lies_in_the_state_directory_follows_it(home: dict[str, str]) -> None:
    settings = Settings.load({"state_dir": "/tmp/other"}, home)
    assert settings.state_dir == Path("/tmp/other")
    assert settings.admin_socket == Path("/tmp/other/admin.sock")
    assert settings.database_url == "sqlite+aiosqlite:////tmp/other/state.db"
    assert settings.node.run_dir.startswith("/tmp/other/")
    own = Settings.load({"state_dir": "/tmp/other", "admin_socket": "/tmp/x.sock"}, home)
    assert own.admin_socket == Path("/tmp/x.sock")


@pytest.mark.parametrize("root", [True, False])
def test_the_state_directorys_default(monkeypatch: pytest.MonkeyPatch, root: bool) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0 if root else 1000)
    expected = "/var/lib/sllmctl" if root else "/h/.local/state/sllmctl"
    assert Settings.load({}, {"HOME": "/h"}).state_dir == Path(expected)
    assert Settings.load({}, {"HOME": "/h", "XDG_STATE_HOME": "/x"}).state_dir == Path("/x/sllmctl")


def test_relative_paths_are_the_files_or_the_working_directorys(tmp_path: Path, home: dict[str, str]) -> None:
    del home["SLLM_STATE_DIR"]
    short = {"admin_socket": "/tmp/a.sock", "node.run_dir": "/tmp/n"}
    file = _write(tmp_path, "state_dir = 'here'", "etc/c.toml")
    assert Settings.load(short, home, file).state_dir == tmp_path / "etc" / "here"
    assert Settings.load({**short, "state_dir": "there"}, home).state_dir == tmp_path / "there"


def test_a_user_without_a_home_names_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(InvalidInput, match="--state-dir"):
        Settings.load({}, {})
    assert Settings.load({"state_dir": "/tmp/s"}, {}).state_dir == Path("/tmp/s")


def test_a_path_that_starts_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="SLLM_CONFIG: ~nobody-of-that-name/x names no home"):
        Settings.load({}, {"HOME": "/h", "SLLM_CONFIG": "~nobody-of-that-name/x"})
    with pytest.raises(InvalidInput, match="flag for state_dir: ~nobody-of-that-name/x names no home"):
        Settings.load({"state_dir": "~nobody-of-that-name/x"}, {"HOME": "/h"})
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Settings.load({"state_dir": "/tmp/s"}, {"HOME": "/h"}).state_dir == Path("/tmp/s")
    with pytest.raises(InvalidInput, match="flag for state_dir: the working directory is gone"):
        Settings.load({"state_dir": "s"}, {"HOME": "/h"})


@pytest.mark.parametrize("key", ["state_dir", "admin_socket", "node.run_dir"])
def test_a_path_too_long_for_a_socket_is_refused(home: dict[str, str], key: str) -> None:
    with pytest.raises(InvalidInput, match="100 is the limit"):
        Settings.load({key: f"/tmp/{'x' * 96}"}, home)


def test_the_nodes_settings_are_its_agents_own(home: dict[str, str]) -> None:
    settings = Settings.load({"node.threads": 3}, home)
    config = parse_config(msgspec.json.encode(settings.node))
    assert msgspec.structs.asdict(config) == msgspec.structs.asdict(settings.node)


def test_no_two_settings_share_a_variable() -> None:
    names: list[str] = []

    def collect(kind: Any, above: str) -> None:
        for field in msgspec.structs.fields(kind):
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                collect(field.type, f"{above}{field.name}_")
            else:
                names.append(f"{above}{field.name}")

    collect(Settings, "")
    assert len(names) == len(set(names)) > 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("4096", 4096), ("17B", 17), ("1GiB", 1 << 30), ("1.5 MiB", 3 << 19), ("500MB", 500_000_000), ("2TiB", 2 << 40)],
)
def test_numbers_of_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1G", "1 gib", "GiB", "1e9", "1,5GiB", "0x10"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(text)
