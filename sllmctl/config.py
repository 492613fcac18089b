"""The manager's settings: flag > SLLM_* environment > TOML file > default, in one typed tree.

A setting's place in the tree is its key everywhere: ``node.arena_bytes`` is the key ``arena_bytes`` of the table ``[node]`` in
the file and ``SLLM_NODE_ARENA_BYTES`` in the environment. Whatever is unknown or of a wrong type is refused, naming the file
(or variable) and the key. Numbers of bytes may be written as ``"1GiB"`` or ``"500MB"``.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput
from schema.logs import LogFormat, LogLevel
from schema.nodesettings import NodeSettings
from sllmctl.cluster.settings import ControlSettings
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.nodes.settings import AssetSettings, LinkSettings, LocalSettings

__all__ = [
    "SOCKET_PATH_BYTES",
    "AdminSettings",
    "ApiSettings",
    "ClientSettings",
    "LogSettings",
    "ServeSettings",
    "Settings",
    "StreamSettings",
    "parse_bytes",
]

SOCKET_PATH_BYTES = 100
"""The longest path of a unix socket that is accepted; the kernel's own limit is 107 bytes."""

_OTHER_VARIABLES = frozenset({"SLLM_CONFIG", "SLLM_PYTHON", "SLLM_VENV"})
"""What is no setting: where the settings' file is, and the interpreter and the environment that install.sh is to use."""

