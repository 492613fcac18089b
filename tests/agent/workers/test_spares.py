"""Spare workers: who is kept ready for which device, and that each becomes one worker or ends. No device is needed."""

from __future__ import annotations

import os
import socket
from typing import Any

from agent.workers.spares import Spares, wait_as_spare
from schema.ids import Epoch
from schema.link import Fork


class _Zygote:
    """Launches no processes, but keeps what each would have been given: (pid, device, its end of the line)."""

    def __init__(self) -> None:
        self.now = 100.0
        self.launched: list[tuple[int, int, socket.socket]] = []
        self.full = False
        self.spares = Spares(self._launch, lambda: self.now)

    def _launch(self, device: int, line: socket.socket) -> int:
        if self.full:
            raise OSError("no more processes")
        self.launched.append((len(self.launched) + 1, device, line.dup()))
        return len(self.launched)

    def refill(self) -> list[int]:
        before = len(self.launched)
        while self.spares.due_s() == 0.0:
            self.spares.refill()
        return [device for _, device, _ in self.launched[before:]]

    def close(self) -> None:
        self.spares.want(())
        for _, _, line in self.launched:
            line.close()


def fork_of(*cuda: int) -> Fork:
    return Fork(instance="i", epoch=Epoch(1), nonce=7, cuda=cuda)


def told(line: socket.socket, opened: list[Any]) -> Any:
    return wait_as_spare(line, lambda: opened.append("opened"))


def test_a_spare_waits_for_each_device_becomes_what_it_is_told_and_is_replaced_later() -> None:
    zygote = _Zygote()
    assert zygote.refill() == []
    zygote.spares.want((0, 1))
    assert zygote.refill() == [0, 1]
    assert zygote.spares.pids == {1, 2}
    assert zygote.spares.take(fork_of(1)) == 2
    opened: list[str] = []
    found = told(zygote.launched[1][2], opened)
    assert (found[0], opened) == (fork_of(1), ["opened"])
    assert zygote.spares.take(fork_of(1)) is None, "there is none for that device"
    assert zygote.spares.take(fork_of()) is None, "it needs no context"
    assert zygote.spares.take(fork_of(0, 1)) is None, "one spare has one context"
    assert not zygote.spares.lost(2), "it is a worker now"
    assert zygote.refill() == [], "the start has the machine for itself"
    zygote.now += 2.0
    assert zygote.refill() == [1]
    zygote.close()


def test_spares_end_with_the_zygote_and_with_their_device() -> None:
    zygote = _Zygote()
    zygote.spares.want((0, 1))
    zygote.refill()
    zygote.spares.want((1,))
    assert told(zygote.launched[0][2], []) is None
    zygote.spares.abandon()  # as a child does, and as the system does for a zygote that was killed
    assert told(zygote.launched[1][2], []) is None
    zygote.close()


def test_where_no_context_can_be_had_it_is_tried_again_later() -> None:
    zygote = _Zygote()
    zygote.spares.want((0,))
    zygote.refill()
    zygote.launched[0][2].close()
    assert zygote.spares.take(fork_of(0)) is None, "it has just ended"
    zygote.now += 2.0
    assert zygote.refill() == [0]
    assert zygote.spares.lost(2)
    assert zygote.refill() == []
    zygote.now += 60.0
    zygote.full = True
    assert zygote.refill() == []
    zygote.full = False
    zygote.now += 60.0
    assert zygote.refill() == [0]
    zygote.close()


def test_a_real_child_is_told_over_its_line_and_ends_where_the_line_does() -> None:
    children: list[int] = []

    def launch(device: int, line: socket.socket) -> int:
        pid = os.fork()
        if pid == 0:
            spares.abandon()
            found = wait_as_spare(line, lambda: None)
            os._exit(3 if found is None else found[0].nonce)
        children.append(pid)
        return pid

    spares = Spares(launch)
    spares.want((0, 1))
    spares.refill()
    spares.refill()
    assert spares.take(fork_of(0)) == children[0]
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
    spares.want(())
    assert os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1]) == 3
