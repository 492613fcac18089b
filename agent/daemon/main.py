"""The agent's entry: its directories, lock, settings and token on disk, its log, its signals, its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import stat
from pathlib import Path
from typing import Final

import msgspec

from agent.config import NodeConfig
from agent.daemon.agent import Agent
from agent.daemon.files import FileLock, private_directory, write_atomic
from agent.daemon.process import become_subreaper, reap_orphans
from agent.logs import begin_log
from schema.errors import Conflict, InvalidInput, SllmError

__all__ = ["main", "read_or_make_token"]

_EXIT: Final[dict[type[SllmError], int]] = {InvalidInput: 2, Conflict: 6}
_log = logging.getLogger(__name__)


def main(config: NodeConfig) -> int:
    """Run the agent of a node until it is told to end. Returns an exit code: 0, 1 failed, 2 settings, 6 another one runs."""
    begin_log("agent", config.log_path / "agent.log", config)
    try:
        _make_directories(config)
        lock = FileLock.take(config.lock_path("agent"), "agent")
        try:
            token = read_or_make_token(config.token_path)
            write_atomic(Path(config.run_dir) / "node.json", msgspec.json.encode(config), durable=False)
            asyncio.run(_serve(config, token))
            config.token_path.unlink(missing_ok=True)
        finally:
            lock.release()
    except SllmError as error:
        _log.error("%s", error)
        return next((code for kind, code in _EXIT.items() if isinstance(error, kind)), 1)
    except OSError as error:
        _log.error("the agent ends: %s", error)
        return 1
    _log.info("the agent has ended")
    return 0


def read_or_make_token(path: Path) -> str:
    """The token of an earlier life, so that its kin is known again, or a new one, in a file of mode 0600. Raises OSError."""
    try:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600:
            token = path.read_text().strip()
            if token:
                return token
    except FileNotFoundError:
        pass
    token = secrets.token_hex(32)
    write_atomic(path, token.encode(), durable=False)
    return token


def _make_directories(config: NodeConfig) -> None:
    private_directory(Path(config.run_dir))
    private_directory(Path(config.data_dir))
    for path in (config.checkpoints_path, Path(config.data_dir) / "tmp", config.log_path, config.log_path / "instances"):
        private_directory(path)


async def _serve(config: NodeConfig, token: str) -> None:
    become_subreaper()
    agent = Agent(config, token)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.shut_down)
    _log.info("the agent serves %s as pid %d", config.socket_path, os.getpid())
    try:
        await agent.run()
    finally:
        reap_orphans()
