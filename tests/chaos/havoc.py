"""What the chaos tests are made of: kills at random points of what clients have read, drawn from a seed that is printed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.cluster import Cluster
from tests.e2e.talk import Endless, client

__all__ = ["NODE_ROLES", "PROMPTS", "Havoc", "hear_out", "kill", "new_seed", "undisturbed"]

NODE_ROLES = ("worker", "store", "zygote", "agent")
PROMPTS = ("sllmctl is", "A worker is", "The store owns", "When the agent is killed,")


def new_seed() -> int:
    """``CHAOS_SEED`` where it is set, to walk the same way again; printed, so that a failure shows it."""
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"CHAOS_SEED={seed}")
    return seed


def kill(cluster: Cluster, role: str) -> bool:
    """kill -9 whatever runs in a role now; False when nothing does. A roster may be out of date while its agent is dead, so
    only processes that are this cluster's are touched."""
    ours = set(cluster.processes())
    pids = [pid for name, pid in cluster.roster().items() if name.partition(":")[0] == role and pid in ours]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def hear_out(cluster: Cluster, prompt: str, read: Callable[[int], None] = lambda count: None) -> str:
    """The whole text of one greedy stream; ``read`` is told how many characters came."""
    with client(cluster) as api, Endless(api, prompt=prompt, max_tokens=400) as stream:
        while piece := stream.token():
            read(len(piece))
        return stream.text


def undisturbed(cluster: Cluster) -> dict[str, str]:
    """What each prompt's stream says when nothing happens to it."""
    texts = {prompt: hear_out(cluster, prompt) for prompt in PROMPTS}
    assert min(len(text) for text in texts.values()) > 200, "the streams are long enough to be disturbed"
    return texts


@dataclass
class Havoc:
    """Calls ``strike`` once for each of ``points``, when so many characters have been read by all streams together."""

    points: list[int]
    strike: Callable[[int], None]
    read_chars: int = 0
    errors: list[BaseException] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, count: int) -> None:
        with self._lock:
            self.read_chars += count
            while self.points and self.points[0] <= self.read_chars:
                self.strike(self.points.pop(0))

    def run(self, work: Callable[[str], None], prompts: list[str], timeout_s: float) -> None:
        """Do the work for all prompts at once; the first error is raised, and AssertionError for one that hangs."""

        def guarded(prompt: str) -> None:
            try:
                work(prompt)
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=guarded, args=(prompt,), name=prompt, daemon=True) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
        if self.errors:
            raise self.errors[0]
        assert not (hung := [thread.name for thread in threads if thread.is_alive()]), f"no end within {timeout_s} s: {hung}"
