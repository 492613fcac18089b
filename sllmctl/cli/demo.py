"""`sllmctl demo`: a cold start and a warm request, on a manager, a node and a model of their own."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import click

from schema.admin import RequestTimeline
from schema.errors import InvalidInput, SllmError
from schema.spec import ModelSpec, PathSource, ScaleSpec, Source, source_of
from schema.states import InstanceState
from sllmctl import client
from sllmctl.bundled import DOCS_2M
from sllmctl.cli.diagnostics import FAILED, OK, ProgressLine, note, told_beside
from sllmctl.cli.format import duration, size
from sllmctl.cli.output import stream, write
from sllmctl.cli.scratch import ScratchManager
from sllmctl.cli.waiting import Patience, wait_for
from sllmctl.config import ClientSettings, parse_bytes
from sllmctl.inference import ChatOptions, ChatStream, Turn
from sllmctl.nodes.local import need_node_packages

__all__ = ["command", "phases"]

MODEL = "docs"
ARENA_BYTES = 256 << 20
COLD_PROMPT = "What is a cold start?"
WARM_PROMPT = "What happens when a worker is killed?"
MAX_TOKENS = 160
TIMELINE_S = 5.0
"""How long the end of a request may take to be in the manager's own account of it."""
_TICK_S = 0.2


@click.command("demo")
@click.option("--keep", is_flag=True, help="Leave it running, and say what to try next.")
@click.option("--source", metavar="SOURCE", help="A Hugging Face directory, or a hub id, in place of the bundled model.")
@click.option("--arena", metavar="SIZE", help="Memory for weights, as in 4GiB [default: 256MiB].")
def command(keep: bool, source: str | None, arena: str | None) -> int:
    """See the whole path once: ingest, deploy scaled to zero, a cold start in its phases, a warm request.

    All of it runs in a scratch directory and beside whatever else runs here; it is stopped and removed at the end.

    \b
    Examples:
      sllmctl demo --keep
      sllmctl demo --source ./my-model --arena 4GiB
    """
    need_node_packages("the demo")
    try:
        arena_bytes = parse_bytes(arena) if arena else ARENA_BYTES
    except ValueError as error:
        raise InvalidInput(f"--arena: {error}", "arena") from error
    origin = _source(source)
    with _interruptible():
        manager = ScratchManager(arena_bytes)
        left_running = False
        killed: list[int] = []
        try:
            _show(manager, origin)
            left_running = keep
        except SllmError:
            note(f"the manager's log ends:\n{manager.log_end()}")
            raise
        finally:
            if not left_running:
                with ProgressLine() as line:
                    killed = manager.stop(lambda: line.show("stopping", None))
        if left_running:
            _what_next(manager)
        elif killed:
            note(f"had to kill {len(killed)} processes that did not stop by themselves")
            return FAILED
        else:
            write("Stopped; nothing is left running.")
    return OK


def _show(manager: ScratchManager, source: Source) -> None:
    began = time.monotonic()
    with ProgressLine() as line, client.AdminClient(manager.settings.admin_socket, manager.settings.client) as admin:
        manager.start()
        status = manager.wait_ready(
            lambda: admin.ask(client.status()), lambda: line.show("starting a manager and a node", None)
        )
        line.clear()
        write(f"Manager and node: ready after {duration(time.monotonic() - began)}, in {manager.directory}")

        began = time.monotonic()
        admin.ask(client.add_model(ModelSpec(name=MODEL, source=source)))
        model = wait_for(admin, MODEL, "ingested", Patience(manager.settings.client.wait_s))
        assert model is not None
        assert model.digest is not None
        checkpoint = admin.ask(client.checkpoint(model.digest))
        write(
            f"Model {MODEL}: {checkpoint.architecture}, {size(checkpoint.image_bytes)}, "
            f"ingested in {duration(time.monotonic() - began)}"
        )
        admin.ask(client.deploy_model(MODEL, ScaleSpec(min=0, max=1)))
        write("Deployed, scaled to zero: nothing of it runs until a request comes.")

        cold = _chat(status.api_url, COLD_PROMPT, admin, manager.settings.client)
        timeline = _timeline(admin, cold.request_id)
        write(f"\nCold start: first token after {duration(cold.first_token_s or 0.0)}")
        for name, seconds, remark in phases(timeline):
            write(f"  {name:<12}{duration(seconds):>8}  {remark}".rstrip())

        warm = _chat(status.api_url, WARM_PROMPT, admin, manager.settings.client)
        write(f"\nWarm request: first token after {duration(warm.first_token_s or 0.0)}, then {_rate(warm):.0f} tokens/s")


