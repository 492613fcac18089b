"""Zygote and workers as real processes, driven by an agent written in the test."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from agent.store.layers import Layers
from agent.workers.numerics import numerics
from schema.checkpoint import LAYOUT
from schema.ids import Epoch
from schema.link import (
    Acked,
    AttemptTruth,
    Cancel,
    ChildExited,
    Committing,
    Forked,
    ForkIngest,
    FrameDecoder,
    InstanceLoad,
    InstanceUpdate,
    LayersArrived,
    OperationDone,
    Ping,
    Pong,
    Progress,
    Role,
    Shutdown,
    StopInstance,
    Tokens,
    TruthEnd,
    WorkerTruth,
    ZygoteTruth,
)
from schema.spec import PathSource, Source, UrlSource
from schema.states import EndReason, InstanceState
from tests.agent.engine.models import submit_of
from tests.agent.workers.fake_agent import DIGEST, LONG, Heard, Node, Peer, alive, await_gone, node
from tests.checkpoints import make_llama_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # of which most is the import of torch

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def here() -> Iterator[Node]:
    with node() as made:
        yield made


def expected(model: Any, count: int, prompt: list[int] = PROMPT) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def ready(here: Node, worker: Peer) -> InstanceUpdate:
    here.begin(worker)
    here.attach(worker)
    update = worker.expect(InstanceUpdate)
    assert update.truth.state is InstanceState.READY, update.truth.fault
    return update


def state(worker: Peer) -> tuple[WorkerTruth, dict[int, AttemptTruth]]:
    truth = worker.expect(WorkerTruth)
    attempts: dict[int, AttemptTruth] = {}
    while isinstance(message := worker.next(), AttemptTruth):
        attempts[message.submit.attempt] = message
    assert isinstance(message, TruthEnd)
    assert message.attempts == len(attempts)
    return truth, attempts


def test_fork_serve_reconnect_cancel_and_stop(here: Node) -> None:
    process, zygote, truth = here.zygote()
    assert (truth.pids, truth.threads) == ((), 1)
    assert f"torch {torch.__version__}" in truth.numerics
    assert truth.numerics == numerics(), "a process that has imported the same says the same"
    zygote.send(Ping(nonce=7))
    assert zygote.expect(Pong).nonce == 7
    pid, worker = here.fork(zygote)
    assert os.getsid(pid) == os.getpgid(pid) == pid
    names = {each: Path(f"/proc/{each}/comm").read_text().strip() for each in (process.pid, pid)}
    assert names == {process.pid: "sllm-zygote", pid: "sllm-worker"}
    opened = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert not any(path.endswith("zygote.lock") for path in opened)
    assert sum("socket:" in path for path in opened) == 1

    worker.send(submit_of(50, PROMPT))  # too early: nothing is ready
    early = worker.expect(Tokens)
    assert [(end.attempt, end.reason, end.position) for end in early.ends] == [(50, EndReason.LOST, 0)]
    worker.send(Acked(frame=early.frame, ends=(Epoch(50),)))

    update = ready(here, worker).truth
    assert (update.instance, update.epoch, update.digest, update.pid) == ("i", 1, DIGEST, pid)
    assert update.kv_capacity_tokens > 1000
    assert update.max_context_tokens == LONG
    assert update.phases is not None
    assert 0 < update.phases.build_s < update.phases.total_s
    assert min(update.phases.fork_s, update.phases.attach_s, update.phases.warm_s) > 0
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert any("memfd:arena" in line and " r--s " in line for line in maps.splitlines())

    # Tokens, in frames that count from 1 and without a gap.
    heard = Heard()
    worker.send(*(submit_of(i, PROMPT[:i], 12) for i in (1, 2, 3, 8)))
    heard.until_ended(worker, 1, 2, 3, 8)
    for i in (1, 2, 3, 8):
        assert heard.tokens[i] == expected(here.model, 12, PROMPT[:i])
        assert heard.ends[i].reason is EndReason.LENGTH
    worker.send(Acked(frame=9, ends=(Epoch(1), Epoch(2))))

    # A known attempt is ignored, a lost connection mended: the truth has everything not acknowledged, to the last token.
    worker.send(submit_of(20, PROMPT, 200))
    heard.take(worker.expect(Tokens))
    worker.close()
    worker, hello = here.accept(Role.WORKER)
    assert hello.pid == pid
    stated, attempts = state(worker)
    assert stated.truth is not None
    assert stated.truth.state is InstanceState.READY
    assert stated.start is not None
    assert (stated.start.digest, stated.arena, len(stated.extents)) == (DIGEST, "a", 2)
    assert set(attempts) == {3, 8, 20}
    assert list(attempts[3].new_ids) == heard.tokens[3]
    assert attempts[3].end == heard.ends[3]
    again = Heard()
    for attempt in attempts.values():
        again.state(attempt)
    worker.send(submit_of(20, PROMPT, 5), Acked(frame=0, ends=(Epoch(3), Epoch(8))))
    again.until_ended(worker, 20)
    assert again.tokens[20] == expected(here.model, 200)

    # A cancel ends its attempt within two steps of the engine.
    worker.send(submit_of(21, PROMPT, LONG - 8))
    while not again.tokens.get(21):
        again.take(worker.expect(Tokens))
    worker.send(Cancel(attempt=Epoch(21)), Cancel(attempt=Epoch(99)))
    again.until_ended(worker, 21)
    assert again.ends[21].reason is EndReason.CANCELLED
    assert again.ends[21].timing is not None
    assert again.tokens[21][:240] == expected(here.model, 240)[: len(again.tokens[21])]

    # Stopping: what runs has its grace, what comes then is lost.
    worker.send(submit_of(30, PROMPT, 40))
    worker.send(StopInstance(instance="i", epoch=Epoch(1), grace_s=300.0), submit_of(31, PROMPT, 4))
    again.until_ended(worker, 30, 31)
    assert again.ends[30].reason is EndReason.LENGTH
    assert again.ends[31].reason is EndReason.LOST
    worker.expect_closed()
    exited = zygote.expect(ChildExited)
    assert (exited.pid, exited.status) == (pid, 0)

    # A second life of the same instance, killed: the zygote says by what.
    other, worker = here.fork(zygote, epoch=2)
    worker.send(Ping(nonce=1))
    assert worker.expect(Pong).nonce == 1
    os.kill(other, signal.SIGKILL)
    exited = zygote.expect(ChildExited)
    assert (exited.pid, exited.status) == (other, -9)

    # Children outlive their zygote, whose lock is free with its end.
    third, worker = here.fork(zygote, epoch=3)
    zygote.send(Shutdown())
    assert process.wait(60) == 0
    assert alive(third)
    worker.send(Ping(nonce=2))
    assert worker.expect(Pong).nonce == 2
    successor, zygote, truth = here.zygote()
    assert truth.pids == ()
    worker.send(Shutdown())
    await_gone(third)
    zygote.close()
    zygote, _ = here.accept(Role.ZYGOTE)
    assert zygote.expect(ZygoteTruth).threads == 1
    os.kill(successor.pid, signal.SIGTERM)
    assert successor.wait(60) == 0


def test_a_checkpoint_is_found_where_its_fetch_has_moved_it(here: Node) -> None:
    _, zygote, _ = here.zygote()
    partial = here.config.checkpoints_path.parent / "partial"
    partial.mkdir()
    for directories in ((str(partial), f"{DIGEST}/l1"), (f"{DIGEST}/l1", str(partial / "later"))):
        _, worker = here.fork(zygote)
        here.begin(worker, *directories)
        here.attach(worker)
        assert worker.expect(InstanceUpdate).truth.state is InstanceState.READY
        worker.send(Shutdown())
    _, worker = here.fork(zygote)
    here.begin(worker, str(partial), "nowhere/l1")
    truth = worker.expect(InstanceUpdate).truth
    assert truth.fault is not None
    assert f"cannot read the manifest {partial}" in truth.fault.message


def coming(here: Node, zygote: Peer, layers: int) -> tuple[int, Peer, int]:
    """A worker that serves over memory to which so many layers have come; the rest of it is NaNs."""
    pid, worker = here.fork(zygote)
    image, memory = here.image(), os.memfd_create("coming")
    os.pwrite(memory, b"\xff" * len(image), 0)
    os.pwrite(memory, image[: Layers(here.manifest).ends[layers - 1] if layers else 0], 0)
    here.begin(worker)
    here.arrive(worker, memory, layers)
    update = worker.expect(InstanceUpdate).truth
    assert (update.state, update.phases) == (InstanceState.READY, None)
    return pid, worker, memory


def test_a_request_is_computed_while_its_weights_come(here: Node) -> None:
    _, zygote, _ = here.zygote()
    _, worker, memory = coming(here, zygote, 0)
    image = here.image()
    worker.send(submit_of(1, PROMPT, 12), submit_of(2, PROMPT[:3], 4))
    load = worker.expect(InstanceLoad)
    assert load.running + load.waiting > 0
    for layers, end in enumerate(Layers(here.manifest).ends, 1):
        os.pwrite(memory, image[:end], 0)
        worker.send(LayersArrived(op="o", layers=layers), Ping(nonce=layers))
        assert worker.expect(Pong).nonce == layers  # within its first step
    os.pwrite(memory, image, 0)
    worker.send(Cancel(attempt=Epoch(2)))  # heard when the step is over
    here.attach(worker)
    update = worker.expect(InstanceUpdate).truth
    assert update.phases is not None
    assert update.phases.total_s > 0
    os.close(memory)
    heard = Heard()
    heard.until_ended(worker, 1, 2)
    timing = heard.ends[1].timing
    assert timing is not None
    assert timing.weights_s > 0
    assert timing.queued_s + timing.weights_s + timing.prefill_s == pytest.approx(timing.first_token_s)
    assert heard.tokens[1] == expected(here.model, 12)
    assert heard.ends[2].reason is EndReason.CANCELLED
    assert heard.tokens.get(2, []) == expected(here.model, 4, PROMPT[:3])[: len(heard.tokens.get(2, []))]
    worker.close()
    worker, _ = here.accept(Role.WORKER)
    assert state(worker)[0].arena == "a"

    # A store that was restarted begins anew elsewhere; the old memory may hold something else by then, and is not read again.
    pid, worker, memory = coming(here, zygote, 1)
    worker.send(submit_of(1, PROMPT, 12), Ping(nonce=1))
    assert worker.expect(Pong).nonce == 1
    assert "memfd:coming" in Path(f"/proc/{pid}/maps").read_text()
    other = os.memfd_create("other")
    os.pwrite(other, b"\xff" * here.manifest.image_bytes, 0)
    worker.send(Ping(nonce=2))
    here.arrive(worker, other, 0)
    os.close(memory)
    os.close(other)
    here.attach(worker)
    heard = Heard()
    heard.until_ended(worker, 1)
    assert heard.tokens[1] == expected(here.model, 12)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "memfd:coming" not in maps
    assert "memfd:other" not in maps

    # Weights of which the last bytes never come: the worker can be stopped, and has told no token.
    pid, worker, memory = coming(here, zygote, 2)
    os.close(memory)
    worker.send(submit_of(1, PROMPT, 12), Ping(nonce=1))
    assert worker.expect(Pong).nonce == 1
    worker.send(StopInstance(instance="i", epoch=Epoch(1)))
    told = worker.expect(Tokens)
    assert (told.runs, [(end.attempt, end.reason) for end in told.ends]) == ((), [(1, EndReason.LOST)])
    while (exited := zygote.expect(ChildExited)).pid != pid:
        pass
    assert exited.status == 0
    worker.expect_closed()


def test_modules_of_transformers_are_computed_while_their_weights_come() -> None:
    with node(model="gpt2") as here:
        _, zygote, _ = here.zygote()
        _, worker, memory = coming(here, zygote, 0)
        worker.send(submit_of(1, PROMPT, 12))
        for layers, end in enumerate(Layers(here.manifest).ends, 1):
            os.pwrite(memory, here.image()[:end], 0)
            worker.send(LayersArrived(op="o", layers=layers), Ping(nonce=layers))
            assert worker.expect(Pong).nonce == layers
        os.pwrite(memory, here.image(), 0)
        here.attach(worker)
        os.close(memory)
        heard = Heard()
        heard.until_ended(worker, 1)
        assert heard.tokens[1] == expected(here.model, 12)
        assert heard.ends[1].timing.weights_s > 0


def test_what_cannot_start_says_why_and_ends(here: Node) -> None:
    _, zygote, _ = here.zygote()

    def fault_of(worker: Peer) -> tuple[str, str]:
        truth = worker.expect(InstanceUpdate).truth
        assert truth.state is InstanceState.STOPPED
        assert truth.fault is not None
        worker.expect_closed()
        assert zygote.expect(ChildExited).status == 1
        return truth.fault.code, truth.fault.message

    _, worker = here.fork(zygote)
    here.begin(worker, "nowhere")
    code, message = fault_of(worker)
    assert code == "not_found"
    assert "nowhere" in message

    _, worker = here.fork(zygote)
    here.begin(worker, digest="cd" * 32)
    assert fault_of(worker)[0] == "invalid_checkpoint"

    _, worker = here.fork(zygote)
    here.begin(worker, kv_bytes=10)
    here.attach(worker)
    assert fault_of(worker)[0] == "out_of_space"

    _, worker = here.fork(zygote)
    here.begin(worker, kv_bytes=1 << 50)  # more than any machine has
    here.attach(worker)
    assert fault_of(worker)[0] == "out_of_space"

    _, worker = here.fork(zygote)
    here.begin(worker)
    here.attach(worker, image_bytes=4096)
    assert fault_of(worker)[0] == "invalid_checkpoint"

    # Of another copy, which says nothing of this one: the next start may find the two together.
    _, worker = here.fork(zygote)
    here.begin(worker)
    here.attach(worker, image_bytes=4096, image_id="9" * 32)
    assert fault_of(worker)[0] == "conflict"

    _, worker, memory = coming(here, zygote, 0)
    os.close(memory)
    here.attach(worker, image_id="9" * 32)
    assert fault_of(worker)[0] == "conflict"

    # Stopped while it still waits for its weights.
    pid, worker = here.fork(zygote)
    here.begin(worker)
    worker.send(StopInstance(instance="i", epoch=Epoch(1), grace_s=30.0))
    worker.expect_closed()
    exited = zygote.expect(ChildExited)
    assert (exited.pid, exited.status) == (pid, 0)


def test_grace_that_runs_out_ends_the_rest_as_lost(here: Node) -> None:
    _, zygote, _ = here.zygote()
    pid, worker = here.fork(zygote)
    ready(here, worker)
    heard = Heard()
    worker.send(submit_of(1, PROMPT, LONG - 8), *(submit_of(i, PROMPT, 248) for i in range(2, 65)))
    heard.take(worker.expect(Tokens))
    load: InstanceLoad | None = None
    while load is None or not load.running:
        if isinstance(message := worker.next(), InstanceLoad):
            load = message
        else:
            heard.take(message)
    assert load.kv_used_tokens >= 16 * load.running
    worker.send(StopInstance(instance="i", epoch=Epoch(9), grace_s=0.0))  # of another life: not for this one
    heard.take(worker.expect(Tokens))
    worker.send(StopInstance(instance="i", epoch=Epoch(1), grace_s=0.0))
    heard.until_ended(worker, *range(1, 65))
    assert heard.ends[1].reason is EndReason.LOST
    reasons = {end.reason for end in heard.ends.values()}
    assert reasons <= {EndReason.LOST, EndReason.LENGTH}, "a fast worker may have ended others before it heard of the stop"
    assert zygote.expect(ChildExited).status == 0
    await_gone(pid)


def fork_ingest(zygote: Peer, op: str, source: Source) -> tuple[int, int]:
    """The pid of an ingest's child, and the end of the pipe that it writes to."""
    reading, frames = os.pipe()
    zygote.send(ForkIngest(nonce=5, op=op, source=source), descriptors=(frames,))
    os.close(frames)
    forked = zygote.expect(Forked)
    assert (forked.nonce, forked.fault) == (5, None)
    return forked.pid, reading


