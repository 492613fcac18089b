"""A node whose disk gives no more than a test allows: ``python -m tests.agent.gated_disk``, else as ``python -m agent``.

The file ``gate`` in the run directory says how many units of each load may be read; without it all may.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent.__main__ import main
from agent.config import NodeConfig
from agent.daemon.agent import Agent
from agent.daemon.supervisor import log_path, spawn_process
from agent.native.reader import ReadJob, ReadPool, Unit


def gate(pool: type[ReadPool], path: Path) -> None:
    """Let pools hand on the units of a job as the gate opens."""
    submit = pool.submit

    def allowed() -> int:
        try:
            return int(path.read_text() or 0)
        except FileNotFoundError:
            return sys.maxsize

    def gated(self: ReadPool, units: Sequence[Unit], changed: Callable[[ReadJob], None], **more: Any) -> ReadJob:
        job = submit(self, (), changed, **more | {"last": False})

        def feed() -> None:
            for number, unit in enumerate(units):
                while allowed() <= number and not job.finished:
                    time.sleep(0.005)
                self.feed(job, (unit,), last=number == len(units) - 1)

        threading.Thread(target=feed, daemon=True).start()
        return job

    pool.submit = gated  # type: ignore[method-assign, assignment]


def spawn(config: NodeConfig, role: str) -> int:
    args = [sys.executable, "-m", "tests.agent.gated_disk", role, "--run-dir", config.run_dir]
    return spawn_process(args, log_path(config, role))


if __name__ == "__main__":
    if sys.argv[1] == "store":
        gate(ReadPool, Path(sys.argv[3]) / "gate")
    defaults: Any = Agent.__init__.__kwdefaults__
    defaults["spawn"] = spawn
    sys.exit(main())
