"""What every benchmark prints: the machine, then rows of medians and ratios; and the same as JSON where asked."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Report", "commit", "machine"]


class Report:
    """Rows of (figure, median, smallest, largest, unit), printed as they come and kept for the JSON file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[dict[str, object]] = []
        self.machine = f"{_cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
        print(f"# {title}\n# {self.machine}", flush=True)

    def row(self, figure: str, values: Sequence[float], unit: str, aim: str = "") -> float:
        """Print one figure with its spread; returns the median."""
        median = statistics.median(values)
        row = {"figure": figure, "median": median, "min": min(values), "max": max(values), "n": len(values), "unit": unit}
        self.rows.append(row | ({"aim": aim} if aim else {}))
        spread = f"[{min(values):.4g} .. {max(values):.4g}, n={len(values)}]"
        print(f"{figure:<58} {median:>10.4g} {unit:<6} {spread:<34} {aim}", flush=True)
        return median

    def note(self, text: str) -> None:
        self.rows.append({"note": text})
        print(f"# {text}", flush=True)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": self.title, "machine": self.machine, "rows": self.rows}, indent=1) + "\n")
        print(f"# written to {path}", file=sys.stderr)


def machine() -> str:
    """The processor, its cores, the kernel and Python, on one line."""
    return f"{_cpu_name()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def commit() -> str:
    """What is measured, as git names it."""
    root = Path(__file__).parent.parent
    answer = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
