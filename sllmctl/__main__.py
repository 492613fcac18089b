"""`python -m sllmctl`: the same as the `sllmctl` on PATH."""

from __future__ import annotations

import sys

from sllmctl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