_Seconds = Annotated[float, Meta(ge=0, le=86400 * 365)]
_Bytes = Annotated[int, Meta(ge=0)]


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the inference API listens; port 0 takes a free one.

    It asks for no key, so it listens on loopback alone, unless ``without_keys`` says that whoever reaches it may use it. Until
    then a request is also refused when it is for another name than localhost, ``host`` or one of ``hosts``: a proxy that passes
    on the name it was called by needs that name there, without a port.
    """

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    without_keys: bool = False
    hosts: tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]+$", max_length=253)], ...] = ()


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The admin API's event stream. ``every_s``: how often it looks for changes, while somebody reads.

    ``readers`` at once; ``part`` things go into one frame. ``keep``: so many events, and so many log lines, are told of.
    ``gone``: so many removed things are remembered for those that resume. ``idle_s``: a sign of life when nothing changes.
    ``linger_s``: a picture that nobody reads is kept for so long, to be resumed.
    """

    every_s: Annotated[float, Meta(gt=0, le=60)] = 0.25
    readers: Annotated[int, Meta(ge=1, le=1000)] = 32
    part: Annotated[int, Meta(ge=1, le=100_000)] = 500
    keep: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    gone: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    idle_s: Annotated[float, Meta(gt=0, le=60)] = 3.0
    linger_s: _Seconds = 30.0


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Logs of nodes, followed over the admin API: by so many ``followers`` at once, looked at every ``every_s``; ``idle_s``: a
    sign of life when nothing is written."""

    followers: Annotated[int, Meta(ge=1, le=1000)] = 32
    every_s: Annotated[float, Meta(gt=0, le=60)] = 0.4
    idle_s: Annotated[float, Meta(gt=0, le=60)] = 3.0


class AdminSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The admin API: how long a GET that waits is held at most, how often it looks, and the largest body."""

    wait_limit_s: _Seconds = 60.0
    wait_look_s: Annotated[float, Meta(gt=0, le=10)] = 0.05
    body_bytes: _Bytes = 1 << 20
    stream: StreamSettings = StreamSettings()
    logs: LogSettings = LogSettings()


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How ``sllmctl serve`` begins and ends.

    ``meet_agent_s``: after so long without its local agent it says so, and goes on waiting. ``stop_agent_s``: what that agent
    gets to end, once running responses are done. With ``stop_agent`` false the agent and its instances are left
    running, for the next manager to adopt.
    """

    meet_agent_s: _Seconds = 30.0
    stop_agent_s: _Seconds = 20.0
    stop_agent: bool = True


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The commands' own patience: to connect, for an answer, for the next event of a streamed reply, under ``--wait``, and for
    the next sign of life of the admin API's event stream. ``theme``: the dashboard's colours; auto are those for the background
    that the terminal says it has."""

    connect_s: _Seconds = 2.0
    answer_s: _Seconds = 60.0
    stream_s: _Seconds = 300.0
    wait_s: _Seconds = 900.0
    silence_s: _Seconds = 15.0
    theme: Literal["auto", "dark", "light"] = "auto"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole tree. What depends on ``state_dir`` (database, sockets, the node's directories) follows it unless set, and the
    node's ``log_format`` follows the manager's."""

    state_dir: Path
    database_url: str
    admin_socket: Path
    node: NodeSettings
    api: ApiSettings = ApiSettings()
    admin: AdminSettings = AdminSettings()
    serve: ServeSettings = ServeSettings()
    client: ClientSettings = ClientSettings()
    gateway: GatewaySettings = GatewaySettings()
    router: RouterSettings = RouterSettings()
    control: ControlSettings = ControlSettings()
    links: LinkSettings = LinkSettings()
    local: LocalSettings = LocalSettings()
    assets: AssetSettings = AssetSettings()
    log_level: LogLevel = "info"
    log_format: LogFormat = "console"

    @classmethod
    def load(cls, flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Settings:
        """The settings of this invocation.

        ``flags`` are by dotted key, None where not given. ``file`` must exist; without it the one that SLLM_CONFIG names, else
        the default one if it is there. Raises InvalidInput naming the origin and the key at fault.
        """
        leaves = {leaf.key: leaf for leaf in _leaves(cls, ())}
        found: dict[str, Any] = {}
        for layer in (_from_file(leaves, environ, file), _from_environ(leaves, environ), _from_flags(leaves, flags)):
            found.update(layer)
        if "state_dir" not in found:
            found["state_dir"] = _default_state_dir(environ)
        state = found["state_dir"]
        found.setdefault("database_url", f"sqlite+aiosqlite:///{state}/state.db")
        found.setdefault("admin_socket", state / "admin.sock")
        if "log_format" in found:
            found.setdefault("node.log_format", found["log_format"])
        found.setdefault("node.run_dir", str(state / "node"))
        found.setdefault("node.data_dir", str(state / "node"))
        settings = msgspec.convert(_nest(found), cls, dec_hook=_as_path)
        _check_socket("admin_socket", settings.admin_socket)
        _check_socket("node.run_dir", Path(settings.node.run_dir) / "agent.sock")
        return settings


@dataclass(frozen=True, slots=True)
class _Leaf:
    key: str
    kind: Any

    @property
    def variable(self) -> str:
        return "SLLM_" + self.key.replace(".", "_").upper()

    @property
    def is_path(self) -> bool:
        return self.kind is Path or self.key in ("node.run_dir", "node.data_dir")


def config_file(environ: Mapping[str, str], file: Path | None = None) -> tuple[Path | None, bool]:
    """Where the settings' file is looked for, None for a user without a home, and whether somebody named it."""
    asked = file or (_expanded(environ["SLLM_CONFIG"], "SLLM_CONFIG") if environ.get("SLLM_CONFIG") else None)
    if asked is not None:
        return asked, True
    directory = _config_dir(environ)
    return None if directory is None else directory / "sllmctl" / "config.toml", False


def parse_bytes(text: str) -> int:
    """The bytes that ``4096``, ``1GiB`` (1024s) or ``500MB`` (1000s) mean. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes; write it as 4096, 500MB or 1GiB")
    number, unit = float(match.group(1)), match.group(2) or "B"
    power = 0 if unit == "B" else "KMGT".index(unit[0]) + 1
    return int(number * (1024 if "i" in unit else 1000) ** power)


def _leaves(kind: type[msgspec.Struct], above: tuple[str, ...]) -> Iterator[_Leaf]:
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _leaves(field.type, (*above, field.name))
        else:
            yield _Leaf(".".join((*above, field.name)), field.type)


def _from_file(leaves: Mapping[str, _Leaf], environ: Mapping[str, str], file: Path | None) -> Iterator[tuple[str, Any]]:
    path, asked = config_file(environ, file)
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if asked:
            raise InvalidInput(f"there is no configuration file {path}") from None
        return
    except OSError as error:
        raise InvalidInput(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not valid TOML: {error}") from error
    for key, value in _flatten(leaves, table, "", path):
        yield key, _checked(leaves[key], value, f"{path}: {key}", strict=True, base=path.absolute().parent)


def _flatten(leaves: Mapping[str, _Leaf], table: Mapping[str, Any], above: str, path: Path) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = above + name
        if key in leaves:
            yield key, value
        elif not any(leaf.startswith(f"{key}.") for leaf in leaves):
            raise InvalidInput(f"{path}: unknown key {key}{_meant(key, leaves)}", key)
        elif not isinstance(value, dict):
            raise InvalidInput(f"{path}: {key} is a table of settings, not a value; write [{key}]", key)
        else:
            yield from _flatten(leaves, value, f"{key}.", path)


def _from_environ(leaves: Mapping[str, _Leaf], environ: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    by_variable = {leaf.variable: leaf for leaf in leaves.values()}
    for name, text in environ.items():
        if not name.startswith("SLLM_") or name in _OTHER_VARIABLES or text == "":
            continue
        leaf = by_variable.get(name)
        if leaf is None:
            raise InvalidInput(f"unknown environment variable {name}{_meant(name, by_variable)}", name)
        yield leaf.key, _checked(leaf, text, f"environment variable {name}", strict=False)


def _from_flags(leaves: Mapping[str, _Leaf], flags: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in flags.items():
        if value is not None:
            yield key, _checked(leaves[key], value, f"flag for {key}", strict=False)


def _checked(leaf: _Leaf, value: Any, origin: str, *, strict: bool, base: Path | None = None) -> Any:
    """One value, of its setting's type; ``base`` is what a relative path is relative to, else the working directory."""
    try:
        if leaf.is_path:
            text = msgspec.convert(str(value) if isinstance(value, Path) else value, str)
            if not text:
                raise ValueError("a path must not be empty")
            if "\0" in text:
                raise ValueError("a path must not contain a NUL character")
            path = _expanded(text, origin)
            path = path if path.is_absolute() else (base or _working_directory()) / path
            return path if leaf.kind is Path else str(path)
        if leaf.key.endswith("_bytes") and isinstance(value, str):
            value = parse_bytes(value)
        elif not strict and isinstance(value, str) and get_origin(leaf.kind) in (tuple, list):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return msgspec.convert(value, leaf.kind, strict=strict)
    except ValueError as error:
        raise InvalidInput(f"{origin}: {error}", leaf.key) from error


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, name = key.split(".")
        table = tree
        for part in above:
            table = table.setdefault(part, {})
        table[name] = value
    return tree


def _as_path(kind: type, value: object) -> Any:
    if kind is Path:
        return Path(str(value))
    raise TypeError(f"no setting is a {kind.__name__}")


def _meant(wrong: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _check_socket(key: str, path: Path) -> None:
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise InvalidInput(
            f"{key}: the socket {path} has a path of {length} bytes, and {SOCKET_PATH_BYTES} is the limit; "
            "choose a shorter state_dir, or set it by itself",
            key,
        )


def _config_dir(environ: Mapping[str, str]) -> Path | None:
    if environ.get("XDG_CONFIG_HOME"):
        return Path(environ["XDG_CONFIG_HOME"])
    home = _home(environ)
    return None if home is None else home / ".config"


def _default_state_dir(environ: Mapping[str, str]) -> Path:
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]) / "sllmctl"
    if os.geteuid() == 0:
        return Path("/var/lib/sllmctl")
    home = _home(environ)
    if home is None:
        raise InvalidInput("this user has no home directory to keep the state in; set state_dir (--state-dir, SLLM_STATE_DIR)")
    return home / ".local" / "state" / "sllmctl"


def _home(environ: Mapping[str, str]) -> Path | None:
    """None for a user of whom neither HOME nor the system's list of users says where that is."""
    try:
        return Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError:
        return None


def _expanded(text: str, origin: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidInput(f"{origin}: {text} names no home directory that is known here; name the path in full") from error


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise ValueError("the working directory is gone; name the path in full") from error
