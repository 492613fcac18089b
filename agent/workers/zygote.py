"""The zygote: a process that has imported everything a worker or an ingest needs, and forks one in milliseconds.

It has one thread, has touched no device and run no parallel region, since a fork after either may hang. So this module imports
torch only after the environment is set, in `main`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import importlib
import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.channel import Channel
from agent.comm import name_process
from agent.config import NodeConfig, load_config
from agent.logs import OutputFile, begin_log, write_to
from agent.workers.kin import kin_token
from agent.workers.spares import Spares, open_context, wait_as_spare
from schema.errors import Fault, LinkError, SllmError
from schema.link import (
    ChildExited,
    Fork,
    Forked,
    ForkIngest,
    Hello,
    KeepSpares,
    Ping,
    Pong,
    Role,
    Shutdown,
    ToZygote,
    Welcome,
    ZygoteTruth,
)
from schema.version import VERSION

__all__ = ["ENVIRONMENT", "main"]

_SOFTWARE: Final = f"sllmctl-zygote {VERSION}"
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # spinning threads made half-millisecond products take ten on a shared machine
    "TOKENIZERS_PARALLELISM": "false",
}
"""What the zygote and so its children run under; set before torch is imported."""
_ARCHITECTURES: Final = (
    "falcon", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "opt", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""Model families whose code is imported ahead; any other is imported by the worker that needs it, in tenths of a second."""
_IDLE_S: Final = 1.0
_log = logging.getLogger(__name__)


