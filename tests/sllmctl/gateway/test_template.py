"""Chat templates in the helper process: what they mean, what they may not do, and what happens to the process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest

from schema.errors import InvalidInput, Overloaded, SllmError, Unreachable
from sllmctl.gateway import template
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.template import TemplateRenderer
from sllmctl.procstat import ProcessStat, process_stat
from tests.checkpoints import CHAT_TEMPLATE


@contextlib.asynccontextmanager
async def _renderer(**values: Any) -> AsyncIterator[TemplateRenderer]:
    # Only a test of the timeout has a short one: a busy machine may take its time.
    renderer = TemplateRenderer(GatewaySettings(**{"template_timeout_s": 60.0, **values}))
    await renderer.start()
    try:
        yield renderer
    finally:
        await renderer.close()
        assert renderer.pid is None


_HI = {"messages": [{"role": "user", "content": "hi"}], "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


async def test_a_usual_template_is_rendered_as_transformers_renders_it() -> None:
    async with _renderer() as renderer:
        text = await renderer.render(CHAT_TEMPLATE, _HI)
    assert text == "<s><|turn|>user\nhi</s>\n<|turn|>assistant\n"


_DIALECT = (
    ("a\n{% if true %}\nb\n    {% endif %}\nc", "a\nb\nc"),  # trim_blocks and lstrip_blocks
    ("{% for i in 'abc' %}{% if i == 'a' %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "b"),
    ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
    ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
    ("{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}{{ ns.n }}", "7"),
    ("{{ messages[0]['content'].upper() }}{{ unknown }}{{ tools is defined }}", "HIFalse"),
    ("{{ dict(a=1).items() | list }}", "[('a', 1)]"),
)


async def test_the_dialect_of_chat_templates() -> None:
    async with _renderer() as renderer:
        for template, text in _DIALECT:
            assert await renderer.render(template, _HI) == text, template


async def test_the_date_is_known() -> None:
    async with _renderer() as renderer:
        before = datetime.now().strftime("%Y-%m-%d")
        assert before <= await renderer.render("{{ strftime_now('%Y-%m-%d') }}", {}) <= datetime.now().strftime("%Y-%m-%d")


_FORBIDDEN = (
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for %}", "Expected"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "sandbox"),
    ("{{ raise_exception.__globals__.os }}", "sandbox"),
    ("{% set _ = messages.append(1) %}", "sandbox"),
    ("{{ dict.__globals__.os }}", "sandbox"),
    ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "sandbox"),
    ("{{ namespace(__init__=1) }}", "sandbox"),
    ("{% include '/etc/passwd' %}", "loader"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 'x' * 20_000_000 }}", "bytes of text"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurs"),
)


async def test_what_a_template_may_not_do_is_an_error_of_that_request_only() -> None:
    async with _renderer() as renderer:
        pid = renderer.pid
        for template, why in _FORBIDDEN:
            with pytest.raises(InvalidInput, match=why) as caught:
                await renderer.render(template, _HI)
            assert caught.value.param == "messages"
            assert await renderer.render("{{ 1 + 1 }}", {}) == "2"
            assert renderer.pid == pid


async def test_the_insides_of_the_interpreter_are_not_there() -> None:
    async with _renderer() as renderer:
        for template in (
            "{{ raise_exception.__globals__ }}",
            "{{ '{0.__class__}'.format(1) }}",
            "{{ 'x'.format.__self__ }}",
            "{{ dict.__base__ }}",
        ):
            assert await renderer.render(template, _HI) == "", template


async def test_a_template_that_loops_is_killed_and_the_next_one_is_served() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with _renderer(template_timeout_s=2.0) as renderer:
        pid = renderer.pid
        assert pid is not None
        with pytest.raises(InvalidInput, match="took too long"):
            await renderer.render(loop, {})
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert await renderer.render("{{ 1 + 1 }}", {}) == "2"
        assert renderer.pid not in (pid, None)


async def test_a_helper_that_has_no_processor_is_waited_for() -> None:
    async with _renderer(template_timeout_s=1.0) as renderer:
        pid = renderer.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        task = asyncio.create_task(renderer.render("{{ 1 + 1 }}", {}))
        await asyncio.wait([task], timeout=1.5)
        os.kill(pid, signal.SIGCONT)
        assert await task == "2"


async def test_a_helper_that_never_goes_on_is_given_up() -> None:
    async with _renderer(template_timeout_s=0.01) as renderer:
        assert renderer.pid is not None
        os.kill(renderer.pid, signal.SIGSTOP)
        with pytest.raises(InvalidInput, match="took too long"):
            await renderer.render("{{ 1 }}", {})


async def test_a_helper_that_cannot_be_looked_at_for_a_moment_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _renderer(template_timeout_s=1.0) as renderer:
        pid = renderer.pid
        assert pid is not None
        usual = process_stat(pid)
        full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        says: list[ProcessStat | OSError] = [full, usual, full, usual._replace(cpu_s=usual.cpu_s + 1.5)]

        def told(_: int) -> ProcessStat:
            said = says.pop(0)
            if isinstance(said, OSError):
                raise said
            return said

        monkeypatch.setattr(template, "process_stat", told)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(InvalidInput, match="took too long"):
            await renderer.render("{{ 1 }}", {})
    assert not says, "it was given up by the clock, which a busy machine must not decide by"


@pytest.mark.slow
async def test_a_template_that_takes_gigabytes_gets_an_error() -> None:
    async with _renderer(template_memory_bytes=256 << 20) as renderer:
        for template in ("{{ 'x' * 10_000_000_000 }}", "{{ ('x' * 200_000_000) ~ ('y' * 200_000_000) }}"):
            with pytest.raises(InvalidInput, match="memory"):
                await renderer.render(template, {})
        assert await renderer.render("{{ 1 + 1 }}", {}) == "2"


async def test_a_helper_that_was_killed_is_replaced() -> None:
    async with _renderer() as renderer:
        assert renderer.pid is not None
        os.kill(renderer.pid, 9)
        with contextlib.suppress(InvalidInput):  # the kill may be seen at the first rendering or before it
            await renderer.render("{{ 1 }}", {})
        assert await renderer.render("{{ 1 + 1 }}", {}) == "2"


async def test_an_asker_that_goes_away_leaves_no_answer_for_the_next() -> None:
    async with _renderer() as renderer:
        task = asyncio.create_task(renderer.render("{% for a in range(90000) %}{% endfor %}mine", {}))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await renderer.render("yours", {}) == "yours"


async def test_many_at_once_each_get_their_own() -> None:
    async with _renderer() as renderer:
        texts = await asyncio.gather(*(renderer.render("{{ n }}", {"n": n}) for n in range(100)))
    assert texts == [str(n) for n in range(100)]


async def test_a_full_queue_is_overloaded() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with _renderer(template_queue_timeout_s=0.05) as renderer:
        first = asyncio.create_task(renderer.render(loop, {}))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await renderer.render("{{ 1 }}", {})
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_after_the_close_nothing_is_started() -> None:
    renderer = TemplateRenderer(GatewaySettings())
    await renderer.close()
    with pytest.raises(SllmError, match="closed"):
        await renderer.render("{{ 1 }}", {})
    assert renderer.pid is None


async def test_a_helper_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(Unreachable, match="template helper"):
        await TemplateRenderer(GatewaySettings()).start()


async def test_a_quick_rendering_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def spared(*_: object, **__: object) -> Any:
        raise AssertionError("it costs more than the rendering itself")

    async with _renderer() as renderer:
        monkeypatch.setattr(template, "_UNWATCHED_S", 60.0)
        monkeypatch.setattr(template, "process_stat", spared)
        asyncio.get_running_loop().set_task_factory(spared)
        try:
            assert await renderer.render("{{ 1 + 1 }}", {}) == "2"
        finally:
            asyncio.get_running_loop().set_task_factory(None)


async def test_a_rendering_costs_little() -> None:
    async with _renderer() as renderer:
        pid = renderer.pid
        assert pid is not None
        await renderer.render(CHAT_TEMPLATE, _HI)
        began = time.process_time() + process_stat(pid).cpu_s
        for _ in range(200):
            await renderer.render(CHAT_TEMPLATE, _HI)
        # Well under 1 ms of a processor each; a template that is parsed anew takes several.
        assert time.process_time() + process_stat(pid).cpu_s - began < 200 * 0.005
        assert renderer.pid == pid
