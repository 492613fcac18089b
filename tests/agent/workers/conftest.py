"""The engine's tests' one thread for torch, for the workers' too."""

from tests.agent.engine.conftest import one_thread

__all__ = ["one_thread"]
