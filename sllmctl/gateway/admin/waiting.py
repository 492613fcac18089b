"""Answers that are held back until something is as waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Annotated

from msgspec import Meta
from starlette.requests import Request

from sllmctl.config import AdminSettings
from sllmctl.gateway.admin.answers import read_number
from sllmctl.gateway.openapi import Query

__all__ = ["TIMEOUT", "wait"]

TIMEOUT = Query("timeout", Annotated[float, Meta(ge=0)], "Seconds to be held at most; the manager's own limit if not given.")


async def wait(request: Request, query: Mapping[str, str], reached: Callable[[], bool], settings: AdminSettings) -> bool:
    """True once it is as asked for, False when the query's ``timeout`` ran out or the asker has gone; raises InvalidInput."""
    timeout_s = min(read_number(query, "timeout", settings.wait_limit_s), settings.wait_limit_s)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not reached():
        left_s = deadline - loop.time()
        if left_s <= 0 or await request.is_disconnected():
            return False
        await asyncio.sleep(min(settings.wait_look_s, left_s))
    return True