def _chat(api_url: str, prompt: str, admin: client.AdminClient, settings: ClientSettings) -> ChatStream:
    """Send one chat request and print its answer as it comes; returns the reply, measured."""
    write(f"\n> {prompt}")
    options = ChatOptions(max_tokens=MAX_TOKENS, temperature=0)
    with ChatStream(api_url, MODEL, [Turn("user", prompt)], options, settings) as reply, _ticking(admin) as came:
        for text in reply:
            came()
            stream(text)
    write("")
    return reply


def _ticking(admin: client.AdminClient) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Show beside a waiting request how far its instance has come, until the function it gives is called."""

    def tick(line: ProgressLine) -> None:
        try:
            starting = [item for item in admin.ask(client.instances()) if item.state is not InstanceState.READY]
        except SllmError:
            return  # the request itself says what is wrong with the manager
        line.show("waiting for the first token", starting[0].progress if starting else None)

    return told_beside(tick)


def _rate(reply: ChatStream) -> float:
    """Tokens per second after the first."""
    span_s = (reply.total_s or 0.0) - (reply.first_token_s or 0.0)
    return (reply.generated_tokens - 1) / span_s if span_s > 0 else 0.0


def _timeline(admin: client.AdminClient, request: str) -> RequestTimeline:
    """Where the request's time went, once its end is known to the manager."""
    deadline = time.monotonic() + TIMELINE_S
    while True:
        timeline = admin.ask(client.request(request)).timeline
        if (timeline.ended_s is not None and timeline.engine is not None) or time.monotonic() > deadline:
            return timeline
        time.sleep(_TICK_S / 10)


def phases(timeline: RequestTimeline) -> list[tuple[str, float, str]]:
    """Name, seconds and a remark of each phase of a cold start that is known. Pure."""
    rows: list[tuple[str, float, str]] = []
    start, engine = timeline.start, timeline.engine
    if start is not None:
        if timeline.routed_s is not None:
            rows.append(("queue", max(0.0, timeline.routed_s - start.total_s), "before the start began and after it ended"))
        source = f"{size(start.loaded_bytes)} from {start.loaded_from}" if start.loaded_from else "the weights were there"
        rows.append(("load", start.load_s, source))
        parts = (("fork", start.fork_s), ("build", start.build_s), ("attach", start.attach_s), ("warm", start.warm_s))
        detail = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts)
        rows.append(("worker", sum(seconds for _, seconds in parts), f"{detail}; beside the load"))
    if engine is not None:
        if engine.weights_s > 0:
            rows.append(("weights", engine.weights_s, "the end of the load, which the prefill had to wait for"))
        rows.append(("prefill", engine.prefill_s, ""))
    if timeline.first_token_s is not None:
        rows.append(("first token", timeline.first_token_s, "at the gateway, since the request came in"))
    return rows


def _source(text: str | None) -> Source:
    """What --source means; a path need not be absolute here."""
    if text is None:
        return PathSource(str(DOCS_2M))
    if Path(text).is_dir():
        return PathSource(str(Path(text).absolute()))
    source = source_of(text)
    if source is None:
        raise InvalidInput(f"--source: {text} is neither a directory here nor a hub id (organisation/name)", "source")
    return source


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """End on SIGTERM and SIGHUP as on Ctrl-C: by unwinding, so that nothing is left running."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _what_next(manager: ScratchManager) -> None:
    """Say how to go on with what --keep has left running, and how to end it."""
    with client.AdminClient(manager.settings.admin_socket, manager.settings.client) as admin:
        api_url = admin.ask(client.status()).api_url
    program = f"{_program()} --config {manager.config}"
    write(
        f"""
It goes on serving at {api_url}. Try:
  {program} model ls
  {program} chat -m {MODEL} "What is a tier?"
  {program} instance ls
  {program} event ls
  curl {api_url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
Stop it:
  kill {manager.pid}; tail --pid={manager.pid} -f /dev/null; rm -r {manager.directory}"""
    )


def _program() -> str:
    """How the user can call this program again."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m sllmctl"
    found = shutil.which(called.name)
    if found is not None and Path(found).resolve() == called.resolve():
        return called.name
    return shlex.quote(str(called))
