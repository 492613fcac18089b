"""The library of compiled code: few_tokens.c and paged_attention.c, which say what they are for.

It is compiled where the package is built, on x86-64 and if there is gcc. Without it torch computes the same, in more time.
"""

from __future__ import annotations

import ctypes
import sysconfig
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["library"]

_INTERFACE: Final = 2
"""Of the library, as compiled.h counts it."""
_BUILT: Final = Path(__file__).with_name(f"_compiled{sysconfig.get_config_var('EXT_SUFFIX')}")


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not compiled, or by another version. torch must have been imported: without the OpenMP library that it
    loads, whose threads share the work, it is None, too."""
    try:
        compiled = ctypes.CDLL(str(_BUILT))
    except OSError:
        return None
    if not hasattr(compiled, "sllm_interface") or compiled.sllm_interface() != _INTERFACE:
        return None
    long, integer, pointer = ctypes.c_long, ctypes.c_int, ctypes.c_void_p
    compiled.sllm_few_tokens.argtypes = (
        integer, pointer, long, long, pointer, long, pointer, long, integer, integer,
    )  # fmt: skip
    compiled.sllm_attend.argtypes = (pointer, integer, integer)
    return compiled