def test_an_ingest_is_forked(here: Node, tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "source")
    here.config.log_path.mkdir(parents=True)
    _, zygote, _ = here.zygote()
    decoder: FrameDecoder[Any] = FrameDecoder(Progress | Committing | OperationDone)
    for op, path, code in (("op_1", source, 0), ("op_2", tmp_path / "not there", 1)):
        pid, reading = fork_ingest(zygote, op, PathSource(str(path)))
        with os.fdopen(reading, "rb") as pipe:
            *steps, ended = decoder.feed(pipe.read())
        assert {step.op for step in steps} <= {op}
        assert (ended.op, ended.fault is None) == (op, code == 0), ended
        assert zygote.expect(ChildExited) == ChildExited(pid=pid, status=code)
        assert (here.config.checkpoints_path / ended.digest / LAYOUT).is_dir() or code
    assert "not there" in ended.fault.message


def test_a_forked_ingest_holds_nothing_of_the_zygotes_and_can_be_killed(here: Node) -> None:
    here.config.log_path.mkdir(parents=True)
    process, zygote, _ = here.zygote()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # whoever downloads from it waits
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/model"
        pid, reading = fork_ingest(zygote, "op_1", UrlSource(url))
        silent.settimeout(60)
        with silent.accept()[0] as line:
            assert line.recv(1)  # it has asked, and waits
            ours, its = ({str(entry.readlink()) for entry in Path(f"/proc/{each}/fd").iterdir()} for each in (process.pid, pid))
            assert not {path for path in ours & its if path.startswith(("socket:", "pipe:")) or path.endswith(".lock")}
            assert os.getsid(pid) == pid
            os.kill(pid, signal.SIGKILL)
            assert zygote.expect(ChildExited) == ChildExited(pid=pid, status=-signal.SIGKILL)
            with os.fdopen(reading, "rb") as pipe:
                assert not FrameDecoder[Any](OperationDone).feed(pipe.read()), "nobody else holds the pipe"


