"""A node's processes with a fake driver instead of CUDA's: ``python -m tests.agent.fake_cuda``, else as ``python -m agent``."""

from __future__ import annotations

import os
import sys
from typing import Any

from agent.__main__ import main
from agent.config import NodeConfig
from agent.daemon.agent import Agent
from agent.daemon.supervisor import log_path, spawn_process
from agent.native.device import install_driver
from tests.agent.native.fake_driver import FakeDriver


def sizes() -> tuple[int, ...]:
    return tuple(int(size) for size in os.environ["FAKE_CUDA_BYTES"].split(","))


def spawn(config: NodeConfig, role: str) -> int:
    args = [sys.executable, "-m", "tests.agent.fake_cuda", role, "--run-dir", config.run_dir]
    return spawn_process(args, log_path(config, role))


if __name__ == "__main__":
    install_driver(lambda: FakeDriver(sizes()))
    defaults: Any = Agent.__init__.__kwdefaults__
    defaults["spawn"] = spawn
    sys.exit(main())