def main(run_dir: str | Path) -> int:
    """Run the zygote of the node whose run directory this is, to its end. Returns the exit code; so do its children."""
    try:
        config = load_config(Path(run_dir))
        token = kin_token(config)
    except SllmError as error:
        sys.stderr.write(f"zygote: {error}\n")
        return 2
    begin_log("zygote", config.log_path / "zygote.log", config)
    lock = os.open(config.lock_path("zygote"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.error("another zygote holds %s; it serves this run directory", config.lock_path("zygote"))
        return 6
    os.environ.update(ENVIRONMENT)
    _import_all()
    from agent.workers.numerics import numerics

    gc.collect()
    gc.freeze()
    return _Zygote(config, token, lock, numerics()).run()


def _import_all() -> None:
    """Everything that a worker or an ingest imports, and what its first model would import lazily."""
    import torch

    torch.set_num_threads(1)
    for name in _ARCHITECTURES:
        with contextlib.suppress(ImportError):  # not every transformers knows every family
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("agent.store.ingest.command")
    importlib.import_module("agent.workers.worker")
    importlib.import_module("agent.workers.rehearsal").rehearse()


def _threads() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Threads:"):
            return int(line.split()[1])
    return 0


class _Zygote:
    """The main loop, woken by the agent's messages and, through a pipe, by signals."""

    def __init__(self, config: NodeConfig, token: str, lock: int, numerics: str) -> None:
        self._config = config
        self._numerics = numerics
        self._lock = lock
        hello = Hello(role=Role.ZYGOTE, software=_SOFTWARE, pid=os.getpid(), token=token)
        self._channel: Channel[ToZygote] = Channel(config.socket_path, hello, ToZygote)
        self._children: set[int] = set()
        self._spares = Spares(self._launch_spare)
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _heard)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        code = 0
        while not self._stopping:
            grace_left_s = self._config.agent_grace_s - self._channel.lost_for_s
            spare_due_s = self._spares.due_s()
            wait_s = _IDLE_S if spare_due_s is None else min(_IDLE_S, spare_due_s)
            for message in self._channel.poll(min(wait_s, max(0.0, grace_left_s)), [self._wake_read]):
                self._handle(message)
            self._reap()
            if not self._stopping:
                self._spares.refill()
            if self._channel.refused:
                _log.error("the agent refuses this zygote: %s", self._channel.last_refusal)
                code = 1
                break
            if not self._channel.connected and self._channel.lost_for_s >= self._config.agent_grace_s:
                _log.warning("no agent for %.0f s", self._channel.lost_for_s)
                break
        self._spares.want(())
        self._channel.close()
        return code

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _handle(self, message: ToZygote) -> None:
        match message:
            case Welcome():
                pids = tuple(sorted(self._children))
                self._channel.send(ZygoteTruth(pids=pids, threads=_threads(), numerics=self._numerics))
            case Fork():
                self._fork(message)
            case ForkIngest():
                self._fork_ingest(message)
            case KeepSpares():
                self._spares.want(message.cuda)
            case Ping():
                self._channel.send(Pong(nonce=message.nonce))
            case Shutdown():
                self._stopping = True
            case _:
                _log.warning("the agent said %s, which says nothing to a zygote", type(message).__name__)

    def _fork(self, fork: Fork) -> None:
        pid = self._spares.take(fork)
        if pid is None:
            began_s = time.monotonic()
            self._launch(fork.nonce, f"the worker of {fork.instance}", lambda: self._work(fork, began_s))
        else:
            self._launched(fork.nonce, pid)

    def _fork_ingest(self, fork: ForkIngest) -> None:
        try:
            (frames,) = self._channel.take_descriptors(1)
        except LinkError as error:
            self._channel.send(Forked(nonce=fork.nonce, fault=Fault.of(error)))
            return
        try:
            self._launch(fork.nonce, f"the ingest {fork.op}", lambda: self._ingest(fork, frames))
        finally:
            os.close(frames)

    def _launch(self, nonce: int, name: str, live: Callable[[], int]) -> None:
        try:
            pid = self._child(name, live)
        except OSError as error:
            self._channel.send(Forked(nonce=nonce, fault=Fault("out_of_space", f"cannot fork {name}: {error.strerror}")))
        else:
            self._launched(nonce, pid)

    def _launched(self, nonce: int, pid: int) -> None:
        self._children.add(pid)
        self._channel.send(Forked(nonce=nonce, pid=pid))

    def _launch_spare(self, device: int, line: socket.socket) -> int:
        def wait() -> int:
            name_process("spare")
            begun = wait_as_spare(line, lambda: open_context(device))
            return self._work(*begun) if begun is not None else 0

        return self._child(f"the spare of device {device}", wait)

    def _child(self, name: str, live: Callable[[], int]) -> int:
        """Fork; the child's life is ``live``, which returns its exit code. Raises OSError."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os._exit(self._live(name, live))
        return pid

    def _live(self, name: str, live: Callable[[], int]) -> int:
        """The child's whole life. It lets go of everything that is the zygote's: lock, link, signals, spares."""
        code = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._channel.abandon()
            for descriptor in (self._lock, self._wake_read, self._wake_write):
                os.close(descriptor)
            self._spares.abandon()
            code = live()
        except BaseException:
            _log.critical("%s failed", name, exc_info=True)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
        return code

    def _work(self, fork: Fork, began_s: float) -> int:
        name_process("worker")
        output = self._begin_log(fork)
        from agent.workers.worker import Worker

        return Worker(self._config, fork, began_s, output).run()

    def _ingest(self, fork: ForkIngest, frames: int) -> int:
        name_process("ingest")
        write_to(self._config.log_path / "ingest.log")
        from agent.store.ingest.command import ingest

        return ingest(self._config.run_dir, fork.op, fork.source, frames)

    def _begin_log(self, fork: Fork) -> OutputFile:
        """A file of the worker's own, for its lines, what libraries print, and the stack of a crash."""
        path = Path(fork.log) if fork.log else self._config.log_path / "zygote.log"
        if fork.log:
            write_to(path)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        faulthandler.enable()
        return begin_log("worker", path, self._config, instance=fork.instance, epoch=fork.epoch)

    def _reap(self) -> None:
        """Say how children ended, as often as one did."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass
        while self._children or self._spares.pids:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._children.clear()
                return
            if pid == 0:
                return
            if self._spares.lost(pid) or pid not in self._children:
                continue
            self._children.discard(pid)
            self._channel.send(ChildExited(pid=pid, status=os.waitstatus_to_exitcode(status)))


def _heard(*_: object) -> None:
    """A signal wakes the loop through its pipe; nothing is done inside the handler."""