def test_without_an_agent_what_runs_is_finished_and_all_end_after_their_grace() -> None:
    with node(agent_grace_s=10.0) as here:  # which is also what this test has to welcome each of them
        process, zygote, _ = here.zygote()
        pid, worker = here.fork(zygote)
        ready(here, worker)
        worker.send(submit_of(1, PROMPT, 240))
        worker.expect(Tokens)
        here.deaf()
        zygote.close()
        worker.close()
        assert process.wait(60) == 0
        await_gone(pid)


def test_a_refused_zygote_and_a_second_one_end(here: Node) -> None:
    process, zygote, _ = here.zygote()
    assert here.start_zygote().wait(60) == 6
    zygote.close()
    here.accept(Role.ZYGOTE, refuse=True)
    assert process.wait(60) == 1


def test_a_refused_worker_ends(here: Node) -> None:
    _, zygote, _ = here.zygote()
    pid, worker = here.fork(zygote)
    worker.close()
    here.accept(Role.WORKER, refuse=True)
    exited = zygote.expect(ChildExited)
    assert (exited.pid, exited.status) == (pid, 1)


def test_a_run_directory_without_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agent.workers.zygote import main

    assert main(tmp_path) == 2
    assert "cannot read the node's settings" in capsys.readouterr().err


def test_a_submit_for_another_life_is_left_alone(here: Node) -> None:
    _, zygote, _ = here.zygote()
    _, worker = here.fork(zygote)
    ready(here, worker)
    stray = submit_of(1, PROMPT, 4)
    worker.send(msgspec.structs.replace(stray, attempt=Epoch(2), instance_epoch=Epoch(8)), stray)
    heard = Heard()
    heard.until_ended(worker, 1)
    assert set(heard.tokens) == {1}
