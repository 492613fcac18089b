"""Chat templates from the manager's side: one warm helper process renders them; it is killed when it takes too long."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from schema.errors import InvalidInput, Overloaded, SllmError, Unreachable
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.template_helper import HEADER, Render, Rendered
from sllmctl.procstat import process_stat

__all__ = ["TemplateRenderer"]

_log = logging.getLogger(__name__)
_BUSY = 15
"""A helper that gets no processor is waited for so many times a template's time."""
_UNWATCHED_S = 0.02
"""Nearly every template is done by then. A helper's processor time is read only after it, and what it took until then is not
counted: to read it for all took longer than to render."""
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class TemplateRenderer:
    """Renders chat templates in a helper process, one after another; a helper that fails is replaced at the next call.

    `start` warms it ahead of need; `close` ends it. Both belong to whoever owns the renderer.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._turn = asyncio.Lock()
        self._helper: asyncio.subprocess.Process | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Rendered).decode
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The helper's process id, None when there is none now."""
        return self._helper.pid if self._helper is not None else None

    async def start(self) -> None:
        """Start the helper. Raises Unreachable when it cannot be started."""
        async with self._turn:
            await self._ready()

    async def close(self) -> None:
        """End the helper, and wait until it is gone; nothing is rendered after it."""
        self._closed = True
        async with self._turn:
            await self._kill()

    async def render(self, template: str, variables: dict[str, Any]) -> str:
        """The prompt that ``template`` makes of ``variables``.

        Raises InvalidInput (param ``messages``) when the template refuses them, fails, or takes too long or too much memory;
        Overloaded when too many others are in the queue; Unreachable when the helper cannot be started.
        """
        try:
            async with asyncio.timeout(self._settings.template_queue_timeout_s):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("too many chat templates wait to be rendered; try again", 1.0) from None
        try:
            answer = await self._ask(template, variables)
        finally:
            self._turn.release()
        if answer.error:
            raise InvalidInput(f"the model's chat template failed: {answer.error}", "messages")
        return answer.text

    async def _ask(self, template: str, variables: dict[str, Any]) -> Rendered:
        settings = self._settings
        job = Render(template, variables, math.ceil(settings.template_timeout_s), settings.template_output_bytes)
        helper = await self._ready()
        finished = False
        try:
            answer = await self._in_time(helper, self._exchange(helper, self._encode(job)))
            finished = True
        except TimeoutError:
            raise InvalidInput(
                f"the model's chat template took too long: over {settings.template_timeout_s:g} s", "messages"
            ) from None
        except (OSError, EOFError, msgspec.DecodeError) as error:
            _log.warning("the template helper died over a template: %s", error)
            raise InvalidInput("the model's chat template ended the process that renders it", "messages") from error
        finally:
            # Also when the asker was cancelled in between: an answer that nobody read would be taken for the next one's.
            if not finished:
                await self._kill()
        return answer

    async def _in_time(self, helper: asyncio.subprocess.Process, exchange: Coroutine[Any, Any, Rendered]) -> Rendered:
        """Raises TimeoutError when the helper has used up a template's time, which is its processor's and not the clock's: on a
        busy machine a template that takes a millisecond may come to its turn seconds later. A stopped one is given up, too."""
        limit_s = self._settings.template_timeout_s
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def look(began_s: float | None) -> None:
            nonlocal timer
            left_s = 0.0
            try:
                now_s = process_stat(helper.pid).cpu_s
            except ProcessLookupError:
                return  # it has ended, which the exchange will see
            except OSError as error:
                _log.warning("how long the template helper has run cannot be read now: %s", error)
            else:
                began_s = now_s if began_s is None else began_s
                left_s = limit_s - (now_s - began_s)
                if left_s <= 0:
                    if not deadline.expired():
                        deadline.reschedule(loop.time())
                    return
            timer = loop.call_later(max(left_s, limit_s / 4), look, began_s)

        async with asyncio.timeout(limit_s * _BUSY) as deadline:
            timer = loop.call_later(_UNWATCHED_S, look, None)
            try:
                return await exchange
            finally:
                timer.cancel()

    async def _exchange(self, helper: asyncio.subprocess.Process, body: bytes) -> Rendered:
        assert helper.stdin is not None
        assert helper.stdout is not None
        helper.stdin.write(HEADER.pack(len(body)) + body)
        await helper.stdin.drain()
        (size,) = HEADER.unpack(await helper.stdout.readexactly(HEADER.size))
        # The helper bounds the text; what is longer comes from a helper that a template has taken over.
        if size > self._settings.template_output_bytes + 4096:
            raise EOFError(f"an answer of {size} bytes")
        return self._decode(await helper.stdout.readexactly(size))

    async def _ready(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise SllmError("the template renderer is closed")
        if self._helper is not None and self._helper.returncode is None:
            return self._helper
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            async with asyncio.timeout(self._settings.template_spawn_timeout_s):
                self._helper = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "sllmctl.gateway.template_helper", str(self._settings.template_memory_bytes)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env=environment,
                    # A terminal's interrupt is for the manager, which ends the helper when the last request is done.
                    start_new_session=True,
                )
                assert self._helper.stdout is not None
                await self._helper.stdout.readexactly(HEADER.size)
        except (OSError, EOFError, TimeoutError) as error:
            await self._kill()
            raise Unreachable(f"the chat template helper cannot be started: {error or 'it did not answer in time'}") from error
        except asyncio.CancelledError:
            await self._kill()
            raise
        return self._helper

    async def _kill(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        if helper.returncode is None:
            try:
                helper.kill()
            except ProcessLookupError:
                _log.debug("the template helper was gone already")
        assert helper.stdin is not None
        helper.stdin.close()
        # SIGKILL needs no deadline, and the exit must be taken in before the process object goes.
        await asyncio.shield(helper.wait())
