"""A process that behaves as an agent towards its manager: lock, roster, socket, truth, Shutdown. Run by the tests alone.

``--deaf``: Shutdown is not obeyed. ``--kin``: a child of its own stands in the roster.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

from schema.link import Ping, Pong, Shutdown
from tests.sllmctl.nodes.fake_agent import fake_agent


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


async def serve(run_dir: Path, deaf: bool) -> None:
    async with fake_agent(run_dir / "agent.sock") as agent:
        while True:
            peer = await agent.link()
            try:
                while True:
                    message = await peer.hear()
                    if isinstance(message, Ping):
                        peer.say(Pong(nonce=message.nonce))
                    if isinstance(message, Shutdown) and not deaf:
                        return
            except (EOFError, ConnectionError):
                continue


def main() -> int:
    config = json.loads(sys.argv[sys.argv.index("--config-json") + 1])
    print("started with", sys.argv[1:], flush=True)
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / "agent.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    processes = [{"role": "agent", "pid": os.getpid(), "ticks": start_ticks(os.getpid())}]
    if "--kin" in sys.argv:
        kin = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=True)
        processes.append({"role": "store", "pid": kin.pid, "ticks": start_ticks(kin.pid), "nonce": 1})
        # A pid that was written down for a process which is gone, and belongs to another now.
        processes.append({"role": "worker", "pid": os.getppid(), "ticks": 1})
    (run_dir / "roster.json").write_text(json.dumps({"processes": processes}))
    asyncio.run(serve(run_dir, "--deaf" in sys.argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
