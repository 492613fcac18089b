"""What the bits that an engine computes here depend on, as one short string: nodes that say the same compute the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from agent.native import few_tokens, paged_attention
from schema.version import VERSION

__all__ = ["numerics"]

_CPUINFO: Final = Path("/proc/cpuinfo")
_ARITHMETIC: Final = ("amx", "asimd", "avx", "bf16", "f16c", "fma", "sve")
"""How the names of instructions begin that products, sums and exponentials are made of."""


def numerics(cpuinfo: Path = _CPUINFO) -> str:
    """The code that computes (ours, transformers', torch's, and which of ours is compiled and can run here), and the processor
    as the libraries under torch choose their kernels by it. torch must have been imported.

    A device of another kind than a processor computes by its own name beside this, and so does a number of threads.
    """
    import torch
    import transformers

    built = f" cuda {torch.version.cuda}" if torch.version.cuda else ""
    here = [*few_tokens.ways(), *paged_attention.widths()]
    compiled = "+".join(one.name.lower() for one in here if one.name) or "none"
    return (
        f"sllmctl {VERSION}, torch {torch.__version__}{built}, transformers {transformers.__version__}, "
        f"compiled {compiled}, {torch.backends.cpu.get_cpu_capability()} on {_processor(cpuinfo)}"
    )


def _processor(cpuinfo: Path) -> str:
    """Its maker and kind, and a digest of the instructions that it has for arithmetic."""
    said: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            said.setdefault(name.strip(), value.strip())
    except OSError:
        return "an unknown processor"
    kind = [said.get(name, "?") for name in ("vendor_id", "cpu family", "model")]
    if "vendor_id" not in said:  # as on ARM
        kind = [said.get(name, "?") for name in ("CPU implementer", "CPU part", "CPU variant")]
    flags = sorted(each for each in said.get("flags", said.get("Features", "")).split() if each.startswith(_ARITHMETIC))
    return f"{'/'.join(kind)}-{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:8]}"
