"""The model that comes with sllmctl, so that the demo and the tests need no hub. Its card is docs-2m/README.md."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DOCS_2M"]

DOCS_2M = Path(__file__).resolve().parent / "docs-2m"
"""A Hugging Face directory: a decoder of 1.9 million parameters, trained on sllmctl's documentation."""
