"""Makes loading-optimised checkpoints of Hugging Face models, in a child process of the agent's."""

from __future__ import annotations

from agent.store.ingest.command import main

__all__ = ["main"]
